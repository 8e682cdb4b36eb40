"""Sparse containers give back what was put in, count their bytes, and multiply as the dense matrix does."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny

from labkit import linear
from labkit.formats import Integer
from labkit.linear import SparseLinear, exact
from labkit.linear.sparse import CONTAINERS, CSR, NM, Bitmask, Dense, SparseQuantized, kernels, layer, restore, store
from labkit.measure import memory, sparse_speed
from labkit.walk import linears, take_place, unpack

PLAIN = (Dense, Bitmask, CSR)
TOLERANCE = 1e-5  # of the norm: fp32 sums in another order
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")


def matrix(rows: int, columns: int, sparsity: float, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    """Random, some of it zero at random places, and with an empty and a full row where there is room."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw)
    weight = torch.where(weight == 0, 1, weight).to(dtype)
    kept = torch.rand(rows, columns, generator=draw) >= sparsity
    if rows > 2:
        kept[0], kept[1] = False, sparsity < 1
    return weight * kept


def pattern_matrix(rows: int, columns: int, n: int, m: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    """Random, with at most n of every m neighbours kept: plain Python, so that it is an oracle."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw).to(dtype)
    for row in range(rows):
        for start in range(0, columns, m):
            size = min(m, columns - start)
            allowed = math.ceil(n * size / m)
            keep = torch.randperm(size, generator=draw)[: int(torch.randint(0, allowed + 1, (), generator=draw))]
            gone = torch.ones(size, dtype=torch.bool)
            gone[keep] = False
            weight[row, start : start + size][gone] = 0
    return weight


def error(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> float:
    truth = x.double() @ weight.double().T
    return float((y.double() - truth).norm() / truth.norm().clamp(min=1e-30))


shapes = st.tuples(st.integers(1, 40), st.integers(1, 70))
sparsities = st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0])
patterns = st.integers(2, 16).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m)))


@settings(max_examples=60, deadline=None)
@given(shapes, sparsities, st.sampled_from(DTYPES), st.integers(0, 9))
def test_any_matrix_comes_back_exactly(shape, sparsity, dtype, seed):
    weight = matrix(*shape, sparsity, seed, dtype)
    for cls in PLAIN:
        small = cls.from_dense(weight)
        assert small.shape == shape
        assert small.decode().dtype == dtype
        assert torch.equal(small.decode(), weight), cls.name
        again = restore(json.loads(json.dumps(small.spec())), small.tensors())
        assert torch.equal(again.decode(), weight), cls.name


@settings(max_examples=60, deadline=None)
@given(shapes, patterns, st.sampled_from(DTYPES), st.integers(0, 9))
def test_any_matrix_of_a_pattern_comes_back_exactly(shape, pattern, dtype, seed):
    weight = pattern_matrix(*shape, *pattern, seed, dtype)
    small = NM.from_dense(weight, *pattern)
    assert small.decode().dtype == dtype and torch.equal(small.decode(), weight)
    assert int(small.kept().sum()) >= int((weight != 0).sum())
    again = restore(json.loads(json.dumps(small.spec())), small.tensors())
    assert torch.equal(again.decode(), weight)


@settings(max_examples=40, deadline=None)
@given(shapes, sparsities, st.sampled_from([1, 2, 7]), st.integers(0, 9))
def test_products_equal_dense_ones(shape, sparsity, batch, seed):
    weight = matrix(*shape, sparsity, seed)
    x = torch.randn(batch, shape[1], generator=torch.Generator().manual_seed(seed))
    for cls in PLAIN:
        assert error(cls.from_dense(weight).matmul(x), x, weight) < TOLERANCE, cls.name


@settings(max_examples=40, deadline=None)
@given(shapes, patterns, st.sampled_from([1, 2, 7]), st.integers(0, 9))
def test_pattern_products_equal_dense_ones(shape, pattern, batch, seed):
    weight = pattern_matrix(*shape, *pattern, seed)
    x = torch.randn(batch, shape[1], generator=torch.Generator().manual_seed(seed))
    assert error(NM.from_dense(weight, *pattern).matmul(x), x, weight) < TOLERANCE


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("batch", [1, 5])
def test_16_bit_values_are_multiplied_in_fp32(dtype, batch):
    """600 rows: more than are widened at a time."""
    weight, pairs = matrix(600, 96, 0.5, dtype=dtype), pattern_matrix(600, 96, 2, 4, dtype=dtype)
    x = torch.randn(batch, 96)
    for cls in (Bitmask, CSR):
        assert error(cls.from_dense(weight).matmul(x), x, weight) < TOLERANCE
    assert error(NM.from_dense(pairs).matmul(x), x, pairs) < TOLERANCE


@needs_numba
def test_the_loops_are_what_runs():
    weight = matrix(32, 64, 0.5)
    assert type(Bitmask.from_dense(weight).product()) is kernels.Product
    assert type(NM.from_dense(pattern_matrix(8, 64, 2, 4)).product()) is kernels.Product


@needs_numba
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_shared_out_over_threads(dtype, monkeypatch):
    weight, x = matrix(601, 64, 0.7, dtype=dtype), torch.randn(3, 64)
    product, ran = Bitmask.from_dense(weight).product(), set()
    loop = product.loop
    product.loop = lambda *args: (ran.add(threading.get_ident()), loop(*args))
    before, alone = torch.get_num_threads(), product(x)
    assert ran == {threading.get_ident()}  # so little is done before another thread is awake
    monkeypatch.setattr(kernels, "SMALL", 0)
    torch.set_num_threads(3)
    try:
        together = product(x)
    finally:
        torch.set_num_threads(before)
    assert len(ran) > 1 and torch.equal(alone, together)  # no sum is split
    assert error(alone, x, weight) < TOLERANCE


@needs_numba
@pytest.mark.parametrize("columns", [8, 64, 261])
def test_every_byte_of_a_mask_is_looked_up_right(columns):
    """All 256 bytes at every place of a row, those that have most ones last: what is written past a row's end is not read."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    kept = bits.repeat(1, -(-columns // 8))[:, :columns].bool()
    weight = torch.randn(kept.shape, generator=torch.Generator().manual_seed(1)) * kept
    x = torch.randn(2, columns)
    for batch in (x, x[:1]):
        assert error(Bitmask.from_dense(weight).product()(batch), batch, weight) < TOLERANCE


def test_numba_s_settings_are_left_as_they_were():
    config = pytest.importorskip("numba").config
    before = config.SLP_VECTORIZE
    kernels.loops.__wrapped__()
    assert before == config.SLP_VECTORIZE


def test_without_numba_products_are_dense_ones(monkeypatch):
    monkeypatch.setattr(kernels, "loops", lambda: None)
    weight, pairs, x = matrix(20, 33, 0.5), pattern_matrix(20, 33, 2, 4), torch.randn(3, 33)
    for small, dense in ((Bitmask.from_dense(weight), weight), (NM.from_dense(pairs), pairs)):
        assert type(small.product()) is not kernels.Product
        assert error(small.matmul(x), x, dense) < TOLERANCE


def test_matmul_keeps_leading_dimensions_and_dtype():
    weight = matrix(12, 40, 0.5)
    for cls in PLAIN:
        x = torch.randn(2, 3, 40)
        y = cls.from_dense(weight).matmul(x)
        assert y.shape == (2, 3, 12)
        torch.testing.assert_close(y, x @ weight.T, rtol=1e-4, atol=1e-5)
        assert cls.from_dense(weight).matmul(x.bfloat16()).dtype == torch.bfloat16


# Bytes


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 9), (torch.float16, 9), (torch.float32, 17)])
def test_half_of_the_weights_in_a_bitmask_are_9_bits_per_weight_at_16(dtype, bits):
    weight = sparse_speed.scattered(torch.randn(24, 64), 0.5, torch.Generator().manual_seed(0)).to(dtype)
    assert Bitmask.from_dense(weight).bits_per_weight == bits
    assert NM.from_dense(pattern_matrix(24, 64, 2, 4, dtype=dtype)).bits_per_weight == bits
    assert SparseLinear(Bitmask.from_dense(weight)).stored_nbytes == 24 * 64 * bits // 8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
