"""Tiny random models of many families: two layers, 64 wide, with features at sizes where they act (a window of 8 tokens)."""

from __future__ import annotations

import torch

from labkit.model import LanguageModel

VOCABULARY = 96
BARE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}
USUAL = BARE | {
    "intermediate_size": 96,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
HEADS_16 = USUAL | {"head_dim": 16}
MIXED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
FALCON = BARE | {"max_position_embeddings": 256}
EXPERTS = USUAL | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = USUAL | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
# name -> its config; the class is the name without what stands in brackets
FAMILIES: dict[str, dict] = {
    "Llama": USUAL,
    "Qwen2": USUAL,
    "Qwen3": HEADS_16,
    "Mistral": USUAL | {"sliding_window": 8},
    "Gemma": HEADS_16,
    "Gemma2": HEADS_16 | {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "Gemma3Text": HEADS_16 | MIXED | {"query_pre_attn_scalar": 16},
    "Phi": BARE | {"intermediate_size": 96, "partial_rotary_factor": 0.5, "max_position_embeddings": 256},
    "Phi3": USUAL,
    "OPT": BARE | {"ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 256},
    "GPTNeoX": BARE | {"intermediate_size": 96, "rotary_pct": 0.25, "max_position_embeddings": 256},
    "GPT2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 256},
    "GPTBigCode": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 256},
    "GPTJ": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 256, "rotary_dim": 8},
    "CodeGen": {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": VOCABULARY,
        "n_positions": 256,
        "n_ctx": 256,
        "rotary_dim": 8,
    },
    "GPTNeo": {
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
        "intermediate_size": 96,
    },
    "Bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY},
    "XGLM": {
        "d_model": 64,
        "ffn_dim": 96,
        "num_layers": 2,
        "attention_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
    },
    "Falcon": FALCON | {"alibi": False},
    "Falcon (alibi)": FALCON | {"alibi": True},
    "Mpt": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "vocab_size": VOCABULARY,
        "max_seq_len": 256,
        "expansion_ratio": 2,
    },
    "StableLm": USUAL,
    "Cohere": USUAL | {"logit_scale": 1.0},
    "Cohere2": USUAL | MIXED | {"logit_scale": 1.0},
    "Glm": HEADS_16 | {"partial_rotary_factor": 0.5},
    "Glm4": HEADS_16 | {"partial_rotary_factor": 0.5},
    "Olmo": USUAL,
    "Olmo2": USUAL,
    "Olmo3": USUAL | {"sliding_window": 8},
    "Granite": USUAL
    | {
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
    },
    "Starcoder2": USUAL,
    "Nemotron": USUAL | {"partial_rotary_factor": 0.5},
    "Persimmon": BARE | {"intermediate_size": 96, "max_position_embeddings": 256},
    "Helium": HEADS_16,
    "SmolLM3": USUAL | {"no_rope_layers": [1, 0]},
    "Ernie4_5": HEADS_16,
    "Arcee": USUAL,
    "Exaone4": USUAL | MIXED,
    "Apertus": USUAL,
    "HunYuanDenseV1": HEADS_16,
    "SeedOss": HEADS_16,
    "Gemma3nText": HEADS_16
    | MIXED
    | {
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCABULARY,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "MiniCPM3": LATENT,
    "DeepseekV3 (dense)": LATENT
    | {"first_k_dense_replace": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "Mixtral": USUAL | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": EXPERTS | {"shared_expert_intermediate_size": 32},
    "Qwen3Moe": EXPERTS | {"head_dim": 16},
    "Olmoe": USUAL | {"num_experts": 4, "num_experts_per_tok": 2},
    "GptOss": HEADS_16 | MIXED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Mamba": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "state_size": 8},
    "Bamba": USUAL | {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8},
    "RecurrentGemma": USUAL | {"num_hidden_layers": 3},
}


def tokenizer():
    """A real one: the words w0 to w95."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w2", pad_token="w1")


def make(family: str, layers: int | None = None, sharp: float = 5.0) -> LanguageModel:
    """A random model in fp32. Its matrices are ``sharp`` times as large as drawn, so that what a block does counts and
    predictions are no flat noise, in which a wrong block would not show."""
    import transformers

    spec = dict(FAMILIES[family])
    if layers:
        counted = next(n for n in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if n in spec)
        spec[counted] = layers
        spec |= {name: spec[name][-layers:] for name in ("layer_types", "activation_sparsity_pattern") if name in spec}
        if "attention_types" in spec:
            spec["attention_types"] = [[["global"], layers]]
        if "attn_layer_indices" in spec:  # in a hybrid stack: the layer that is left is one with attention
            spec["attn_layer_indices"] = [0]
    config = getattr(transformers, f"{family.split()[0]}Config")(**spec)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(sharp)
    model.generation_config.eos_token_id = None
    return LanguageModel(model, tokenizer(), f"tiny-{family}")


def ids(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
