"""A model's fingerprint, a hash of all of its bytes, beside other hashes of the same bytes and a plain read of them."""

import hashlib

import torch
from report import Row

import labkit
from labkit import identity
from labkit.measure import timing

TITLE = "Fingerprint of the embedded model: all 538 MB"
TIMEOUT = 300
LIMIT = 1.0  # s: what a slider may wait for, with a lot to spare


def run(quick: bool) -> list[Row]:
    lm = labkit.load(device="cpu", dtype=torch.float32)
    held = [t.detach().reshape(-1) for t in lm.model.parameters()]
    size = sum(t.nbytes for t in held) / 1e9

    def standard(name: str) -> None:
        for t in held:
            hashlib.new(name, t.view(torch.uint8).numpy()).digest()

    ways = {
        "fingerprint": lambda: identity.fingerprint(lm.model),
        "a plain sum": lambda: [t.view(torch.int32).sum() for t in held],
        "sha256, one thread": lambda: standard("sha256"),
        "blake2b, one thread": lambda: standard("blake2b"),
    }
    timed = timing.compare(ways, rounds=3 if quick else 9, warmup=1, device="cpu", min_seconds=0)
    rows = []
    for name, t in timed.timings.items():
        ours = name == "fingerprint"
        target = {"target": f"at most {LIMIT:g} s", "ok": t.median <= LIMIT} if ours else {}
        beside = {} if ours else {"baseline": "fingerprint", "ratio": timed.ratio[name]}
        rows.append(Row(f"{name}, {size / t.median:.1f} GB/s", t.median, "s", **beside, **target))
    return rows
