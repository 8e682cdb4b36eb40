"""Where factors can be folded: the same places in 16 bits as in fp32, no wrong ones, and what a method says without them."""

from __future__ import annotations

import warnings

import pytest
import torch
from tiny_models import FAMILIES, Letters, tiny

import labkit
from labkit.fold import Fold, Places, folds, head_dim_of, in_float32
from labkit.linear import exact
from labkit.method import DoneInPart
from labkit.model import LanguageModel
from labkit.walk import Flow, blocks, linears, weight_of

NARROW = (torch.float16, torch.bfloat16)
NORM, LATER = "input_layernorm", "post_attention_layernorm"
OUTLIERS = [3, 40, 50]  # channels


def ids(windows: int = 8, length: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 96, (windows, length), generator=torch.Generator().manual_seed(seed))


@exact()
@torch.no_grad()
def places(lm) -> list[list[Fold]]:
    stack = blocks(lm.model)
    flow, found = Flow(lm.model, stack, ids(2)), []
    for index, block in enumerate(stack):
        hidden = flow.few(1)
        found.append(folds(block, lambda b: flow.run(index, hidden, b), head_dim_of(lm)))  # noqa: B023
        flow.advance(index)
    return found


def post_norm() -> LanguageModel:
    """OLMo 2: its norms come after attention and MLP, so that no linear reads one."""
    import transformers

    config = transformers.Olmo2Config(**FAMILIES["Llama"] | {"pad_token_id": None})
    torch.manual_seed(0)
    return LanguageModel(transformers.AutoModelForCausalLM.from_config(config).eval(), Letters(), "tiny-Olmo2")


# --- in 16 bits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_places_in_16_bits(family):
    lm = tiny(family)
    expected = places(lm)
    assert all(expected)
    for dtype in NARROW:
        lm = tiny(family)
        lm.model.to(dtype)
        assert places(lm) == expected, dtype


def with_outliers(dtype: torch.dtype) -> LanguageModel:
    """A model with large weights, whose norms make three channels 60 times as large; its function is as without them."""
    lm = tiny()
    for block in blocks(lm.model):
        for name, linear in linears(block):
            linear.weight.data *= 6
            if not name.endswith(("o_proj", "down_proj")):
                linear.weight.data[:, OUTLIERS] /= 60
        for norm in (NORM, LATER):
            getattr(block, norm).weight.data[OUTLIERS] *= 60
    lm.model.to(dtype)
    return lm


