"""Wanda and SparseGPT on the shared walk beside plain ports of the papers' procedures: time, memory and KL, in one run."""

import torch
from port_prune import port_sparsegpt, port_wanda
from report import Row
from side_by_side import side_by_side

import labkit

TITLE = "Wanda and SparseGPT, 50 %, 32 × 512 tokens: labkit against plain ports"
TIMEOUT = 2400


def run(quick: bool) -> list[Row]:
    lm = labkit.load(device="cpu", dtype=torch.float32)
    calib = labkit.text.calibration(lm, windows=8 if quick else 32, length=256 if quick else 512)
    rows = []
    for method, port in ((labkit.Wanda, port_wanda), (labkit.SparseGPT, port_sparsegpt)):
        rows += side_by_side(
            lm,
            {
                f"port of {method.__name__}": lambda port=port: port(lm, calib, 0.5),
                f"labkit {method.__name__}": lambda method=method: method(sparsity=0.5)(lm, calib, progress=False),
            },
            quick,
        )
    return rows
