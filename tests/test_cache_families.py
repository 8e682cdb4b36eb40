"""Cache methods on families that turn keys, compute attention or keep state in ways of their own: exact, or refused when
applied. The oracles are the models' own forwards: on the tokens that are kept alone, eagerly, or with a mask."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
import transformers
from tiny_models import FAMILIES, MOE, SMALL, Letters, tiny

from labkit.cache import H2O, KIVI, CachePolicy, RandomKV, RecentKV, Scissorhands, SnapKV, StreamingLLM
from labkit.cache import examine as examining
from labkit.cache.base import MOST
from labkit.cache.layer import KVLayer, KVStateLayer
from labkit.cache.rotary import cos_sin, fit, turn
from labkit.model import LanguageModel

GQA = FAMILIES["Qwen2"] | {"max_position_embeddings": 256, "pad_token_id": 0}
FOUR = GQA | {"num_hidden_layers": 4}
MLA = GQA | {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8}
MLA |= {"qk_nope_head_dim": 8, "v_head_dim": 16}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2}
BOTH = {"layer_types": ["sliding_attention", "full_attention"]}
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
WIDE = {"head_dim": 16}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 2.0}


def make(family: str, spec: dict, loud: float = 3.0) -> LanguageModel:
    """A random model whose matrices are ``loud`` times as large as usual, so that attention matters."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**spec)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and "conv1d" not in name:
            parameter.data.mul_(loud)
    return LanguageModel(model, Letters(), f"tiny-{family}")


