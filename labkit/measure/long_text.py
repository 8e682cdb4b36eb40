"""Perplexity of a long text that is read through the cache, so that a cache method evicts and rounds while it is read.

One text is read from its first token to its last, and every forward sees only what those before it have left in the
cache. (:func:`labkit.perplexity` reads many short windows, with half of each as the prompt.)
"""

from __future__ import annotations

import math

import torch

from labkit import positions, text
from labkit.linear import exact
from labkit.method import brief
from labkit.progress import track

ROWS = 64  # tokens whose distributions over the vocabulary are worked on at a time


def streaming_perplexity(lm, ids: torch.Tensor, chunk: int = 1, prompt: int | None = None, progress: bool = False):
    """exp of the mean negative log-likelihood of a text, LongTensor (1, tokens), read through the cache.

    ``chunk``: tokens in one forward. With 1 a query sees just what decoding would show it: the tokens that were kept, and
    itself. In a larger chunk, tokens also see all that are before them in the chunk, and eviction waits for its end: the
    cache lends each query up to ``chunk - 1`` tokens above the budget, (chunk - 1) / 2 on average, so damage is
    understated. ``prompt``: tokens of the first forward, by default ``chunk``; methods that act on the prompt alone, such
    as SnapKV, evict only there. Every token but the first counts.
    """
    return math.exp(token_losses(lm, ids, chunk, prompt, progress).double().mean())


@exact()
@torch.inference_mode()
def token_losses(
    lm, ids: torch.Tensor, chunk: int = 1, prompt: int | None = None, progress: bool = False
) -> torch.Tensor:
    """Negative log-likelihood (nats) of each token but the first, fp32 (tokens - 1,); see :func:`streaming_perplexity`."""
    text.check_windows(lm, ids)
    tokens = ids.shape[1]
    if len(ids) != 1:
        raise ValueError(f"ids of shape {tuple(ids.shape)} are not allowed: one text is read, (1, tokens).")
    prompt = chunk if prompt is None else prompt
    for name, value in (("chunk", chunk), ("prompt", prompt)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= tokens:
            raise ValueError(f"{name} = {brief(value)} is not allowed: it must be a whole number from 1 to {tokens}.")
    starts = [0, *range(prompt, tokens - 1, chunk)]  # the last token predicts nothing that is scored
    losses, cache = [], None
    for start, end in track(list(zip(starts, [*starts[1:], tokens - 1])), "reading", progress):
        here = positions.after(lm.model, start, end - start)
        out = lm.model(ids[:, start:end].to(lm.device), past_key_values=cache, use_cache=True, **here)
        cache = out.past_key_values
        for logits, wanted in zip(out.logits[0].split(ROWS), ids[0, start + 1 : end + 1].split(ROWS)):
            scores = logits.float().log_softmax(-1)
            losses.append(-scores.gather(1, wanted.to(scores.device)[:, None])[:, 0].cpu())
    return torch.cat(losses)
