"""Every weight is accounted for: what a method left as it was is counted, named, saved and said."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from test_bad_input import lettered
from tiny_models import FAMILIES, MIXTURES, tiny
from torch import nn

import labkit
from labkit import LeftUncompressed, Recipe
from labkit.coverage import Coverage, bits_per_weight, coverage, decoder_weights, nbytes, percent
from labkit.walk import blocks, linears, matrices, path_of, weight_of

ON_WEIGHTS = {name: cls for name, cls in labkit.methods().items() if cls.kind != "cache"}
IDS = torch.randint(1, 96, (6, 32), generator=torch.Generator().manual_seed(1))


def counts(family: str) -> dict[str, int]:
    """Weights of the tiny mixtures' decoders, worked out by hand from their configs: linears, experts, routers."""
    c = MIXTURES[family]
    hidden, heads, experts = c["hidden_size"], c["num_attention_heads"], 4
    if family == "DeepseekV3":  # two blocks of latent attention, the first with a dense MLP, the second with experts
        to_queries = (
            24 * hidden + heads * (8 + 8) * 24
        )  # down to the query's rank, up to what is not turned and what is
        to_keys = (16 + 8) * hidden + heads * (8 + 16) * 16
        attention = to_queries + to_keys + hidden * heads * 16
        dense, shared, each = 3 * hidden * 96, 3 * hidden * 32, 3 * hidden * 32
        return {"linears": 2 * attention + dense + shared, "experts": experts * each, "routers": experts * hidden}
    attention = 2 * hidden * heads * 16 + 2 * hidden * c["num_key_value_heads"] * 16
    wide = 32 if family == "Qwen3Moe" else 96
    return {"linears": 2 * attention, "experts": 2 * experts * 3 * hidden * wide, "routers": 2 * experts * hidden}


@pytest.fixture(scope="module", params=MIXTURES)
def mixture(request):
    return request.param, tiny(request.param)