def test_bytes_are_those_of_the_stored_tensors(dtype, sparsity):
    rows, columns = 10, 37
    weight, size = matrix(rows, columns, sparsity, dtype=dtype), dtype.itemsize
    kept = int((weight != 0).sum())
    assert Dense.from_dense(weight).nbytes == rows * columns * size
    assert Bitmask.from_dense(weight).nbytes == rows * 5 + kept * size
    assert CSR.from_dense(weight).nbytes == 4 * (rows + 1) + 4 * kept + kept * size
    for cls in PLAIN:
        small = cls.from_dense(weight)
        held = SparseLinear(small)
        assert (
            small.nbytes == sum(t.nbytes for t in small.tensors().values()) == held.stored_nbytes == memory.held(held)
        )
        assert small.bits_per_weight == 8 * small.nbytes / (rows * columns)


@pytest.mark.parametrize(("n", "m", "bits"), [(2, 4, 2), (4, 8, 3), (1, 5, 3), (3, 100, 7), (1, 256, 8)])
def test_bytes_of_a_pattern(n, m, bits):
    weight = pattern_matrix(6, 300, n, m, dtype=torch.bfloat16)
    stored = n * -(-300 // m)
    assert NM.from_dense(weight, n, m).nbytes == 6 * (math.ceil(stored * bits / 8) + 2 * stored)


def test_a_kept_zero_is_dropped():
    weight = torch.tensor([[0.0, -0.0, 1.0, 2.0]])
    assert len(Bitmask.from_dense(weight).values) == 2
    assert torch.equal(Bitmask.from_dense(weight).decode(), weight)


# Patterns


def test_a_weight_that_contradicts_its_pattern_names_row_and_group():
    weight = pattern_matrix(5, 16, 2, 4)
    weight[3, 8:12] = torch.tensor([1.0, 2.0, 3.0, 0.0])
    weight[4, :4] = 1
    with pytest.raises(
        ValueError, match=r"does not fit 2:4: row 3, group 2 \(columns 8 to 11\) has 3 .* 2 are allowed"
    ):
        NM.from_dense(weight)


@pytest.mark.parametrize(("n", "m", "columns", "allowed"), [(2, 4, 6, 1), (2, 4, 7, 2), (4, 8, 11, 2)])
def test_a_shorter_last_group_may_keep_its_share_rounded_up(n, m, columns, allowed):
    weight = torch.zeros(2, columns)
    weight[1, columns - columns % m :][:allowed] = 3
    assert torch.equal(NM.from_dense(weight, n, m).decode(), weight)
    weight[1, columns - columns % m :][: allowed + 1] = 3
    with pytest.raises(ValueError, match=f"row 1, group {columns // m} .* {allowed} are allowed"):
        NM.from_dense(weight, n, m)


@pytest.mark.parametrize("pattern", [(0, 4), (4, 4), (5, 4), (2, 257), (2.0, 4), (True, 4)])
def test_patterns_that_are_none(pattern):
    with pytest.raises(ValueError, match=f"pattern {pattern[0]}:{pattern[1]} is not allowed"):
        NM.from_dense(torch.zeros(4, 8), *pattern)


def test_store_takes_a_pattern_in_words():
    weight = pattern_matrix(4, 16, 4, 8)
    assert isinstance(store(weight), Bitmask)
    assert (store(weight, "4:8").n, store(weight, "4:8").m) == (4, 8)
    for bad in ("2-4", "structured", None, "2:4 "):
        with pytest.raises(ValueError, match="must be 'unstructured' or like '2:4'"):
            store(weight, bad)


@pytest.mark.parametrize("cls", [Dense, Bitmask, CSR, NM])
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(4), r"shape \(4,\) cannot be stored"),
        (torch.zeros(0, 4), r"shape \(0, 4\) cannot be stored"),
        (torch.zeros(4, 0), r"shape \(4, 0\) cannot be stored"),
        (torch.zeros(4, 4, dtype=torch.int8), "dtype torch.int8 cannot be stored"),
        (torch.tensor([[0.0, float("nan")]]), "holds 1 NaN or infinite"),
        (torch.tensor([[float("inf"), -float("inf")]]), "holds 2 NaN or infinite"),
    ],
)
def test_what_cannot_be_stored(cls, weight, message):
    with pytest.raises(ValueError, match=message):
        cls.from_dense(weight)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_2_4_is_laid_out_as_torch_does(dtype):
    """torch's own conversion as the oracle: its values, and its 16-bit words with the order of the GPU's tiles undone."""
    conversions = pytest.importorskip("torch.sparse._semi_structured_conversions")
    weight = pattern_matrix(64, 128, 2, 4, dtype=dtype)  # groups with none, one and two kept
    small = NM.from_dense(weight)
    values, reordered = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    assert torch.equal(small.values, values)
    rows, words = reordered.shape
    places = conversions._calculate_meta_reordering_scatter_offsets(rows, words, reordered.dtype, weight.device)
    ours = small.positions.view(torch.int16)
    assert torch.equal(ours, reordered.view(-1)[places].view(rows, words))
    tiled = torch.empty(rows * words, dtype=torch.int16).scatter_(0, places, ours.reshape(-1)).view(rows, words)
    assert torch.equal(conversions.sparse_semi_structured_to_dense_cutlass(small.values, tiled), weight)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_tensor_cores_against_float64():
    weight, x = pattern_matrix(64, 128, 2, 4, dtype=torch.float16), torch.randn(5, 128)
    layer = SparseLinear(NM.from_dense(weight)).cuda()
    assert error(layer(x.half().cuda()).cpu(), x.half(), weight) < 1e-2
    assert layer.runtime_nbytes > 0


