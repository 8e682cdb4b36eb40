"""Measuring stacks whose blocks differ, states in place of caches, and windows that are full."""

from __future__ import annotations

import sys

import pytest
import torch
from odd_models import odd
from tiny_models import tiny

import labkit
from labkit import RTN
from labkit.measure import breakdown, memory, roofline, timing
from labkit.measure.latency import decode_run, gemv
from labkit.walk import blocks, is_linear

latency = sys.modules["labkit.measure.latency"]
QUICK = {"texts": ("prose",), "windows": 1, "length": 16, "progress": False, "engine": False}


@pytest.fixture
def brief(monkeypatch):
    """As few samples as there can be."""
    real = timing.compare, timing.time_one
    monkeypatch.setattr(timing, "compare", lambda runs, **how: real[0](runs, **how | {"rounds": 1, "warmup": 0}))
    how = {"repeats": 1, "warmup": 0, "min_seconds": 0}
    monkeypatch.setattr(timing, "time_one", lambda run, **given: real[1](run, **given | how))


def kinds(lm) -> set[str]:
    return {name for block in blocks(lm.model) for name, m in block.named_modules() if is_linear(m)}


@pytest.mark.parametrize("family", ["Bamba", "Jamba", "DeepseekV3", "Gemma3nText", "Mamba", "Rwkv", "Mistral", "Lfm2"])
@pytest.mark.filterwarnings("ignore")  # experts are left as they are
def test_a_measurement_of_a_stack_of_any_kind(family, brief):
    lm = odd(family)
    small = RTN(bits=8, group_size=32)(lm, progress=False)
    found = labkit.measure(small, lm, **QUICK)
    assert found.quality["prose"].kl < 0.1 and not any("left out" in note for note in found.notes)
    assert found.latency.decode_ms > 0 and found.latency.decode_ratio > 0 and found.memory.kv_bytes > 0
    assert set(found.latency.gemv_us) == kinds(lm) and "one linear of each kind" in str(found)


def test_each_kind_of_linear_is_timed_in_the_blocks_that_have_it(brief):
    lm, ran = odd("DeepseekV3"), []
    for index, block in enumerate(blocks(lm.model)):
        for name, module in block.named_modules():
            if is_linear(module):
                module.register_forward_hook(lambda m, args, out, at=(name, index): ran.append(at))
    gemv(lm)
    assert {i for name, i in ran if name == "mlp.gate_proj"} == {0}  # the dense block
    assert {i for name, i in ran if name == "mlp.shared_experts.gate_proj"} == {1}
    assert {i for name, i in ran if name == "self_attn.o_proj"} == {0, 1}


def read_at_once(lm, monkeypatch, context: int, runs: int) -> list[tuple[int, int]]:
    """(tokens read, tokens known before) of every call of the model while decoding."""
    calls, forward = [], lm.model.forward

    def watched(ids, **how):
        kept = how.get("past_key_values")
        calls.append((ids.shape[1], kept.get_seq_length() if kept is not None else 0))
        return forward(ids, **how)

    monkeypatch.setattr(lm.model, "forward", watched)
    run = decode_run(lm, context, 4)
    calls.clear()
    for _ in range(runs):
        run()
    return calls


def test_a_full_window_goes_on_and_a_cache_that_can_be_cut_begins_again(monkeypatch):
    again = read_at_once(tiny("Llama"), monkeypatch, 16, 3)
    assert again == 3 * [(1, 16), (1, 17), (1, 18), (1, 19)]
    on = read_at_once(odd("Mistral"), monkeypatch, 16, 20)
    assert on[:17] == [(1, 16 + i) for i in range(17)]
    assert max(known for _, known in on) == 16 + latency.GROWN + 3 and on[-1][1] < 16 + latency.GROWN


def test_a_text_that_goes_on_stays_within_the_models_positions(monkeypatch):
    lm = odd("Mistral")
    lm.model.config.max_position_embeddings = 32
    assert max(known for _, known in read_at_once(lm, monkeypatch, 16, 8)) < 32


def test_without_a_cache_the_text_is_read_again_and_that_is_said(brief, monkeypatch):
    lm = odd("OpenAIGPT")
    assert read_at_once(lm, monkeypatch, 16, 1) == [(16, 0), (17, 0), (18, 0), (19, 0)]
    found = labkit.measure(lm, **QUICK)
    assert found.memory.kv_bytes == 0 and found.latency.decode_ms > 0
    assert "hands back no cache, so that none is weighed. Each decoded token is timed with the whole" in str(found)


def test_states_are_weighed_with_keys_and_values():
    mamba, bamba = odd("Mamba"), odd("Bamba")
    c = mamba.model.config
    states = c.num_hidden_layers * c.intermediate_size * (c.state_size + c.conv_kernel)
    assert memory.kv_bytes(mamba, 50) == (4 * states, 50)
    kept = bamba.model(torch.arange(50)[None], use_cache=True).past_key_values.layers
    ours = [kept[1].keys, kept[1].values, kept[0].conv_states[0], kept[0].recurrent_states[0]]
    assert memory.kv_bytes(bamba, 50)[0] == 4 * sum(t.numel() for t in ours)
    assert memory.kv_per_token(mamba) == 0 and memory.kv_per_token(bamba) == 2 * 4 * 2 * 16


def test_what_cannot_be_measured_is_left_out_and_said(tiny_lm, brief, monkeypatch):
    def broken(*args):
        raise RuntimeError("no such step\nat all")

    monkeypatch.setattr(sys.modules["labkit.measure"], "_latency", broken)
    monkeypatch.setattr(memory, "kv_bytes", broken)
    found = labkit.measure(tiny_lm, **QUICK)
    assert found.quality["prose"].perplexity > 1 and found.latency is None and found.memory.kv_bytes == 0
    said = "are left out: this model cannot be measured so (RuntimeError: 'no such step')."
    assert [n for n in found.notes if "left out" in n] == [f"Eager times {said}", f"The cache's bytes {said}"]
    assert "KV cache of" not in str(found)


def test_memory_that_is_not_enough_is_no_note(tiny_lm, monkeypatch):
    def broken(*args):
        raise MemoryError

    monkeypatch.setattr(memory, "kv_bytes", broken)
    with pytest.raises(MemoryError):
        labkit.measure(tiny_lm, latency=False, **QUICK)


def test_steps_of_other_kinds_are_taken_apart_or_refused():
    for family in ("Gemma3nText", "Mistral", "Jamba"):
        twin = breakdown.hollow(odd(family))
        assert breakdown.token_bytes(twin) < breakdown.token_bytes(odd(family))
    for family in ("Mamba", "DeepseekV3"):
        with pytest.raises(ValueError, match=r"cannot be made small \(.*\): its steps cannot be taken apart"):
            breakdown.hollow(odd(family))
    for family in ("Mamba", "Jamba"):
        with pytest.raises(ValueError, match="is not a dense decoder, it has .*: its work is not modelled"):
            roofline.Shape.of(odd(family))
