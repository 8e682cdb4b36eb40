"""GPTQ on the shared walk beside a plain port of the paper's procedure: time, memory and KL of the two, in one run."""

import time

import torch
from port_gptq import port
from report import Row

import labkit
from labkit.measure import memory

TITLE = "GPTQ, 4 bits, group 64, 32 × 512 tokens: labkit against a plain port"
TIMEOUT = 1500


def run(quick: bool) -> list[Row]:
    lm = labkit.load(device="cpu", dtype=torch.float32)
    calib = labkit.text.calibration(lm, windows=8 if quick else 32, length=256 if quick else 512)
    texts = {t: labkit.text.evaluation(lm, 2 if quick else 8, 512, t) for t in ("manual", "prose")}
    ways = {
        "plain port": lambda: port(lm, calib, 4, 64),
        "labkit": lambda: labkit.GPTQ(bits=4, group_size=64, scale=False, clip=False)(lm, calib, progress=False),
    }
    seconds, peaks, kl = {n: [] for n in ways}, {}, {}
    for turn in range(1 if quick else 2):  # A B B A
        for name in list(ways) if turn % 2 == 0 else list(ways)[::-1]:
            before, start = memory.resident(), time.perf_counter()
            with memory.peak(lm.device) as peak:
                small = ways[name]()
            seconds[name].append(time.perf_counter() - start)
            peaks[name] = peak.bytes - before
            if name not in kl:
                kl[name] = {t: labkit.divergence(small, lm, ids).kl for t, ids in texts.items()}
            del small
    rows = []
    for name in ways:
        mean = sum(seconds[name]) / len(seconds[name])
        share = mean / (sum(seconds["plain port"]) / len(seconds["plain port"]))
        wanted = {"target": "at most 0.65x", "ok": share <= 0.65} if name == "labkit" else {}
        rows.append(Row(f"time, {name}", mean, "s", "plain port", share, **wanted))
        share = peaks[name] / peaks["plain port"]
        wanted = {"target": "no more than the port", "ok": share <= 1.05} if name == "labkit" else {}
        rows.append(Row(f"peak memory above the model, {name}", peaks[name] / 1e6, "MB", "plain port", share, **wanted))
        for text in texts:
            share = kl[name][text] / kl["plain port"][text]
            wanted = {"target": "equal within 5 %", "ok": share <= 1.05} if name == "labkit" else {}
            rows.append(Row(f"KL on {text}, {name}", kl[name][text], "nats per token", "plain port", share, **wanted))
    return rows
