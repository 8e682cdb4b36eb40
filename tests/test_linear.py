"""Packed linears compute what their codes say, on every path."""

from __future__ import annotations

import copy

import pytest
import torch

from labkit.formats import Integer
from labkit.linear import PackedLinear, matmulnbits


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [None, 16, 48, 64, 128])
@pytest.mark.parametrize("symmetric", [False, True])
def test_against_float64(bits, group_size, symmetric):
    draw = torch.Generator().manual_seed(bits)
    weight = torch.randn(40, 192, generator=draw)
    q = Integer(bits, group_size, symmetric).encode(weight)
    bias = torch.randn(40, generator=draw)
    layer = PackedLinear(q, bias)
    exact = q.decode().double()
    for rows in (1, 3, 64):
        x = torch.randn(rows, 192, generator=draw)
        truth = x.double() @ exact.T + bias.double()
        error = (layer(x).double() - truth).norm() / truth.norm()
        on_kernel = rows <= 32 and matmulnbits.takes(bits, q.group_size)
        assert error < (1e-2 if on_kernel else 1e-5)  # the kernel rounds activations to int8


def test_kernels_are_there_for_2_4_8_bits():
    assert all(matmulnbits.takes(bits, 64) for bits in (2, 4, 8))
    assert not any(matmulnbits.takes(bits, 64) for bits in (3, 5, 6, 7))
    assert not matmulnbits.takes(4, 24)


def test_copy_shares_tensors_and_works():
    layer = PackedLinear(Integer(4, 32).encode(torch.randn(16, 64)))
    x = torch.randn(1, 64)
    y = layer(x)
    twin = copy.deepcopy(layer, {id(t): t for t in (*layer.parameters(), *layer.buffers())})
    assert twin.packed is layer.packed
    assert torch.equal(twin(x), y)
    assert layer.runtime_nbytes > 0


def test_works_in_bfloat16():
    layer = PackedLinear(Integer(4, 32).encode(torch.randn(16, 64)), dtype=torch.bfloat16)
    assert layer(torch.randn(1, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
