"""The remembered reference: the same logits, fewer forward passes, and never stale."""

from __future__ import annotations

import pytest
import torch

import labkit
from labkit.measure.reference import remembered


@pytest.fixture
def windows():
    return torch.randint(0, 96, (3, 20), generator=torch.Generator().manual_seed(1))


def count_passes(lm):
    calls = []
    lm.model.base_model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_logits_are_the_models_own_on_every_family(each_family, windows):
    for _ in range(2):
        for index, ids in enumerate(windows):
            with torch.inference_mode():
                found = remembered(each_family, windows).logits(index)
                torch.testing.assert_close(found, each_family.model(ids[None]).logits[0], rtol=1e-5, atol=1e-5)


def test_the_second_comparison_runs_the_reference_no_more(tiny_lm, windows):
    small = labkit.RTN(bits=4, group_size=32)(tiny_lm)
    calls = count_passes(tiny_lm)
    first = labkit.divergence(small, tiny_lm, windows)
    assert len(calls) == 3
    assert labkit.divergence(small, tiny_lm, windows).kl == pytest.approx(first.kl, rel=1e-4)
    assert len(calls) == 3
    labkit.divergence(small, tiny_lm, windows.flip(0))  # other windows
    assert len(calls) == 6


@pytest.mark.parametrize("how", ["in place", "through data", "inference tensor", "replaced"])
def test_a_changed_weight_is_noticed(tiny_lm, windows, how):
    layer = tiny_lm.model.model.layers[0].mlp.down_proj
    if how == "inference tensor":
        with torch.inference_mode():  # it has no _version
            layer.weight = torch.nn.Parameter(layer.weight.clone(), requires_grad=False)
    other = tiny_lm.copy()
    assert labkit.divergence(other, tiny_lm, windows).kl == pytest.approx(0, abs=1e-6)
    if how != "replaced":
        with torch.inference_mode(how == "inference tensor"), torch.no_grad():
            (layer.weight.data if how == "through data" else layer.weight).mul_(3)
        other = tiny_lm.copy()
        assert labkit.divergence(other, tiny_lm, windows).kl == pytest.approx(0, abs=1e-6)
    else:
        layer.weight = torch.nn.Parameter(layer.weight * 3, requires_grad=False)
        assert labkit.divergence(other, tiny_lm, windows).kl > 1e-4


def test_logits_that_are_capped_after_the_output_layer_are_not_remembered_wrongly(windows):
    import transformers

    from labkit.model import LanguageModel

    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96, "head_dim": 16}
    config = transformers.Gemma2Config(
        **small, intermediate_size=96, num_key_value_heads=1, final_logit_softcapping=0.5
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    lm = LanguageModel(model, None, "tiny-Gemma2")
    with torch.inference_mode():
        for _ in range(2):
            logits = remembered(lm, windows).logits(1)
            torch.testing.assert_close(logits, model(windows[1:2]).logits[0])
            assert logits.abs().max() <= 0.5