# Pruned and quantized


@settings(max_examples=40, deadline=None)
@given(shapes, st.sampled_from([2, 3, 4, 8]), st.sampled_from([None, 16, 24]), st.booleans(), st.booleans())
def test_pruned_and_quantized_is_the_quantized_matrix_with_its_zeros(shape, bits, group_size, symmetric, structured):
    weight = pattern_matrix(*shape, 2, 4) if structured else matrix(*shape, 0.5)
    form = Integer(bits, group_size, symmetric)
    small = SparseQuantized.from_dense(weight, form, (2, 4) if structured else None)
    truth = form.encode(weight).decode()
    assert torch.equal(small.decode(), truth)
    assert not truth[weight == 0].any()
    again = restore(json.loads(json.dumps(small.spec())), small.tensors())
    assert torch.equal(again.decode(), truth)
    x = torch.randn(3, shape[1])
    assert error(small.matmul(x), x, truth) < TOLERANCE


def test_bytes_of_4_bits_and_2_4():
    weight = pattern_matrix(16, 128, 2, 4)
    small = SparseQuantized.from_dense(weight, Integer(4, 64), (2, 4))
    scales = 16 * 2 * 2 + 16  # two groups: fp16 scales, and two 4-bit zero points in a byte
    assert small.nbytes == 16 * 128 * 3 // 8 + scales
    mask = SparseQuantized.from_dense(weight, Integer(4, 64))
    kept = int((mask.decode() != 0).sum())
    assert mask.nbytes == 16 * 128 // 8 + math.ceil(kept / 2) + scales


