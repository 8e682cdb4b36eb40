"""What every number format promises: nearest values, honest bits, and a way back from what was stored."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit import formats
from labkit.formats import FORMATS, NF4, NVFP4, Affine, Float8, Integer, by_name, restore

# The name, its settings, and the true bits per weight of a 256 × 1024 matrix.
CASES = [
    ("int", {"bits": 4, "group_size": 64}, 4 + 16 / 64 + 4 / 64),
    ("int", {"bits": 3, "group_size": 64, "symmetric": True}, 3 + 16 / 64),
    ("int", {"bits": 8}, 8 + 24 / 1024),
    ("affine", {"bits": 4, "group_size": 32}, 4 + 32 / 32),
    ("nf4", {}, 4 + 8 / 64 + 32 / (64 * 256) + 32 / (256 * 1024)),
    ("nf4", {"double_quant": False}, 4 + 32 / 64),
    ("fp4", {}, 4 + 16 / 64),
    ("mxfp4", {}, 4 + 8 / 32),
    ("nvfp4", {}, 4 + 8 / 16 + 32 / (256 * 1024)),
    ("fp6_e2m3", {}, 6 + 16 / 64),
    ("fp6_e3m2", {"group_size": 128}, 6 + 16 / 128),
    ("mxfp6", {}, 6 + 8 / 32),
    ("mxfp6", {"variant": "e3m2"}, 6 + 8 / 32),
    ("fp8_e4m3", {}, 8 + 32 / 1024),
    ("fp8_e4m3", {"group_size": 128, "rows": 128}, 8 + 32 / (128 * 128)),
    ("fp8_e5m2", {"rows": None}, 8 + 32 / (256 * 1024)),
    ("mxfp8", {}, 8 + 8 / 32),
    ("mxfp8", {"variant": "e5m2"}, 8 + 8 / 32),
]
FORMS = [by_name(name, **chosen) for name, chosen, _ in CASES]
every_form = pytest.mark.parametrize("form", FORMS, ids=repr)
some_form = st.sampled_from(FORMS)


def normal(rows, columns, seed=0, scale=0.05) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale


def test_every_format_is_tested_here():
    assert {name for name, _, _ in CASES} == set(FORMATS)


@pytest.mark.parametrize("name,chosen,bits", CASES)
def test_true_bits_per_weight(name, chosen, bits):
    encoded = by_name(name, **chosen).encode(normal(256, 1024))
    assert encoded.bits_per_weight == pytest.approx(bits, rel=1e-12)
    assert encoded.nbytes == sum(len(t.contiguous().reshape(-1).view(torch.uint8)) for t in encoded.tensors().values())


@settings(max_examples=150, deadline=None)
@given(some_form, st.integers(1, 6), st.integers(1, 200), st.integers(0, 2**31), st.integers(-6, 2))
def test_nearest_values(form, rows, columns, seed, magnitude):
    """Brute force in float64: no other value of a weight's own grid is nearer, and the error is at most half a step there.

    The grid is read from what was stored. Beyond its ends the error is what the scale's rounding cut off.
    """
    weight = normal(rows, columns, seed, 10.0**magnitude)
    encoded = form.encode(weight)
    assert encoded.shape == (rows, columns)
    params = encoded.params()
    codes = torch.arange(1 << form.bits, dtype=torch.uint8)
    grid = form.dequantize(codes.expand(*params[0].shape, -1), params).double()  # (out, groups, codes)
    grid = grid.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).sort(-1).values
    grid = grid[:, torch.arange(columns) // form.size(columns)]  # (out, in, codes)
    distance = (grid - weight.double()[..., None]).abs().amin(-1)
    error = (encoded.decode().double() - weight.double()).abs()
    # The absmax that chooses an NF4 code is not the one that decodes it: their difference counts on top.
    slack = weight.abs().double() * 1e-6
    if isinstance(form, NF4) and form.double_quant:
        exact = form.groups(weight).abs().amax(-1).double()
        slack = 2 * (params[0].double() - exact).abs()[:, torch.arange(columns) // form.size(columns)] + 1e-12
    assert (error <= distance + slack).all()
    inside = (weight >= grid[..., 0]) & (weight <= grid[..., -1])
    widest = grid.diff(dim=-1).amax(-1)
    assert (error <= widest / 2 + slack)[inside].all()


# Integers fit a new range to what they decoded, and so does the second quantization of NF4's absmaxes.
STABLE = [f for f in FORMS if not isinstance(f, (Integer, Affine)) and not getattr(f, "double_quant", False)]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(STABLE), st.integers(1, 200), st.integers(0, 2**31))
def test_a_second_encoding_changes_nothing(form, columns, seed):
    """The largest magnitude sets the grid and lies on it: the grid is found again, up to the last bit of its scale."""
    once = form.encode(normal(4, columns, seed))
    twice = form.encode(once.decode())
    assert torch.equal(once.codes(), twice.codes())
    torch.testing.assert_close(once.decode(), twice.decode(), rtol=1e-6, atol=0)


@settings(max_examples=60, deadline=None)
@given(some_form, st.integers(1, 5), st.integers(1, 150), st.integers(0, 2**31))
def test_restore(form, rows, columns, seed):
    """Through JSON for the spec, and through copies of the tensors: nothing else is needed."""
    encoded = form.encode(normal(rows, columns, seed))
    spec = json.loads(json.dumps(encoded.spec()))
    back = restore(spec, {name: tensor.clone() for name, tensor in encoded.tensors().items()})
    assert torch.equal(back.decode(), encoded.decode()) and torch.equal(back.codes(), encoded.codes())
    assert back.spec() == encoded.spec() and back.nbytes == encoded.nbytes and back.shape == (rows, columns)
    assert spec["format"] in FORMATS and "packed" in encoded.tensors() and "scale" in encoded.tensors()


@every_form
def test_round_is_quantize_then_dequantize(form):
    groups = form.groups(normal(8, 256))
    for params in (form.fit(groups), form.fit(groups, shrink=0.7)):
        codes = form.quantize(groups, params)
        assert codes.dtype == torch.uint8
        assert torch.equal(form.round(groups, params), form.dequantize(codes, params))


@every_form
def test_column_by_column_equals_all_at_once(form):
    """What GPTQ does: one column at a time, with the parameters of its group."""
    weight = normal(8, 256)
    groups = form.groups(weight)
    params = form.fit(groups)
    codes = form.quantize(groups, params).view(8, -1)
    for column in range(256):
        one = form.slice(params, column // groups.shape[2])
        assert torch.equal(form.quantize(weight[:, column, None, None], one)[:, 0, 0], codes[:, column])
    joined = form.join([form.slice(params, g) for g in range(groups.shape[1])])
    assert torch.equal(form.assemble(codes, joined).decode(), form.encode(weight).decode())


@every_form
def test_shrink_clips_the_range(form):
    groups = form.groups(normal(4, 256))
    full, half = (form.round(groups, form.fit(groups, shrink)).abs().amax() for shrink in (1.0, torch.tensor(0.5)))
    assert half < 0.7 * full
    per_group = torch.ones(groups.shape[:2])
    assert torch.equal(form.round(groups, form.fit(groups, per_group)), form.round(groups, form.fit(groups)))


@every_form
def test_zeros_and_extremes(form):
    signed_zero = torch.tensor([[0.0, -0.0] * 40])
    assert (form.encode(signed_zero).decode() == 0).all()
    mixed = torch.zeros(3, 256)
    mixed[1] = normal(1, 256)
    decoded = form.encode(mixed).decode()
    if not (isinstance(form, Float8) and form.rows != 1):
        assert (decoded[0] == 0).all() and (decoded[2] == 0).all()
    for magnitude in (1e-40, 1e-30, 1e-8, 1e4, 1e30, 3e38):
        weight = normal(3, 100, scale=1.0).clamp(-1, 1) * magnitude
        decoded = form.encode(weight).decode()
        assert torch.isfinite(decoded).all()
        assert decoded.abs().max() <= weight.abs().max() * 1.2 + 1e-3 * (form.name in ("int", "affine"))


@every_form
def test_refuses_what_is_no_finite_matrix(form):
    for bad in (torch.nan, torch.inf, -torch.inf):
        weight = normal(4, 64)
        weight[1, 3] = bad
        with pytest.raises(ValueError, match="holds 1 NaN or infinite values: only finite numbers can be encoded"):
            form.encode(weight)
    for shape in ((5,), (2, 3, 4), (0, 4), (4, 0)):
        with pytest.raises(ValueError, match="must be a matrix"):
            form.encode(torch.zeros(shape))


def test_levels_are_a_table_to_plot():
    for form in FORMS:
        levels = form.levels()
        assert levels.ndim == 1 and torch.equal(levels, levels.unique()) and torch.isfinite(levels).all()
        assert len(levels) <= 1 << form.bits
        weight = normal(1, form.size(64))  # one group: its decoded values are the table's, scaled and shifted
        spread = form.encode(weight).decode().unique()
        assert len(spread) <= len(levels)


def test_wider_formats_are_closer():
    weight = normal(64, 1024)

    def error(name, **chosen):
        return ((by_name(name, **chosen).encode(weight).decode() - weight).norm() / weight.norm()).item()

    assert error("mxfp6") < error("nvfp4") < error("mxfp4")
    assert (
        error("mxfp6") < error("mxfp8") < 1.2 * error("mxfp6")
    )  # both have 3 mantissa bits: E4M3's 2 more buy only range
    assert (
        error("nf4") < error("fp4") < error("mxfp4")
    )  # on normal weights the quantiles win, and a real-valued scale helps
    assert error("fp8_e4m3") < error("fp8_e5m2")


def test_nvfp4_like_keeps_the_tensor_scale():
    form, weight = NVFP4(), normal(4, 64)
    groups = form.groups(weight)
    whole = form.fit(groups)
    part = form.fit(groups[:, 1:2] * 3, like=form.slice(whole, 1))
    assert torch.equal(part[1], whole[1]) and part[0].shape == (4, 1)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: by_name("nf3"), "format = 'nf3' is not allowed: it must be one of int, nf4"),
        (lambda: by_name("mxfp4", group_size=64), "has no setting 'group_size': it takes nothing"),
        (lambda: by_name("fp8_e4m3", variant="e5m2"), "has no setting 'variant'"),
        (lambda: Float8("e3m4"), "variant = 'e3m4' is not allowed: it must be 'e4m3' or 'e5m2'"),
        (lambda: formats.FP6("e2m1"), "variant = 'e2m1'"),
        (lambda: formats.MXFP8("e2m3"), "variant = 'e2m3'"),
        (lambda: NF4(group_size=0), "group_size = 0 is not allowed"),
        (lambda: Float8(rows=0), "rows = 0 is not allowed"),
        (lambda: Integer(9), "bits = 9 is not allowed"),
    ],
)
def test_bad_settings(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_settings_by_name():
    assert formats.settings("int") == ("bits", "group_size", "symmetric")
    assert formats.settings("mxfp4") == () and formats.settings("fp8_e4m3") == ("group_size", "rows")
