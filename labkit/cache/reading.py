"""A model's predictions while it reads a text with its cache: the only way in which a cache method's damage shows."""

from __future__ import annotations

import torch

from labkit import positions
from labkit.method import brief, check_model


@torch.inference_mode()
def read(lm, ids: torch.Tensor, prompt: int, step: int = 1) -> torch.Tensor:
    """Logits of every token, (batch, tokens, vocabulary), for ids (batch, tokens) read through the cache.

    The first ``prompt`` tokens are read at once, the others ``step`` at a time; after each forward the model's cache
    methods evict and round. With ``step`` 1 this is decoding, with the text's own tokens; a larger one is quicker, and
    lets the cache grow by ``step`` tokens in between. (One forward of a whole text, as in :func:`labkit.perplexity`,
    shows nothing of a cache method: its attention is over before anything is evicted.)
    """
    check_model(lm)
    tokens = ids.shape[-1]
    for name, value in (("prompt", prompt), ("step", step)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= tokens:
            raise ValueError(f"{name} = {brief(value)} is not allowed: it must be a whole number from 1 to {tokens}.")
    out = lm.model(ids[:, :prompt].to(lm.device), use_cache=True)
    logits = out.logits.new_empty(ids.shape[0], tokens, out.logits.shape[-1])
    logits[:, :prompt] = out.logits
    for start in range(prompt, tokens, step):
        part = slice(start, start + step)
        piece = ids[:, part].to(lm.device)
        here = positions.after(lm.model, start, piece.shape[1], len(piece))
        out = lm.model(piece, past_key_values=out.past_key_values, use_cache=True, **here)
        logits[:, part] = out.logits
    return logits
