"""What blocks take besides hidden states: the walk's hidden states are those of the model, window by window."""

from __future__ import annotations

import pytest
import torch
from odd_models import odd, tokens
from tiny_models import tiny

from labkit import AWQ, GPTQ, RTN, SmoothQuant, SparseGPT, Wanda
from labkit.linear import PackedLinear
from labkit.walk import Flow, blocks, is_linear

WINDOWS, LENGTH = 5, 24


@pytest.fixture
def in_twos(monkeypatch):
    """Batches of two windows, the last of one."""
    monkeypatch.setattr("labkit.walk.BATCH", (2 * LENGTH, 2 * LENGTH))


def flow_of(lm) -> Flow:
    return Flow(lm.model, blocks(lm.model), tokens(WINDOWS, LENGTH))


def outputs(lm) -> list[list[torch.Tensor]]:
    """Every block's output for every window, from plain forward passes over one window each."""
    stack, found = blocks(lm.model), []
    for index, block in enumerate(stack):
        found.append([])
        block.register_forward_hook(
            lambda m, a, out, i=index: found[i].append(out[0] if isinstance(out, (tuple, list)) else out)
        )
    for ids in tokens(WINDOWS, LENGTH):
        lm.model.base_model(ids[None], use_cache=False)
    for block in stack:
        block._forward_hooks.clear()
    return found


@pytest.mark.parametrize(
    "family", ["Llama", "Bloom", "XGLM", "Mistral", "Gemma3nText", "Gemma4Text", "Jamba", "RecurrentGemma", "OpenAIGPT"]
)
@torch.no_grad()
def test_hidden_states_are_those_of_the_model(family, in_twos):
    lm = tiny() if family == "Llama" else odd(family)
    expected, flow = outputs(lm), flow_of(lm)
    axis = 1 if family == "Gemma3nText" else 0  # (streams, windows, length, width)
    for index, windows in enumerate(expected):
        for count in (1, 3, WINDOWS):  # of a batch, across batches, all
            got = flow.run(index, flow.few(count))
            torch.testing.assert_close(got, torch.cat(windows[:count], axis), rtol=1e-4, atol=1e-4)
        if index + 1 < len(expected):
            flow.advance(index)
            torch.testing.assert_close(flow.few(None), torch.cat(windows, axis), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_one_window_alone_says_where_windows_lie():
    lm, expected = odd("Gemma3nText"), outputs(odd("Gemma3nText"))
    flow = Flow(lm.model, blocks(lm.model), tokens(WINDOWS, LENGTH)[:1])
    assert flow.inputs.axis == 1 and flow.few(1).shape == (4, 1, LENGTH, 64)
    torch.testing.assert_close(flow.run(0, flow.few(None)), expected[0][0])


@torch.no_grad()
def test_what_fits_any_tokens_is_held_once(in_twos):
    llama, gemma = flow_of(tiny()).inputs, flow_of(odd("Gemma4Text")).inputs
    tables = [calls[index][1]["position_embeddings"] for calls in llama.calls for index in (0, 1)]
    assert len(llama.calls) == 3 and len({id(cos) for cos, _ in tables}) == 1
    masks = [calls[0][1]["attention_mask"] for calls in gemma.calls]
    assert masks[1] is masks[0] and masks[2].shape[0] == 1  # one for each size of a batch
    assert len({id(calls[0][0][0]) for calls in gemma.calls}) == 3  # of the tokens


@torch.no_grad()
def test_recording_runs_the_blocks_on_one_window_alone(tiny_lm, in_twos):
    rows = []
    for block in blocks(tiny_lm.model):
        block.mlp.register_forward_hook(lambda m, args, out: rows.append(args[0].shape[0]))
    forwards = [block.__dict__.get("forward") for block in blocks(tiny_lm.model)]
    flow_of(tiny_lm)
    assert rows == [1, 1]
    assert [block.__dict__.get("forward") for block in blocks(tiny_lm.model)] == forwards == [None, None]


@pytest.mark.parametrize(
    ("family", "said"),
    [("GlmMoeDsa", "block 1 takes prev_topk_indices, which other blocks compute"), ("HrmText", "block 0 runs twice")],
)
def test_a_model_that_hands_on_more_between_its_blocks_is_refused(family, said):
    with pytest.raises(ValueError, match=f"labkit cannot walk {family}ForCausalLM block by block: {said}"):
        Wanda()(odd(family), tokens(2), progress=False)


def test_a_model_that_does_something_between_its_blocks_is_refused(tiny_lm):
    blocks(tiny_lm.model)[1].register_forward_pre_hook(lambda m, args: (2 * args[0], *args[1:]))
    with pytest.raises(ValueError, match="what block 1 reads is not what block 0 puts out"):
        flow_of(tiny_lm)


LOSSLESS = [
    RTN(bits=8, group_size=32),
    GPTQ(bits=8, group_size=32),
    AWQ(bits=8, group_size=32),
    SmoothQuant(),
    Wanda(sparsity=0.0),
    SparseGPT(sparsity=0.0),
]


@pytest.mark.filterwarnings("ignore")  # experts and convolutions are left as they are
@pytest.mark.parametrize("family", ["Mamba", "Jamba", "HunYuanMoEV1", "Lfm2", "Llama4Text", "Bloom", "Gemma3nText"])
@torch.no_grad()
def test_methods_at_their_lossless_end(family):
    """Recurrence, convolutions, and routers and mixers that look at a linear's weight while it waits for its input."""
    lm, ids = odd(family), tokens(2)
    expected = lm.model(ids).logits
    for method in LOSSLESS:
        got = method(lm, tokens(3, 16), progress=False).model(ids).logits
        error = (got - expected).norm() / expected.norm()
        assert error < (1e-4 if isinstance(method, (Wanda, SparseGPT)) else 0.06), method


@torch.no_grad()
def test_a_class_derived_from_linear_is_one_unless_it_computes_something_else():
    falcon, llama4 = odd("Falcon"), odd("Llama4Text")
    assert all(type(m).__name__ == "FalconLinear" and is_linear(m) for m in [blocks(falcon.model)[0].mlp.dense_4h_to_h])
    assert not is_linear(blocks(llama4.model)[1].feed_forward.router)
    with pytest.warns(UserWarning, match="router"):
        small = RTN(bits=8, group_size=32)(llama4, progress=False)
    assert isinstance(blocks(small.model)[1].self_attn.q_proj, PackedLinear)
    assert not isinstance(blocks(small.model)[1].feed_forward.router, PackedLinear)
