"""The walk: every family, statistics against a direct computation, inputs from compressed blocks."""

from __future__ import annotations

import pytest
import torch

from labkit import RTN
from labkit.formats import Integer
from labkit.linear import PackedLinear, SparseLinear, exact
from labkit.linear.sparse import store
from labkit.walk import linears, walk, weight_of


@pytest.fixture
def windows():
    return torch.randint(0, 96, (3, 20), generator=torch.Generator().manual_seed(1))


def record_inputs(model, windows):
    """An independent look at every linear's input: hooks over whole forward passes."""
    seen = {}
    handles = [
        m.register_forward_pre_hook(lambda mod, args, n=n: seen.setdefault(n, []).append(args[0]))
        for n, m in linears(model)
    ]
    with torch.no_grad():
        for ids in windows:
            model(ids[None], use_cache=False)
    for h in handles:
        h.remove()
    return {n: torch.cat([x.reshape(-1, x.shape[-1]) for x in xs]).double() for n, xs in seen.items()}


@pytest.mark.parametrize("statistic", ["channel_norm", "hessian"])
def test_statistics_are_exact_on_every_family(each_family, windows, statistic):
    inputs = record_inputs(each_family.model, windows)
    by_weight = {weight_of(m).data_ptr(): n for n, m in linears(each_family.model)}
    checked = []

    def solve(weight, stats, path):
        name = by_weight[weight.data_ptr()]
        x = inputs[name]
        assert stats.count == len(x) or stats.count > 0
        torch.testing.assert_close(stats.channel_norm.double(), x.square().sum(0).sqrt(), rtol=1e-4, atol=1e-4)
        if statistic == "hessian":
            torch.testing.assert_close(stats.hessian.double(), 2 * x.T @ x / len(x), rtol=1e-3, atol=1e-4)
        checked.append(name)
        return weight

    walk(each_family, windows, statistic, solve, progress=False)
    inside = [n for n in inputs if "head" not in n and "embed_out" not in n]
    assert sorted(checked) == sorted(inside)


def test_blocks_see_what_compressed_blocks_produce(tiny_lm, windows):
    """Second block's statistic equals the one from a forward pass through a model whose first block is quantized."""
    form = Integer(3, 16)
    norms = []

    def solve(weight, stats, path):
        norms.append(stats.channel_norm)
        return form.encode(weight)

    small = tiny_lm.copy()
    walk(small, windows, "channel_norm", solve, progress=False)
    oracle = RTN(bits=3, group_size=16)(tiny_lm, progress=False)
    inputs = record_inputs(oracle.model, windows)
    name = "model.layers.1.self_attn.q_proj"
    second_block = norms[len(norms) // 2]
    torch.testing.assert_close(second_block.double(), inputs[name].square().sum(0).sqrt(), rtol=1e-4, atol=1e-4)
    dense = record_inputs(tiny_lm.model, windows)[name].square().sum(0).sqrt()
    assert not torch.allclose(second_block.double(), dense, rtol=1e-3)


def test_every_linear_is_given_statistics_of_what_it_will_read(each_family, windows):
    """Within a block too: the inputs seen at calibration are those of the finished, compressed model."""
    form, norms = Integer(3, 16), {}

    def solve(weight, stats, path):
        norms[path] = stats.channel_norm.double()
        return form.encode(weight)

    walk(each_family, windows, "channel_norm", solve, progress=False)
    inputs = record_inputs(each_family.model, windows)
    for path, norm in norms.items():
        torch.testing.assert_close(norm, inputs[path].square().sum(0).sqrt(), rtol=1e-3, atol=1e-4)


def test_batches_in_step_are_as_one(each_family, windows, monkeypatch):
    """Statistics and weights do not depend on how the calibration is cut into batches."""
    found = []
    for batch in (20, 1 << 20):  # one window at a time, all at once
        monkeypatch.setattr("labkit.walk.BATCH", (batch, batch))
        form, norms, model = Integer(3, 16), {}, each_family.copy()

        def solve(weight, stats, path, norms=norms, form=form):
            norms[path] = stats.count, stats.channel_norm
            return form.encode(weight)

        walk(model, windows, "channel_norm", solve, progress=False)
        found.append(norms)
    small, large = found
    assert list(small) == list(large)
    for path, (count, norm) in large.items():
        assert small[path][0] == count, path
        torch.testing.assert_close(small[path][1], norm, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_weight_is_unpacked_once_for_all_batches(tiny_lm, windows, monkeypatch, sparse):
    """And batches see the values that are stored: those of a model that is run as it came out."""
    monkeypatch.setattr("labkit.walk.BATCH", (20, 20))  # three batches
    kind = SparseLinear if sparse else PackedLinear
    reads, weight_as_it_is = [], kind.weight
    monkeypatch.setattr(kind, "weight", property(lambda self: (reads.append(self), weight_as_it_is.fget(self))[1]))
    norms = {}

    def solve(weight, stats, path):
        norms[path] = stats.channel_norm
        return SparseLinear(store(weight * (weight > 0))) if sparse else Integer(3, 16).encode(weight)

    walk(tiny_lm, windows, "channel_norm", solve, progress=False)
    assert len(reads) == len(set(reads)) == len(norms)
    with exact():
        inputs = record_inputs(tiny_lm.model, windows)
    for path, norm in norms.items():
        torch.testing.assert_close(norm.double(), inputs[path].square().sum(0).sqrt(), rtol=1e-4, atol=1e-5)


def test_an_error_in_a_block_leaves_its_linears_in_place(tiny_lm, windows, monkeypatch):
    monkeypatch.setattr("labkit.walk.BATCH", (20, 20))
    before = dict(linears(tiny_lm.model))

    def solve(weight, stats, path):
        if path.endswith("1.mlp.up_proj"):
            raise KeyboardInterrupt
        return weight

    with pytest.raises(KeyboardInterrupt):
        walk(tiny_lm, windows, "hessian", solve, progress=False)
    assert dict(linears(tiny_lm.model)) == before


def test_rtn_on_every_family(each_family, windows):
    small = RTN(bits=4, group_size=32)(each_family, progress=False)
    packed = [m for m in small.model.modules() if isinstance(m, PackedLinear)]
    assert len(packed) >= 8
    with torch.inference_mode():
        assert torch.isfinite(small.model(windows).logits).all()
        assert small.model(windows[:1, :3]).logits.shape == (1, 3, 96)


def test_shared_inputs_are_gathered_once(tiny_lm, windows):
    grams = []
    walk(tiny_lm.copy(), windows, "hessian", lambda w, s, path: grams.append(s) or w, progress=False)
    assert len(grams) == 14 and len({id(s) for s in grams}) == 8  # q/k/v share, gate/up share


def test_unknown_statistic(tiny_lm, windows):
    with pytest.raises(ValueError, match="statistic = 'mean' is not allowed"):
        walk(tiny_lm, windows, "mean", lambda w, s, path: w)
