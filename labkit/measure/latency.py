"""Latency of a whole model: prefill of a prompt, and decoding one token at a time with the cache.

Two ways: *eager*, through transformers, where everything can be looked at and Python runs between hundreds of small
operators; and the *engine*, the whole model as one onnxruntime graph, where little but the reading of weights is left.
"""

from __future__ import annotations

import copy

import torch

from labkit.measure import timing
from labkit.measure.measurement import Latency
from labkit.walk import blocks, linears


def latency(
    lm, against=None, engine=None, prompt: int = 512, context: int = 16, steps: int = 8, rounds: int = 5
) -> tuple[Latency, Latency | None]:
    """Time ``lm``, eagerly and, where there is an ``engine`` (``lm`` compiled), as one graph.

    Interleaved with ``against``, where it is given. Decode: ms per token over ``steps`` at ``context``. All ratios are to
    the uncompressed model run eagerly: ``against``, or ``lm`` itself for its own engine.
    """
    room = min(getattr(m.model.config, "max_position_embeddings", None) or prompt for m in (lm, against or lm))
    prompt = min(prompt, room)
    models = {"this": lm} if against is None else {"baseline": against, "this": lm}
    prefills = {name: prefill_run(m, prompt) for name, m in models.items()}
    decodes = {name: decode_run(m, context, steps) for name, m in models.items()}
    if engine is not None:
        prefills["engine"] = engine_prefill_run(engine, lm, prompt)
        decodes["engine"] = engine_decode_run(engine, lm, context, steps)
    prefill = timing.compare(prefills, rounds=max(2, rounds - 2))
    decode = timing.compare(decodes, rounds=rounds)

    layers = gemv(lm)

    def made(name: str) -> Latency:
        paired = name != prefill.baseline  # the uncompressed model, timed eagerly, comes first
        p, d = prefill.timings[name], decode.timings[name]
        return Latency(
            prefill_ms=1e3 * p.median,
            prefill_iqr=1e3 * p.iqr,
            prefill_tokens=prompt,
            decode_ms=1e3 * d.median / steps,
            decode_iqr=1e3 * d.iqr / steps,
            threads=torch.get_num_threads(),
            prefill_ratio=prefill.ratio[name] if paired else None,
            decode_ratio=decode.ratio[name] if paired else None,
            gemv_us={} if name == "engine" else layers,
        )

    return made("this"), made("engine") if engine is not None else None


@torch.inference_mode()
def gemv(lm) -> dict[str, float]:
    """Microseconds of each kind of linear for one token, as decoding meets it: every block's in turn. Name -> median."""
    stack = blocks(lm.model)
    dtype = lm.model.get_input_embeddings().weight.dtype
    found = {}
    for name, first in linears(stack[0]):
        layers = [block.get_submodule(name) for block in stack]
        columns = first.weight.shape[0] if hasattr(first, "nf") else first.in_features  # GPT-2's weights are (in, out)
        x = torch.randn(1, 1, columns, dtype=dtype, device=lm.device)

        def run(layers=layers, x=x):
            for layer in layers:
                layer(x)

        timed = timing.time_one(run, repeats=5, warmup=1, min_seconds=0.05, device=str(lm.device))
        found[name] = 1e6 * timed.median / len(layers)
    return found


def _prompt(lm, tokens: int) -> torch.Tensor:
    vocabulary = lm.model.get_input_embeddings().weight.shape[0]
    return torch.arange(tokens, device=lm.device)[None] * 7 % vocabulary


def prefill_run(lm, tokens: int):
    """A callable that reads a prompt of that many tokens."""
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
        kept = cache if cache.is_croppable else copy.deepcopy(cache)  # what a policy has evicted cannot be put back
        if (grown := kept.get_seq_length() - context) > 0:
            kept.crop(-grown)
        token = first
        for _ in range(steps):
            token = lm.model(token, past_key_values=kept, use_cache=True).logits[:, -1:].argmax(-1)

    return run


def engine_prefill_run(engine, lm, tokens: int):
    """The same for a compiled model of ``lm``."""
    ids = _prompt(lm, tokens).cpu()
    return lambda: engine.prefill(ids)


def engine_decode_run(engine, lm, context: int, steps: int):
    """The same for a compiled model of ``lm``."""
    ids = _prompt(lm, context).cpu()
    first = int(engine.prefill(ids).argmax())

    def run():
        if engine.length > context:
            engine.rewind(context)
        else:  # a prefill run came between
            engine.prefill(ids)
        token = first
        for _ in range(steps):
            token = int(engine.decode(token).argmax())

    return run
