"""The KV cache against context and batch: bytes held, and time per decoded token, whole and under each method.

Eager, in turns, on one model. A text goes on from round to round, so that a whole cache grows by some tokens while it is
timed; its bytes are those at the context named. The engine keeps the whole cache.
"""

import torch
from report import Row

import labkit
from labkit.engine import NotCompilable
from labkit.heap import trim
from labkit.measure import memory, roofline, timing
from labkit.measure.latency import engine_decode_run

TITLE = "KV cache: bytes and ms per token against context and batch"
TIMEOUT = 3000
STEPS = 8
FULL, ENGINE = "full cache", "engine, full cache"
METHODS = {
    "RecentKV 256": labkit.RecentKV(budget=256),
    "StreamingLLM 256": labkit.StreamingLLM(budget=256),
    "H2O 256": labkit.H2O(budget=256),
    "Scissorhands 256": labkit.Scissorhands(budget=256),
    "SnapKV 256": labkit.SnapKV(budget=256),
    "RandomKV 256": labkit.RandomKV(budget=256),
    "KIVI 4-bit": labkit.KIVI(bits=4),
    "KIVI 2-bit": labkit.KIVI(bits=2),
    "SnapKV 256, KIVI 4-bit": labkit.Recipe(labkit.SnapKV(budget=256), labkit.KIVI(bits=4)),
}
OVERHEAD = 1024  # tokens held, whole or under a policy that has to evict one at every step


def run(quick: bool) -> list[Row]:
    lm = labkit.load(device="cpu", dtype=torch.float32)
    rows = peaks(lm, 1024 if quick else 4096)
    models = {FULL: lm} | {name: method(lm, progress=False) for name, method in METHODS.items()}
    contexts, batches = ((512,), (1, 4)) if quick else ((256, 512, 1024, 2048, 4096), (1, 4))
    rounds = 3 if quick else 11
    engine = compiled(lm, contexts[-1] + 2 * STEPS)
    roof = roofline.measure(0.3 if quick else 1.0, device="cpu", progress=False)
    for context in contexts:
        for batch in batches:
            rows += decode(lm, models, engine if batch == 1 else None, context, batch, rounds, roof)
    rows += overhead(lm, 256 if quick else OVERHEAD, rounds)
    for batch in batches:
        tokens = roofline.cache_outweighs_weights(lm, batch)
        rows.append(Row(f"cache outweighs weights from, batch {batch}", tokens, "tokens", label="modelled"))
    return rows


def compiled(lm, context: int):
    try:
        return labkit.compile(lm, context=context, head_bits=None, embedding_bits=None)
    except (NotCompilable, ImportError) as error:
        print(f"not run: the engine ({error})")
        return None


def decode(lm, models, engine, context: int, batch: int, rounds: int, roof) -> list[Row]:
    """ms per step, in turns, and the bytes of each cache before the first one."""
    where, runs, held = f"at {context}, batch {batch}", {}, {}
    for name, model in models.items():
        runs[name], held[name] = steps(model, context, batch)
    if engine is not None:
        runs[ENGINE] = engine_decode_run(engine, lm, context, STEPS)
    timed = timing.compare(runs, rounds=rounds, warmup=1, device="cpu", min_seconds=0)
    least = 1e3 * roof.seconds(roofline.decode_work(lm, batch, context), "fp32")
    rows = [Row(f"under the roof {where}", least, "ms/step", label="modelled")]
    for name, t in timed.timings.items():
        rows.append(Row(f"decode {where}, {name}", 1e3 * t.median / STEPS, "ms/step", FULL, timed.ratio[name]))
    for name, size in held.items():
        rows.append(Row(f"KV {where}, {name}", size / 1e6, "MB", FULL, size / held[FULL]))
    return rows


@torch.inference_mode()
def steps(model, context: int, batch: int):
    """A callable that decodes STEPS more tokens of ``batch`` texts, and the bytes that their cache holds at first."""
    ids = torch.arange(context)[None] * 7 % model.model.get_input_embeddings().weight.shape[0]
    out = model.model(ids, use_cache=True, logits_to_keep=1)
    cache = out.past_key_values
    if batch > 1:  # the same text for all: to the clock it makes no difference, and it is read only once
        cache.batch_repeat_interleave(batch)
    token = out.logits[:, -1:].argmax(-1).expand(batch, 1)

    @torch.inference_mode()
    def run():
        nonlocal token
        for _ in range(STEPS):
            token = model.model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

    return run, memory.cache_bytes(cache)


def overhead(lm, tokens: int, rounds: int) -> list[Row]:
    """What a policy's own work adds to a step: the same number of tokens held, one evicted at every step."""
    classes = (labkit.RecentKV, labkit.StreamingLLM, labkit.H2O, labkit.Scissorhands, labkit.RandomKV)
    models = {FULL: lm} | {cls.__name__: cls(budget=tokens)(lm, progress=False) for cls in classes}
    timed = timing.compare(
        {name: steps(model, tokens, 1)[0] for name, model in models.items()},
        rounds=rounds,
        warmup=1,
        device="cpu",
        min_seconds=0,
    )
    rows = []
    for name in models:
        if name != FULL:
            added = 100 * (1 / timed.ratio[name] - 1)
            target = {"target": "at most 10 %", "ok": added <= 10} if tokens == OVERHEAD else {}
            what = f"overhead of {name}, {tokens} tokens held"
            rows.append(Row(what, added, "% of a step", FULL, timed.ratio[name], **target))
    return rows


@torch.inference_mode()
def peaks(lm, tokens: int) -> list[Row]:
    """Memory that reading a prompt takes above what is held before, whole and under H2O, which needs all attention sums."""
    ids, rows, found = torch.arange(tokens)[None], [], {}
    lm.model(ids[:, :64], logits_to_keep=1)  # what the first forward of a process allocates once
    for name, model in ((FULL, lm), ("H2O 256", labkit.H2O(budget=256)(lm, progress=False))):
        trim()
        before = memory.resident()
        with memory.peak(lm.device, every=0.005) as peak:
            model.model(ids, use_cache=True, logits_to_keep=1)
        found[name] = max(peak.bytes - before, 1)
        rows.append(
            Row(f"peak of reading {tokens} tokens, {name}", found[name] / 1e6, "MB", FULL, found[name] / found[FULL])
        )
    shape = roofline.Shape.of(lm)
    one = 4 * shape.heads * tokens**2
    rows.append(Row(f"attention of one layer, {tokens} tokens", one / 1e6, "MB", label="modelled"))
    rows.append(Row(f"attention of all layers, {tokens} tokens", shape.layers * one / 1e6, "MB", label="modelled"))
    if tokens == 4096:
        more, target = found["H2O 256"] - found[FULL], "less than one layer's attention"
        rows.append(Row("H2O's peak above the full cache's", more / 1e6, "MB", target=target, ok=more < one))
    return rows
