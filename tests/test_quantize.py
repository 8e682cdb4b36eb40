"""The quantizers against independent oracles: brute force in float64, and what each paper says must hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import labkit
from labkit.fold import folds
from labkit.formats import Affine, Integer
from labkit.linear import W8A8Linear
from labkit.measure import memory
from labkit.quantize.awq import best_factors, clipped
from labkit.quantize.gptq import gptq
from labkit.quantize.hqq import BETA, P, hqq, shrunk
from labkit.quantize.smoothquant import smoothing
from labkit.walk import Flow, Stats, blocks, walk


def inputs(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Correlated activations of very different sizes, as a model's are."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=draw) / columns**0.5 + torch.eye(columns)
    sizes = torch.exp(torch.randn(columns, generator=draw))
    return (torch.randn(rows, columns, generator=draw) @ mix) * sizes


def stats_of(x: torch.Tensor) -> Stats:
    stats = Stats()
    stats.add(x, "hessian")
    return stats


def weights(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


# --- GPTQ


def brute_force(weight, x, bits: int, group_size: int, act_order: bool, damp: float) -> np.ndarray:
    """Optimal brain quantization in a fixed order, float64: after each column, H of what is left is inverted anew."""
    w = weight.double().numpy().copy()
    h = 2 * (x.double().T @ x.double()).numpy() / len(x)
    columns = len(h)
    h += damp * np.trace(h) / columns * np.eye(columns)
    order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(columns)
    form = Integer(bits, group_size)
    static = [p.double().numpy() for p in form.fit(form.groups(weight))]
    out = np.empty_like(w)
    left = list(order)
    scale = zero = None
    for j in order:
        group = j // group_size
        if act_order:
            scale, zero = static[0][:, group], static[1][:, group]
        elif j % group_size == 0:
            now = torch.from_numpy(w[:, j : j + group_size]).float()
            scale, zero = (p[:, 0].double().numpy() for p in form.fit(now[:, None]))
        codes = np.clip(np.round(w[:, j] / scale + zero), 0, 2**bits - 1)
        out[:, j] = (codes - zero) * scale
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        at = left.index(j)
        error = (w[:, j] - out[:, j]) / inverse[at, at]
        w[:, left] -= np.outer(error, inverse[at])
        left.remove(j)
    return out


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits, group_size, columns", [(3, 16, 48), (4, 48, 48), (2, 32, 160), (4, 24, 168)])
def test_gptq_equals_brute_force(bits, group_size, columns, act_order):
    weight, x = weights(12, columns), inputs(400, columns)
    found = gptq(weight, stats_of(x), Integer(bits, group_size), act_order, damp=0.01).decode().double().numpy()
    truth = brute_force(weight, x, bits, group_size, act_order, 0.01)
    different = np.abs(found - truth) > 1e-6
    # A weight that lies on the middle between two codes may fall to either side in fp32, and its row goes on from there.
    assert different.any(axis=1).mean() <= 0.1


def test_the_papers_order_fits_each_grid_when_its_group_comes():
    """act_order=False: a group's grid spans the updated weights; with act-order it spans the weights as they were."""
    weight, x, form, before = weights(12, 64), inputs(400, 64), Integer(3, 16), {}

    def watch(done, columns):
        if done % 16 == 0 and done < 64:
            before[done] = columns[done : done + 16].T.clone()  # the next group, as it is when its turn comes

    scale = gptq(weight, stats_of(x), form, False, watch=watch).tensors()["scale"].float()
    for done, group in before.items():
        torch.testing.assert_close(scale[:, done // 16], form.fit(group[:, None])[0][:, 0], rtol=1e-3, atol=1e-6)
    as_it_was = form.fit(form.groups(weight))[0]
    static = gptq(weight, stats_of(x), form, True).tensors()["scale"].float()
    torch.testing.assert_close(static, as_it_was, rtol=1e-3, atol=1e-6)
    assert ((scale - as_it_was).abs() > 1e-2 * as_it_was)[:, 1:].float().mean() > 0.9


@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_without_correlation_is_plain_rounding(act_order):
    weight = weights(24, 192)
    stats = Stats(count=2, gram=torch.eye(192))
    form = Integer(3, 64)
    assert torch.equal(gptq(weight, stats, form, act_order).packed, form.encode(weight).packed)


@pytest.mark.parametrize("name", ["nf4", "mxfp4", "nvfp4", "fp4", "affine"])
def test_gptq_lowers_the_output_error_in_every_format(name):
    from labkit import formats

    form = formats.by_name(name, **({"bits": 4, "group_size": 32} if name == "affine" else {}))
    weight, x = weights(48, 192), inputs(600, 192)
    errors = [
        (x @ (weight - encoded.decode()).T).square().sum()
        for encoded in (gptq(weight, stats_of(x), form), form.encode(weight))
    ]
    assert errors[0] < 0.8 * errors[1]


def test_a_dead_input_and_a_singular_hessian_are_survived():
    weight, x = weights(16, 96), inputs(20, 96)  # 20 rows cannot fill 96 columns
    x[:, 7] = 0
    encoded = gptq(weight, stats_of(x), Integer(4, 32))
    assert torch.isfinite(encoded.decode()).all()
    assert encoded.decode()[:, 7].abs().max() == 0


def test_an_indefinite_hessian_is_damped_until_it_works():
    gram = torch.eye(32)
    gram[0, 1] = gram[1, 0] = 1.5  # eigenvalue -0.5
    encoded = gptq(weights(8, 32), Stats(count=2, gram=gram), Integer(4, 32))
    assert torch.isfinite(encoded.decode()).all()


@pytest.mark.model
def test_gptq_is_never_worse_than_rounding_on_the_layers_of_the_model(lm):
    form, ratios = Integer(3, 64), {}

    def solve(weight, stats, path):
        encoded = gptq(weight, stats, form)
        errors = []
        for candidate in (encoded, form.encode(weight)):
            change = (weight - candidate.decode()).double()
            errors.append(((change @ stats.gram.double()) * change).sum())
        ratios[path] = (errors[0] / errors[1]).item()
        return encoded

    calib = labkit.text.calibration(lm, windows=8, length=256)
    walk(lm.copy(), calib, "hessian", solve, progress=False)
    assert len(ratios) == 210
    assert max(ratios.values()) <= 1, max(ratios, key=ratios.get)


# --- AWQ


@pytest.fixture
def block(tiny_lm):
    calib = torch.randint(0, 96, (4, 32), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        stack = blocks(tiny_lm.model)
        flow = Flow(tiny_lm.model, stack, calib)
        yield stack[0], lambda block=None: flow.run(0, flow.few(4), block)


def test_a_fold_leaves_the_block_as_it_is(block):
    block, run = block
    before = run()
    found = folds(block, run, head_dim=16)
    assert {f.source for f in found} == {
        "input_layernorm",
        "post_attention_layernorm",
        "self_attn.v_proj",
        "mlp.up_proj",
    }
    draw = torch.Generator().manual_seed(3)
    for fold in found:
        width = block.get_submodule(fold.readers[0]).weight.shape[1]
        fold.apply(block, fold.tie(torch.exp(torch.randn(width, generator=draw)), block))
    torch.testing.assert_close(run(), before, rtol=1e-4, atol=1e-5)


def test_the_best_exponent_is_no_worse_than_none(block):
    block, run = block
    for fold in folds(block, run, head_dim=16):
        before = [block.get_submodule(n).weight for n in fold.readers]
        search = best_factors(block, fold, run, Integer(3, 16))
        assert search.exponents[0] == 0 and min(search.losses) <= search.losses[0]
        assert all(a is b for a, b in zip(before, [block.get_submodule(n).weight for n in fold.readers]))


@pytest.mark.parametrize("group_size, columns", [(16, 64), (None, 64), (24, 64)])
def test_clipping_lowers_the_error_of_every_group(group_size, columns):
    weight, x = weights(16, columns), inputs(300, columns)
    weight[:, ::13] *= 6  # outliers
    form = Integer(3, group_size)
    size = group_size or columns
    change = {
        name: form.groups(weight - e.decode())
        for name, e in {"clip": clipped(weight, x.T @ x, form), "whole": form.encode(weight)}.items()
    }
    for g in range(-(-columns // size)):
        part = x[:, g * size : (g + 1) * size]
        errors = {n: (c[:, g, : part.shape[1]] @ part.T).square().sum(1) for n, c in change.items()}
        assert (errors["clip"] <= errors["whole"] * 1.0001).all()


# --- AWQ and GPTQ together


def same(one, other) -> bool:
    ids = torch.arange(32)[None]
    return torch.equal(one.model(ids).logits, other.model(ids).logits)


def test_without_scaling_and_clipping_the_hybrid_is_gptq(tiny_lm):
    ids = torch.randint(0, 96, (8, 32), generator=torch.Generator().manual_seed(0))
    plain, parts = {"bits": 3, "group_size": 16}, {"scale": False, "clip": False}
    made = {m: m(tiny_lm, ids, progress=False) for m in (labkit.GPTQ(**plain), labkit.AWQGPTQ(**plain, **parts))}
    assert same(*made.values())
    for part in parts:
        one = labkit.AWQGPTQ(**plain, **parts | {part: True})(tiny_lm, ids, progress=False)
        assert not same(one, made[labkit.GPTQ(**plain)]), part


def test_without_compensation_the_hybrid_is_awq(tiny_lm, monkeypatch):
    monkeypatch.setattr(labkit.quantize.awq, "UNCLIPPED", ())  # AWQ leaves q and k unclipped, the hybrid does not
    ids = torch.randint(0, 96, (8, 32), generator=torch.Generator().manual_seed(0))
    knobs = {"bits": 3, "group_size": 16}
    made = labkit.AWQGPTQ(**knobs, compensate=False)(tiny_lm, ids, progress=False)
    assert same(made, labkit.AWQ(**knobs)(tiny_lm, ids, progress=False))


def test_the_default_gptq_is_the_fields(tiny_lm):
    assert set(labkit.AWQGPTQ.knobs()) - set(labkit.GPTQ.knobs()) == {"scale", "clip"}
    assert labkit.GPTQ() == labkit.GPTQ(act_order=True, damp=0.01, compensate=True)


# --- SmoothQuant


def test_smoothing_is_the_papers_formula():
    peak, readers = torch.tensor([4.0, 0.0, 9.0]), [torch.tensor([[1.0, 2.0, -4.0]]), torch.tensor([[-0.5, 1.0, 1.0]])]
    s = smoothing(peak, readers, 0.5)
    np.testing.assert_allclose(s, [4**0.5 / 1**0.5, 1.0, 9**0.5 / 4**0.5], rtol=1e-6)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("rows", [1, 33])
def test_w8a8_is_a_product_of_whole_numbers(static, rows):
    weight, x = weights(40, 96), inputs(rows, 96)
    scale = x.abs().max() / 127 if static else None
    layer = W8A8Linear(weight, torch.ones(40), activation_scale=scale)
    s_w = weight.double().abs().amax(1) / 127
    s_x = scale.double() if static else x.double().abs().amax(1, keepdim=True) / 127
    truth = (x.double() / s_x).round() @ (weight.double() / s_w[:, None]).round().T * s_x * s_w + 1
    torch.testing.assert_close(layer(x).double(), truth, rtol=1e-5, atol=1e-5)


def test_smoothing_helps_where_activations_have_outliers(tiny_lm):
    norm = tiny_lm.model.model.layers[0].input_layernorm
    gain = norm.weight.detach().clone()
    gain[5] *= 200  # one channel far out, as large models have
    norm.weight = torch.nn.Parameter(gain, requires_grad=False)
    ids = torch.randint(0, 96, (4, 32), generator=torch.Generator().manual_seed(0))
    kl = {
        smooth: labkit.divergence(
            labkit.SmoothQuant(smooth=smooth, alpha=0.5)(tiny_lm, ids, progress=False), tiny_lm, ids
        ).kl
        for smooth in (True, False)
    }
    assert kl[True] < 0.5 * kl[False]


# --- HQQ


@pytest.mark.parametrize("bits", [2, 4])
def test_hqq_lowers_its_own_error(bits):
    draw = torch.distributions.StudentT(2.0)
    torch.manual_seed(0)
    weight, form = draw.sample((64, 128)) * 0.1, Affine(bits, 64)

    def error(encoded) -> float:
        return (weight - encoded.decode()).abs().mean().item()

    assert error(hqq(weight, form)) < error(form.encode(weight))
    assert torch.equal(hqq(weight, form, steps=0).tensors()["packed"], form.encode(weight).tensors()["packed"])


@given(st.floats(-2, 2), st.floats(1, 1000))
def test_hqq_shrinks_only_what_is_above_its_threshold(x, beta):
    """0.170 at the authors' β = 10: the residuals of 4-bit weights stay below it."""
    e = float(shrunk(torch.tensor([x], dtype=torch.float64), beta))
    if abs(x) < beta ** (-1 / (2 - P)):
        assert e == 0
    else:
        assert e == pytest.approx(math.copysign(abs(x) - abs(x) ** (P - 1) / beta, x), abs=1e-9)
    threshold = BETA ** (-1 / (2 - P))
    assert threshold == pytest.approx(0.170, abs=5e-4)


def test_hqq_at_4_bits_is_least_squares():
    """With residuals below the threshold one step sets each minimum to the mean of w - code · scale."""
    torch.manual_seed(0)
    weight, form = 0.1 * torch.randn(32, 128), Affine(4, 64)
    groups = form.groups(weight)
    scale, minimum = form.fit(groups)
    codes = form.quantize(groups, (scale, minimum)).double()
    assert not shrunk(groups - form.dequantize(codes, (scale, minimum))).any()
    left = groups.double() - codes * scale[..., None]
    moved = left.mean(-1)
    assert ((left - moved[..., None]).square().sum(-1) <= (left - minimum[..., None]).square().sum(-1)).all()
    found = hqq(weight, form, steps=1).params()[1]
    assert (found - moved).abs().max() < 1e-3 * weight.abs().max()  # as fp16 stores it


# --- mixed precision


def test_the_budget_goes_where_it_saves_most():
    from labkit.quantize.mixed import WIDTHS, allocate

    damage = {"a": 1.0, "b": 0.01, "c": 0.0}
    errors = {path: {bits: 4.0**-bits for bits in WIDTHS} for path in damage}
    sizes = {"a": 100, "b": 100, "c": 50}
    for budget in (2.0, 3.0, 3.7, 8.0):
        width = allocate(damage, errors, sizes, budget)
        spent = sum(width[p] * sizes[p] for p in sizes) / 250
        assert spent <= budget and spent > budget - 1
        assert width["a"] >= width["b"]
    assert allocate(damage, errors, sizes, 3.0) == {"a": 4, "b": 2, "c": 3}  # c is harmless: it gets what is left
    assert set(allocate(damage, errors, sizes, 2.0).values()) == {2}
    assert set(allocate(damage, errors, sizes, 8.0).values()) == {8}


def test_the_width_between_widths_is_rounded_half_up():
    from labkit.quantize.mixed import middle_width

    widths = [middle_width(2 + i / 4) for i in range(25)]
    assert [middle_width(b) for b in (2.25, 2.5, 3.25, 3.5, 4.5, 8.0)] == [2, 3, 3, 4, 5, 8]
    assert widths == sorted(widths) and {widths.count(w) for w in range(3, 8)} == {4}


@pytest.mark.parametrize("bits, group_size", [(3.5, 64), (5.0, 16)])
def test_the_budget_counts_codes_and_the_help_says_what_is_held(tiny_lm, bits, group_size):
    ids = torch.randint(0, 96, (4, 32), generator=torch.Generator().manual_seed(0))
    made = labkit.MixedPrecision(bits=bits, group_size=group_size)(tiny_lm, ids, progress=False)
    layers = [m for m in made.model.modules() if hasattr(m, "format")]
    weights = sum(m.in_features * m.out_features for m in layers)
    codes = sum(m.format["bits"] * m.in_features * m.out_features for m in layers) / weights
    assert bits - 0.3 < codes <= bits
    groups = sum(m.out_features * -(-m.in_features // group_size) for m in layers) / weights
    assert memory.bits_per_weight(made) == pytest.approx(codes + (16 + codes) * groups, rel=0.02)
    assert "3.8 held at groups of 64" in labkit.MixedPrecision.knobs()["bits"].help
    assert round(3.5 + (16 + 3.5) / 64, 1) == 3.8


def test_mixed_precision_beats_an_even_spread_at_equal_bits(tiny_lm):
    ids = torch.randint(0, 96, (8, 32), generator=torch.Generator().manual_seed(0))
    made = labkit.MixedPrecision(bits=3.0, group_size=16)(tiny_lm, ids, progress=False)
    even = labkit.AWQGPTQ(bits=3, group_size=16)(tiny_lm, ids, progress=False)
    used = [m.format["bits"] for m in made.model.modules() if hasattr(m, "format")]
    assert len(set(used)) > 1
    assert made.nbytes <= even.nbytes
    assert labkit.divergence(made, tiny_lm, ids).kl < labkit.divergence(even, tiny_lm, ids).kl
