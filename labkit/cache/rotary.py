"""Turning keys from one rotary position to another."""

from __future__ import annotations

import torch


def frequencies(model) -> torch.Tensor | None:
    """Angle per position of each channel pair, (pairs,), of the module that runs a model's blocks; None where it turns no keys.

    Raises ValueError for rotary embeddings whose angles depend on the length of the text or on the layer.
    """
    rotary = getattr(model, "rotary_emb", None)
    if rotary is None:
        return None
    angles, kind = getattr(rotary, "inv_freq", None), getattr(rotary, "rope_type", "default")
    if angles is None or not isinstance(kind, str) or kind in ("dynamic", "longrope"):
        raise ValueError(
            f"{type(model).__name__} turns its keys in a way ({kind}) that cannot be moved to new positions."
        )
    return angles.float()


def cos_sin(by: torch.Tensor, angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, (..., tokens, pairs), of turning ``by`` (..., tokens) positions."""
    turned = by[..., None].float() * angles
    return turned.cos(), turned.sin()


def turn(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Keys (batch, kv_heads, tokens, head_dim), already turned, turned on; cos and sin are :func:`cos_sin`'s.

    Channel i of the first half of the turned channels and channel i of their second half are one pair (as in Llama and
    GPT-NeoX); channels beyond 2 * pairs are not turned. Turning by a and then by b is turning by a + b.
    """
    pairs = cos.shape[-1]
    first, second, rest = keys[..., :pairs].float(), keys[..., pairs : 2 * pairs].float(), keys[..., 2 * pairs :]
    turned = torch.empty_like(keys)
    turned[..., :pairs] = (first * cos).addcmul_(second, sin, value=-1)
    turned[..., pairs : 2 * pairs] = (second * cos).addcmul_(first, sin)
    turned[..., 2 * pairs :] = rest
    return turned
