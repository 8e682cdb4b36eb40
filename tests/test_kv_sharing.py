"""Heads that share: bytes from shapes against real caches, MLA against transformers' and against itself, pooled heads."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import FAMILIES, Letters, tiny

import labkit
from labkit.cache import RecentKV
from labkit.cache.sharing import AttentionShape, FewerKVHeads, MultiHeadLatentAttention, catalogue, kv_bytes
from labkit.measure import memory, roofline
from labkit.model import LanguageModel
from labkit.quantize import RTN

# --- bytes from shapes ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma", "Phi", "OPT", "GPTNeoX", "GPT2"])
def test_bytes_are_those_of_a_real_cache(family):
    lm = tiny(family)
    for tokens in (1, 7, 100):
        held = memory.cache_bytes(lm.model(torch.ones(1, tokens, dtype=torch.long), use_cache=True).past_key_values)
        assert kv_bytes(AttentionShape.of(lm), tokens, "fp32") == held


def test_sliding_windows_are_those_of_a_real_cache():
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = transformers.Gemma3TextConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=6, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, vocab_size=32, sliding_window=17, layer_types=kinds, pad_token_id=0,
    )  # fmt: skip
    shape = AttentionShape(layers=6, heads=2, kv_heads=1, head_dim=16, window=16, full_layers=1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for tokens in (10, 16, 50):
        with torch.inference_mode():
            kept = model(torch.ones(1, tokens, dtype=torch.long), use_cache=True).past_key_values
        # between two forwards transformers keeps one token less than a query sees: the query brings the last one
        assert kv_bytes(shape, tokens, "fp32") == sum(4 * 2 * layer.keys.numel() for layer in kept.layers)


@pytest.mark.parametrize(
    "name, config",
    [
        ("GPT-2", transformers.GPT2Config()),
        ("Llama-2-7B", transformers.LlamaConfig()),
        ("Mistral-7B", transformers.MistralConfig()),
        ("gpt-oss-120b", transformers.GptOssConfig()),
        ("DeepSeek-V3", transformers.DeepseekV3Config()),
    ],
)
def test_the_catalogue_is_what_transformers_says(name, config):
    """Where the library's default configuration is the published model."""
    shape = catalogue()[name]
    heads = config.num_attention_heads
    assert (shape.layers, shape.heads) == (config.num_hidden_layers, heads)
    assert shape.kv_heads == (getattr(config, "num_key_value_heads", None) or heads)
    assert shape.window == getattr(config, "sliding_window", None)
    if shape.full_layers is not None:
        assert shape.full_layers == config.layer_types.count("full_attention")
    if shape.latent:
        assert (shape.latent, shape.rope) == (config.kv_lora_rank, config.qk_rope_head_dim)
    else:
        assert shape.head_dim == (getattr(config, "head_dim", None) or config.hidden_size // heads)


def test_the_catalogue_has_every_kind_and_figures_known_from_the_papers():
    found = catalogue()
    assert {s.kind for s in found.values()} == {"MHA", "GQA", "MQA", "MLA"}
    assert all(s.source and s.label == "modelled" and s.context for s in found.values())
    per_token = {name: kv_bytes(s, 1) for name, s in found.items()}
    assert per_token["Llama-2-7B"] == 2 * 32 * 4096 * 2 == 512 * 1024
    assert per_token["Llama-2-7B"] == 4 * per_token["Llama-3-8B"]
    # DeepSeek-V2, section 2.1.4: MLA's cache is that of GQA with 2.25 groups (head_dim 128)
    v3 = found["DeepSeek-V3"]
    assert v3.per_token == 2.25 * 2 * 128 and per_token["DeepSeek-V3"] == 61 * 576 * 2
    assert kv_bytes(v3.shared(128), 1) / kv_bytes(v3, 1) == pytest.approx(56.9, abs=0.1)
    gemma, long = found["Gemma-3-27B"], 131072
    everywhere = dataclasses.replace(gemma, window=None, full_layers=None)
    assert 5 < kv_bytes(everywhere, long) / kv_bytes(gemma, long) < 6.2  # 62 layers, 10 of which see everything
    assert kv_bytes(gemma, 1000) == kv_bytes(everywhere, 1000)
    assert kv_bytes(found["Mistral-7B"], 4096) == kv_bytes(found["Mistral-7B"], 100_000)


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 4), st.integers(1, 64), st.integers(0, 300), st.data())
def test_bytes_are_what_a_loop_counts(layers, groups, kv_heads, head_dim, tokens, data):
    window = data.draw(st.none() | st.integers(1, 200))
    full = data.draw(st.none() | st.integers(0, layers)) if window else None
    shape = AttentionShape(layers, groups * kv_heads, kv_heads, head_dim, window=window, full_layers=full)
    numbers = 0
    for layer in range(layers):
        sees_all = window is None or layer < (full or 0)
        for token in range(tokens):
            if sees_all or token >= tokens - window:
                numbers += 2 * kv_heads * head_dim
    assert kv_bytes(shape, tokens, "bf16") == 2 * numbers
    assert kv_bytes(shape, tokens, "int4") == round(numbers / 2)


