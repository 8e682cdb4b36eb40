"""The step that a CUDA graph records, run without recording: static cache, rewind, threads. Recording wants a GPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import Letters, tiny

import labkit
from labkit.engine import NotCompilable
from labkit.engine.cuda_graph import GraphedModel
from labkit.model import LanguageModel

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


ODD = {
    "GPTNeo": ({"attention_types": [[["global", "local"], 1]], "window_size": 8}, "it computes something else"),
    "Falcon": ({"alibi": True}, "does not run on a cache of fixed size"),
    "Mamba": ({"state_size": 8}, "keep a state that is no cache of tokens"),
}


@pytest.mark.parametrize("family", ODD)
def test_what_goes_wrong_on_a_cache_with_room_is_refused(family):
    import transformers

    more, said = ODD[family]
    fields = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96} | more
    if family == "GPTNeo":
        fields |= {"num_layers": fields.pop("num_hidden_layers"), "num_heads": fields.pop("num_attention_heads")}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**fields))
    lm = LanguageModel(model.eval().requires_grad_(False), Letters(), family)
    with pytest.raises(NotCompilable, match=said):
        GraphedModel(lm, context=64)


def test_a_cache_method_and_changing_angles_are_refused(tiny_lm):
    for method in (labkit.StreamingLLM(budget=4096), labkit.KIVI()):
        with pytest.raises(NotCompilable, match=f"{type(method).__name__} hooked into its cache"):
            GraphedModel(method(tiny_lm), context=64)
    tiny_lm.model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(NotCompilable, match="changes with the length of the text"):
        GraphedModel(tiny_lm, context=64)


@pytest.mark.parametrize("context", (1, 3))
def test_a_short_context_is_enough(tiny_lm, context):
    graphed = GraphedModel(tiny_lm, context=context)
    torch.testing.assert_close(graphed.prefill(IDS[:, :context]), whole(tiny_lm, IDS[:, :context])[:, -1])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_recorded_step_gives_the_same(tiny_lm):
    lm = LanguageModel(tiny_lm.model.to("cuda"), tiny_lm.tokenizer, "tiny")
    graphed = labkit.compile(lm, context=32)
    assert graphed.graph is not None
    expected = whole(lm, IDS.cuda())
    found = [graphed.prefill(IDS[:, :12])] + [graphed.decode(int(t)).clone() for t in IDS[0, 12:]]
    torch.testing.assert_close(torch.stack(found, 1), expected[:, 11:], rtol=1e-3, atol=1e-3)
