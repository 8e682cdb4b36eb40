"""The step that a CUDA graph records, run without recording: static cache, rewind, threads. Recording wants a GPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import tiny

import labkit
from labkit.engine import NotCompilable
from labkit.engine.cuda_graph import GraphedModel

IDS = torch.arange(20)[None] * 7 % 96


def whole(lm, ids):
    with torch.inference_mode():
        return lm.model(ids).logits


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Gemma", "GPTNeoX"])
def test_steps_on_the_fixed_cache_give_the_logits_of_the_whole_text(family):
    lm = tiny(family)
    graphed = GraphedModel(lm, context=32)
    expected = whole(lm, IDS)
    for _ in range(2):  # a second text finds nothing of the first
        found = [graphed.prefill(IDS[:, :12])] + [graphed.decode(int(t)) for t in IDS[0, 12:]]
        torch.testing.assert_close(torch.stack(found, 1), expected[:, 11:], rtol=1e-4, atol=1e-5)
        assert graphed.length == 20
    graphed.rewind(12)
    torch.testing.assert_close(graphed.decode(int(IDS[0, 12])), expected[:, 12], rtol=1e-4, atol=1e-5)


def test_greedy_text_is_that_of_the_model(tiny_lm):
    packed = labkit.RTN(bits=4, group_size=32)(tiny_lm, progress=False)
    for lm in (tiny_lm, packed):
        graphed = GraphedModel(lm, context=64)
        with labkit.linear.exact():
            assert graphed.generate("What is salt", 24) == lm.generate("What is salt", 24)


@pytest.mark.parametrize("family, tied", [("Llama", True), ("Qwen2", False)])
def test_parts_are_the_models_bytes(family, tied):
    lm = tiny(family)
    graphed = GraphedModel(lm, context=16)
    assert graphed.parts["head"] == 96 * 64 * 4
    assert graphed.parts["embedding"] == (0 if tied else 96 * 64 * 4)
    assert sum(graphed.parts.values()) == graphed.nbytes == lm.nbytes


def test_what_does_not_fit_or_mix_is_refused(tiny_lm):
    graphed = GraphedModel(tiny_lm, context=16)
    with pytest.raises(ValueError, match="20 tokens do not fit into the context of 16"):
        graphed.prefill(IDS)
    graphed.prefill(IDS[:, :16])
    with pytest.raises(ValueError, match="filled the context of 16"):
        graphed.decode(3)
    with pytest.raises(ValueError, match="length = 17 is not allowed"):
        graphed.rewind(17)
    graphed.rewind(4)
    with ThreadPoolExecutor(1) as other, pytest.raises(RuntimeError, match="another thread"):
        other.submit(graphed.decode, 3).result()
    first = graphed.stream("abc", 8)
    next(first)
    next(graphed.stream("xyz", 8))
    with pytest.raises(RuntimeError, match="Another text"):
        next(first)


def test_a_sliding_window_runs_eagerly():
    lm = tiny("Mistral")
    lm.model.config.sliding_window = 8
    with pytest.raises(NotCompilable, match="slides over a window"):
        GraphedModel(lm)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_recorded_step_gives_the_same(tiny_lm):
    from labkit.model import LanguageModel

    lm = LanguageModel(tiny_lm.model.to("cuda"), tiny_lm.tokenizer, "tiny")
    graphed = labkit.compile(lm, context=32)
    assert graphed.graph is not None
    expected = whole(lm, IDS.cuda())
    found = [graphed.prefill(IDS[:, :12])] + [graphed.decode(int(t)).clone() for t in IDS[0, 12:]]
    torch.testing.assert_close(torch.stack(found, 1), expected[:, 11:], rtol=1e-3, atol=1e-3)