def ids(tokens: int = 40, rows: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 96, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def steps(lm, x: torch.Tensor, prompt: int):
    """Logits after each token from the prompt's last one on, (rows, tokens - prompt + 1, vocabulary), and the cache."""
    out = lm.model(x[:, :prompt], use_cache=True)
    found = [out.logits[:, -1]]
    for t in range(prompt, x.shape[1]):
        place = torch.full((len(x), 1), t)  # Bamba 5.23 decodes a little differently without
        out = lm.model(x[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True, position_ids=place)
        found.append(out.logits[:, -1])
    return torch.stack(found, 1), out.past_key_values


# --- how keys are turned -------------------------------------------------------------------------

TURNED = {  # one layer each, and what is odd about it
    "Cohere": ("Cohere", GQA),  # neighbours are pairs
    "Cohere2, sliding": ("Cohere2", GQA | {"layer_types": ["sliding_attention"], "sliding_window": 128}),
    "Cohere2, full": ("Cohere2", GQA | {"layer_types": ["full_attention"], "sliding_window": 128}),  # not turned
    "Glm4": ("Glm4", GQA | WIDE | {"partial_rotary_factor": 0.5}),  # neighbours, partial
    "SmolLM3 without": ("SmolLM3", GQA | {"no_rope_layers": [0]}),
    "NanoChat": ("NanoChat", GQA | WIDE),  # backwards
    "DeepseekV3": ("DeepseekV3", MLA | EXPERTS | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}),
    "MiniCPM3": ("MiniCPM3", MLA),  # turned channels are what the cache calls values
    "Gemma2": ("Gemma2", GQA | WIDE | {"query_pre_attn_scalar": 16, "layer_types": ["full_attention"]}),
    "GptOss": ("GptOss", MOE | WIDE | PLAIN | {"num_local_experts": 4, "layer_types": ["full_attention"]}),
    "YaRN": ("Llama", GQA | {"rope_parameters": LONG | {"rope_type": "yarn", "original_max_position_embeddings": 64}}),
}


@pytest.mark.parametrize("name", TURNED)
def test_streaming_is_the_model_on_the_kept_tokens(name):
    """In a one-layer model a key depends on its token and its place alone."""
    family, spec = TURNED[name]
    lm = make(family, spec | {"num_hidden_layers": 1}, loud=12)
    x, kept = ids(), [0, 1, 2, 3, *range(22, 30)]
    found, cache = steps(StreamingLLM(budget=12, sinks=4)(lm), x[:, :31], 30)
    assert cache.layers[0].position[0, 0].sort().values.tolist() == [0, 1, 2, 3, *range(23, 31)]
    with torch.no_grad():
        said = lm.model(torch.cat([x[:, kept], x[:, 30:31]], 1)).logits[0, -1]
    kl = lambda p, q: float((p.exp() * (p - q)).sum())  # noqa: E731
    assert kl(said.log_softmax(-1), found[0, -1].log_softmax(-1)) < 1e-6


def test_streaming_in_sixteen_bits_finds_the_same_turn():
    for dtype in (torch.bfloat16, torch.float16):
        for name in ("Cohere", "DeepseekV3", "NanoChat"):
            lm = make(TURNED[name][0], TURNED[name][1] | {"num_hidden_layers": 1}, loud=12)
            exact = StreamingLLM(budget=12)(lm).model(ids(30)).past_key_values.turning
            lm.model.to(dtype)
            rounded = StreamingLLM(budget=12)(lm).model(ids(30)).past_key_values.turning
            for mine, theirs in zip(exact[0], rounded[0], strict=True):
                assert (mine is None) == (theirs is None)
                if mine is not None:
                    assert (mine.first, mine.second) == (theirs.first, theirs.second)
                    assert torch.allclose(mine.angles, theirs.angles, rtol=0.01)  # .to() has rounded the model's own


def turned_by_hand(keys, places, pairs, angles):
    """Keys (heads, width) at places, (places, heads, width), by the formula, in float64."""
    out = keys.double().repeat(len(places), 1, 1)
    for (i, j), angle in zip(pairs, angles, strict=True):
        for n, place in enumerate(places):
            a = torch.tensor(float(place) * float(angle), dtype=torch.float64)
            x, y = keys[:, i].double(), keys[:, j].double()
            out[n, :, i], out[n, :, j] = x * a.cos() - y * a.sin(), y * a.cos() + x * a.sin()
    return out


@pytest.mark.parametrize("start", [0, 3, 6])
@pytest.mark.parametrize("way", [1, -1])
@pytest.mark.parametrize("pairing", ["halves", "neighbours"])
def test_the_turn_is_read_from_the_keys_and_carried_on(pairing, way, start):
    torch.manual_seed(start)
    width, angles = 14, 10000.0 ** -(torch.arange(4) / 4)
    pairs = [
        (start + i, start + i + 4) if pairing == "halves" else (start + 2 * i, start + 2 * i + 1) for i in range(4)
    ]
    keys, places = torch.randn(3, width), torch.tensor([0, 1, 2, 7, 50, 400])
    seen = turned_by_hand(keys, places, pairs, way * angles).float()
    found = fit(seen, places, [torch.rand(3), angles], known := [])
    assert known == [found] and fit(seen, places, [], known) is found
    again = turn(seen[3], found, *cos_sin(torch.tensor(93), found.angles))  # from place 7 to 100
    assert torch.allclose(again, turned_by_hand(keys, [100], pairs, way * angles)[0].float(), atol=1e-5)
    assert fit(keys.expand(6, -1, -1), places, [angles], []) is None
    for spoiled in (seen * (1 + places / 1000)[:, None, None], seen.flip(-1), seen + places[:, None, None] / 1000):
        with pytest.raises(ValueError, match="no turn of pairs of channels"):
            fit(spoiled, places, [angles * torch.tensor([1.0, 1.0, 1.0, 1.2])], [])


def test_a_block_that_is_taken_out_changes_what_is_turned():
    lm = make("SmolLM3", FOUR | {"no_rope_layers": [1, 0, 1, 0]})
    small = StreamingLLM(budget=12)(lm)
    kinds = lambda: [key is not None for key, _ in small.model(ids(20)).past_key_values.turning]  # noqa: E731
    assert kinds() == [True, False, True, False]
    del small.model.model.layers[0]
    for index, block in enumerate(small.model.model.layers):
        block.self_attn.layer_idx = index
    small.model.config.num_hidden_layers, small.model.config.layer_types = 3, ["full_attention"] * 3
    assert kinds() == [False, True, False]


# --- refused when applied ------------------------------------------------------------------------

OLD = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 256}
OWN = {
    "Falcon": SMALL | {"alibi": False},
    "StableLm": GQA,
    "Nemotron": GQA | {"partial_rotary_factor": 0.5},
    "GPTJ": OLD | {"rotary_dim": 8},
    "Bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96},
    "Mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 96},
}


@pytest.mark.parametrize("family", OWN)
def test_an_attention_that_cannot_be_watched_is_refused(family):
    lm = make(family, OWN[family])
    for method in (StreamingLLM(budget=12), H2O(budget=12), KIVI()):
        with pytest.raises(ValueError) as raised:
            method(lm)
        text = str(raised.value)
        assert text.startswith(f"{type(method).__name__} cannot be applied to {type(lm.model).__name__}: its attention")
        assert "set_attn_implementation" not in text  # there is nothing that a user could set
    lm.model(ids())  # what was refused is as it was


