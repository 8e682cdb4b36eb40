"""The parts of a decode step: they sum to it, are never negative, and the bytes are those that are held."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny

import labkit
from labkit.measure import breakdown, roofline
from labkit.measure.breakdown import EAGER, GRAPH, Step
from labkit.quantize import RTN
from labkit.ui.lessons import milliseconds

ROOF = roofline.Roofline("test", 10e9, {"fp32": 80e9}, "modelled", reads={"a": 10e9}, sizes={"fp32": 1024})
SECONDS = st.floats(1e-7, 10, allow_nan=False)


@pytest.fixture(scope="module")
def models():
    lm = tiny()
    return {"fp32": lm, "4-bit": RTN(bits=4, group_size=16)(lm, progress=False)}


@pytest.fixture(scope="module")
def steps(models):
    return breakdown.decode(models, ROOF, rounds=2, tokens=2)


# ---------------------------------------------------------------------------------------------- the parts


@given(seconds=SECONDS, hollow=SECONDS, nbytes=st.integers(0, 10**12), bandwidth=st.floats(1e8, 1e13))
def test_parts_are_not_negative_and_sum_to_the_step(seconds, hollow, nbytes, bandwidth):
    s = Step("a", EAGER, seconds, hollow, nbytes, bandwidth)
    parts = (s.reading, s.kernels, s.framework)
    assert min(parts) >= 0
    assert math.isclose(math.fsum(parts), seconds, rel_tol=1e-12)
    assert s.cut == (nbytes / bandwidth + hollow > seconds)
    if not s.cut:
        assert s.framework == hollow and s.reading == pytest.approx(nbytes / bandwidth, rel=1e-9, abs=1e-15 * seconds)
    assert s.most_gain >= 1


def test_a_step_by_hand():
    s = Step("fp32", EAGER, seconds=0.050, hollow=0.010, nbytes=300_000_000, bandwidth=10e9)
    assert s.reading == pytest.approx(0.030) and s.framework == 0.010 and s.kernels == pytest.approx(0.010)
    assert s.most_gain == pytest.approx(5) and not s.cut
    busy = Step("fp32", EAGER, seconds=0.050, hollow=0.030, nbytes=300_000_000, bandwidth=10e9)
    assert busy.cut and busy.framework == 0.030 and busy.reading == pytest.approx(0.020) and busy.kernels == 0


def test_every_model_is_timed_both_ways(steps):
    pytest.importorskip("onnxruntime")
    assert [(s.model, s.way) for s in steps] == [(m, w) for w in (EAGER, GRAPH) for m in ("fp32", "4-bit")]
    assert all(s.seconds > 0 and s.hollow > 0 and s.bandwidth == 10e9 for s in steps)


def test_graphs_can_be_left_out(models):
    found = breakdown.decode(models, ROOF, rounds=1, tokens=1, graphs=["4-bit"])
    assert [(s.model, s.way) for s in found][:2] == [("fp32", EAGER), ("4-bit", EAGER)]
    assert ("fp32", GRAPH) not in [(s.model, s.way) for s in found]
    text = milliseconds.sentence([*SHOWN[:2], SHOWN[3]])
    assert "As one graph, 4-bit reads" not in text and "One graph in place of 4-bit's many operators" in text
    with pytest.raises(ValueError, match="graphs = .* is not allowed: '3-bit' is not one of fp32, 4-bit"):
        breakdown.decode(models, ROOF, graphs=["3-bit"])


def test_bytes_are_those_that_are_held(models, steps):
    layers = [m for m in models["fp32"].model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    weights, head = sum(m.weight.numel() for m in layers), models["fp32"].model.lm_head.weight.numel()
    eager = {s.model: s.nbytes for s in steps if s.way == EAGER}
    assert eager["fp32"] == 4 * (weights + head)
    # Codes of 4 bits; for each 16 weights of a row a scale and a sum, fp32, and a zero point of 4 bits.
    zeros = sum(m.out_features * math.ceil(m.in_features / 16 / 2) for m in layers)
    packed = weights // 2 + weights // 16 * 8 + zeros
    assert eager["4-bit"] == packed + 4 * head
    norms = sum(p.numel() for n, p in models["fp32"].model.named_parameters() if "norm" in n)
    graphs = {s.model: s.nbytes for s in steps if s.way == GRAPH}
    for (
        name,
        nbytes,
    ) in graphs.items():  # the same, the norms, and in each of the two blocks where gate and up are split
        assert nbytes == eager[name] + 4 * norms + 2 * 16


def test_kernels_are_let_go_of_and_come_back():
    lm = RTN(bits=4, group_size=16)(tiny(), progress=False)
    layer, x = lm.model.model.layers[0].mlp.up_proj, torch.randn(1, 64)
    y, held = layer(x), layer.runtime_nbytes
    breakdown.release(lm)
    assert held > 0 and layer.runtime_nbytes == 0
    assert torch.equal(layer(x), y) and layer.runtime_nbytes == held


def test_without_a_kernel_the_stored_bytes_count():
    lm = RTN(bits=3, group_size=16)(tiny(), progress=False)
    stored = sum(m.stored_nbytes for m in lm.model.modules() if hasattr(m, "stored_nbytes"))
    assert breakdown.token_bytes(lm) == stored + 4 * lm.model.lm_head.weight.numel()


# ---------------------------------------------------------------------------------------------- the hollow twin


def test_a_hollow_twin_has_every_layer_and_next_to_no_weights(each_family):
    packed = RTN(bits=4, group_size=16)(each_family, progress=False)
    before = torch.get_rng_state()
    for lm in (each_family, packed):
        twin = breakdown.hollow(lm)
        names = [(n, type(m)) for n, m in lm.model.named_modules()]
        assert [(n, type(m)) for n, m in twin.model.named_modules()] == names
        assert breakdown.token_bytes(twin) < breakdown.token_bytes(lm)
        with torch.inference_mode():
            assert twin.model(torch.zeros(1, 3, dtype=torch.long)).logits.isfinite().all()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_layer_that_cannot_be_repeated_is_named():
    lm = labkit.SmoothQuant()(tiny(), torch.arange(64)[None] % 96, progress=False)
    with pytest.raises(ValueError, match="W8A8Linear cannot be made small"):
        breakdown.hollow(lm)
    with pytest.raises(ValueError, match="at least one model"):
        breakdown.decode({}, ROOF)


# ---------------------------------------------------------------------------------------------- the view

SHOWN = [
    Step("fp32", EAGER, 0.060, 0.012, 400_000_000, 10e9),
    Step("4-bit", EAGER, 0.030, 0.0125, 160_000_000, 10e9),
    Step("fp32", GRAPH, 0.045, 0.001, 400_000_000, 10e9),
    Step("4-bit", GRAPH, 0.018, 0.001, 160_000_000, 10e9),
]


def test_the_bars_are_the_parts():
    figure = milliseconds.figure(SHOWN)
    assert figure.layout.barmode == "stack" and [t.name for t in figure.data] == list(milliseconds.PARTS.values())
    for i, s in enumerate(SHOWN):
        assert [t.y[i] for t in figure.data] == pytest.approx([1e3 * getattr(s, part) for part in milliseconds.PARTS])
        assert figure.layout.annotations[i].y == 1e3 * s.seconds
    assert list(figure.data[0].x) == ["fp32, eager", "4-bit, eager", "fp32, one graph", "4-bit, one graph"]


def test_the_sentence_tells_what_changed_and_what_did_not():
    text = milliseconds.sentence(SHOWN)
    assert "Eagerly, 4-bit reads 40 % of fp32's bytes: reading and kernels go from 48.0 ms to 17.5 ms" in text
    assert "the framework stays at about 12.5 ms" in text
    assert "One graph in place of fp32's many operators: the framework goes from 12.0 ms to 1.00 ms." in text
    assert "takes 20 % of fp32's eager step." in text and "cut to fit" not in text
    slower = [SHOWN[0], Step("4-bit", EAGER, 0.030, 0.018, 160_000_000, 10e9)]
    assert "the framework goes from 12.0 ms to 18.0 ms" in milliseconds.sentence(slower)
    assert "cut to fit" in milliseconds.sentence(slower)
    assert "graph" not in milliseconds.sentence(slower)


def test_the_table_has_the_same_numbers():
    table = milliseconds.table(SHOWN)
    assert table.rows[0] == ("fp32, eager", "400", "40.0", "8.00", "12.0", "60.0", "16.7")
    assert len(table.head) == 7 and "10.0 GB/s" in table.caption


def test_it_is_shown_without_scripts(monkeypatch):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda data, raw: shown.append(data))
    milliseconds.show(SHOWN)
    assert "<svg" in shown[0]["image/svg+xml"] and "<table>" in shown[1]["text/html"]
    assert "image/svg+xml" not in shown[1] and "4-bit, one graph" in shown[1]["text/plain"]
