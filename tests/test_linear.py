"""Packed linears compute what their codes say, on every path."""

from __future__ import annotations

import copy

import pytest
import torch

from labkit.formats import NVFP4, Affine, Integer, integers
from labkit.linear import PackedLinear, exact, matmulnbits, tinygemm
from labkit.measure import memory


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [None, 16, 48, 64, 128])
@pytest.mark.parametrize("symmetric", [False, True])
def test_against_float64(bits, group_size, symmetric):
    draw = torch.Generator().manual_seed(bits)
    weight = torch.randn(40, 192, generator=draw)
    q = Integer(bits, group_size, symmetric).encode(weight)
    bias = torch.randn(40, generator=draw)
    layer = PackedLinear(q, bias)
    truth_of = q.decode().double()
    on_kernel = matmulnbits.takes(q, weight.device)
    for rows in (1, 3, 64):
        x = torch.randn(rows, 192, generator=draw)
        truth = x.double() @ truth_of.T + bias.double()

        def error(x=x, truth=truth):
            return (layer(x).double() - truth).norm() / truth.norm()

        assert error() < (1e-2 if on_kernel else 1e-5)  # the kernel rounds activations to int8
        with exact():
            assert error() < 1e-5


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("columns", [192, 200])
def test_codes_come_back_out_of_the_kernel(bits, symmetric, columns):
    weight = torch.randn(48, columns, generator=torch.Generator().manual_seed(bits)) * 0.02
    weight[5] = 0  # an all-zero group
    weight[7] *= 1000
    q = Integer(bits, 64, symmetric).encode(weight)
    layer = PackedLinear(q)
    layer(torch.randn(1, columns))
    assert layer.packed is None and layer.runtime_nbytes > 0  # the runtime has the only copy
    assert memory.held(layer) < layer.runtime_nbytes + q.nbytes - q.packed.numel() + 1
    assert torch.equal(layer.quantized.packed, q.packed)
    assert layer.runtime_nbytes == 0
    layer(torch.randn(1, columns))
    assert torch.equal(layer.state_dict()["packed"], q.packed)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 16, 48, 128])
@pytest.mark.parametrize("columns", [192, 200])
def test_real_valued_zeros_run_on_the_kernel_too(bits, group_size, columns):
    draw = torch.Generator().manual_seed(bits)
    weight = torch.randn(40, columns, generator=draw) * 0.02
    weight[5], weight[6] = 0, 5  # all zero, and all the same
    weight[7] = weight[7].abs() + 1  # zero is far outside of what its codes span
    q = Affine(bits, group_size).encode(weight)
    whole, rest = integers(q)
    spread = rest.repeat_interleave(whole.group_size, 1)[:, :columns]
    assert (whole.decode() + spread - q.decode()).abs().max() < 1e-5
    layer, truth_of = PackedLinear(q), q.decode().double()
    on_kernel = bits != 3 and whole.group_size % 16 == 0
    for rows in (1, 3, 64):
        x = torch.randn(rows, columns, generator=draw)
        truth = x.double() @ truth_of.T
        error = (layer(x).double() - truth).norm() / truth.norm()
        assert error < (1e-2 if on_kernel else 1e-5)
    assert (layer.runtime_nbytes > 0) == on_kernel
    if on_kernel:  # what the whole zeros left is held, and counted
        assert layer.runtime_nbytes >= q.tensors()["packed"].numel() + rest.nbytes
    assert torch.equal(layer.quantized.tensors()["packed"], q.tensors()["packed"]) and layer.runtime_nbytes == 0


def test_many_rows_are_shared_out_over_threads():
    layer = PackedLinear(Integer(4, 32).encode(torch.randn(24, 64)))
    x = torch.randn(201, 64)
    together = layer(x)
    one_by_one = torch.cat([layer(row[None]) for row in x])
    assert torch.equal(together, one_by_one)


def test_kernels_are_there_for_2_4_8_bits():
    cpu = torch.device("cpu")
    weight = torch.randn(16, 192)
    assert all(matmulnbits.takes(Integer(bits, 64).encode(weight), cpu) for bits in (2, 4, 8))
    assert not any(matmulnbits.takes(Integer(bits, 64).encode(weight), cpu) for bits in (3, 5, 6, 7))
    assert not matmulnbits.takes(Integer(4, 24).encode(weight), cpu)
    assert not matmulnbits.takes(Integer(4, 64).encode(weight), torch.device("cuda"))


def test_copy_shares_tensors_and_kernel():
    layer = PackedLinear(Integer(4, 32).encode(torch.randn(16, 64)))
    x = torch.randn(1, 64)
    twin = copy.deepcopy(layer, {id(t): t for t in (*layer.parameters(), *layer.buffers())})
    assert twin.packed is layer.packed
    y = layer(x)
    running = copy.deepcopy(layer, {id(t): t for t in (*layer.parameters(), *layer.buffers())})
    assert torch.equal(twin(x), y) and torch.equal(running(x), y)
    assert running._kernel is layer._kernel
    layer.take_back()
    assert torch.equal(running(x), y)


def test_works_in_bfloat16():
    layer = PackedLinear(Integer(4, 32).encode(torch.randn(16, 64)), dtype=torch.bfloat16)
    assert layer(torch.randn(1, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.weight.dtype == torch.bfloat16


def test_half_changes_what_the_weight_becomes_and_not_what_is_stored():
    weight = torch.randn(16, 64)
    layer = PackedLinear(NVFP4().encode(weight), torch.zeros(16))
    before = layer.weight
    layer = layer.bfloat16()
    assert layer.tensor_scale.dtype == torch.float32 and layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.weight, before.bfloat16())
    assert layer(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_8_bit_kernel_of_torch_computes_what_its_codes_say():
    """torch has the same operator for CPUs, so that its call, if not its GPU kernel, can be checked here."""
    q = Integer(8, None, symmetric=True).encode(torch.randn(64, 576))
    x = torch.randn(5, 576)
    truth = x.double() @ q.decode().double().T
    assert (tinygemm.Kernel(q)(x).double() - truth).norm() / truth.norm() < 2e-2


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("form", [Integer(4, 64), Affine(4, 64), Integer(8, None, symmetric=True)])
def test_tinygemm_against_float64(form):
    weight = torch.randn(64, 576)
    q = form.encode(weight)
    layer = PackedLinear(q).cuda()
    x = torch.randn(5, 576)
    truth = x.double() @ q.decode().double().T
    assert (layer(x.cuda()).cpu().double() - truth).norm() / truth.norm() < 2e-2
    assert layer.runtime_nbytes > 0
    assert torch.equal(layer.quantized.tensors()["packed"].cpu(), q.tensors()["packed"])