CHUNKED = FOUR | WIDE | {"intermediate_size_mlp": 96, "num_local_experts": 2, "num_experts_per_tok": 1}
SHARING = FOUR | WIDE | {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 96}
SHARING |= {"laurel_rank": 8, "sliding_window": 8, "activation_sparsity_pattern": [0.0] * 4}
SHARING |= {"layer_types": BOTH["layer_types"] * 2}
ODD = {  # spec, why eviction is refused, and whether rounding is as well
    "Llama4": ("Llama4Text", CHUNKED | {"attention_chunk_size": 16}, "cut into chunks", False),
    "Gemma3n": ("Gemma3nText", SHARING, "more than one attention over the keys", False),
    "DiffLlama": ("DiffLlama", GQA, "more than one attention over the keys", False),
    "Doge": ("Doge", GQA, "adds a bias to its attention", False),
    "Mamba": ("Mamba", {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96}, "no layer that keeps", True),
}


@pytest.mark.parametrize("name", ODD)
def test_what_an_eviction_would_break_is_refused(name):
    family, spec, why, rounding = ODD[name]
    lm = make(family, spec)
    with pytest.raises(ValueError, match=f"H2O cannot be applied to .*: .*{why}"):
        H2O(budget=12)(lm)
    if rounding:
        with pytest.raises(ValueError, match=f"KIVI cannot be applied to .*: .*{why}"):
            KIVI()(lm)
    else:
        found, expected = (steps(m, ids(), 30)[0] for m in (KIVI(residual=64)(lm), lm))
        assert torch.allclose(found, expected, atol=1e-4)


def test_the_advice_to_a_family_without_sdpa_can_be_followed():
    lm = make("Gemma2", WATCHED["Gemma2"])
    expected = steps(H2O(budget=12)(lm), ids(), 30)[0]
    lm.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"flash_attention_2.*call model.set_attn_implementation\('eager'\) first"):
        H2O(budget=12)(lm)
    lm.model.set_attn_implementation("eager")
    assert torch.equal(steps(H2O(budget=12)(lm), ids(), 30)[0], expected)


def test_only_what_turns_keys_minds_angles_that_change():
    lm = make("Llama", GQA | {"rope_parameters": LONG | {"original_max_position_embeddings": 128}})
    with pytest.raises(ValueError, match="StreamingLLM .*LlamaForCausalLM.*longrope"):
        StreamingLLM(budget=12)(lm)
    SnapKV(budget=12, window=4)(lm)