def test_codes_that_contradict_the_pattern_are_refused():
    with pytest.raises(ValueError, match="does not fit 2:4: row 0, group 0"):
        SparseQuantized.from_dense(torch.ones(4, 8), Integer(4, 8), (2, 4))


# The layer


def each_container(weight: torch.Tensor):
    yield from (cls.from_dense(weight) for cls in PLAIN)
    yield NM.from_dense(weight)
    yield SparseQuantized.from_dense(weight, Integer(4, 16))
    yield SparseQuantized.from_dense(weight, Integer(4, 16, symmetric=True), (2, 4))


def test_every_container_is_tried_here():
    assert {type(c) for c in each_container(pattern_matrix(8, 16, 2, 4))} == set(CONTAINERS.values())


@pytest.mark.parametrize("rows", [1, 5, layer.ROWS, layer.ROWS + 1])
def test_layer_against_float64_on_every_path(rows):
    weight, bias, x = pattern_matrix(24, 64, 2, 4), torch.randn(24), torch.randn(rows, 64)
    for container in each_container(weight):
        made = SparseLinear(container, bias)
        truth = container.decode()
        assert torch.equal(made.weight, truth)
        assert error(made(x) - bias, x, truth) < 10 * TOLERANCE
        with exact():
            assert error(made(x) - bias, x, truth) < 10 * TOLERANCE