def caught(make) -> tuple[object, list[str]]:
    """What ``make()`` gives, and what it warned of about weights that were left."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        made = make()
    return made, [str(w.message) for w in seen if w.category is LeftUncompressed]


# ---- what is counted


def test_the_decoders_weights_are_those_of_the_config(mixture):
    family, lm = mixture
    by_hand, found = counts(family), decoder_weights(lm)
    assert sum(m.count for m in found) == sum(by_hand.values())
    assert sum(m.count for m in found if m.tensor.dim() == 3) == by_hand["experts"]
    assert sum(m.count for m in found if m.path.endswith((".gate", ".router"))) == by_hand["routers"]
    assert bits_per_weight(lm) == 32 and nbytes(lm) == 4 * sum(by_hand.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_dense_model_these_are_its_linears(family):
    lm = tiny(family)
    found = decoder_weights(lm)
    inside = [weight_of(m) for _, m in linears(blocks(lm.model))]
    assert [m.tensor.data_ptr() for m in found] == [w.data_ptr() for w in inside]
    assert all(lm.model.get_submodule(m.path).weight is m.tensor for m in found)


def test_vectors_are_no_matrices_whatever_their_shape():
    odd = nn.Module()
    odd.scale, odd.mix = nn.Parameter(torch.ones(64)), nn.Parameter(torch.ones(1, 1, 64))
    odd.down_proj_bias, odd.experts = nn.Parameter(torch.ones(4, 64)), nn.Parameter(torch.ones(4, 2, 8))
    odd.gate, odd.conv = nn.Linear(64, 1), nn.Conv1d(8, 8, 3, groups=8)  # a gate with one output is a linear
    assert {m.path: m.count for m in matrices(odd)} == {"experts": 64, "gate": 64, "conv": 24}


# ---- what a method says


@pytest.mark.parametrize("name", ON_WEIGHTS)
def test_no_method_is_silent_about_experts(mixture, name):
    family, lm = mixture
    by_hand = counts(family)
    total = sum(by_hand.values())
    small, said = caught(lambda: ON_WEIGHTS[name]()(lm, IDS, progress=False))
    with torch.inference_mode():
        assert torch.isfinite(small.model(IDS).logits).all()
    now = {m.path: m for m in decoder_weights(small)}
    same = [m for m in decoder_weights(lm) if now[m.path].tensor is not None]
    same = sum(m.count for m in same if torch.equal(m.tensor, now[m.path].tensor))  # by values, not by place
    assert small.coverage.share == (total - same) / total
    if small.coverage.share >= 0.95:
        assert not said
    else:
        assert len(said) == 1 and said[0].startswith(f"After {ON_WEIGHTS[name]().typed()}, ")
        assert all(what in said[0] for what in small.coverage.left)
        assert f"{percent(small.coverage.share)} of the decoder's weights compressed" in repr(small)
    left = " ".join(small.coverage.left)
    assert (same >= by_hand["experts"]) == ("experts.gate_up_proj" in left and "experts.down_proj" in left)


def test_the_words_of_a_warning():
    lm = tiny("Mixtral")
    total, each = sum(counts("Mixtral").values()), 2 * 4 * 64 * 96
    with pytest.warns(LeftUncompressed) as seen:
        small = labkit.RTN(bits=2)(lm, progress=False)
    names = [
        f"model.layers.*.mlp.experts.gate_up_proj (2 blocks, {2 * each / total:.0%}".replace("%", " %)"),
        f"model.layers.*.mlp.experts.down_proj (2 blocks, {each / total:.0%}".replace("%", " %)"),
        "model.layers.*.mlp.gate (2 blocks, under 1 %)",
    ]
    assert small.coverage.left == names
    text = f"After RTN(bits=2), 86 % of the decoder's weights are as they were: {', '.join(names)}."
    assert str(seen[0].message) == text
    assert seen[0].filename == __file__  # where it was called, not inside labkit


@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_dense_model_every_method_reaches_all(family):
    lm = tiny(family)
    for cls in ON_WEIGHTS.values():
        small, said = caught(lambda cls=cls: cls()(lm, IDS, progress=False))
        assert small.coverage == Coverage(sum(m.count for m in decoder_weights(lm)), {}), cls
        assert not said and small.coverage.share == 1 and "compressed" not in repr(small)


@pytest.mark.parametrize("container", ["auto", "dense"])
def test_a_weight_at_the_lossless_end_was_reached(tiny_lm, container):
    same = labkit.Magnitude(sparsity=0.0, container=container)(tiny_lm, progress=False)
    assert same.coverage.share == 1 and same.coverage.compressed == same.coverage.total > 0


@pytest.mark.parametrize("method", [labkit.SnapKV(), labkit.KIVI(), labkit.FewerKVHeads()])
def test_methods_for_the_cache_have_no_weights_to_reach(method):
    lm = tiny("Mixtral")
    small, said = caught(lambda: method(lm, progress=False))
    assert small.coverage == Coverage() and small.coverage.share == 1 and small.coverage.left == [] and not said
    rounded, _ = caught(lambda: labkit.RTN()(lm, progress=False))
    again, said = caught(lambda: method(rounded, progress=False))
    assert again.coverage == rounded.coverage and not said  # said once, when it was done


# ---- several methods


@dataclass(frozen=True)
class HalfExperts(labkit.Method):
    """Half of each expert's weights become zero; nothing else is touched."""

    kind: ClassVar[str] = "prune"

    def apply(self, lm, calib, progress):
        for m in decoder_weights(lm):
            if m.tensor is not None and m.tensor.dim() == 3:
                half = m.tensor * (torch.arange(m.tensor.shape[-1]) % 2)
                setattr(m.module, m.path.rpartition(".")[2], nn.Parameter(half, requires_grad=False))

    def typed(self):
        return "HalfExperts()"


@dataclass(frozen=True)
class Shallow(labkit.Method):
    """The first block is gone."""

    kind: ClassVar[str] = "structure"

    def apply(self, lm, calib, progress):
        del blocks(lm.model)[0]

    def typed(self):
        return "Shallow()"


def test_in_a_recipe_a_weight_counts_once_any_method_has_reached_it():
    lm, by_hand = tiny("Mixtral"), counts("Mixtral")
    total = sum(by_hand.values())
    for first, second in ((HalfExperts(), labkit.RTN()), (labkit.RTN(), HalfExperts())):
        both, said = caught(lambda a=first, b=second: Recipe(a, labkit.SnapKV(), b)(lm, progress=False))
        assert not said  # although each alone leaves much
        assert both.coverage.total == total and both.coverage.compressed == by_hand["linears"] + by_hand["experts"]
        assert both.coverage.left == ["model.layers.*.mlp.gate (2 blocks, under 1 %)"]
        assert "over 99 % of the decoder's weights compressed" in repr(both)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert second(first(lm, progress=False), progress=False).coverage == both.coverage


def test_a_recipe_warns_once_and_for_itself():
    recipe = Recipe(labkit.RTN(bits=8), Recipe(labkit.Magnitude(), labkit.RTN()))
    small, said = caught(lambda: recipe(tiny("Mixtral"), progress=False))
    assert len(said) == 1 and said[0].startswith(f"After {recipe.typed()}, 86 %")
    assert len(small.history) == 3


