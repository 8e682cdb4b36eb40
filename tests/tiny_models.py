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

    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    auto = transformers.AutoModelForCausalLM.from_config
    torch.manual_seed(0)
    model = auto(config).eval().requires_grad_(False)
    return LanguageModel(model, Letters(), f"tiny-{family}")
