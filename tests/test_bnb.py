"""bitsandbytes' layers: every width, every dtype, before and after a save; the oracle is the library's codes as one row."""

from __future__ import annotations

import warnings

import pytest
import torch
from tiny_models import tiny

import labkit
from labkit.formats import NF4
from labkit.linear import BnbLinear, PackedLinear, W8A8Linear
from labkit.linear import bnb as module
from labkit.method import DoneInPart
from labkit.walk import blocks, linears

functional = pytest.importorskip("bitsandbytes.functional")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDTHS = (64, 80, 96, 99, 100, 288)


def weights(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def as_one_row(weight: torch.Tensor, type: str) -> torch.Tensor:
    """What the weight is rounded to: as one row a block lies in no two of them, and the library is right everywhere."""
    if type == "nf4":
        return NF4().encode(weight.reshape(1, -1)).decode().view_as(weight)
    packed, state = functional.quantize_4bit(weight.reshape(1, -1), quant_type=type, compress_statistics=True)
    return functional.dequantize_4bit(packed, state).view_as(weight)


@pytest.mark.parametrize("type", ["nf4", "fp4"])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_and_dtype(type, width):
    weight, x = weights(40, width), weights(5, width, 1)
    truth = as_one_row(weight, type)
    for dtype in DTYPES:
        layer = BnbLinear.encode(weight, type, True, 6.0).to(dtype)
        assert torch.equal(layer.weight, truth.to(dtype))
        found, expected = layer(x.to(dtype)).double(), x.to(dtype).double() @ truth.double().T
        assert (found - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm() + 1e-6


def test_a_kernel_that_is_wrong_is_found_out_and_said(monkeypatch):
    lm = tiny()
    x = weights(3, 64)
    monkeypatch.setattr(BnbLinear, "_product", lambda self, x: x.new_ones(*x.shape[:-1], self.out_features))
    module.right.cache_clear()
    try:
        with pytest.warns(DoneInPart, match=r"rows of 64, 96 weights are unpacked by labkit, since bitsandbytes \d"):
            small = labkit.BitsAndBytes()(lm, progress=False)
        assert "unpacked by labkit" in small.history[0]
        layer = small.model.model.layers[0].self_attn.q_proj
        torch.testing.assert_close(layer(x), x @ layer.weight.T)
    finally:
        module.right.cache_clear()


def test_a_width_that_the_library_can_is_left_to_it(monkeypatch):
    layer = BnbLinear.encode(weights(64, 64), "nf4", True, 6.0)
    layer(weights(1, 64))
    monkeypatch.setattr(BnbLinear, "_decoded", None)
    assert layer(weights(2, 64)).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("type", ["nf4", "fp4", "int8"])
def test_tables_outlive_a_change_of_dtype_and_a_save(type, dtype, tmp_path):
    lm = tiny()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DoneInPart)  # which widths the library can depends on the machine
        small = labkit.BitsAndBytes(type=type)(lm, progress=False)
    before = [(m.weight.clone(), dict(m.named_buffers())) for _, m in linears(blocks(small.model))]
    small.model.to(dtype)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *args, **kwargs: small.tokenizer)
        again = labkit.load(small.save(tmp_path / "small"))
    ids = torch.arange(32)[None]
    assert again.model(ids).logits.isfinite().all() and small.model(ids).logits.isfinite().all()
    for model in (small.model, again.model):
        for (weight, stored), (_, layer) in zip(before, linears(blocks(model)), strict=True):
            assert layer.weight.dtype == dtype and torch.equal(layer.weight, weight.to(dtype))
            assert all(torch.equal(t, stored[name]) for name, t in layer.named_buffers())


@pytest.mark.parametrize("static", [None, torch.tensor(1e-9)])
def test_int8_scales_outlive_half(static):
    weight = weights(8, 64) * 1e-8  # scales of 1e-11: zero in fp16
    for layer in (W8A8Linear(weight, activation_scale=static), BnbLinear.encode(weight, "int8", True, 6.0)):
        scale = layer.scale.clone()
        layer.half()
        assert torch.equal(layer.scale, scale) and layer.weight.dtype == torch.float16
        layer.float()
        assert (layer.weight - weight).norm() < 0.02 * weight.norm()
    assert static is None or static.dtype == torch.float32


def test_int8_is_the_librarys_rounding_and_takes_any_size():
    weight = weights(16, 96)
    codes, scale, _ = functional.int8_vectorwise_quant(weight.half())
    for factor in (2.0**-20, 1.0, 2.0**30):
        layer = BnbLinear.encode(weight * factor, "int8", True, 6.0)
        assert torch.equal(layer.int8, codes) and torch.equal(layer.scale, scale * factor)
    weight[3] = 0
    layer = BnbLinear.encode(weight, "int8", True, 6.0)
    assert (layer.weight[3] == 0).all() and (layer.int8[3] == 0).all()


def test_new_tables_are_read_after_load_state_dict():
    one, other = (BnbLinear.encode(weights(32, 64, seed), "nf4", True, 6.0) for seed in (0, 1))
    assert not torch.equal(one.weight, other.weight)
    one.load_state_dict(other.state_dict())
    assert torch.equal(one.weight, other.weight)


def test_packed_bias_follows_its_layer():
    layer = PackedLinear(NF4().encode(weights(8, 64)), torch.ones(8)).to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16 == layer(weights(2, 64).bfloat16()).dtype
