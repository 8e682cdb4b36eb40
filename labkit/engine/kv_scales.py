"""The steps between the codes of a packed KV cache: one per channel of every key head and value head, found once.

The attention operator writes a token's keys and values as codes while it is computed, so the steps must be known before
any text is. They come from a little calibration text. A key is stored after it was turned to its position, and turning
mixes channel i with channel i + width/2: what bounds a channel at *every* position is the length of that pair, so the
text need not be as long as the context. What is larger than any value in the calibration text is clipped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import DynamicCache

from labkit import heap, text

BITS = (8, 4)  # what the attention operator takes
WINDOWS, LENGTH = 2, 256  # of the calibration text: 512 tokens bound a channel as well as the operator's 8 bits need


@dataclass(frozen=True)
class KVScales:
    """Steps for a cache of ``bits``; ``keys[i]`` and ``values[i]``: fp32 (kv_heads * head_dim,) of layer i."""

    bits: int
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]


@torch.inference_mode()
def find(lm, bits: int, calib: torch.Tensor | None = None) -> KVScales:
    """Run a LanguageModel over calibration windows, LongTensor (windows, length), and bound what its cache holds.

    ``calib``: None takes a few windows of the manual. Raises ValueError for windows that are not this model's.
    """
    if calib is None:
        calib = text.calibration(lm, WINDOWS, LENGTH, source="manual", progress=False)
    text.check_windows(lm, calib)
    windows = [_largest(lm, window) for window in calib.split(1)]  # one at a time in memory
    heap.trim()
    highest = 2 ** (bits - 1) - 1
    steps = [(torch.stack(x).amax(0) / highest).clamp_min(1e-8).cpu() for x in zip(*windows)]
    layers = len(steps) // 2
    return KVScales(bits, tuple(steps[:layers]), tuple(steps[layers:]))


def _largest(lm, window: torch.Tensor) -> list[torch.Tensor]:
    """What bounds each channel, (kv_heads * head_dim,), over a window (1, length): of every layer's keys, then its values."""
    cache = DynamicCache()  # made without the config, it keeps every token, under a sliding window too
    lm.model(window.to(lm.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    pairs = [x.keys.float().unflatten(-1, (2, -1)).square().sum(-2).sqrt() for x in cache.layers]
    bounds = [x.repeat(1, 1, 1, 2) for x in pairs] + [x.values.float().abs() for x in cache.layers]
    return [x.amax((0, 2)).flatten() for x in bounds]  # of (1, kv_heads, length, head_dim)
