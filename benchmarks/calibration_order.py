"""Which calibration windows AWQ's search sees, and what that does: measured trials, kept in data/calibration_order.json.

    python benchmarks/calibration_order.py              # all that the file lacks: most of an hour on two cores
    python benchmarks/calibration_order.py --trials 1   # one more of them

Each trial compresses the embedded model with the same 32 windows, half from the manual and half the model's own text, in
another order: the search looks at the first few alone. Kept are the KL divergence of each evaluation window, and what
the search chose in each block. Notebook 03 shows the file (``labkit.ui.lessons.few_windows``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # the checkout that this file lies in

import labkit
from labkit import paths, text
from labkit.quantize import AWQ, AWQGPTQ, awq

FILE = paths.data() / "calibration_order.json"
ORDERS = ("manual first", "in turns", "own text first")


@dataclass
class Trial:
    """One compressed model. ``kl``: nats per token, by text, of each window. ``chosen``: what the search found for each
    fold, in the order of the blocks, see :func:`choice`."""

    method: str
    order: str
    seed: int
    kl: dict[str, list[float]] = field(default_factory=dict)
    chosen: list[tuple] = field(default_factory=list)

    @property
    def setting(self) -> tuple:
        return self.method, self.order, self.seed


def wanted() -> list[Trial]:
    """Every trial, the most telling first."""
    draws = itertools.product((0, 1, 2), (AWQ(bits=4), AWQGPTQ(bits=4)), ORDERS[:2])
    found = [Trial(method.typed(), order, seed) for seed, method, order in draws]
    found += [Trial(AWQ(bits=4).typed(), "own text first", 0)]
    found += [Trial(AWQ(bits=4, windows=n).typed(), "in turns", 0) for n in (1, 2, 16)]
    return found + [Trial(AWQ(bits=3).typed(), order, 0) for order in ORDERS[:2]]


def ordered(lm, order: str, seed: int) -> torch.Tensor:
    """The windows (32, 512) of the mixed calibration, in one of the ORDERS."""
    manual, own = (text.calibration(lm, 16, 512, seed, source) for source in ("manual", "self"))
    if order == "in turns":
        return torch.stack([manual, own], 1).flatten(0, 1)
    return torch.cat([manual, own] if order == "manual first" else [own, manual])


def choice(layer: str, search: awq.Search) -> tuple[str, float, float, float, float]:
    """The first layer that reads a fold, the best exponent, its loss as a share of that at 0, and where it is flat: the
    lowest and the highest exponent up to which the loss stays within 1 % of the best one's."""
    losses, exponents = search.losses, search.exponents
    best = low = high = losses.index(min(losses))
    near = [loss <= 1.01 * losses[best] for loss in losses]
    while low > 0 and near[low - 1]:
        low -= 1
    while high + 1 < len(losses) and near[high + 1]:
        high += 1
    left = round(losses[best] / max(losses[0], 1e-30), 4)
    return layer, exponents[best], left, exponents[low], exponents[high]


def measure(lm, trial: Trial) -> Trial:
    """Fill in a trial."""
    search, chosen = awq.best_factors, []

    def watched(block, fold, run, form):
        found = search(block, fold, run, form)
        chosen.append(choice(fold.readers[0], found))
        return found

    awq.best_factors = watched
    try:
        method = eval(trial.method, {"AWQ": AWQ, "AWQGPTQ": AWQGPTQ})
        small = method(lm, ordered(lm, trial.order, trial.seed), progress=False)
    finally:
        awq.best_factors = search
    for name in ("manual", "prose"):
        windows = text.evaluation(lm, 8, 512, name)
        trial.kl[name] = [round(labkit.divergence(small, lm, w[None]).kl, 6) for w in windows]
    trial.chosen = chosen
    return trial


def kept() -> list[Trial]:
    return [Trial(**row) for row in json.loads(FILE.read_text(encoding="utf-8"))] if FILE.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=None, help="how many more, at most")
    options = parser.parse_args()
    done = kept()
    missing = [t for t in wanted() if t.setting not in {d.setting for d in done}][: options.trials]
    lm = labkit.load(device="cpu", dtype=torch.float32) if missing else None
    for trial in missing:
        done.append(measure(lm, trial))
        rows = ",\n".join(json.dumps(asdict(t)) for t in done)
        scratch = FILE.with_suffix(".part")
        scratch.write_text(f"[\n{rows}\n]\n", encoding="utf-8")
        os.replace(scratch, FILE)
        means = ", ".join(f"{name} {sum(v) / len(v):.4f}" for name, v in trial.kl.items())
        print(*trial.setting, means, flush=True)


if __name__ == "__main__":
    main()
