"""Which calibration windows AWQ's search sees, and what that does: measured, kept in data/calibration_order.json.

    python benchmarks/calibration_order.py              # all that the file lacks: most of an hour on two cores
    python benchmarks/calibration_order.py --parts 1    # one more part of it

Searches: the exponents that a few windows of one text choose in some blocks, and what they cost on more windows of each
text. Trials: the embedded model compressed with the same 32 windows, half from the manual and half the model's own text, in
another order, since the search looks at the first few alone; kept is the KL divergence of each evaluation window. Notebook
03 shows both (``labkit.ui.lessons.few_windows``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # the checkout that this file lies in

import labkit
from labkit import paths, text
from labkit.formats import Integer
from labkit.linear import exact
from labkit.quantize import AWQ, AWQGPTQ
from labkit.quantize.awq import Search, best_factors
from labkit.reproduce import TEXTS
from labkit.results import Key, Store
from labkit.sweep import text_hashes
from labkit.ui.lessons.inputs import Inputs

FILE = paths.data() / "calibration_order.json"
SOURCES = ("manual", "self")
ORDERS = ("manual first", "in turns", "own text first")
BLOCKS = (3, 15, 27)  # where the searches are compared
FEW, MANY = (1, 2, 4), 8  # windows of a search, and those on which its choice is judged


def wanted() -> list[dict]:
    """Every trial, the most telling first."""
    found = list(itertools.product((0, 1, 2), (AWQ(bits=4), AWQGPTQ(bits=4)), ORDERS[:2]))
    found += [(0, AWQ(bits=4), "own text first")]
    found += [(0, AWQ(bits=4, windows=n), "in turns") for n in (1, 2, 16)]
    found += [(0, AWQ(bits=3), order) for order in ORDERS[:2]]
    return [{"method": method.typed(), "order": order, "seed": seed} for seed, method, order in found]


def ordered(lm, order: str, seed: int) -> torch.Tensor:
    """The windows (32, 512) of the mixed calibration, in one of the ORDERS."""
    manual, own = (text.calibration(lm, 16, 512, seed, source) for source in SOURCES)
    if order == "in turns":
        return torch.stack([manual, own], 1).flatten(0, 1)
    return torch.cat([manual, own] if order == "manual first" else [own, manual])


def measured(lm, trial: dict, store: Store | None = None) -> dict:
    """A trial with the KL divergence, in nats per token, of each window of both evaluation texts; what a store has is not
    measured again."""
    method = eval(trial["method"], {"AWQ": AWQ, "AWQGPTQ": AWQGPTQ})
    calib = ordered(lm, trial["order"], trial["seed"])
    row = (store or Store()).find(Key.of(lm, method, text_hashes(lm, TEXTS), calib))
    if row is not None:  # in turns is the order of "mixed": `labkit reproduce calibration` has measured it
        found = {name: row.measurement.quality[name].per_window["kl"] for name in TEXTS}
    else:
        small = method(lm, calib, progress=False)
        windows = {name: text.evaluation(lm, 8, 512, name) for name in TEXTS}
        found = {name: [labkit.divergence(small, lm, w[None]).kl for w in windows[name]] for name in TEXTS}
    return trial | {"kl": {name: [round(v, 6) for v in values] for name, values in found.items()}}


def chosen(search: Search) -> int:
    """Which exponent of its grid a search chooses."""
    return search.losses.index(min(search.losses))


@exact()
@torch.no_grad()
def searches(lm, bits: int = 4, group_size: int = 64, blocks=BLOCKS) -> list[dict]:
    """For each fold of some blocks and each of FEW windows of each text: the exponent that AWQ's search chooses on the
    uncompressed model, and by text what the error is there on MANY windows, as a share of that at the best exponent.

    "gain" is that share for exponent 0, which is plain rounding. All searches are of the first windows of the same draw.
    """
    seen = {source: Inputs(lm, text.calibration(lm, MANY, 512, 0, source)) for source in SOURCES}
    form, found = Integer(bits, group_size), []
    for block in blocks:
        for index, fold in enumerate(seen[SOURCES[0]].folds(block)):

            def search(source: str, windows: int, block=block, fold=fold) -> Search:
                inputs = seen[source]
                return best_factors(inputs.stack[block], fold, lambda: inputs.run(block, windows), form)

            judges = {source: search(source, MANY) for source in SOURCES}
            for source, windows in itertools.product(SOURCES, FEW):
                at = chosen(search(source, windows))
                cost = {s: round(judge.losses[at] / min(judge.losses), 4) for s, judge in judges.items()}
                gain = {s: round(judge.losses[0] / min(judge.losses), 4) for s, judge in judges.items()}
                where = {"block": block, "fold": index, "layer": fold.readers[0], "source": source, "windows": windows}
                found.append(where | {"exponent": judges[source].exponents[at], "cost": cost, "gain": gain})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--parts", type=int, default=None, help="how many more, at most: all searches, or one trial, each"
    )
    options = parser.parse_args()
    kept = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {"searches": [], "trials": []}
    known = [{n: t[n] for n in ("method", "order", "seed")} for t in kept["trials"]]
    parts = [] if kept["searches"] else [None]
    parts = (parts + [t for t in wanted() if t not in known])[: options.parts]
    lm = labkit.load(device="cpu", dtype=torch.float32) if parts else None
    for trial in parts:
        if trial is None:
            kept["searches"] = searches(lm)
            print(len(kept["searches"]), "searches", flush=True)
        else:
            kept["trials"].append(measured(lm, trial))
            means = {name: sum(v) / len(v) for name, v in kept["trials"][-1]["kl"].items()}
            print(*trial.values(), means, flush=True)
        lines = (f'"{name}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]" for name, rows in kept.items())
        scratch = FILE.with_suffix(".part")
        scratch.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        scratch.replace(FILE)


if __name__ == "__main__":
    main()