def test_queries_that_grow_with_their_place_are_refused(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaAttention

    lm, plain = make("Llama", GQA), LlamaAttention.forward

    def grown(self, hidden_states, position_embeddings=None, position_ids=None, **more):
        cos, sin = position_embeddings
        return plain(self, hidden_states * (1 + position_ids[..., None] / 100), (cos, sin), **more)

    monkeypatch.setattr(LlamaAttention, "forward", grown)
    monkeypatch.setattr(examining, "_known", {})  # the same class was examined before
    with pytest.raises(ValueError, match="its queries grow with their true place"):
        StreamingLLM(budget=12)(lm)


def test_a_model_is_examined_once(monkeypatch):
    runs, run = [], examining._states
    monkeypatch.setattr(examining, "_known", {})
    monkeypatch.setattr(examining, "_states", lambda *a, **k: runs.append(1) or run(*a, **k))
    lm = tiny()
    for _ in range(3):
        StreamingLLM(budget=12)(lm)
    assert len(runs) == 5  # prompt and token, by two caches, and places
    lm.model.config.rms_norm_eps = 1e-4  # another model
    StreamingLLM(budget=12)(lm)
    assert len(runs) == 10


# --- eager families and latent attention ---------------------------------------------------------


@dataclass(frozen=True)
class Watch(CachePolicy):
    """Evicts nothing; notes each layer's attention, (batch, kv_heads, new, tokens)."""

    seen: list = field(default_factory=list, compare=False)

    def scores(self, step):
        self.seen.append(step.attention())
        return step.position.float()


WATCHED = {
    "Gemma2": GQA | WIDE | BOTH | {"sliding_window": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
    "GptOss": MOE | WIDE | PLAIN | BOTH | {"num_local_experts": 4, "sliding_window": 8},
    "DeepseekV3": MLA | EXPERTS | {"first_k_dense_replace": 2, "n_group": 1, "topk_group": 1},
}


@pytest.mark.parametrize("family", WATCHED)
def test_policies_see_the_attention_that_the_model_computes(family):
    lm, x = make(family, WATCHED[family]), ids(20)
    if family == "GptOss":
        for block in lm.model.model.layers:
            block.self_attn.sinks.data += 2
    eager = lm.copy().model
    eager.set_attn_implementation("eager")
    small = (watch := Watch(budget=MOST))(lm)
    with torch.no_grad():
        truth = eager(x, output_attentions=True).attentions
        small.model(x)
        told = small.model(x, use_cache=False).logits
    assert torch.allclose(told, eager(x).logits, atol=1e-5)
    for seen, expected in zip(watch.seen, truth, strict=True):  # (1, heads, query, key) of each layer
        assert seen.shape[1] == (1 if family == "DeepseekV3" else 2)
        assert torch.allclose(seen, expected.unflatten(1, (seen.shape[1], -1)).mean(2), atol=1e-5)


@pytest.mark.parametrize("family", WATCHED)
def test_true_positions_after_eviction(family):
    """Token by token with the newest 10 kept, against one eager forward whose mask hides the evicted tokens."""
    spec = WATCHED[family]
    lm = make(family, spec | ({"layer_types": ["full_attention"] * 2} if "layer_types" in spec else {}))
    x, query, key = ids(), torch.arange(40)[:, None], torch.arange(40)
    see = (key <= query) & ((query < 30) | (key >= query - 10))
    lm.model.set_attn_implementation("eager")
    with torch.no_grad():
        added = torch.zeros(40, 40).masked_fill(~see, torch.finfo(torch.float32).min)[None, None]
        expected = lm.model(x, attention_mask=added, position_ids=key[None]).logits[:, 29:]
    if lm.model._supports_sdpa:
        lm.model.set_attn_implementation("sdpa")
    assert torch.allclose(steps(RecentKV(budget=10)(lm), x, 30)[0], expected, atol=1e-4)


@pytest.mark.parametrize(
    "policy",
    [
        H2O(budget=12),
        Scissorhands(budget=12, recent=4, drop=0.0),
        SnapKV(budget=12, window=4, heads="adaptive"),
        RandomKV(budget=12, recent=4),
        StreamingLLM(budget=12),
    ],
    ids=repr,
)
def test_a_latent_is_evicted_for_all_heads_at_once(policy):
    lm = make("DeepseekV3", WATCHED["DeepseekV3"])
    small, x = policy(lm), ids(rows=2)
    _, cache = steps(small, x, 40)
    for layer in cache.layers:
        assert layer.keys.shape[:3] == layer.values.shape[:3] == (2, 1, 12)
    mask = torch.ones_like(x)
    mask[0, :13] = 0
    more = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = small.model.generate(x, attention_mask=mask, **more)
    alone = small.model.generate(x[:1, 13:], attention_mask=mask[:1, 13:], **more)
    assert torch.equal(out[:1, 13:], alone)


# --- stacks whose blocks differ ------------------------------------------------------------------

HYBRID = {
    "Lfm2": GQA | {"layer_types": ["conv", "full_attention"], "block_ff_dim": 96, "block_auto_adjust_ff_dim": False},
    "Bamba": GQA | {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8},
    "FalconH1": GQA | {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},  # both in each
}


@pytest.mark.parametrize("family", HYBRID)
def test_hybrid_stacks_keep_the_states_of_their_other_layers(family):
    lm, x = make(family, HYBRID[family]), ids(rows=2)
    plain, theirs = steps(lm, x, 30)
    for method in (H2O(), StreamingLLM(), KIVI(residual=64)):
        assert torch.allclose(steps(method(lm), x, 30)[0], plain, atol=1e-4)
    evicted, cache = steps(H2O(budget=12)(lm), x, 30)
    assert not torch.allclose(evicted[:, 1:], plain[:, 1:], atol=1e-3)
    keeping = [layer for layer in cache.layers if isinstance(layer, KVLayer)]
    assert [layer.keys.shape[2] for layer in keeping] == [12] * cache.depth and cache.depth == len(keeping)
    assert all(isinstance(layer, KVStateLayer) for layer in keeping) == (family == "FalconH1")
    state = lambda c: c.layers[0].conv_states[0]  # noqa: E731
    assert torch.allclose(
        state(cache), state(theirs), atol=1e-4
    )  # the first block's, before any attention of the other
    before = state(cache).clone()
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(state(cache), before.flip(0))


def test_the_windows_of_the_configuration_hold_where_the_attention_does_not_say_them():
    """Phi-3.5-MoE's attention is told its window by the mask alone."""
    lm = make("Phimoe", GQA | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8})
    x = ids()
    assert torch.allclose(steps(RecentKV(budget=64)(lm), x, 30)[0], steps(lm, x, 30)[0], atol=1e-4)
    found, cache = steps(RecentKV(budget=20)(lm), x, 30)  # more than the window: nothing that counts is evicted
    assert torch.allclose(found, steps(lm, x, 30)[0], atol=1e-4)
    position = cache.layers[0].position
    assert int(position[position >= 0].min()) == 40 - 8 + 1