def test_blocks_that_were_removed_are_not_left():
    lm, by_hand = tiny("Mixtral"), counts("Mixtral")
    total = sum(by_hand.values())
    cut, said = caught(lambda: Shallow()(lm, progress=False))
    assert cut.coverage.share == 0.5 and len(said) == 1
    assert all(path.startswith("model.layers.0.") for path in cut.coverage.untouched)  # what was block 1
    small, _ = caught(lambda: Recipe(Shallow(), labkit.RTN())(lm, progress=False))
    assert small.coverage.compressed == total - by_hand["experts"] / 2 - by_hand["routers"] / 2


def test_coverage_asks_the_models_themselves():
    lm = tiny("Mixtral")
    small, _ = caught(lambda: labkit.RTN()(lm, progress=False))
    assert coverage(small, lm) == small.coverage == small.copy().coverage
    assert coverage(lm.copy(), lm).share == 0  # a copy shares all of it


# ---- bytes


def test_bits_per_weight_count_what_was_left():
    lm, by_hand = tiny("Mixtral"), counts("Mixtral")
    small, _ = caught(lambda: labkit.RTN(bits=2, group_size=32, symmetric=True)(lm, progress=False))
    each = 2 + 16 / 32  # codes, and a scale in fp16 per group
    total = sum(by_hand.values())
    bits = by_hand["linears"] * each + 32 * (total - by_hand["linears"])
    assert bits_per_weight(small) == pytest.approx(bits / total)
    assert nbytes(small) == pytest.approx(bits / 8)


def test_a_kernels_own_copy_is_held(tiny_lm):
    small = labkit.RTN(bits=4, group_size=32)(tiny_lm, progress=False)
    before, bits = nbytes(small), bits_per_weight(small)
    with torch.inference_mode():
        small.model(IDS)
    packed = [m for _, m in linears(blocks(small.model))]
    kept = sum(m.runtime_nbytes for m in packed) + sum(
        b.numel() * b.element_size() for m in packed for b in m.buffers()
    )
    assert nbytes(small) == kept and bits_per_weight(small) == bits == pytest.approx(8 * before / small.coverage.total)


# ---- on disk


def test_a_saved_model_knows_what_was_left(tmp_path):
    lm = tiny("Mixtral")
    lm.tokenizer = lettered().tokenizer
    small, _ = caught(lambda: labkit.RTN()(lm, progress=False))
    again, said = caught(lambda: labkit.load(small.save(tmp_path / "small")))
    assert again.coverage == small.coverage and not said
    assert "14 % of the decoder's weights compressed" in repr(again)
    more, _ = caught(lambda: HalfExperts()(again, progress=False))
    assert more.coverage.left == ["model.layers.*.mlp.gate (2 blocks, under 1 %)"]
    same = labkit.load(lm.save(tmp_path / "dense"))
    assert same.coverage == Coverage()


def test_a_model_saved_before_this_was_recorded(tmp_path):
    small = labkit.RTN(group_size=32)(lettered(), progress=False)
    path = small.save(tmp_path / "small") / "labkit.json"
    manifest = json.loads(path.read_text())
    del manifest["coverage"]
    path.write_text(json.dumps(manifest))
    again = labkit.load(path.parent)
    assert again.coverage == Coverage()  # not known, so nothing is claimed
    assert labkit.Magnitude()(again, progress=False).coverage.share == 1


# ---- which list of blocks


def test_a_tower_for_pictures_is_not_the_decoder():
    import transformers

    text = FAMILIES["Gemma"] | {"num_key_value_heads": 2}
    eyes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=eyes | {"image_size": 32, "patch_size": 16}, mm_tokens_per_image=4
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    tower = model.model.vision_tower.encoder.layers
    stack = blocks(model)
    assert sum(m.count for m in matrices(tower)) > sum(m.count for m in matrices(stack))
    assert path_of(stack, model) == "model.language_model.layers"


class Bare(nn.Module):
    """Blocks with experts alone, beside a short list of linears."""

    def __init__(self):
        super().__init__()
        self.adapters = nn.ModuleList([nn.Linear(32, 32)])
        self.layers = nn.ModuleList([nn.Module(), nn.Module()])
        for block in self.layers:
            block.experts = nn.Parameter(torch.ones(4, 32, 16))


def test_experts_alone_make_a_block():
    model = Bare()
    assert blocks(model) is model.layers
    with pytest.raises(ValueError, match="no list of decoder blocks with weight matrices"):
        blocks(nn.ModuleList([nn.LayerNorm(8)]))


# ---- linears whose input the calibration does not see


class Experts(nn.Module):
    """Three experts of linears; the last is never chosen."""

    def __init__(self, mlp):
        super().__init__()
        self.experts = nn.ModuleList([copy.deepcopy(mlp) for _ in range(3)])

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        out, which = torch.zeros_like(flat), (flat[:, 0] > 0).long()
        for i, expert in enumerate(self.experts):
            rows = (which == i).nonzero()[:, 0]
            if len(rows):
                out[rows] = expert(flat[rows])
        return out.view_as(x)