def test_layer_in_half_precision():
    for container in each_container(pattern_matrix(16, 64, 2, 4)):
        made = SparseLinear(container, torch.zeros(16))
        before, size = made.weight, made.stored_nbytes
        made(torch.randn(1, 64))
        made = made.bfloat16()
        assert made.dtype == made.weight.dtype == made.bias.dtype == torch.bfloat16
        assert torch.equal(made.weight, before.bfloat16())
        assert made.runtime_nbytes == 0  # a product of the wider values would be stale
        assert made(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
        narrow = made.stored_nbytes
        assert narrow < size or isinstance(container, SparseQuantized)
        assert made.float().stored_nbytes == narrow  # the values stay as they are, and so does the weight
        assert torch.equal(made.weight, made.container.decode().float())


def test_copy_shares_tensors_and_product():
    for container in each_container(pattern_matrix(16, 64, 2, 4)):
        made, x = SparseLinear(container), torch.randn(1, 64)
        y = made(x)
        twin = copy.deepcopy(made, {id(t): t for t in (*made.parameters(), *made.buffers())})
        assert all(getattr(twin, name) is getattr(made, name) for name in container.tensors())
        assert twin._product is made._product
        made.half()
        assert torch.equal(twin(x), y)


def test_other_weights_make_another_product():
    weight, x = matrix(16, 64, 0.5), torch.randn(2, 64)
    made = SparseLinear(Bitmask.from_dense(weight))
    made(x)
    made.load_state_dict(SparseLinear(Bitmask.from_dense(weight.flip(0))).state_dict())  # as many values, in other rows
    assert error(made(x), x, weight.flip(0)) < TOLERANCE


# In a model


def pruned():
    """A tiny model with a different container in each of its linears, in turn."""
    lm = tiny("Qwen2")
    for index, block in enumerate(lm.model.model.layers):
        for number, (name, module) in enumerate(list(linears(block))):
            weight = pattern_matrix(*module.weight.shape, 2, 4, seed=number)
            container = list(each_container(weight))[(index + number) % 6]
            block.set_submodule(name, take_place(module, SparseLinear(container)))
    return lm


def logits(lm):
    with torch.inference_mode():
        return lm.model(torch.arange(12)[None]).logits


def test_a_model_saves_and_gives_identical_logits(tmp_path, monkeypatch):
    import transformers

    lm = pruned()
    before = logits(lm)
    assert torch.isfinite(before).all()
    lm.save(tmp_path / "model")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: lm.tokenizer)
    from labkit.model import load

    again = load(tmp_path / "model", device="cpu")
    assert any(isinstance(m, SparseLinear) for m in again.model.modules())
    assert torch.equal(logits(again), before)
    assert again.nbytes == lm.nbytes and memory.bits_per_weight(again) == memory.bits_per_weight(lm)


def test_a_model_counts_its_bytes():
    lm = pruned()
    layers = memory.linear_layers(lm)
    bits = sum(8 * t.nbytes for m in layers for t in m.buffers())
    assert memory.bits_per_weight(lm) == bits / sum(m.in_features * m.out_features for m in layers)
    held = lm.nbytes
    logits(lm)
    grown = sum(m.runtime_nbytes for m in layers)
    assert lm.nbytes == held + grown


def test_bias_and_dtype_come_from_the_linear():
    old = torch.nn.Linear(16, 8, dtype=torch.bfloat16)
    new = take_place(old, SparseLinear(store(pattern_matrix(8, 16, 2, 4), "2:4")))
    assert new.bias is old.bias and new.dtype == torch.bfloat16
    assert new.values.dtype == torch.bfloat16  # methods work in fp32; 16 bits are what is kept


