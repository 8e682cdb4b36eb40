"""The whole model, 4-bit against fp32: decode inside transformers and as one graph, and the bytes each holds meanwhile."""

import torch
from report import Row

import labkit
from labkit.engine import compile
from labkit.measure import memory, timing
from labkit.measure.latency import decode_run, engine_decode_run

TITLE = "Decode of the whole model, 4-bit RTN against fp32, and bytes held"
TIMEOUT = 600
STEPS = 8


def run(quick: bool) -> list[Row]:
    lm = labkit.load(device="cpu", dtype=torch.float32)
    small = labkit.RTN(bits=4, group_size=64)(lm, progress=False)
    graph = compile(small)
    runs = {
        "fp32, eager": decode_run(lm, 16, STEPS),
        "4-bit, eager": decode_run(small, 16, STEPS),
        "4-bit, one graph": engine_decode_run(graph, small, 16, STEPS),
    }
    timed = timing.compare(runs, rounds=5 if quick else 21, device="cpu")
    rows = []
    for name, t in timed.timings.items():
        ratio = timed.ratio[name]
        wanted = {"target": "at least 2.3x", "ok": ratio >= 2.3} if name == "4-bit, one graph" else {}
        rows.append(Row(f"decode, {name}", 1e3 * t.median / STEPS, "ms/token", "fp32, eager", ratio, **wanted))
    held = {name: sum(map(memory.held, memory.linear_layers(m))) for name, m in {"fp32": lm, "4-bit": small}.items()}
    share = held["4-bit"] / held["fp32"]
    rows.append(Row("linears held, fp32", held["fp32"] / 1e6, "MB"))
    what = "linears held, 4-bit, with what the runtime keeps"
    rows.append(Row(what, held["4-bit"] / 1e6, "MB", "fp32", share, target="at most 0.22x", ok=share <= 0.22))
    share = graph.parts["blocks"] / held["fp32"]
    what = "blocks of the graph, 4-bit, norms included"
    rows.append(Row(what, graph.parts["blocks"] / 1e6, "MB", "fp32", share, target="at most 0.22x", ok=share <= 0.22))
    return rows
