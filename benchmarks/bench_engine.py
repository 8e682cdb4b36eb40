"""The whole model as one graph, beside transformers and beside other engines, in one run and in turns.

Bytes per token are what the graph reads: blocks, head and the cache of the context. Their share of the measured read
bandwidth says how close a step is to the roof. Peers run in processes of their own, each where it is installed.
"""

import engine_memory
import torch
from engine_peers import Peer, PeerMissing
from report import Row

import labkit
from labkit.engine import compile
from labkit.measure import roofline, timing
from labkit.measure.latency import decode_run, engine_decode_run, engine_prefill_run, prefill_run

TITLE = "Decode and prefill: eager, one graph, llama.cpp, onnxruntime-genai"
TIMEOUT = 1500
STEPS = 16
OURS = "engine 4-bit, 8-bit head"
LONG = f"{OURS}, 8-bit cache"


def run(quick: bool) -> list[Row]:
    lm = labkit.load(device="cpu", dtype=torch.float32)
    small = labkit.RTN(bits=4, group_size=64)(lm, progress=False)
    rows, engines = compiled(lm, small)
    peers, absent = reachable()
    bandwidth = roofline.measure().bandwidth
    try:
        for context in (16,) if quick else (16, 512, 1024):
            runs = {"eager fp32": decode_run(lm, context, STEPS), "eager 4-bit": decode_run(small, context, STEPS)}
            runs |= {name: engine_decode_run(e, s, context, STEPS) for name, (s, e) in pairs(lm, small, engines)}
            runs |= {name: lambda p=p, c=context: p.ask("decode", c, STEPS) for name, p in peers.items()}
            timed = timing.compare(runs, rounds=5 if quick else 11, device="cpu", min_seconds=0)
            speed = {name: STEPS / t.median for name, t in timed.timings.items()}
            for name in runs:
                where = f"decode at {context}, {name}"
                rows.append(Row(where, speed[name], "tok/s", "eager fp32", timed.ratio[name]))
                if name in engines:
                    share = 100 * read(engines[name], context) * speed[name] / bandwidth
                    rows.append(Row(f"{where}: share of {bandwidth / 1e9:.0f} GB/s", share, "%"))
            rows += verdicts(timed, context)
        runs = {"eager fp32": prefill_run(lm, 512), "eager 4-bit": prefill_run(small, 512)}
        runs |= {name: engine_prefill_run(e, s, 512) for name, (s, e) in pairs(lm, small, engines)}
        runs["engine 4-bit, prompts with dense weights"] = engine_prefill_run(
            compile(small, prefill="dense"), small, 512
        )
        runs |= {name: lambda p=p: p.ask("prefill", 512) for name, p in peers.items()}
        timed = timing.compare(runs, rounds=3 if quick else 7, device="cpu", min_seconds=0, warmup=1)
        for name, t in timed.timings.items():
            rows.append(Row(f"prefill of 512, {name}", 512 / t.median, "tok/s", "eager fp32", timed.ratio[name]))
    finally:
        for peer in peers.values():
            peer.close()
    for why in absent:
        print(f"not run: {why}")
    return rows


def read(engine, context: int) -> float:
    """Bytes that one step reads at a context."""
    return engine.parts["blocks"] + engine.parts["head"] + engine.kv_nbytes * context / engine.context


def compiled(lm, small):
    """The compiled models, with what compiling took in a process of its own: time, and memory above what the source holds."""
    rows = []
    for kind, name in (("4-bit", OURS), ("fp32", "engine fp32")):
        seconds, nbytes, peak, steady = engine_memory.measured(kind)
        target = {"target": "at most 3 s", "ok": seconds <= 3} if kind == "4-bit" else {}
        rows.append(Row(f"compile, {name}", seconds, "s", **target))
        rows.append(Row(f"weights held, {name}", nbytes / 1e6, "MB"))
        target = {"target": "at most 2.2x", "ok": peak <= 2.2 * nbytes}
        rows.append(Row(f"peak above the source, {name}", peak / 1e6, "MB", "weights held", peak / nbytes, **target))
        rows.append(Row(f"steady above the source, {name}", steady / 1e6, "MB", "weights held", steady / nbytes))
    engines = {
        OURS: compile(small),
        LONG: compile(small, kv_bits=8),
        "engine 4-bit, 4-bit head": compile(small, head_bits=4, embedding_bits=4),
        "engine fp32": compile(lm, head_bits=None, embedding_bits=None),
    }
    return rows, engines


def pairs(lm, small, engines):
    return [(name, (lm if "fp32" in name else small, e)) for name, e in engines.items()]


def reachable() -> tuple[dict, list]:
    """The peers that run here, and why the others do not."""
    peers, absent = {}, []
    for threads in ("1", "2"):
        for options in ((), ("plain",)):  # where repacked weights crash, as on some virtual machines, without them
            try:
                name = f"llama.cpp Q4_1, {threads} thread{'s' * (threads != '1')}" + ", not repacked" * bool(options)
                peers[name] = Peer("llama", threads, *options)
                break
            except PeerMissing as error:
                absent.append(str(error))
    try:
        peers["onnxruntime-genai, 4-bit head"] = Peer("genai")
    except PeerMissing as error:
        absent.append(str(error))
    return peers, absent


def verdicts(timed, context: int) -> list[Row]:
    """Paired ratios of our packed engine to the others, with the targets."""
    rows = []

    def against(names, own: str, least: float):
        names = [n for n in timed.timings if n.startswith(names)]
        if names:
            best = min(names, key=lambda n: timed.timings[n].median)
            ratios = sorted(a / b for a, b in zip(timed.timings[best].samples, timed.timings[own].samples))
            ratio = ratios[len(ratios) // 2]
            what = f"decode at {context}, {own}, times the speed of the best of {len(names)}"
            target = {"target": f"at least {least}x", "ok": ratio >= least}
            rows.append(Row(what, ratio, "x", best, ratio, **target))

    for own in (OURS, LONG):
        against("eager fp32", own, 5.0)
        against("llama.cpp", own, 1.0)
        against("onnxruntime-genai", own, 0.95)
    against("onnxruntime-genai", "engine 4-bit, 4-bit head", 0.95)
    return rows
