"""Pruners: exact sparsity, valid patterns, and the papers' procedures against brute force in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit import Magnitude, SparseGPT, Wanda
from labkit.formats import Integer
from labkit.measure.memory import bits_per_weight
from labkit.prune.allocate import outliers, spread
from labkit.prune.common import keep_mask, nm_mask, parse_pattern
from labkit.prune.repair import repaired
from labkit.prune.sparsegpt import sparsegpt
from labkit.walk import Stats, blocks, linears, weight_of

ALL = [Magnitude, Wanda, SparseGPT]


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stats_of(x: torch.Tensor) -> Stats:
    stats = Stats()
    stats.add(x, "hessian")
    return stats


def error(change: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The squared output error of each row, in float64."""
    return (x.double() @ change.double().T).square().sum(0)


def weights(lm):
    return [weight_of(m) for block in blocks(lm.model) for _, m in linears(block)]


@pytest.fixture
def windows():
    return torch.randint(0, 96, (3, 20), generator=torch.Generator().manual_seed(1))


# Masks


@given(
    rows=st.integers(1, 9), columns=st.integers(1, 40), sparsity=st.floats(0, 1), per=st.sampled_from(["row", "matrix"])
)
@settings(deadline=None)
def test_exactly_so_many_are_dropped_and_they_are_the_lowest(rows, columns, sparsity, per):
    scores = draw(rows * 41 + columns, rows, columns).abs()
    mask = keep_mask(scores, sparsity, None, per)
    for s, m in zip(scores, mask) if per == "row" else [(scores, mask)]:
        assert (~m).sum() == int(sparsity * s.numel() + 1e-9)
        if m.any() and not m.all():
            assert s[m].min() >= s[~m].max()


