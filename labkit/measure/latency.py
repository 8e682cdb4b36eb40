"""Latency of a whole model: prefill of a prompt, and decoding one token at a time with the cache."""

from __future__ import annotations

import torch

from labkit.measure import timing
from labkit.measure.measurement import Latency


def latency(lm, against=None, prompt: int = 512, context: int = 16, steps: int = 8, rounds: int = 5) -> Latency:
    """Time ``lm``, interleaved with ``against`` where it is given. Decode: ms per token over ``steps`` at ``context``."""
    models = {"this": lm} if against is None else {"baseline": against, "this": lm}
    prefill = timing.compare({name: prefill_run(m, prompt) for name, m in models.items()}, rounds=max(2, rounds - 2))
    decode = timing.compare({name: decode_run(m, context, steps) for name, m in models.items()}, rounds=rounds)
    p, d = prefill.timings["this"], decode.timings["this"]
    return Latency(
        prefill_ms=1e3 * p.median,
        prefill_iqr=1e3 * p.iqr,
        prefill_tokens=prompt,
        decode_ms=1e3 * d.median / steps,
        decode_iqr=1e3 * d.iqr / steps,
        threads=torch.get_num_threads(),
        prefill_ratio=None if against is None else prefill.ratio["this"],
        decode_ratio=None if against is None else decode.ratio["this"],
    )


def _prompt(lm, tokens: int) -> torch.Tensor:
    vocabulary = lm.model.get_input_embeddings().weight.shape[0]
    return torch.arange(tokens, device=lm.device)[None] * 7 % vocabulary


def prefill_run(lm, tokens: int):
    ids = _prompt(lm, tokens)

    @torch.inference_mode()
    def run():
        lm.model(ids, use_cache=True, logits_to_keep=1)

    return run


def decode_run(lm, context: int, steps: int):
    """Greedy decoding of ``steps`` tokens after a prompt; the cache is cut back to the prompt before each run."""
    ids = _prompt(lm, context)
    with torch.inference_mode():
        out = lm.model(ids, use_cache=True)
    cache, first = out.past_key_values, out.logits[:, -1:].argmax(-1)

    @torch.inference_mode()
    def run():
        if (grown := cache.get_seq_length() - context) > 0:
            cache.crop(-grown)
        token = first
        for _ in range(steps):
            token = lm.model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

    return run