@pytest.fixture(scope="module")
def damage() -> dict:
    """KL that each method costs at each dtype."""
    methods = {
        "W8A8": labkit.SmoothQuant(smooth=False),
        "SmoothQuant": labkit.SmoothQuant(),
        "unscaled": labkit.AWQ(bits=3, scale=False, clip=False),
        "AWQ": labkit.AWQ(bits=3, clip=False),
        "AWQGPTQ": labkit.AWQGPTQ(bits=3),
    }
    found = {}
    for dtype in (torch.float32, *NARROW):
        lm = with_outliers(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error", DoneInPart)
            small = {name: m(lm, ids(), progress=False) for name, m in methods.items()}
        found[dtype] = {name: labkit.divergence(s, lm, ids(seed=1)).kl for name, s in small.items()}
    return found


@pytest.mark.parametrize("dtype", NARROW)
def test_scaling_helps_in_16_bits_as_in_fp32(damage, dtype):
    wide, narrow = damage[torch.float32], damage[dtype]
    assert wide["SmoothQuant"] < 0.1 * wide["W8A8"] and wide["AWQ"] < 0.95 * wide["unscaled"]
    assert narrow["SmoothQuant"] < 0.1 * narrow["W8A8"]
    for name in ("AWQ", "AWQGPTQ"):
        assert narrow[name] == pytest.approx(wide[name], rel=0.1), name


def test_a_block_that_is_narrow_in_part_is_proved_in_fp32_and_left_alone():
    block = blocks(tiny().model)[0]
    assert in_float32(block) is block
    block.mlp.to(torch.bfloat16)
    twin = in_float32(block)
    assert {p.dtype for p in twin.parameters()} == {torch.float32}
    assert block.mlp.up_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("family", ["Llama", "Gemma"])  # Gemma's norms are stored less 1
def test_a_norms_rounding_is_made_up_for_in_its_readers(family, dtype):
    """Gains become 1/300 of what they are or 300 times as much: less 1 in bf16, 0.003 is 0.004 or 0."""
    lm = tiny(family)
    lm.model.to(dtype)
    block = blocks(lm.model)[0]
    norm, reader = block.input_layernorm, block.self_attn.q_proj
    draw = torch.Generator().manual_seed(0)
    norm.weight = torch.nn.Parameter(norm.weight + 0.1 * torch.randn(64, generator=draw).to(dtype), False)
    offset = float(family == "Gemma")

    def product() -> torch.Tensor:  # float64 (out, in)
        return weight_of(reader).double() * (norm.weight.double() + offset)

    before = product()
    Fold(NORM, ("self_attn.q_proj",), offset).apply(block, torch.logspace(-2.5, 2.5, 64))
    assert ((product() - before).norm(dim=0) <= torch.finfo(dtype).eps * before.norm(dim=0)).all()


def test_a_gain_that_rounding_would_make_zero_stays():
    lm = tiny("Gemma")
    lm.model.to(torch.bfloat16)
    block = blocks(lm.model)[0]
    before = block.self_attn.q_proj.weight.clone()
    Fold(NORM, ("self_attn.q_proj",), 1.0).apply(block, torch.full((64,), 1e4))
    assert (block.input_layernorm.weight == 0).all() and torch.equal(block.self_attn.q_proj.weight, before)


# --- no wrong places


def test_small_weights_prove_nothing():
    """Where gelu's inputs are tiny it is nearly linear, and whatever happens behind them hardly changes the output."""
    for scale in (1.0, 0.02):
        lm = tiny("GPT2")
        for block in blocks(lm.model):
            for _, linear in linears(block):
                linear.weight.data *= scale
        assert [[f.source for f in found] for found in places(lm)] == [["ln_1", "ln_2"]] * 2


# --- what is said


def test_a_method_without_places_says_so():
    lm, calib = post_norm(), ids(2)
    with pytest.warns(DoneInPart, match=r"^SmoothQuant\(alpha=0\.5\): smoothed in none of 2 blocks\.$"):
        small = labkit.SmoothQuant()(lm, calib, progress=False)
    assert small.history == (f"{labkit.SmoothQuant()!r} (smoothed in none of 2 blocks)",)


def test_a_method_with_places_in_some_blocks_says_in_how_many(tmp_path):
    lm, calib = tiny(), ids(2)
    block = blocks(lm.model)[1]
    for name in (NORM, LATER):  # something comes between the norms and their readers
        setattr(block, name, torch.nn.Sequential(getattr(block, name), torch.nn.Hardtanh(-1e9, 1e9)))
    recipe = labkit.Recipe(labkit.SmoothQuant(), labkit.Magnitude())
    with pytest.warns(DoneInPart, match="smoothed in 1 of 2 blocks"):
        small = recipe(lm, calib, progress=False)
    smoothed, pruned = small.history
    assert smoothed == f"{labkit.SmoothQuant()!r} (smoothed in 1 of 2 blocks)" and pruned == repr(labkit.Magnitude())
    (tmp_path / "text.txt").write_text("All that a model is measured on. " * 20)
    short = {"windows": 1, "length": 32, "latency": False, "engine": False, "progress": False}
    measured = labkit.measure(small, texts=str(tmp_path / "text.txt"), **short)
    assert measured.method == f"{smoothed} -> {pruned}"


def test_nothing_is_said_where_all_was_done_or_nothing_asked_for():
    lm, calib = post_norm(), ids(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DoneInPart)
        for model, method in ((tiny(), labkit.AWQ()), (lm, labkit.SmoothQuant(smooth=False)), (lm, labkit.GPTQ())):
            assert method(model, calib, progress=False).history == (repr(method),)


def test_places_in_words():
    counted = Places()
    assert counted.said() is None
    for found in ([], [Fold("a", ("b",))], []):
        counted.count(found)
    assert counted.said() == "scaled in 1 of 3 blocks"