def test_a_bad_shape_is_refused():
    shape = catalogue()["GPT-2"]
    for call, message in (
        (lambda: kv_bytes(shape, -1), "tokens = -1"),
        (lambda: kv_bytes(shape, 1, "int3"), "dtype = 'int3'.*fp32, bf16"),
        (lambda: shape.shared(5), "kv_heads = 5.*must divide heads = 12"),
        (lambda: AttentionShape(0, 1, 1, 1), "layers = 0"),
        (lambda: AttentionShape(2, 1, 1, 1, window=4, full_layers=3), "full_layers = 3.*0 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_from_which_context_on_the_cache_outweighs_the_weights():
    shape = roofline.Shape.llama(hidden=64, layers=3, heads=4, kv_heads=2, ffn=96, vocab=50)
    for batch, bits, head, kv in ((1, 32, None, 32), (4, 4.5, 16, 16)):
        context = roofline.cache_outweighs_weights(shape, batch, bits, head_bits=head, kv_bits=kv)
        weights = 3 * (64 * 64 * 2 + 32 * 64 * 2 + 96 * 64 * 3) * bits / 8 + 50 * 64 * (head or bits) / 8
        assert context == pytest.approx(weights / (batch * 2 * 3 * 2 * 16 * kv / 8))
        work = [
            roofline.decode_work(shape, batch, tokens, bits, head_bits=head, kv_bits=kv).bytes for tokens in (0, 10_000)
        ]
        assert work[1] - work[0] == pytest.approx(weights * 10_000 / context)
    # Llama-2-7B, all in 16 bits: its 6.6 billion weights against half a megabyte per token
    llama = roofline.Shape.llama(4096, 32, 32, 32, 11008, 32000)
    assert roofline.cache_outweighs_weights(llama, 1, 16, kv_bits=16) == pytest.approx(6.6e9 * 2 / 2**19, rel=0.01)
    for bad, message in (
        ({"batch": 0}, "batch = 0"),
        ({"weight_bits": -1}, "weight_bits = -1"),
        ({"kv_bits": 0}, "kv_bits"),
    ):
        with pytest.raises(ValueError, match=message):
            roofline.cache_outweighs_weights(shape, **bad)


# --- multi-head latent attention -----------------------------------------------------------------


def mla(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    layer = MultiHeadLatentAttention(hidden=48, heads=4, head_dim=8, latent=20, rope=6).to(dtype).requires_grad_(False)
    layer.norm.weight.copy_(1 + 0.3 * torch.randn(20))
    return layer


def test_absorbed_decode_is_plain_decode():
    layer, x = mla(), torch.randn(2, 30, 48, dtype=torch.float64)
    whole, cache = layer(x)
    assert cache.shape == (2, 30, 26)  # all that is kept: a latent vector and a rotary key
    assert torch.allclose(layer(x, absorbed=True)[0], whole, atol=1e-12)
    kept = {False: None, True: None}
    for start, end in ((0, 9), (9, 10), (10, 11), (11, 15), (15, 30)):
        for absorbed in kept:
            out, kept[absorbed] = layer(x[:, start:end], kept[absorbed], absorbed)
            assert torch.allclose(out, whole[:, start:end], atol=1e-12)
    assert torch.allclose(kept[True], cache, atol=1e-12)


def test_mla_is_that_of_transformers():
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    ours = mla()
    config = transformers.DeepseekV3Config(
        hidden_size=48, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=1, kv_lora_rank=20,
        q_lora_rank=None, qk_rope_head_dim=6, qk_nope_head_dim=8, v_head_dim=8, rope_interleave=False,
        vocab_size=32, intermediate_size=32, attn_implementation="eager",
    )  # fmt: skip
    theirs = deepseek.DeepseekV3Attention(config, 0).double().eval().requires_grad_(False)
    theirs.q_proj.weight.copy_(ours.q.weight)
    theirs.kv_a_proj_with_mqa.weight.copy_(ours.down.weight)
    theirs.kv_a_layernorm.weight.copy_(ours.norm.weight)
    theirs.kv_b_proj.weight.copy_(torch.cat([ours.up_key, ours.up_value], 1).flatten(0, 1))
    theirs.o_proj.weight.copy_(ours.o.weight)
    x, tokens = torch.randn(2, 25, 48, dtype=torch.float64), 25
    turning = deepseek.DeepseekV3RotaryEmbedding(config)(x, torch.arange(tokens)[None])
    mask = torch.full((tokens, tokens), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    expected = theirs(x, turning, mask)[0]
    for absorbed in (False, True):
        assert torch.allclose(ours(x, absorbed=absorbed)[0], expected, atol=1e-5)  # their angles are fp32


# --- fewer KV heads ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mistral", "Phi"])
def test_pooled_heads_are_the_mean_and_halve_the_cache(family):
    lm, ids = tiny(family), torch.randint(1, 96, (2, 30), generator=torch.Generator().manual_seed(0))
    before = AttentionShape.of(lm).kv_heads
    small = FewerKVHeads(kv_heads=before // 2)(lm, progress=False)
    attention, small_attention = lm.model.model.layers[1].self_attn, small.model.model.layers[1].self_attn
    for name in ("k_proj", "v_proj"):
        old, new = getattr(attention, name), getattr(small_attention, name)
        width = old.out_features // before
        for i in range(before // 2):
            first, second = (slice((2 * i + j) * width, (2 * i + j + 1) * width) for j in (0, 1))
            assert torch.allclose(new.weight[i * width : (i + 1) * width], (old.weight[first] + old.weight[second]) / 2)
            if old.bias is not None:
                assert torch.allclose(new.bias[i * width : (i + 1) * width], (old.bias[first] + old.bias[second]) / 2)
    assert AttentionShape.of(lm).kv_heads == before  # the input is untouched
    assert 2 * memory.kv_per_token(small) == memory.kv_per_token(lm)
    assert memory.kv_per_token(small) == kv_bytes(AttentionShape.of(small), 1, "fp32")
    with torch.inference_mode():
        out, copied = small.model(ids).logits, repeated(lm, small).model(ids).logits
    assert torch.allclose(out, copied, atol=1e-5)


def repeated(lm, small):
    """The original with every head of a group set to the group's new head: the same function, by the original's code."""
    made = lm.copy()
    for block, pooled in zip(made.model.model.layers, small.model.model.layers):
        for name in ("k_proj", "v_proj"):
            old, new = getattr(block.self_attn, name), getattr(pooled.self_attn, name)
            times = old.out_features // new.out_features
            for part in ("weight", "bias"):
                if (rows := getattr(new, part)) is not None:
                    setattr(old, part, spread(rows, block.self_attn.head_dim, times))
        for name, old in block.self_attn.named_modules():
            if name.startswith("k_") and "norm" in name and isinstance(getattr(old, "weight", None), torch.Tensor):
                index = name.rpartition(".")[2]  # of StableLM's list: all heads' norms in one group are the same
                single = name.replace(f".{index}", f".{int(index) // times}") if index.isdigit() else name
                new = pooled.self_attn.get_submodule(single)
                same = old.weight.shape == new.weight.shape
                old.weight = new.weight if same else spread(new.weight.flatten(), block.self_attn.head_dim, times)
                if not same:
                    old.weight = torch.nn.Parameter(old.weight.view(-1, *new.weight.shape[1:]), requires_grad=False)
    return made


def spread(rows, head_dim, times):
    """Rows (heads * head_dim, ...), each head ``times`` times over."""
    rows = rows.unflatten(0, (-1, head_dim)).repeat_interleave(times, 0).flatten(0, 1)
    return torch.nn.Parameter(rows, requires_grad=False)


def test_heads_that_are_alike_lose_nothing():
    lm, ids = tiny(), torch.randint(1, 96, (1, 30), generator=torch.Generator().manual_seed(0))
    alike = repeated(lm, FewerKVHeads(kv_heads=1, pool="first")(lm, progress=False))
    with torch.inference_mode():
        expected = alike.model(ids).logits
        for pool in ("mean", "first"):
            small = FewerKVHeads(kv_heads=1, pool=pool)(alike, progress=False)
            assert torch.allclose(small.model(ids).logits, expected, atol=1e-5)
            assert not torch.allclose(small.model(ids).logits, lm.model(ids).logits, atol=1e-3)


def test_it_composes_is_saved_and_is_compiled(tmp_path):
    lm, ids = tiny(), torch.randint(1, 96, (1, 40), generator=torch.Generator().manual_seed(0))
    recipe = labkit.Recipe(RTN(bits=8, group_size=32), FewerKVHeads(kv_heads=1), RecentKV(budget=16))
    small = recipe(lm, progress=False)
    with torch.inference_mode():
        kept = small.model(ids, use_cache=True).past_key_values
    assert kept.layers[0].keys.shape == (1, 1, 16, 16)
    plain = FewerKVHeads(kv_heads=1)(lm, progress=False)
    with torch.inference_mode():
        expected = plain.model(ids).logits
    engine = pytest.importorskip("labkit.engine")
    compiled = engine.compile(plain, context=64, head_bits=None, embedding_bits=None, threads=1)
    assert torch.allclose(compiled.logits(ids), expected, atol=1e-4)
    compiled.prefill(ids[:, :20])
    steps = torch.stack([compiled.decode(int(t)).flatten().clone() for t in ids[0, 20:]])
    assert torch.allclose(steps, expected[0, 20:], atol=1e-4)


GQA = FAMILIES["Qwen2"] | {"pad_token_id": 0}
NORMED = {  # what the keys' norm has for each head
    "Olmo2": GQA,  # numbers in one vector
    "Cohere": GQA | {"use_qk_norm": True},  # a row
    "StableLm": GQA | {"qk_layernorm": True},  # a norm of its own; and the attention keeps the number of heads
    "Qwen3": GQA | {"head_dim": 16},  # nothing: one norm serves all
}


@pytest.mark.parametrize("pool", ["mean", "first"])
@pytest.mark.parametrize("family", NORMED)
def test_norms_of_all_heads_are_pooled_too(family, pool, tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**NORMED[family])
    lm = LanguageModel(transformers.AutoModelForCausalLM.from_config(config).eval(), Letters(), family)
    for name, parameter in lm.model.requires_grad_(False).named_parameters():
        if "k_norm" in name or "k_layernorm" in name:
            parameter.data.uniform_(0.5, 2)
    ids = torch.randint(1, 96, (2, 30), generator=torch.Generator().manual_seed(0))
    small = FewerKVHeads(kv_heads=1, pool=pool)(lm, progress=False)
    alike = repeated(lm, small)
    expected = alike.model(ids).logits
    assert torch.allclose(small.model(ids).logits, expected, atol=1e-5)
    again = FewerKVHeads(kv_heads=1, pool=pool)(alike, progress=False)  # heads that are alike lose nothing
    assert torch.allclose(again.model(ids).logits, expected, atol=1e-5)
    assert not torch.allclose(lm.model(ids).logits, expected, atol=1e-4)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: lm.tokenizer)
    small.save(tmp_path / "saved")
    assert torch.allclose(labkit.load(tmp_path / "saved", device="cpu").model(ids).logits, expected, atol=1e-5)


def test_blocks_without_keys_are_left_and_shared_keys_are_counted():
    """A convolution beside attention (LFM2), and blocks that read the keys of another one (Gemma 3n)."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
    more = {"head_dim": 16, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16}
    more |= {"vocab_size_per_layer_input": 96, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4}
    conv = {"layer_types": ["conv", "full_attention"], "block_ff_dim": 96, "block_auto_adjust_ff_dim": False}
    for family, spec in (("Lfm2", GQA | conv), ("Gemma3nText", GQA | kinds | more)):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**spec)).eval()
        lm = LanguageModel(model.requires_grad_(False), Letters(), family)
        small = FewerKVHeads(kv_heads=1)(lm, progress=False)
        with torch.inference_mode():
            kept = small.model(torch.ones(2, 12, dtype=torch.long), use_cache=True).past_key_values
        assert {layer.keys.shape[1] for layer in kept.layers if getattr(layer, "keys", None) is not None} == {1}


def test_what_would_not_run_is_refused_when_it_is_applied(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaAttention

    plain = LlamaAttention.forward

    def fixed(self, hidden_states, *args, **kwargs):
        assert self.k_proj.out_features == 32, "two heads, whatever the configuration says"
        return plain(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", fixed)
    with pytest.raises(ValueError, match="LlamaForCausalLM does not run with its KV heads merged .two heads"):
        FewerKVHeads(kv_heads=1)(tiny(), progress=False)


def test_the_notebook_says_why_a_model_has_nothing_to_merge():
    kv_models = pytest.importorskip("labkit.ui.lessons.kv_models")
    kv_codes = pytest.importorskip("labkit.ui.lessons.kv_codes")
    lm = tiny("GPT2")
    assert "GPT2LMHeadModel has no KV heads" in kv_models.merged(lm, None, FewerKVHeads(kv_heads=1))
    windows = torch.randint(1, 96, (1, 40), generator=torch.Generator().manual_seed(0))
    assert kv_models.merged(tiny(), windows, FewerKVHeads(kv_heads=1)).kl > 0
    with pytest.warns(UserWarning, match="cannot be compiled"):
        assert kv_codes.table(kv_codes.compare(lm, contexts=(8,))).rows == ()
    cells = json.loads((Path(__file__).parent.parent / "notebooks" / "07_kv_cache.ipynb").read_text(encoding="utf-8"))
    code = ["".join(cell["source"]) for cell in cells["cells"] if cell["cell_type"] == "code"]
    assert sum('"layer":' in c for c in code) == 3 and not any(re.search(r'"layer": \d', c) for c in code)


@pytest.mark.parametrize("family", ["OPT", "GPTNeoX", "GPT2"])
def test_a_model_without_shared_heads_is_refused(family):
    with pytest.raises(ValueError, match="no KV heads that several query heads could share"):
        FewerKVHeads()(tiny(family), progress=False)


def test_a_number_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"kv_heads = 3 is not allowed for tiny-Llama, block 0: .* its 2 KV heads"):
        FewerKVHeads(kv_heads=3)(tiny(), progress=False)
