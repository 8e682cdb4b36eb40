"""Latency of a whole model: prefill of a prompt, and decoding one token at a time with the cache.

Two ways: *eager*, through transformers, where everything can be looked at and Python runs between hundreds of small
operators; and the *engine*, the whole model as one onnxruntime graph, where little but the reading of weights is left.
Each is timed in turns with the uncompressed model run in the same way: a machine that drifts does not drift alike for both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from labkit import cache
from labkit.measure import memory, timing
from labkit.measure.measurement import Latency
from labkit.walk import blocks, linears

PROMPT = 256  # tokens of the prompt whose reading is timed
CONTEXT = 16  # tokens in the cache when decoding begins, so that weights are what a step reads
LONG_CONTEXT = 1024  # the same under methods for the KV cache: they must have evicted or rounded something
STEPS = 4  # tokens decoded in one sample
ROUNDS = 15
GROWN = 64  # tokens that are decoded before a text that cannot be cut back begins again


def latency(lm, against=None, rounds: int = ROUNDS) -> Latency:
    """Time ``lm`` eagerly; where it is given, in turns with ``against``, the uncompressed model.

    Decoding begins with 16 tokens in the cache, or 1,024 where methods act on it.
    """
    models = {"this": lm} if against is None else {"baseline": against, "this": lm}
    room = min(_room(m) for m in models.values())
    context = max(1, min(LONG_CONTEXT if cache.methods_of(lm.model) else CONTEXT, room - STEPS))
    prompt = min(PROMPT, room)
    prefills = {name: prefill_run(m, prompt) for name, m in models.items()}
    decodes = {name: decode_run(m, context, STEPS) for name, m in models.items()}
    return _timed(prefills, decodes, prompt, context, rounds, torch.get_num_threads(), gemv(lm))


def engine_latency(lm, graph, against=None, rounds: int = ROUNDS) -> Latency:
    """Time ``graph``, which is ``lm`` compiled; where it is given, in turns with ``against``, the uncompressed graph."""
    graphs = {"this": graph} if against is None else {"baseline": against, "this": graph}
    room = min(g.context for g in graphs.values())
    prompt, context = min(PROMPT, room), min(CONTEXT, room - STEPS)
    prefills = {name: engine_prefill_run(g, lm, prompt) for name, g in graphs.items()}
    decodes = {name: engine_decode_run(g, lm, context, STEPS) for name, g in graphs.items()}
    return _timed(prefills, decodes, prompt, context, rounds, getattr(graph, "threads", 1), {})


def _room(lm) -> int:
    return getattr(lm.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 20


def _timed(
    prefills: dict[str, Callable],
    decodes: dict[str, Callable],
    prompt: int,
    context: int,
    rounds: int,
    threads: int,
    gemv_us: dict[str, float],
) -> Latency:
    """Run the callables in turns. The one called "this" is what is wanted, "baseline" what it is compared with."""
    prefill = timing.compare(prefills, rounds=rounds, warmup=1, min_seconds=0)
    decode = timing.compare(decodes, rounds=rounds, warmup=2, min_seconds=0)
    p, d, paired = prefill.timings["this"], decode.timings["this"], "baseline" in prefills
    return Latency(
        prefill_ms=1e3 * p.median,
        prefill_iqr=1e3 * p.iqr,
        prefill_tokens=prompt,
        decode_ms=1e3 * d.median / STEPS,
        decode_iqr=1e3 * d.iqr / STEPS,
        threads=threads,
        prefill_ratio=prefill.ratio["this"] if paired else None,
        decode_ratio=decode.ratio["this"] if paired else None,
        prefill_spread=list(prefill.spread["this"]) if paired else None,
        decode_spread=list(decode.spread["this"]) if paired else None,
        context=context,
        rounds=rounds,
        busy=max((b for b in (prefill.busy, decode.busy) if b is not None), default=None),
        gemv_us=gemv_us,
    )


def gemv(lm) -> dict[str, float]:
    """Microseconds of each kind of linear for one token, as decoding meets it: every block's in turn. Name -> median.

    Blocks may differ, as where a dense one comes before those of experts: each kind is timed in the blocks that have it.
    """
    dtype = lm.model.get_input_embeddings().weight.dtype
    kinds: dict[str, list] = {}
    for block in blocks(lm.model):
        for name, layer in linears(block):
            kinds.setdefault(name, []).append(layer)
    found = {}
    for name, layers in kinds.items():
        # GPT-2's weights are (in, out)
        widths = [m.weight.shape[0] if hasattr(m, "nf") else m.in_features for m in layers]
        inputs = {width: torch.randn(1, 1, width, dtype=dtype, device=lm.device) for width in widths}

        def run(layers=layers, inputs=tuple(inputs[width] for width in widths)):
            for layer, x in zip(layers, inputs):
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
    """Greedy decoding of ``steps`` tokens after a prompt of ``context``.

    The cache is cut back to the prompt before each run. One that has evicted or rounded cannot be cut back, nor can a full
    sliding window or a recurrent state: there the text goes on, and begins again, from a copy of the cache, once it is
    ``GROWN`` tokens longer (rarely, so that a median of many runs does not see it). A model that hands back no cache reads
    the whole text again for each token.
    """
    ids = _prompt(lm, context)

    @torch.inference_mode()
    def read() -> tuple[torch.Tensor, dict]:
        out = lm.model(ids, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1:].argmax(-1), memory.cache_of(out)

    @torch.inference_mode()
    def decode(token: torch.Tensor, kept: dict) -> dict:
        for _ in range(steps):
            out = lm.model(token, use_cache=True, **kept)
            token, kept = out.logits[:, -1:].argmax(-1), memory.cache_of(out)
        return kept

    first, begun = read()
    if not begun:
        return _reread_run(lm, ids, steps)
    can_crop = getattr(begun.get("past_key_values"), "is_croppable", False)
    if can_crop and not _crops(decode(first, begun), steps):
        can_crop, (first, begun) = False, read()
    kept = begun if can_crop else copy.deepcopy(begun)
    grown = 0

    def run():
        nonlocal kept, grown
        if can_crop:
            if grown:
                kept["past_key_values"].crop(-grown)
            grown = 0
        elif grown > min(GROWN, _room(lm) - context - steps):
            kept, grown = copy.deepcopy(begun), 0
        kept = decode(first, kept)
        grown += steps

    return run


def _crops(kept: dict, tokens: int) -> bool:
    """Cut the last tokens off a cache that says that this can be done. Whether it can; if not, the cache is spoiled."""
    try:
        kept["past_key_values"].crop(-tokens)
    except (
        RuntimeError
    ):  # a sliding window that is full, or the states of convolutions, are not recorded unless asked for
        return False
    return True


def _reread_run(lm, ids: torch.Tensor, steps: int):
    @torch.inference_mode()
    def run():
        text = ids
        for _ in range(steps):
            token = lm.model(text, use_cache=False, logits_to_keep=1).logits[:, -1:].argmax(-1)
            text = torch.cat([text, token], 1)

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
