"""The whole model, decoding: 4-bit against fp32, inside transformers, and the bytes that each holds while it runs."""

import torch
from report import Row

import labkit
from labkit.measure import memory, timing
from labkit.measure.latency import decode_run, prefill_run

TITLE = "Decode and prefill of the whole model, 4-bit RTN against fp32, eager"
TIMEOUT = 600


def run(quick: bool) -> list[Row]:
    lm = labkit.load(device="cpu", dtype=torch.float32)
    small = labkit.RTN(bits=4, group_size=64)(lm, progress=False)
    models = {"fp32": lm, "4-bit": small}
    rows = []
    for context in (16,) if quick else (16, 512, 1024):
        runs = {name: decode_run(m, context, steps=8) for name, m in models.items()}
        timed = timing.compare(runs, rounds=5 if quick else 15, device="cpu")
        for name, t in timed.timings.items():
            ms = 1e3 * t.median / 8
            rows.append(Row(f"decode at {context} tokens, {name}", ms, "ms/token", "fp32", timed.ratio[name]))
    timed = timing.compare({n: prefill_run(m, 512) for n, m in models.items()}, rounds=3 if quick else 7, device="cpu")
    for name, t in timed.timings.items():
        rows.append(Row(f"prefill of 512 tokens, {name}", 1e3 * t.median, "ms", "fp32", timed.ratio[name]))
    held = {name: sum(map(memory.held, memory.linear_layers(m))) for name, m in models.items()}
    share = held["4-bit"] / held["fp32"]
    rows.append(Row("linears held, fp32", held["fp32"] / 1e6, "MB"))
    what = "linears held, 4-bit, with what the runtime keeps"
    rows.append(Row(what, held["4-bit"] / 1e6, "MB", "fp32", share, target="at most 0.22x", ok=share <= 0.22))
    return rows
