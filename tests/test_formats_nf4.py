"""NF4 is bitsandbytes' NF4, bit for bit."""

from __future__ import annotations

import pytest
import torch

from labkit.formats import NF4
from labkit.formats.nf4 import BLOCK, dynamic_values

bnb = pytest.importorskip("bitsandbytes.functional")


def weights(shape, seed) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw) * torch.exp(torch.randn(shape[0], 1, generator=draw)) * 0.02


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(576, 576), (1536, 576), (192, 576), (576, 1536)])
def test_encodes_and_decodes_as_bitsandbytes(shape, double_quant):
    for seed in range(3):
        weight = weights(shape, seed)
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant)
        encoded = NF4(double_quant=double_quant).encode(weight)
        ours = encoded.tensors()
        assert torch.equal(encoded.codes(), torch.stack([packed >> 4, packed & 15], 1).view(shape))
        assert torch.equal(ours["scale"].flatten(), state.absmax)
        if double_quant:
            assert torch.equal(ours["block_scale"], state.state2.absmax)
            assert torch.equal(ours["offset"], state.offset)
        assert torch.equal(encoded.decode(), bnb.dequantize_4bit(packed, state))


def test_zero_blocks_and_one_constant_absmax_as_bitsandbytes():
    zeros = weights((4, 256), 0)
    zeros[1, 64:128] = 0
    for weight in (zeros, torch.zeros(4, 256), torch.ones(4, 256)):
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        encoded = NF4().encode(weight)
        assert torch.equal(encoded.tensors()["scale"].flatten(), state.absmax)
        assert torch.equal(encoded.decode(), bnb.dequantize_4bit(packed, state))


def test_tables_as_bitsandbytes():
    assert torch.equal(dynamic_values(), bnb.create_dynamic_map())
    assert torch.equal(NF4().levels(), bnb.get_4bit_type("nf4", device="cpu"))


def test_values_are_normal_quantiles():
    """QLoRA, section 3: quantiles of N(0, 1) at even steps of probability, each side up to the same largest value."""
    norm = pytest.importorskip("scipy.stats").norm
    steps = torch.linspace(0.9677083, 0.5, 9)[:-1].double(), torch.linspace(0.9677083, 0.5, 8)[:-1].double()
    right, left = (torch.from_numpy(norm.ppf(s.numpy())) for s in steps)
    expected = torch.cat([-left, torch.zeros(1).double(), right]).sort().values
    torch.testing.assert_close(NF4().levels().double(), expected / expected.max(), atol=1e-6, rtol=0)


def test_codes_are_not_used_equally_often():
    """A block's largest weight is no quantile: normal weights use some codes 5 times as often (Yoshida, arXiv:2306.06965)."""
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    codes = NF4(double_quant=False).encode(weight).codes().flatten().int()
    share = torch.bincount(codes, minlength=16) / weight.numel()
    assert 0.015 < share.min() < 0.02 and 0.085 < share.max() < 0.1
    assert -(share * share.log2()).sum() == pytest.approx(3.88, abs=0.01)
    assert (NF4().levels() < 0).sum() == 7 and (NF4().levels() > 0).sum() == 8


@pytest.mark.parametrize("shape", [(576, 576), (1536, 576), (3, 64)])
def test_true_bits(shape):
    blocks = shape[0] * shape[1] // 64
    bits = NF4().encode(weights(shape, 0)).bits_per_weight
    assert bits == 8 * (shape[0] * shape[1] // 2 + blocks + 4 * -(-blocks // BLOCK) + 4) / (shape[0] * shape[1])
    assert NF4(double_quant=False).encode(weights(shape, 0)).bits_per_weight == 4 + 32 / 64


def test_a_group_on_its_own_takes_the_matrix_statistics():
    """GPTQ fits a group when its turn comes; offset and block scales are then those of the whole matrix."""
    weight, form = weights((64, 256), 1), NF4()
    groups = form.groups(weight)
    whole = form.fit(groups)
    parts = [form.fit(groups[:, g : g + 1], like=form.slice(whole, g)) for g in range(groups.shape[1])]
    for mine, theirs in zip(form.join(parts), whole):
        assert torch.equal(mine, theirs)