@pytest.fixture
def idle(tiny_lm):
    for block in tiny_lm.model.model.layers:
        block.mlp = Experts(block.mlp)
    return tiny_lm


def weights(lm, expert: int) -> list[torch.Tensor]:
    return [m.weight for block in blocks(lm.model) for _, m in linears(block.mlp.experts[expert])]


@pytest.mark.parametrize("name", [name for name, cls in ON_WEIGHTS.items() if cls.calibrated])
def test_an_expert_without_tokens_is_compressed_too(idle, name):
    with pytest.warns(UserWarning, match=r"no input of mlp\.experts\.2\.gate_proj in block 0 and 5 more was seen"):
        small = ON_WEIGHTS[name]()(idle, IDS, progress=False)
    assert small.coverage.share == 1
    assert all(torch.isfinite(w).all() for w in weights(small, 2))


@pytest.mark.filterwarnings("ignore:.*no input of")
@pytest.mark.parametrize(
    ("method", "plain"),
    [
        (labkit.Wanda(), labkit.Magnitude(per="row")),
        (labkit.Wanda(repair=True), labkit.Magnitude(per="row")),
        (labkit.SparseGPT(), labkit.Magnitude(per="matrix")),  # of 96 columns at most: one block of them
    ],
)
def test_without_inputs_all_channels_count_alike(idle, method, plain):
    found, expected = (m(idle, IDS, progress=False) for m in (method, plain))
    for mine, theirs in zip(weights(found, 2), weights(expected, 2)):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert not all(torch.equal(a, b) for a, b in zip(weights(found, 0), weights(expected, 0)))


@pytest.mark.filterwarnings("ignore:.*no input of")
@pytest.mark.parametrize("allocation", ["owl", "sensitivity"])
def test_an_allocation_looks_at_them_as_well(idle, allocation):
    small = labkit.Wanda(allocation=allocation)(idle, IDS, progress=False)
    zeros = sum((w == 0).sum().item() for _, m in linears(blocks(small.model)) for w in [m.weight])
    assert zeros / small.coverage.total == pytest.approx(0.5, abs=0.01)


@pytest.mark.filterwarnings("ignore:.*no input of")
def test_a_static_scale_needs_an_input(idle):
    small = labkit.SmoothQuant(activations="static")(idle, IDS, progress=False)
    for block in blocks(small.model):
        scales = [m.activation_scale for m in block.mlp.experts.modules() if hasattr(m, "activation_scale")]
        assert [s is None for s in scales] == 6 * [False] + 3 * [True]


@pytest.mark.filterwarnings("ignore::labkit.LeftUncompressed", "ignore:.*no input of")
@pytest.mark.parametrize("name", [name for name, cls in ON_WEIGHTS.items() if cls.calibrated])
@pytest.mark.parametrize("family", ["HunYuanMoEV1", "Mamba"])
def test_a_block_that_looks_at_a_weight_sees_one(monkeypatch, family, name):
    """A router asks for its weight's dtype, Mamba multiplies by the weight itself: the pass has a stand-in there."""
    small = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96}
    config = {
        "HunYuanMoEV1": MIXTURES["Mixtral"] | {"head_dim": 16, "num_experts": 4, "moe_topk": 2, "pad_token_id": 0},
        "Mamba": small | {"state_size": 8},
    }
    monkeypatch.setitem(MIXTURES, family, config[family])
    lm = tiny(family)
    small = ON_WEIGHTS[name]()(lm, IDS, progress=False)
    with torch.inference_mode():
        assert torch.isfinite(small.model(IDS).logits).all()
    every = {m.path for m in decoder_weights(lm)} - set(small.coverage.untouched)
    assert every >= {f"{path_of(blocks(lm.model), lm.model)}.{n}" for n, _ in linears(blocks(lm.model))}


# ---- words


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0 %"), (1e-6, "under 1 %"), (0.444, "44 %"), (0.95, "95 %"), (0.996, "over 99 %"), (1, "100 %")],
)
def test_percent(share, text):
    assert percent(share) == text


def test_long_lists_are_cut_in_the_warning_alone():
    found = Coverage(700, {f"model.layers.{i}.part{j}": 50 + j for i in range(2) for j in range(7)})
    assert len(found.left) == 7 and found.left[0].startswith("model.layers.*.part6 (2 blocks, 16 %)")
    with pytest.warns(LeftUncompressed, match=r"part3 \(2 blocks, 15 %\) and 3 more\.$"):
        labkit.coverage.tell(labkit.RTN(), found)