@given(rows=st.integers(1, 5), columns=st.integers(1, 40), of=st.integers(2, 9), data=st.data())
@settings(deadline=None)
def test_every_group_keeps_n_of_m(rows, columns, of, data):
    keep = data.draw(st.integers(1, of - 1))
    mask = nm_mask(draw(columns, rows, columns).abs(), keep, of)
    for start in range(0, columns, of):
        group = mask[:, start : start + of]
        expected = keep if group.shape[1] == of else -(-keep * group.shape[1] // of)
        assert (group.sum(1) == expected).all()


def test_two_of_four_is_the_best_of_all_six_choices():
    """With inputs that do not correlate, |w|·‖x‖ finds the mask of least output error; by trying every one."""
    weight, norms = draw(0, 7, 4), draw(1, 4).abs() + 0.1
    best = []
    for row in weight:
        losses = {kept: sum((row[j] * norms[j]) ** 2 for j in range(4) if j not in kept).item()
                  for kept in itertools.combinations(range(4), 2)}  # fmt: skip
        best.append(min(losses, key=losses.get))
    mask = nm_mask(weight.abs() * norms, 2, 4)
    assert [tuple(row.nonzero()[:, 0].tolist()) for row in mask] == best


# The papers' procedures


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_wanda_is_its_formula(tiny_lm, windows, pattern):
    layer = "model.layers.0.self_attn.q_proj"
    seen = []
    handle = tiny_lm.model.get_submodule(layer).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        tiny_lm.model(windows)
    handle.remove()
    weight = weight_of(tiny_lm.model.get_submodule(layer)).double()
    scores = weight.abs() * seen[0].reshape(-1, 64).double().square().sum(0).sqrt()
    small = weight_of(Wanda(pattern=pattern)(tiny_lm, windows, progress=False).model.get_submodule(layer)).double()
    expected = torch.zeros_like(weight)
    size, kept = (4, 2) if pattern == "2:4" else (64, 32)
    for i, start in itertools.product(range(len(weight)), range(0, 64, size)):
        for j in sorted(range(start, start + size), key=lambda j: scores[i, j], reverse=True)[:kept]:
            expected[i, j] = weight[i, j]
    assert torch.equal(small, expected)


def brute_force(weight, hessian, sparsity, pattern, width, damp=0.01):
    """Algorithm 1 of SparseGPT with an explicit inverse for every column: no Cholesky factor, no lazy updates."""
    w, h = weight.double().clone(), hessian.double().clone()
    columns = len(h)
    h += damp * h.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    inverses = [torch.linalg.inv(h[j:, j:]) for j in range(columns)]
    price = torch.stack([inverse[0, 0] for inverse in inverses])
    keep = torch.ones_like(w, dtype=torch.bool)
    for j in range(columns):
        if not pattern and j % width == 0:
            near = slice(j, j + width)
            scores = w[:, near].square() / price[near]
            count = int(sparsity * scores.numel() + 1e-9)
            keep[:, near] = (scores.flatten().argsort().argsort() >= count).view_as(scores)
        if pattern and j % pattern[1] == 0:
            near = slice(j, j + pattern[1])
            rank = (w[:, near].square() / price[near]).argsort(1, descending=True).argsort(1)
            keep[:, near] = rank < pattern[0]
        wrong = w[:, j] * ~keep[:, j]
        w[:, j:] -= wrong[:, None] / inverses[j][0, 0] * inverses[j][0]
        w[:, j] = w[:, j] * keep[:, j]
    return w


@pytest.mark.parametrize("pattern", [None, (2, 4), (1, 4)])
def test_sparsegpt_equals_brute_force(monkeypatch, pattern):
    monkeypatch.setattr("labkit.prune.sparsegpt.BLOCK", 8)
    x = draw(2, 200, 24) @ draw(3, 24, 24)
    weight, stats = draw(4, 6, 24), stats_of(x)
    pruned, keep, _ = sparsegpt(weight, stats, 0.5, pattern)
    expected = brute_force(weight, stats.hessian, 0.5, pattern, 8)
    torch.testing.assert_close(pruned.double(), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(pruned != 0, keep)


def test_without_correlation_sparsegpt_is_wanda_over_blocks():
    """H diagonal: nothing can make up for anything, and the price is (w·‖x‖)²."""
    norms = draw(5, 32).abs() + 0.5
    weight, stats = draw(6, 8, 32), stats_of(torch.diag(norms))
    pruned, _, _ = sparsegpt(weight, stats, 0.5, (2, 4), damp=0.0001)
    assert torch.equal(
        pruned, weight * nm_mask(weight.abs() * (norms.square() + 1e-4 * norms.square().mean()).sqrt(), 2, 4)
    )


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_each_method_errs_less_than_the_one_before(pattern):
    """Outputs of one layer on correlated inputs with an outlier channel."""
    x = draw(7, 512, 64) @ draw(8, 64, 64)
    x[:, 5] *= 20
    weight, stats, parsed = draw(9, 48, 64), stats_of(x), parse_pattern(pattern)
    by_size = weight * keep_mask(weight.abs(), 0.5, parsed, "row")
    by_input = weight * keep_mask(weight.abs() * stats.channel_norm, 0.5, parsed, "row")
    swept, keep, _ = sparsegpt(weight, stats, 0.5, parsed)
    fitted = repaired(swept, keep, stats.hessian)
    uncompensated, _, _ = sparsegpt(weight, stats, 0.5, parsed, compensate=False)
    found = [error(weight - w, x).sum().item() for w in (by_size, by_input, swept)]
    assert found[0] > found[1] > found[2]
    assert error(weight - uncompensated, x).sum() > error(weight - swept, x).sum()
    assert error(weight - repaired(weight, keep, stats.hessian), x).sum() <= error(weight - swept, x).sum() * 1.001
    assert torch.equal(fitted != 0, keep)


def test_repair_is_least_squares():
    """Row by row against lstsq in float64, rows that keep all, none or any number of weights."""
    x = draw(10, 300, 20) @ draw(11, 20, 20)
    weight, mask = draw(12, 40, 20), draw(13, 40, 20) > 0
    mask[0], mask[1] = False, True
    found = repaired(weight, mask, stats_of(x).hessian, damp=1e-9).double()
    for w, m, got in zip(weight.double(), mask, found):
        expected = torch.zeros_like(w)
        if m.any():
            expected[m] = torch.linalg.lstsq(x.double()[:, m], x.double() @ w).solution
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_joint_rounding_lies_on_the_grid_and_errs_less_than_one_after_the_other(pattern):
    x = draw(14, 400, 128) @ draw(15, 128, 128)
    weight, stats, form = draw(16, 32, 128), stats_of(x), Integer(3, 64)
    joint, keep, grid = sparsegpt(weight, stats, 0.5, pattern, form=form)
    groups = form.groups(joint)
    on_grid = form.round(groups, grid).reshape(32, -1)
    torch.testing.assert_close(joint, on_grid * keep, rtol=0, atol=1e-5)
    after, mask, _ = sparsegpt(weight, stats, 0.5, pattern)
    rounded = form.round(form.groups(after), form.fit(form.groups(after))).reshape(32, -1) * mask
    assert error(weight - joint, x).sum() < error(weight - rounded, x).sum()


# Methods on models


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("knobs", [{"sparsity": 0.3}, {"pattern": "2:4"}, {"pattern": "1:3", "sparsity": 2 / 3}])
def test_every_family_is_pruned_as_asked(each_family, windows, cls, knobs):
    small = cls(**knobs)(each_family, windows, progress=False)
    pattern = parse_pattern(knobs.get("pattern", "unstructured"))
    for weight in weights(small):
        columns = weight.shape[1]
        zeros = weight == 0
        if pattern:
            of = pattern[1]
            for start in range(0, columns - columns % of, of):
                assert (zeros[:, start : start + of].sum(1) >= of - pattern[0]).all()
        elif cls is Wanda:
            assert (zeros.sum(1) == int(0.3 * columns + 1e-9)).all()
        else:
            width = 128 if cls is SparseGPT else columns  # where weights compete
            for part in zeros.split(width, dim=1):
                assert part.sum() == int(0.3 * part.numel() + 1e-9)
    with torch.inference_mode():
        assert torch.isfinite(small.model(windows).logits).all()


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_nothing_and_everything(tiny_lm, windows, cls, sparsity):
    small = cls(sparsity=sparsity)(tiny_lm, windows, progress=False)
    for before, after in zip(weights(tiny_lm), weights(small)):
        assert torch.equal(after, before if sparsity == 0 else torch.zeros_like(before))


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        (
            {"pattern": "4:2"},
            "pattern = '4:2' is not allowed: it must be 'unstructured', or N:M such as '2:4', with N < M",
        ),
        ({"pattern": "0:4"}, "must be"),
        ({"pattern": "two of four"}, "must be"),
        ({"pattern": "2:4", "sparsity": 0.6}, "sparsity = 0.6 contradicts pattern = '2:4': 2 of 4 are kept, so .* 0.5"),
        ({"pattern": "1:4"}, "must be 0.75"),
        ({"sparsity": 1.2}, "sparsity = 1.2 is not allowed"),
    ],
)
def test_bad_knobs_are_named(cls, knobs, words):
    with pytest.raises(ValueError, match=f"{cls.__name__}.*{words}"):
        cls(**knobs)


