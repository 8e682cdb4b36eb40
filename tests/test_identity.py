"""A model's fingerprint: any weight changed by any means changes it, and nothing else does."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, MIXTURES, SMALL, tiny

import labkit
from labkit import embedded, identity, paths, shipped
from labkit.linear import PackedLinear
from labkit.model import LanguageModel

IDS = torch.arange(24).view(1, 24)


def with_version(weight, index, value):
    with torch.no_grad():
        weight.view(-1)[index] = value


def through_data(weight, index, value):
    weight.data.view(-1)[index] = value  # leaves no trace in _version


def through_numpy(weight, index, value):
    weight.detach().numpy().reshape(-1)[index] = value


def under_inference_mode(weight, index, value):
    with torch.inference_mode():
        weight.view(-1)[index] = value


EDITS = [with_version, through_data, through_numpy, under_inference_mode]


def named(model) -> dict[str, torch.nn.Parameter]:
    return dict(model.named_parameters())


# ---- changes


once = functools.cache(tiny)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_weight_written_to_by_any_means_changes_it(data):
    lm = once(data.draw(st.sampled_from(sorted(FAMILIES))))
    before = lm.fingerprint
    name = data.draw(st.sampled_from(sorted(named(lm.model))))
    weight = named(lm.model)[name]
    index = data.draw(st.integers(0, weight.numel() - 1))
    was = weight.detach().view(-1)[index].item()
    # to the very next number, and to any other
    near = float(np.nextafter(np.float32(was), np.float32(np.inf)))
    value = data.draw(st.just(near) | st.floats(width=32, allow_nan=False).filter(lambda x: x != was))
    edit = data.draw(st.sampled_from(EDITS))
    edit(weight, index, value)
    assert lm.fingerprint != before
    edit(weight, index, was)
    assert lm.fingerprint == before


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_replaced_tensor_changes_it(data):
    lm = once("Qwen3").copy()
    before = lm.fingerprint
    name = data.draw(st.sampled_from(sorted(named(lm.model))))
    path, _, leaf = name.rpartition(".")
    new = named(lm.model)[name].detach().clone()
    new.view(-1)[data.draw(st.integers(0, new.numel() - 1))] += 1
    with torch.inference_mode(data.draw(st.booleans())):  # an inference tensor has no _version at all
        new = new.clone()
        if data.draw(st.booleans()):
            lm.model = copy.deepcopy(lm.model)  # for the copy shares its parameters
            named(lm.model)[name].data = new
        else:
            setattr(lm.model.get_submodule(path), leaf, torch.nn.Parameter(new, requires_grad=False))
    assert lm.fingerprint != before


def test_a_matrix_of_zeros_but_for_a_sample_is_another_model(tiny_lm):
    """A hash over every 257th part of a tensor let this through."""
    weight = tiny_lm.model.model.layers[0].mlp.up_proj.weight
    before, kept = tiny_lm.fingerprint, weight.view(-1)[:: weight.numel() // 257].clone()
    weight.zero_()
    weight.view(-1)[:: weight.numel() // 257] = kept
    assert tiny_lm.fingerprint != before


def test_two_rows_that_change_places_are_another_model(tiny_lm):
    weight = tiny_lm.model.model.layers[0].mlp.up_proj.weight
    before = tiny_lm.fingerprint
    weight.data[[0, 1]] = weight.data[[1, 0]]
    assert tiny_lm.fingerprint != before


def test_dtype_and_shape_count():
    zeros = [torch.zeros(4, 6), torch.zeros(6, 4), torch.zeros(24), torch.zeros(48).bfloat16(), torch.zeros(24).int()]
    assert len({identity.digest(z) for z in zeros}) == len(zeros)
    assert identity.digest(torch.tensor(1.0)) != identity.digest(torch.tensor(2.0))
    assert identity.digest(torch.empty(0, 3)) != identity.digest(torch.empty(3, 0))
    assert identity.digest(torch.arange(9.0)[4:5].view(1, 1).T) == identity.digest(torch.tensor([[4.0]]))
    assert identity.digest(torch.ones(1, 256)[:, :1]) == identity.digest(torch.ones(1, 1)), "a stride of 256"
    assert identity.digest(torch.arange(24.0).view(4, 6).T) == identity.digest(
        torch.arange(24.0).view(4, 6).T.contiguous()
    )


def test_what_else_decides_the_outputs_counts(tiny_lm):
    before = tiny_lm.fingerprint
    cached = labkit.SnapKV(budget=64)(tiny_lm)
    assert len({before, cached.fingerprint, labkit.SnapKV(budget=65)(tiny_lm).fingerprint}) == 3
    other = tiny_lm.copy()
    other.model.config.rope_parameters = {"rope_theta": 1234.0, "rope_type": "default"}
    assert other.fingerprint != before


ZOO = {  # families whose config says something that neither the weights nor the fields named in CONFIG show
    "Granite": {
        "logits_scaling": 3.0,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.3,
    },
    "DeepseekV3": {"norm_topk_prob": False, "routed_scaling_factor": 1.5, "n_group": 2},
    "Gemma3Text": {"layer_types": ["full_attention", "full_attention"]},
    "SmolLM3": {"no_rope_layers": [1, 0]},
    "Falcon": {"alibi": True},
    "Olmo": {"clip_qkv": 8.0},
    "GPT2": {"scale_attn_by_inverse_layer_idx": True},
}


def configured(family: str, **more):
    import transformers

    fields = MIXTURES.get(family) or SMALL | {"intermediate_size": 96, "num_key_value_heads": 2, "pad_token_id": 0}
    return getattr(transformers, f"{family}Config")(**fields | more)


def holding(config):
    """What identity looks at, without weights."""
    model = torch.nn.Module()
    model.config = config
    return model


@pytest.mark.parametrize("family, field", [(family, field) for family, fields in ZOO.items() for field in fields])
def test_a_field_of_the_config_that_changes_outputs_changes_it(family, field):
    plain, other = configured(family), configured(family, **{field: ZOO[family][field]})
    edited = copy.deepcopy(plain)
    setattr(edited, field, ZOO[family][field])
    found = [identity.fingerprint(holding(c)) for c in (plain, other, edited)]
    assert found[0] != found[1] == found[2]
    assert identity.fingerprint(holding(configured(family))) == found[0]


def test_the_rows_of_a_model_whose_config_was_edited_are_not_the_models():
    from labkit.results import Key

    lm = LanguageModel(holding(configured("Granite")), None, "granite")
    before = Key.of(lm, labkit.RTN(), {"manual": "ab"})
    lm.model.config.logits_scaling = 7.0
    assert Key.of(lm, labkit.RTN(), {"manual": "ab"}) != before


def test_the_length_that_stretched_angles_are_counted_by_changes_it():
    def stretched():
        return {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}

    found = [configured("Llama", rope_parameters=stretched(), max_position_embeddings=n) for n in (256, 512)]
    assert len({identity.fingerprint(holding(c)) for c in found}) == 2
    plain = [configured("Llama", max_position_embeddings=n) for n in (256, 512)]
    assert len({identity.fingerprint(holding(c)) for c in plain}) == 1


# ---- what is no change


def test_cosmetics_and_what_a_class_derives_from_shapes_are_no_change(monkeypatch):
    """So the fingerprint of a Llama, as the embedded model is one, is that of the time before other fields counted."""
    cosmetic = {
        "eos_token_id": [5, 6],
        "pad_token_id": 3,
        "use_cache": False,
        "initializer_range": 0.5,
        "attention_dropout": 0.1,
        "pretraining_tp": 2,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        "dtype": "bfloat16",
        "architectures": ["X"],
        "id2label": {0: "a"},
    }
    for config in (configured("Llama"), configured("Llama", **cosmetic), configured("Qwen2"), configured("Mistral")):
        assert identity._settings(holding(config)) == {}, config.model_type
    with_settings = identity.fingerprint(holding(configured("Llama", **cosmetic)))
    monkeypatch.setattr(identity, "_settings", lambda model: {})
    assert identity.fingerprint(holding(configured("Llama", **cosmetic))) == with_settings


def test_a_field_that_a_new_version_adds_with_a_default_is_no_change(monkeypatch):
    config = configured("Granite", logits_scaling=3.0)
    before = identity.fingerprint(holding(config))
    real = type(config).to_dict
    monkeypatch.setattr(type(config), "to_dict", lambda self: real(self) | {"a_new_multiplier": 1.0})
    assert identity.fingerprint(holding(config)) == before


def test_equal_models_have_equal_fingerprints(each_family):
    again = tiny(each_family.name.removeprefix("tiny-"))
    assert again.fingerprint == each_family.fingerprint == each_family.copy().fingerprint
    same = each_family.copy()
    for name, weight in named(same.model).items():
        path, _, leaf = name.rpartition(".")
        setattr(same.model.get_submodule(path), leaf, torch.nn.Parameter(weight.clone(), requires_grad=False))
    assert same.fingerprint == each_family.fingerprint, "other tensors with the same bytes"


def test_what_a_version_of_transformers_writes_into_a_config_is_no_change(tiny_lm):
    before, config = tiny_lm.fingerprint, tiny_lm.model.config
    config.transformers_version, config._name_or_path, config.use_cache = "6.0.0", "elsewhere", False
    config.a_field_of_the_future = 3
    config.rms_norm_eps = float(np.float32(config.rms_norm_eps))  # as a GGUF holds it
    assert tiny_lm.fingerprint == before


def test_the_device_dtype_and_back(tiny_lm):
    before = tiny_lm.fingerprint
    for weight in named(tiny_lm.model).values():
        weight.data = weight.data.bfloat16().float()
    rounded = tiny_lm.fingerprint
    tiny_lm.model.bfloat16()
    assert len({before, rounded, tiny_lm.fingerprint}) == 3
    tiny_lm.model.float()
    assert tiny_lm.fingerprint == rounded


METHODS = [
    labkit.RTN(bits=4, group_size=32),
    labkit.RTN(format="nf4", group_size=32),
    labkit.Magnitude(sparsity=0.5),
    labkit.Magnitude(pattern="2:4"),
    labkit.SmoothQuant(),
    labkit.H2O(budget=32),
    labkit.Recipe(labkit.RTN(bits=4, group_size=32), labkit.KIVI()),
]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_saved_and_loaded_it_is_the_same(method, tmp_path, monkeypatch):
    lm = tiny()
    calib = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))
    small = method(lm, calib, False) if not isinstance(method, labkit.Recipe) else method(lm)
    assert small.fingerprint != lm.fingerprint == tiny().fingerprint
    assert small.fingerprint == small.copy().fingerprint
    small.model(IDS)  # some layers hand their codes to a kernel now
    folder = small.save(tmp_path / "saved")
    import transformers

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: lm.tokenizer)
    assert labkit.load(folder, device="cpu").fingerprint == small.fingerprint


# ---- packed layers


@pytest.fixture
def packed(tiny_lm):
    small = labkit.RTN(bits=4, group_size=32)(tiny_lm)
    before = small.fingerprint
    small.model(IDS)
    layers = [m for m in small.model.modules() if isinstance(m, PackedLinear)]
    if not all(m.runtime_nbytes for m in layers):
        pytest.skip("no kernel takes packed weights here")
    return small, layers, before


def test_looking_does_not_take_the_codes_out_of_a_kernel(packed):
    small, layers, before = packed
    kernels = [m._kernel for m in layers]
    assert small.fingerprint == before
    assert [m._kernel for m in layers] == kernels and all(m.packed is None for m in layers)
    layers[0].take_back()
    assert small.fingerprint == before and layers[0].released == {}
    layers[0].packed[0, 0] ^= 1
    assert small.fingerprint != before


def test_a_kernel_that_gives_back_other_codes_is_not_believed(packed):
    _, layers, _ = packed
    right = layers[0]._kernel
    layers[0]._kernel = type("Wrong", (), {"__call__": lambda self, x: right(x).roll(1, 0), "nbytes": 1})()
    with pytest.raises(RuntimeError, match="did not give back the codes"):
        layers[0].take_back()


# ---- the store finds nothing under an edited model's key


@pytest.mark.parametrize("edit", EDITS)
def test_a_model_edited_in_place_has_another_key(tiny_lm, edit):
    from labkit.results import Key

    hashes = {"manual": "ab"}
    before = [Key.of(tiny_lm, method, hashes) for method in (None, labkit.RTN())]
    edit(tiny_lm.model.model.layers[1].self_attn.o_proj.weight, 777, 0.5)
    after = [Key.of(tiny_lm, method, hashes) for method in (None, labkit.RTN())]
    assert not set(before) & set(after)
    assert after[1].uncompressed() == after[0] and before[1].uncompressed() == before[0]


def test_a_panel_does_not_answer_for_an_edited_model_from_the_store(tiny_lm, tmp_path, monkeypatch):
    pytest.importorskip("ipywidgets")
    from labkit.measure.measurement import Measurement, Memory, Quality
    from labkit.results import Store
    from labkit.ui.panel import Panel

    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(paths, "data", lambda: tmp_path)  # a store without the shipped rows
    measured = []

    def measure(lm, against=None, **how):
        measured.append(lm.history)
        kl = {} if against is None else {"kl": 0.1, "kl_se": 0.01, "top1": 0.9, "top1_se": 0.01}
        quality = {"manual": Quality(10.0, 0.1, 100, **kl)}
        return Measurement(lm.name, "x", quality, Memory(1000, 800, 4.5, 96, 1), None, "cpu")

    how = {"texts": ("manual",), "latency": False}
    panel = Panel(labkit.RTN, tiny_lm, Store(tmp_path / "s.sqlite"), how, {"group_size": 32}, measure, {"manual": "ab"})
    assert panel.worker.join(20) and len(measured) == 2
    panel.reset()
    assert panel.worker.join(20) and len(measured) == 2, "from the store"
    through_data(tiny_lm.model.model.layers[1].self_attn.o_proj.weight, 777, 0.5)
    panel.reset()
    assert panel.worker.join(20) and len(measured) == 4, "measured again, the uncompressed model too"
    assert len(panel.store.rows()) == 4


# ---- the embedded model


def test_the_frozen_factors_are_the_drawn_ones():
    """To the last bits, in which machines may differ; the shipped ones are what counts."""
    import transformers

    small = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, num_hidden_layers=30, vocab_size=8))
    fixed, fresh = embedded.frozen(model), embedded.drawn(model)
    assert [len(f) for f in fixed[:4]] == [576, 576, 192, 1536] and len(fixed) == len(fresh) == 120
    for a, b in zip(fixed, fresh):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)


def test_damaged_factors_are_not_used(tmp_path, monkeypatch, tiny_lm):
    import shutil

    shutil.copytree(paths.data(), tmp_path / "data")
    monkeypatch.setattr(paths, "data", lambda: tmp_path / "data")
    (file,) = shipped.shipped()["unsnap"].paths
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(OSError, match="unsnap.safetensors is damaged"):
        embedded.frozen(tiny_lm.model)


@pytest.mark.model
def test_the_embedded_model_is_the_one_that_the_shipped_text_was_written_by():
    (file,) = shipped.shipped()["self"].paths
    assert labkit.load(device="cpu", dtype=torch.float32).fingerprint == file.stem == "7a5c5a0ed247712d"