def test_a_model_unpacks_to_the_same_values():
    lm = pruned()
    weights = [m.weight for m in memory.linear_layers(lm)]
    for block in lm.model.model.layers:
        unpack(block)
    assert all(torch.equal(m.weight, w) for m, w in zip(memory.linear_layers(lm), weights))


def test_a_model_compiles_dense_and_says_so():
    pytest.importorskip("onnxruntime")
    from labkit.engine import compile

    lm = pruned()
    made = compile(lm, context=32, head_bits=None, embedding_bits=None)
    ids = torch.arange(12)[None]
    torch.testing.assert_close(made.logits(ids), logits(lm), rtol=1e-3, atol=1e-3)
    assert any("SparseLinear" in note and "dense fp32" in note for note in made.notes)


def test_a_spec_goes_through_json():
    for container in each_container(pattern_matrix(8, 16, 2, 4)):
        made = SparseLinear(container, torch.zeros(8))
        empty = linear.from_spec(json.loads(json.dumps(made.spec())))
        for name, tensor in made.state_dict().items():
            (empty._parameters if name == "bias" else empty._buffers)[name] = tensor
        assert torch.equal(empty.weight, made.weight)


# Time against sparsity


def test_time_against_sparsity_gives_a_row_per_container():
    rows = sparse_speed.time_against_sparsity((32, 64), 2, (0.0, 0.5, 0.9), rounds=1, min_seconds=0.0)
    names = ["dense", "csr", *(["bitmask", "N:M"] if kernels.loops() else []), "4-bit"]
    half = [r for r in rows if r.sparsity == 0.5]
    assert [r.name for r in half] == names
    assert "N:M" not in {r.name for r in rows if r.sparsity == 0.0}
    assert all(r.seconds > 0 and r.ratio > 0 for r in rows)
    bits = {r.name: r.bits_per_weight for r in half}
    assert bits["dense"] == 32 and (not kernels.loops() or bits["bitmask"] == bits["N:M"] == 17)


def test_crossover_is_where_it_stays_faster():
    def rows(*ratios):
        spots = zip((0.5, 0.7, 0.9, 0.99), ratios)
        return [sparse_speed.SpeedRow("csr", s, 1.0, r, (r, r), 1, 1.0) for s, r in spots]

    assert sparse_speed.crossover(rows(0.5, 0.9, 1.1, 2.0), "csr") == 0.9
    assert sparse_speed.crossover(rows(1.5, 0.9, 1.1, 2.0), "csr") == 0.9  # one lucky point below does not count
    assert sparse_speed.crossover(rows(1.5, 1.2, 1.1, 2.0), "csr") == 0.5
    assert sparse_speed.crossover(rows(0.5, 0.6, 0.7, 0.8), "csr") is None
    assert sparse_speed.crossover(rows(2, 2, 2, 2), "another") is None


@pytest.mark.parametrize("bad", [-0.1, 1.0, 0.555, float("nan"), "half", None, True])
def test_sparsities_that_are_none(bad):
    with pytest.raises(ValueError, match="sparsity = .* is not allowed"):
        sparse_speed.time_against_sparsity((8, 8), 1, (bad,))


def test_random_masks_have_the_share_of_zeros_that_was_asked_for():
    draw = torch.Generator().manual_seed(0)
    weight = torch.ones(8, 100)
    assert ((sparse_speed.scattered(weight, 0.7, draw) == 0).sum(1) == 70).all()
    grouped = sparse_speed.grouped(torch.ones(8, 103), 3, 10, draw)
    assert (grouped[:, :100].view(8, 10, 10).sum(-1) == 3).all() and (grouped[:, 100:].sum(1) == 1).all()
    assert sparse_speed.pattern_of(0.7) == (3, 10) and sparse_speed.pattern_of(0.5) == (2, 4)
    assert sparse_speed.pattern_of(0) is None