def test_what_does_not_go_together_is_refused(tiny_lm, windows):
    with pytest.raises(ValueError, match="repair = True is not allowed with bits"):
        SparseGPT(bits=4, repair=True)
    with pytest.raises(ValueError, match="container = 'csr' is not allowed with bits"):
        SparseGPT(bits=4, container="csr")
    with pytest.raises(ValueError, match="allocation = 'owl' is not allowed with pattern = '2:4'"):
        Wanda(pattern="2:4", allocation="owl")(tiny_lm, windows, progress=False)


# How they are stored


@pytest.mark.parametrize(
    ("knobs", "bits"),
    [
        ({}, 1 + 32 / 2),
        ({"pattern": "2:4"}, 32 / 2 + 2 / 2),
        ({"container": "csr"}, 32),  # 32-bit columns beside 32-bit values, and where rows begin
        ({"container": "dense"}, 32),
    ],
)
@pytest.mark.parametrize("cls", ALL)
def test_bits_per_weight_are_those_of_the_container(tiny_lm, windows, cls, knobs, bits):
    small = cls(**knobs)(tiny_lm, windows, progress=False)
    assert bits_per_weight(small) == pytest.approx(bits, rel=0.03)
    dense = cls(**(knobs | {"container": "dense"}))(tiny_lm, windows, progress=False)
    for a, b in zip(weights(small), weights(dense)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_joint_rounding_is_stored_in_codes_of_what_is_kept(tiny_lm, windows, pattern):
    knobs = {"bits": 4, "group_size": 32, "pattern": pattern}
    small = SparseGPT(**knobs)(tiny_lm, windows, progress=False)
    dense = SparseGPT(**knobs, container="dense")(tiny_lm, windows, progress=False)
    scales = (16 + 4) / 32
    assert bits_per_weight(small) <= 1 + 4 / 2 + scales + 0.2
    assert bits_per_weight(dense) == pytest.approx(4 + scales, abs=0.01)
    for a, b in zip(weights(small), weights(dense)):
        assert torch.equal(a, b)
        assert (a == 0).float().mean() >= 0.5


# Where zeros go


@given(st.lists(st.tuples(st.floats(-20, 20), st.integers(1, 1000)), min_size=1, max_size=12), st.floats(0, 1))
def test_allocation_keeps_the_mean_and_spares_the_worthy(blocks, sparsity):
    worth, sizes = zip(*blocks)
    shares = spread(list(worth), list(sizes), sparsity)
    assert sum(s * n for s, n in zip(shares, sizes)) / sum(sizes) == pytest.approx(sparsity, abs=1e-9)
    assert all(-1e-9 <= s <= 1 + 1e-9 for s in shares)
    for (a, s), (b, t) in itertools.combinations(zip(worth, shares), 2):
        assert (a - b) * (s - t) <= 1e-9


def test_owl_counts_outliers_against_one_mean_of_the_whole_block():
    """As the authors' code: all scores of the block in one row, one mean, the share above five times that."""
    draw = torch.Generator().manual_seed(0)
    quiet, loud = torch.rand(40, 30, generator=draw), 8 * torch.rand(10, 30, generator=draw)
    joined = torch.cat([quiet.flatten(), loud.flatten()]).double()
    expected = (joined > 5 * joined.mean()).double().mean().item()
    assert outliers([quiet, loud]) == pytest.approx(expected) and expected > 0
    assert outliers([quiet]) == outliers([loud]) == 0  # neither has outliers of its own


@pytest.mark.parametrize("allocation", ["owl", "sensitivity"])
@pytest.mark.parametrize("cls", [Wanda, SparseGPT])
def test_allocated_sparsity_is_right_on_average(tiny_lm, windows, cls, allocation):
    small = cls(sparsity=0.6, allocation=allocation)(tiny_lm, windows, progress=False)
    found = [(w == 0).float().mean().item() for w in weights(small)]
    assert sum((w == 0).sum().item() for w in weights(small)) / sum(w.numel() for w in weights(small)) == pytest.approx(
        0.6, abs=0.01
    )
    assert max(found) - min(found) > 0.05
