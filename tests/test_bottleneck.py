"""Notebook 01's views: pure functions, tested without widgets on a tiny model."""

from __future__ import annotations

import pytest
import torch

from labkit.measure import roofline
from labkit.progress import listen
from labkit.quantize import RTN
from labkit.ui.lessons import bottleneck
from labkit.ui.worker import Latest

ROOF = roofline.Roofline("test", 10e9, {"fp32": 80e9}, "modelled", reads={"a": 10e9}, sizes={"fp32": 1024})


@pytest.fixture
def bench(tiny_lm):
    small = RTN(bits=4, group_size=16)(tiny_lm, progress=False)
    return bottleneck.Bench({"fp32": tiny_lm, "4-bit": small}, ROOF, rounds=2)


def test_a_worker_and_the_cell_below_may_ask_for_the_same_pass(bench):
    """The worker holds the lock of all measurements and asks the bench; the cell asks the bench, which measures."""
    bench.forget()
    worker, found = Latest(wait=0.0), []
    for batch in (3, 5, 6):
        worker.submit(lambda batch=batch: bench.passes("decode", batch), found.append, found.append)
        mine = bench.passes("decode", batch)
        assert worker.join(120), "neither waits for the other forever"
        assert found.pop() is mine


def test_a_decode_step_always_finds_the_same_cache(each_family):
    lm, seen = each_family, []
    forward = lm.model.forward

    def spy(*args, **kwargs):
        if (cache := kwargs.get("past_key_values")) is not None:
            seen.append((cache.get_seq_length(), args[0].shape))
        return forward(*args, **kwargs)

    lm.model.forward = spy
    step = bottleneck.decode_step(lm, batch=3, context=5)
    for _ in range(4):
        step()
    assert seen[-4:] == [(5, torch.Size([3, 1]))] * 4


def test_passes_are_timed_once_and_remembered(bench):
    assert bench.untimed("decode", 2)
    first = bench.passes("decode", 2)
    assert not bench.untimed("decode", 2) and bench.passes("decode", 2) is first
    dense, packed = first.values()
    assert dense.seconds > 0 and dense.ratio == 1 and packed.ratio > 0
    assert dense.tokens == 2 and bench.passes("prefill", 2)["fp32"].tokens == 2 * bottleneck.PROMPT
    assert dense.rate == 2 / dense.seconds and dense.speed == dense.work.flops / dense.seconds
    assert packed.work.bytes < dense.work.bytes and packed.work.flops == dense.work.flops
    assert packed.work.intensity > dense.work.intensity
    assert dense.least == ROOF.seconds(dense.work, "fp32")


def test_timing_reports_progress_and_can_be_cancelled(bench):
    from labkit.progress import Cancelled

    def stop(what, done, total):
        assert what == "timing" and total >= 2
        raise Cancelled

    with listen(stop), pytest.raises(Cancelled):
        bench.passes("decode", 4)
    assert bench.untimed("decode", 4)  # nothing half-measured is kept
    assert bench.passes("decode", 4)


def test_bad_input_is_refused(bench):
    with pytest.raises(ValueError, match="phase = 'encode' is not allowed: it must be one of decode, prefill"):
        bench.passes("encode", 1)
    with pytest.raises(ValueError, match="at least one model"):
        bottleneck.Bench({}, ROOF)
    with pytest.raises(ValueError, match="machine = 'H1000' is not in the catalogue: H100 SXM"):
        bottleneck.elsewhere("H1000", 4, 1)


def test_the_view_has_measured_dots_and_modelled_places_and_says_so(bench):
    bench.passes("decode", 1)
    figure, text = bench.view("decode", 2)
    named = {trace.name: trace for trace in figure.data}
    assert {"fp32, measured", "4-bit, measured", "at best (modelled)", "measured before"} <= set(named)
    now = bench.passes("decode", 2)
    assert named["fp32, measured"].x[0] == now["fp32"].work.intensity
    assert named["fp32, measured"].y[0] == pytest.approx(now["fp32"].speed / 1e9)
    for x, y in zip(named["at best (modelled)"].x, named["at best (modelled)"].y):
        assert y == pytest.approx(ROOF.attainable(x, "fp32") / 1e9)  # on the roof
    assert len(named["measured before"].x) == 2  # both models at batch 1
    assert text.startswith("Decode, batch 2: fp32 takes ") and "where the roof is memory-bound" in text
    assert "as fast as fp32 (measured); the roof would allow" in text


def test_a_dot_over_the_roof_is_explained():
    work = roofline.Work(1e9, 1e9)
    over = bottleneck.Pass("fp32", "decode", 1, work, seconds=0.05, ratio=1.0, least=0.1)
    under = bottleneck.Pass("fp32", "decode", 1, work, seconds=0.2, ratio=1.0, least=0.1)
    assert "refresh=True" in bottleneck.sentence(ROOF, "fp32", [over])
    assert "refresh=True" not in bottleneck.sentence(ROOF, "fp32", [under])
    assert "reaches 50 % of it" in bottleneck.sentence(ROOF, "fp32", [under])


