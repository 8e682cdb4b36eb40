"""What a Measurement says: which tokens are scored, of which arithmetic, against what, and how many bytes are held."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

import labkit
from labkit import H2O, KIVI, RTN, RecentKV, Recipe, Scissorhands, SnapKV, StreamingLLM
from labkit.measure import compiled, memory, quality
from labkit.measure.reading import Reading

POLICIES = [
    SnapKV(budget=16, window=8),
    H2O(budget=16),
    Scissorhands(budget=16),
    StreamingLLM(budget=16),
    RecentKV(budget=16),
]


def windows(count=2, length=64, seed=0):
    return torch.randint(0, 96, (count, length), generator=torch.Generator().manual_seed(seed))


def by_hand(lm, reference, ids, prompt, step=16):
    """Mean KL of the tokens after the prompt, from two passes through the cache written out here, in float64."""
    found = []
    for one in ids:
        logits, cache = [], None
        for part in (one[:prompt], *one[prompt:].split(step)):
            out = lm.model(part[None], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits[0])
        mine = torch.cat(logits)[prompt:-1].double().log_softmax(-1)
        theirs = reference.model(one[None]).logits[0, prompt:-1].double().log_softmax(-1)
        found.append((theirs.exp() * (theirs - mine)).sum(-1).mean().item())
    return found


@pytest.mark.parametrize("method", POLICIES, ids=lambda m: type(m).__name__)
@torch.inference_mode()
def test_a_policy_is_scored_on_what_is_read_under_it_alone(tiny_lm, method):
    small, ids = method(tiny_lm, progress=False), windows()
    found = quality(small, ids, tiny_lm, progress=False)
    assert found.tokens == 2 * (64 - 1 - 32)
    assert found.per_window["kl"] == pytest.approx(by_hand(small, tiny_lm, ids, 32), rel=1e-3)
    assert min(found.per_window["kl"]) > 0
    more = quality(small, ids, tiny_lm, progress=False, prompt=40)
    assert more.tokens == 2 * (64 - 1 - 40)
    assert more.per_window["kl"] == pytest.approx(by_hand(small, tiny_lm, ids, 40), rel=1e-3)


def test_what_it_is_compared_with_is_scored_on_the_same_tokens(tiny_lm):
    ids = windows()
    half = quality(tiny_lm, ids, progress=False, prompt=32)
    logits = torch.stack([tiny_lm.model(one[None]).logits[0, 32:-1] for one in ids]).double().log_softmax(-1)
    expected = -logits.gather(2, ids[:, 33:, None]).mean((1, 2))
    assert half.per_window["nll"] == pytest.approx(expected.tolist(), rel=1e-5)
    assert half.perplexity == pytest.approx(expected.mean().exp().item(), rel=1e-5)


@pytest.mark.parametrize(
    "method", [SnapKV(), H2O(), SnapKV(budget=32, window=8), KIVI(residual=64), SnapKV(share=1.0)], ids=repr
)
def test_a_text_too_short_for_a_policy_is_refused(tiny_lm, method):
    small = method(tiny_lm, progress=False)
    with pytest.raises(ValueError, match=rf"{type(method).__name__}\(.*prompt of 32.*longer windows"):
        quality(small, windows(), tiny_lm, progress=False)


def test_a_method_that_is_told_to_lose_nothing_is_not_refused(tiny_lm):
    for cls in (SnapKV, H2O, KIVI):
        same = cls(**cls.lossless)(tiny_lm, progress=False)
        assert quality(same, windows(), tiny_lm, progress=False).kl == pytest.approx(0, abs=1e-6)


def test_a_reference_under_a_cache_method_is_read_through_its_cache(tiny_lm):
    small = SnapKV(budget=16, window=8)(tiny_lm, progress=False)
    assert quality(small, windows(), small, progress=False).kl == pytest.approx(0, abs=1e-9)


def test_readings(tiny_lm):
    assert Reading.of(tiny_lm) == Reading(8, min(512, tiny_lm.model.config.max_position_embeddings))
    room = tiny_lm.model.config.max_position_embeddings
    long = Reading(4, min(1024, room), min(1024, room) // 2)
    assert Reading.of(tiny_lm, SnapKV()) == long
    assert Reading.of(tiny_lm, Recipe(RTN(), KIVI())) == long
    assert Reading.of(SnapKV()(tiny_lm, progress=False)) == long
    assert Reading.of(tiny_lm, SnapKV(), 2, 64, 8) == Reading(2, 64, 8)
    ids = windows()
    hashes = {Reading(2, 64, prompt).fingerprint(ids) for prompt in (0, 1, 32)}
    assert len(hashes) == 3
    for bad in (-1, 63, 1.5, True, "8"):
        with pytest.raises(ValueError, match="prompt = .* from 0 to 62"):
            Reading(2, 64, bad)


CACHES = [
    *POLICIES,
    KIVI(bits=2, group_size=16, residual=32),
    Recipe(SnapKV(budget=64, window=8), KIVI(bits=4, group_size=16, residual=32)),
]


@pytest.mark.parametrize("method", CACHES, ids=repr)
def test_cache_bytes_are_what_its_tensors_hold_at_the_stated_length(tiny_lm, method):
    small = method(tiny_lm, progress=False)
    held, tokens = memory.kv_bytes(small, 100)
    assert tokens == 100
    ids = torch.arange(tokens)[None] * 7 % 96
    layers = small.model(ids, use_cache=True).past_key_values.layers
    expected = sum(t.numel() * t.element_size() for layer in layers for t in layer.held())
    assert held == pytest.approx(expected, rel=0.02)
    assert held < memory.kv_bytes(tiny_lm, 100)[0]


def test_the_cache_is_weighed_at_a_length_that_the_model_has(tiny_lm):
    room = tiny_lm.model.config.max_position_embeddings
    assert memory.kv_bytes(tiny_lm, 10 * room)[1] == room


# ---- as it runs


QUICK = {"windows": 2, "length": 48, "texts": ("prose",), "progress": False}


def test_kl_as_run_is_the_graphs_and_not_below_that_of_the_weights(short_lm):
    small = RTN(bits=8, group_size=32)(short_lm, progress=False)
    found = labkit.measure(small, short_lm, latency=False, **QUICK).quality["prose"]
    ids = labkit.text.evaluation(short_lm, 2, 48, "prose")
    graph = labkit.compile(small)
    theirs = torch.cat([short_lm.model(one[None]).logits for one in ids])[:, :-1].double().log_softmax(-1)
    mine = torch.cat([graph.logits(one[None]) for one in ids])[:, :-1].double().log_softmax(-1)
    expected = (theirs.exp() * (theirs - mine)).sum(-1).mean(1)
    assert found.per_window["kl_run"] == pytest.approx(
        expected.tolist(), rel=0.05
    )  # read in parts, sums in another order
    assert found.kl_run > found.kl > 0


def test_the_uncompressed_graph_has_a_kl_of_its_own(short_lm):
    found = labkit.measure(short_lm, latency=False, **QUICK).quality["prose"]
    assert found.kl is None and 0 < found.kl_run < 0.1


def test_a_graph_reads_a_text_in_parts_as_it_does_at_once(short_lm):
    graph, ids = labkit.compile(short_lm), windows(1, 50)
    apart = torch.cat(list(graph.read(ids, step=16)), 1)
    assert torch.allclose(apart, graph.logits(ids), atol=0.05, rtol=0.01)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (RTN(format="nf4"), "nf4"),
        (RTN(format="fp8_e4m3"), "fp8_e4m3"),
        (labkit.SmoothQuant(), "W8A8Linear"),
        (labkit.Magnitude(), "SparseLinear"),
    ],
    ids=repr,
)
def test_no_engine_for_weights_that_it_does_not_read_packed(short_lm, method, said):
    calib = labkit.text.evaluation(short_lm, 1, 32, "prose")
    found = labkit.measure(method(short_lm, calib, progress=False), short_lm, **QUICK)
    assert found.engine is None and found.memory.engine is None and found.quality["prose"].kl_run is None
    assert any(said in note and "dense fp32" in note for note in found.notes)
    assert found.latency is not None


def test_every_shipped_linear_of_a_kept_graph_is_read_packed(short_lm):
    for method in (RTN(bits=2), RTN(bits=3), RTN(bits=4), RTN(bits=8), labkit.HQQ(bits=4)):
        small = method(short_lm, progress=False)
        graph, notes = compiled(small)
        assert graph is not None and not any("dense" in note for note in notes)
        assert graph.parts["blocks"] < 0.7 * memory.held(short_lm.model.model.layers)


def test_times_are_paired_with_the_same_way_of_running(short_lm):
    small = RTN(bits=4)(short_lm, progress=False)
    found = labkit.measure(small, short_lm, **QUICK)
    for way in (found.latency, found.engine):
        assert way.rounds >= 15 and way.context == 16
        for ratio, spread in ((way.decode_ratio, way.decode_spread), (way.prefill_ratio, way.prefill_spread)):
            assert spread[0] <= ratio <= spread[1]
    assert found.engine.threads == labkit.compile(small).threads
    alone = labkit.measure(short_lm, **QUICK)
    assert alone.engine.decode_ratio is None and alone.latency.decode_spread is None and alone.memory.bits_before == 32


def test_decoding_under_a_policy_is_timed_where_it_evicts(short_lm, monkeypatch):
    found = labkit.measure(SnapKV(budget=16, window=8)(short_lm, progress=False), short_lm, prompt=32, **QUICK)
    assert found.latency.context == 1024 and found.engine is None and found.memory.kv_tokens == 1000


def test_a_text_under_a_policy_goes_on_and_is_not_copied_at_each_run(tiny_lm, monkeypatch):
    from labkit.measure import latency

    copies, small = [], H2O(budget=16)(tiny_lm, progress=False)
    counted = SimpleNamespace(deepcopy=lambda x: copies.append(x) or copy.deepcopy(x))
    monkeypatch.setattr(latency, "copy", counted)
    run = latency.decode_run(small, 32, 4)
    for _ in range(10):
        run()
    assert len(copies) == 1  # the one from which it may begin again
    monkeypatch.setattr(latency, "GROWN", 12)
    for _ in range(4):
        run()
    assert len(copies) == 2


@pytest.mark.parametrize("busy", [None, 0.02, 0.4])
def test_times_of_a_busy_machine_are_said_and_not_kept(tiny_lm, tmp_path, monkeypatch, busy):
    from labkit.measure import timing

    monkeypatch.setattr(timing, "_share", lambda stretches: busy)
    monkeypatch.setattr(timing, "ROUNDS_AGAIN", 0, raising=False)
    store, calls = labkit.Store(tmp_path / "results.sqlite"), []

    def measured(*args, **kwargs):
        calls.append(args)
        return labkit.measure(*args, **kwargs)

    how = {"texts": ("prose",), "windows": 2, "length": 16, "progress": False, "measure": measured}
    _, small = labkit.sweep(tiny_lm, [RTN(bits=4, group_size=16)], store, **how)
    disturbed = busy == 0.4
    assert small.latency.busy == busy and any("took 40 % of the cores" in n for n in small.notes) == disturbed
    kept = [row["latency"] if "latency" in row else row["latency.decode_ms"] for row in store.rows(shipped=False)]
    assert len(kept) == 2 and all((time is None) == disturbed for time in kept)
    calls.clear()
    monkeypatch.setattr(timing, "_share", lambda stretches: 0.0)
    labkit.sweep(tiny_lm, [RTN(bits=4, group_size=16)], store, **how)  # taken again where they are missing
    assert len(calls) == (2 if disturbed else 0)
