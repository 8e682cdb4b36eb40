"""Tiny random models of every family, and a tokenizer for them."""

from __future__ import annotations

import torch

from labkit.model import LanguageModel

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
FAMILIES = {
    "Llama": SMALL | {"intermediate_size": 96, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "Qwen2": SMALL | {"intermediate_size": 96, "num_key_value_heads": 2},
    "Qwen3": SMALL | {"intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16},
    "Mistral": SMALL | {"intermediate_size": 96, "num_key_value_heads": 2},
    "Gemma": SMALL | {"intermediate_size": 96, "num_key_value_heads": 1, "head_dim": 16},
    "Phi": SMALL | {"intermediate_size": 96},
    "OPT": SMALL | {"ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 128},
    "GPTNeoX": SMALL | {"intermediate_size": 96},
    "GPT2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 128},
}

MOE = SMALL | {"intermediate_size": 96, "num_key_value_heads": 2, "num_experts_per_tok": 2}
MIXTURES = {  # of experts, which are 3-D parameters in transformers 5; apart, so that tests over FAMILIES are not multiplied
    "Mixtral": MOE | {"num_local_experts": 4},
    "Qwen3Moe": MOE | {"head_dim": 16, "num_experts": 4, "moe_intermediate_size": 32},
    "GptOss": MOE
    | {"head_dim": 16, "num_local_experts": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "DeepseekV3": MOE
    | {
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,  # a dense block, then one of experts
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
    },
}


class Letters:
    """A tokenizer for tiny models: one token per byte, modulo the vocabulary."""

    all_special_ids: tuple = ()

    def __call__(self, text, return_tensors=None, **_):
        ids = [b % 96 for b in text.encode()]
        return type("Ids", (), {"input_ids": torch.tensor([ids]) if return_tensors else ids})

    def decode(self, ids, **_):
        return "".join(chr(32 + int(i)) for i in ids)

    def save_pretrained(self, path):
        pass


def tiny(family: str = "Llama") -> LanguageModel:
    """A random model of a family, seeded, two layers, 64 wide."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**(FAMILIES | MIXTURES)[family])
    auto = transformers.AutoModelForCausalLM.from_config
    torch.manual_seed(0)
    model = auto(config).eval().requires_grad_(False)
    return LanguageModel(model, Letters(), f"tiny-{family}")
