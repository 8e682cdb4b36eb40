"""GPTQ on the shared walk beside a plain port of the same procedure: time, memory and KL of the two, in one run."""

import torch
from port_gptq import port
from report import Row
from side_by_side import side_by_side

import labkit

TITLE = "GPTQ, 4 bits, group 64, 32 × 512 tokens: labkit against a plain port"
TIMEOUT = 1500


def run(quick: bool) -> list[Row]:
    lm = labkit.load(device="cpu", dtype=torch.float32)
    calib = labkit.text.calibration(lm, windows=8 if quick else 32, length=256 if quick else 512)
    ours = labkit.GPTQ(bits=4, group_size=64)
    ways = {"plain port": lambda: port(lm, calib, 4, 64), "labkit": lambda: ours(lm, calib, progress=False)}
    return side_by_side(lm, ways, quick)
