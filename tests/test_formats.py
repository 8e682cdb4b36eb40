"""Packing and the integer format, against independent oracles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.formats import Integer, pack, unpack


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**31))
def test_pack_round_trip_and_size(bits, rows, columns, seed):
    draw = np.random.default_rng(seed)
    codes = torch.from_numpy(draw.integers(0, 1 << bits, (rows, columns), dtype=np.uint8))
    packed = pack(codes, bits)
    assert packed.shape == (rows, -(-columns * bits // 8))
    assert torch.equal(unpack(packed, bits, columns), codes)
    # The oracle: the same bits as one big little-endian number.
    number = sum(int(c) << (i * bits) for i, c in enumerate(codes[0]))
    assert number.to_bytes(packed.shape[1], "little") == packed[0].numpy().tobytes()


def test_pack_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="16 does not fit into 4 bits"):
        pack(torch.tensor([[16]], dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="bits = 9"):
        pack(torch.zeros(1, 1, dtype=torch.uint8), 9)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_largest_weight_of_a_symmetric_group_errs_by_half_a_step(bits):
    """As in GPTQ's code: the scale is 2 · max|w| over the largest code, so both signs lie half a step off the grid."""
    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(bits))
    q = Integer(bits, 64, symmetric=True).encode(weight)
    step = 2 * weight.double().abs().amax(1) / ((1 << bits) - 1)
    assert torch.allclose(q.scale[:, 0].double(), step, rtol=1e-3)
    left = (weight.double() - q.decode().double()).abs()
    largest = left.gather(1, weight.abs().argmax(1, keepdim=True))[:, 0]
    assert torch.allclose(largest / step, torch.full((50,), 0.5, dtype=torch.float64), atol=2e-3 * (1 << bits))
    assert (left.amax(1) <= step * (0.5 + 2e-3 * (1 << bits))).all()


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 8), st.sampled_from([None, 8, 16, 48, 64]), st.booleans(), st.integers(0, 2**31))
def test_nearest_grid_value(bits, group_size, symmetric, seed):
    """Each weight gets the nearest value of its group's grid: float64 brute force over all codes."""
    weight = torch.from_numpy(np.random.default_rng(seed).standard_normal((3, 100))).float()
    q = Integer(bits, group_size, symmetric).encode(weight)
    decoded = q.decode().double()
    size = group_size or 100
    for column in range(100):
        scale = q.scale[:, column // size].double()
        zero = q.zeros()[:, column // size].double()
        grid = (torch.arange(1 << bits).double()[None] - zero[:, None]) * scale[:, None]
        best = (grid - weight[:, column : column + 1].double()).abs().amin(1)
        error = (decoded[:, column] - weight[:, column].double()).abs()
        assert (error <= best + 1e-6).all()


def test_all_zero_constant_and_huge_groups():
    for weight in (torch.zeros(2, 64), torch.full((2, 64), 3.0), torch.full((2, 64), -1e-7), torch.full((2, 64), 1e4)):
        decoded = Integer(4, 32).encode(weight).decode()
        assert torch.isfinite(decoded).all()
        assert (decoded - weight).abs().max() <= weight.abs().max() / 15 + 1e-4


def test_true_bits_per_weight():
    q = Integer(4, 64).encode(torch.randn(128, 256))
    assert q.bits_per_weight == 4 + 16 / 64 + 4 / 64
    assert Integer(4, 64, symmetric=True).encode(torch.randn(128, 256)).bits_per_weight == 4 + 16 / 64