def test_times_that_others_spoiled_are_told_and_can_be_forgotten(bench):
    quiet = bottleneck.Pass("fp32", "decode", 1, roofline.Work(1e9, 1e9), seconds=0.2, ratio=1.0, least=0.1)
    busy = bottleneck.Pass("fp32", "decode", 1, quiet.work, seconds=0.2, ratio=1.0, least=0.1, others=0.5)
    assert "Other programs took 50 % of the cores" in bottleneck.sentence(ROOF, "fp32", [busy])
    assert "Other programs" not in bottleneck.sentence(ROOF, "fp32", [quiet])
    first = bench.passes("decode", 1)
    assert 0 <= first["fp32"].others <= 1
    bench.forget()
    assert bench.untimed("decode", 1) and bench.passes("decode", 1) is not first


def test_the_sweep_and_its_table(bench):
    figure = bench.sweep([1, 2])
    names = [trace.name for trace in figure.data]
    assert names == ["fp32, measured", "4-bit, measured", "fp32, at best (modelled)", "4-bit, at best (modelled)"]
    assert list(figure.data[0].y) == [bench.passes("decode", b)["fp32"].rate for b in (1, 2)]
    table = bench.ratios([1, 2])
    assert [row[0] for row in table.rows] == ["1", "2"] and len(table.rows[0]) == len(table.head) == 6
    assert table.rows[0][-1].endswith("x") and "modelled" in table.caption
    assert "<th>4-bit, ms</th>" in table._repr_html_() and "4-bit, ms" in str(table)


def test_intensities_count_the_packed_bits_and_the_whole_output_layer(bench):
    table = bottleneck.intensities(bench.models, batches=(1,), prompt=64)
    assert [row[:2] for row in table.rows] == [
        ("decode, batch 1", "fp32"),
        ("decode, batch 1", "4-bit"),
        ("prefill, 64 tokens", "fp32"),
        ("prefill, 64 tokens", "4-bit"),
    ]
    lm = bench.models["fp32"]
    linears = sum(m.weight.numel() for m in lm.model.model.layers.modules() if isinstance(m, torch.nn.Linear))
    head = lm.model.get_output_embeddings().weight.numel()
    dense, packed = (bottleneck.work_of(m, "decode", 1) for m in bench.models.values())
    from labkit.measure.memory import bits_per_weight

    saved = linears * (4 - bits_per_weight(bench.models["4-bit"]) / 8)
    assert dense.bytes - packed.bytes == pytest.approx(saved)
    assert dense.bytes > 4 * (linears + head)


def test_llama_70b_has_70_billion_weights():
    assert bottleneck.weight_bytes(8) == pytest.approx(70.55e9, rel=0.001)  # the paper: 70B; the model card: 70.6B


def test_a_70b_model_elsewhere():
    figure, text = bottleneck.elsewhere("H100 SXM", 4, 1)
    assert "(modelled)" in text and "fit into its 80 GB" in text and "memory-bound" in text
    assert 90 < 1 / bottleneck.step_seconds(roofline.catalogue()["H100 SXM"], 4) < 97  # 3.35 TB/s over 35 GB
    assert "do not fit into its 80 GB" in bottleneck.elsewhere("H100 SXM", 16, 1)[1]
    assert "compute-bound" in bottleneck.elsewhere("H100 SXM", 4, 1024)[1]
    assert figure.data[0].name and len(str(figure.to_json())) < 40_000
    for name in roofline.catalogue():  # a machine without a published peak too
        assert "memory-bound" in bottleneck.elsewhere(name, 4, 1)[1]


def test_bars_are_missing_where_the_weights_do_not_fit():
    figure = bottleneck.catalogue_bars()
    bars = {trace.name: dict(zip(trace.x, trace.y)) for trace in figure.data}
    assert "H100 SXM" in bars["4 bits"] and "H100 SXM" not in bars["16 bits"]
    assert bars["4 bits"]["MI300X"] == pytest.approx(4 * bars["16 bits"]["MI300X"], rel=0.05)
    assert not any("Raspberry Pi 5" in row for row in bars.values())


def test_a_remembered_setting_is_shown_at_once():
    from labkit.ui import plots
    from labkit.ui.explore import explore

    known, calls = {1: "one"}, []

    def compute(n):
        calls.append(n)
        known[n] = f"number {n}"
        return plots.lines({"a": ([1, 2], [n, n])}, "x", "y"), known[n]

    box = explore(compute, slow=lambda n: n not in known, n=[1, 2])
    assert box.text == "number 1" and calls == [1]  # before the cell ended, without a worker
    box.controls["n"].value = 2
    assert box.worker.join(10) and box.text == "number 2"
    box.controls["n"].value = 1
    assert not box.worker.busy and box.text == "number 1"
