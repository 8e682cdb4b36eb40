"""Tiny random models of families whose blocks differ, or take more than hidden states."""

from __future__ import annotations

import torch
from tiny_models import MIXTURES, SMALL, Letters

from labkit.model import LanguageModel

BASE = SMALL | {"intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0}
MIXED = ["sliding_attention", "full_attention"]
GEMMA = BASE | {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "sliding_window": 8,
    "layer_types": 2 * MIXED,
    "num_kv_shared_layers": 2,  # the last two read the keys of the first two
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 96,
}
ODD = {
    "Bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96},
    "XGLM": {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4, "vocab_size": 96},
    "Mistral": BASE | {"sliding_window": 8},
    "Gemma3nText": GEMMA | {"laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4},
    "Gemma4Text": GEMMA | {"global_head_dim": 16},
    "Mamba": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96, "state_size": 8},
    "Rwkv": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96, "attention_hidden_size": 64},
    "RecurrentGemma": BASE | {"num_hidden_layers": 3, "attention_window_size": 8},
    "Jamba": BASE
    | {"num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1}
    | {"expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 8},
    "Bamba": BASE | {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8},
    "Lfm2": BASE | {"layer_types": ["conv", "full_attention"]},
    "HunYuanMoEV1": BASE | {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "Llama4Text": BASE
    | {"head_dim": 16, "intermediate_size_mlp": 96, "num_local_experts": 4, "num_experts_per_tok": 1}
    | {"attention_chunk_size": 8, "moe_layers": [1]},
    "Falcon": SMALL | {"alibi": True},
    "OpenAIGPT": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 128},
    "DeepseekV3": MIXTURES["DeepseekV3"],
    "GlmMoeDsa": MIXTURES["DeepseekV3"] | {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2},
    "HrmText": BASE | {"head_dim": 16},
}


def odd(family: str) -> LanguageModel:
    """A random model of a family, seeded; its norms and biases are not those of a fresh one, for these hide faults."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**ODD[family])
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for tensor in model.parameters():
        if tensor.dim() < 2:
            tensor.add_(0.1 * torch.randn(tensor.shape))
    return LanguageModel(model, Letters(), f"tiny-{family}")


def tokens(windows: int, length: int = 24) -> torch.Tensor:
    """LongTensor (windows, length)."""
    return torch.randint(1, 96, (windows, length), generator=torch.Generator().manual_seed(1))
