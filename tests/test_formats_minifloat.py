"""Small floats, bit for bit: against ml_dtypes and torch's own float8, over all codes and over numbers of every size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from labkit.formats import FP4, FP6, MINIFLOATS, MXFP4, MXFP8, NVFP4, Float8

ml_dtypes = pytest.importorskip("ml_dtypes")
ORACLES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def numbers(kind) -> torch.Tensor:
    """All values, all ties, both neighbours of each tie, random numbers over the whole range, both zeros."""
    values = kind.levels().double()
    ties = ((values[1:] + values[:-1]) / 2).float()
    near = [torch.nextafter(ties, torch.full_like(ties, torch.inf * sign)) for sign in (1, -1)]
    draw = torch.Generator().manual_seed(0)
    spread = torch.randn(200_000, generator=draw) * torch.exp2(torch.rand(200_000, generator=draw) * 40 - 25)
    x = torch.cat([values.float(), ties, *near, spread, torch.tensor([0.0, -0.0, 1e-45, -1e-45])])
    return x.clamp(-kind.largest, kind.largest)


@pytest.mark.parametrize("name", MINIFLOATS)
def test_every_code_decodes_as_ml_dtypes(name):
    kind = MINIFLOATS[name]
    codes = np.arange(1 << kind.bits, dtype=np.uint8)
    expected = codes.view(ORACLES[name]).astype(np.float32)
    got = kind.decode(torch.from_numpy(codes)).numpy()
    np.testing.assert_array_equal(got, expected)  # NaN equals NaN here
    np.testing.assert_array_equal(np.signbit(got), np.signbit(expected))
    assert kind.largest == float(ml_dtypes.finfo(ORACLES[name]).max)
    assert kind.smallest == float(ml_dtypes.finfo(ORACLES[name]).smallest_subnormal)


@pytest.mark.parametrize("name", MINIFLOATS)
def test_rounding_as_ml_dtypes(name):
    kind = MINIFLOATS[name]
    x = numbers(kind)
    expected = x.numpy().astype(ORACLES[name])
    np.testing.assert_array_equal(kind.encode(x).numpy(), expected.view(np.uint8))
    np.testing.assert_array_equal(kind.round(x).numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("name", TORCH)
def test_float8_as_torch(name):
    kind = MINIFLOATS[name]
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(kind.decode(codes).nan_to_num(nan=-1), codes.view(TORCH[name]).float().nan_to_num(nan=-1))
    x = numbers(kind)
    assert torch.equal(kind.encode(x), x.to(TORCH[name]).view(torch.uint8))


@pytest.mark.parametrize("name", MINIFLOATS)
def test_what_is_too_large_saturates(name):
    kind = MINIFLOATS[name]
    x = torch.tensor([kind.largest * 1.0001, kind.largest * 1.5, 1e30, torch.inf])
    for sign in (1, -1):
        assert (kind.decode(kind.encode(sign * x)) == sign * kind.largest).all()


def test_levels():
    assert FP4().levels().tolist() == [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for form, count in ((FP6("e2m3"), 63), (FP6("e3m2"), 63), (Float8("e4m3"), 253), (Float8("e5m2"), 247)):
        levels = form.levels()
        assert (
            len(levels) == count and torch.equal(levels, levels.sort().values) and torch.equal(levels, -levels.flip(0))
        )


@pytest.mark.parametrize("exponent", [-140, -127, -60, 0, 100, 126])
def test_mx_scale_is_e8m0(exponent):
    """The stored byte, read by ml_dtypes, is the power of two that the specification asks for."""
    weight = torch.ldexp(torch.tensor([[1.9] + [0.3] * 31]), torch.tensor(exponent))
    for form, emax in ((MXFP4(), 2), (MXFP8("e4m3"), 8), (MXFP8("e5m2"), 15)):
        encoded = form.encode(weight)
        byte = encoded.tensors()["scale"].numpy()
        assert byte.view(ml_dtypes.float8_e8m0fnu).astype(np.float64).item() == 2.0 ** max(exponent - emax, -127)
        scale = byte.view(ml_dtypes.float8_e8m0fnu).astype(np.float32).item()
        values = encoded.codes().numpy().view(ORACLES["e2m1" if form.bits == 4 else form.variant]).astype(np.float32)
        np.testing.assert_array_equal(encoded.decode().numpy(), values * np.float32(scale))


def test_mxfp4_block_by_hand():
    """The largest weight 7.9 has exponent 2, as 6 has: the scale is 1, and what lies above 6 becomes 6."""
    weight = torch.tensor([[7.9, -5.0, 2.5, 3.5, 0.25, 0.26] + [0.0] * 26])
    encoded = MXFP4().encode(weight)
    assert encoded.tensors()["scale"].item() == 127
    assert encoded.decode()[0, :6].tolist() == [6, -4, 2, 4, 0, 0.5]  # ties go to the even code


def test_nvfp4_against_ml_dtypes():
    weight = torch.randn(7, 80, generator=torch.Generator().manual_seed(1)) * 0.02
    encoded = NVFP4().encode(weight)
    blocks = weight.numpy().reshape(7, 5, 16)
    tensor_scale = np.float32(np.abs(blocks).max() / np.float32(6 * 448))
    scale = (np.abs(blocks).max(-1) / np.float32(6) / tensor_scale).astype(ml_dtypes.float8_e4m3fn)
    step = (scale.astype(np.float32) * tensor_scale)[..., None]
    codes = np.clip(blocks / step, -6, 6).astype(ml_dtypes.float4_e2m1fn)
    np.testing.assert_array_equal(encoded.tensors()["scale"].numpy(), scale.view(np.uint8))
    assert encoded.tensors()["tensor_scale"].item() == tensor_scale
    np.testing.assert_array_equal(encoded.codes().numpy(), codes.view(np.uint8).reshape(7, 80))
    np.testing.assert_array_equal(encoded.decode().numpy(), (codes.astype(np.float32) * step).reshape(7, 80))


def test_how_often_the_largest_weight_of_a_block_saturates():
    """A power of two leaves it anywhere below 8; an E4M3 scale is off by a sixteenth at most, either way."""
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    mx, nv = MXFP4(), NVFP4()
    high = mx.groups(weight).abs().amax(-1) / mx.fit(mx.groups(weight))[0]
    assert 0.27 < (high > 6).float().mean() < 0.32 and 0.14 < (high > 7).float().mean() < 0.2 and high.max() < 8
    scale, tensor_scale = nv.fit(nv.groups(weight))
    high = nv.groups(weight).abs().amax(-1) / (scale * tensor_scale)
    assert 0.45 < (high > 6).float().mean() < 0.55 and high.max() <= 6.375 * (1 + 1e-6)


def test_nvfp4_keeps_blocks_far_below_the_largest():
    weight = torch.cat([torch.full((1, 16), 1e3), torch.full((1, 16), 1e-3)], 1)
    assert torch.isfinite(NVFP4().encode(weight).decode()).all()


@pytest.mark.parametrize("rows,group_size,shape", [(128, 128, (3, 5)), (None, None, (1, 1)), (1, None, (300, 1))])
def test_float8_scales_cover_tiles(rows, group_size, shape):
    """DeepSeek-V3's tiles, with an edge that does not come out even; one scale per tensor; one per row."""
    weight = torch.randn(300, 600, generator=torch.Generator().manual_seed(2))
    encoded = Float8("e4m3", group_size, rows).encode(weight)
    scale = encoded.tensors()["scale"]
    assert scale.shape == shape and scale.dtype == torch.float32
    high, wide = rows or 300, group_size or 600
    for i in range(shape[0]):
        for j in range(shape[1]):
            tile = weight[i * high : (i + 1) * high, j * wide : (j + 1) * wide]
            assert scale[i, j] == tile.abs().max() / 448
            expected = (tile / scale[i, j]).to(torch.float8_e4m3fn).float() * scale[i, j]
            assert torch.equal(encoded.decode()[i * high : (i + 1) * high, j * wide : (j + 1) * wide], expected)
