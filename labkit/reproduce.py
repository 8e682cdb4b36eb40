"""The sweeps that ship with labkit: what they measure, and how to measure it again.

``data/sweeps.toml`` says which settings each one has; ``data/results/NAME.jsonl`` holds what they gave on some machine,
and is read into every new store. ``labkit reproduce NAME`` measures here what is missing and writes that file.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from labkit import paths
from labkit.measure.measurement import Measurement
from labkit.measure.reading import Reading
from labkit.method import Method
from labkit.results import Key, Store, calibrated
from labkit.sweep import grid, sweep, text_hashes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TEXTS = ("manual", "prose")


@dataclass(frozen=True)
class Sweep:
    """One shipped sweep. ``sources``: the calibrations that each calibrated setting is tried with, in the draw of the first
    of ``seeds``; the last source in the draws of all of them, for a seed band."""

    name: str
    what: str
    settings: tuple[dict, ...]
    windows: int = 8
    length: int = 512
    latency: bool = True
    engine: bool = True
    sources: tuple[str, ...] = ("mixed",)
    seeds: tuple[int, ...] = (0,)

    def methods(self) -> list[Method]:
        """Every setting of the sweep, once."""
        import labkit

        found: dict[tuple[str, str], Method] = {}
        for setting in self.settings:
            knobs = {n: _none(v) for n, v in setting.items() if n != "method"}
            for method in grid(labkit.methods()[setting["method"]], **knobs):
                found[type(method).__name__, method.key()] = method
        return list(found.values())

    def readings(self, lm) -> set[Reading]:
        """The ways in which the sweep's rows are read: methods for the cache otherwise than the rest."""
        return {Reading.of(lm, method, self.windows, self.length) for method in (None, *self.methods())}

    def run(self, lm, store: Store | None = None, progress: bool = True, missing: bool = False) -> list[Key]:
        """Measure what the store does not have from this machine; returns the keys of all, the uncompressed first.

        ``missing``: what any other machine has measured counts as measured (quality and bytes carry over, times do not).
        """
        from labkit import text

        store = Store() if store is None else store
        how = {name: getattr(self, name) for name in ("windows", "length", "latency", "engine")}
        hashes: dict[Reading, dict[str, str]] = {}

        def key_of(method, calib=None) -> Key:
            reading = Reading.of(lm, method, self.windows, self.length)
            if reading not in hashes:
                hashes[reading] = text_hashes(lm, TEXTS, **vars(reading))
            return Key.of(lm, method, hashes[reading], calib)

        def known(method, calib=None) -> Key | None:
            """The key of the row that already answers for ``method``."""
            found = store.find(key_of(method, calib)) if missing else None
            return found and found.key

        methods = self.methods()
        plain = [m for m in methods if not calibrated(m)]
        rounds = [(plain, None)]
        for source in self.sources:
            seeds = self.seeds if source == self.sources[-1] else self.seeds[:1]
            rounds += [([m for m in methods if calibrated(m)], (source, seed)) for seed in seeds]
        keys = [known(None) or key_of(None)]
        for todo, chosen in rounds:
            if not todo:
                continue
            calib = text.calibration(lm, source=chosen[0], seed=chosen[1]) if chosen else None
            rows = {m: known(m, calib) for m in todo}
            if new := [m for m, key in rows.items() if key is None]:
                sweep(lm, new, store, calib, TEXTS, progress=progress, **how)
            keys += [key or key_of(m, calib) for m, key in rows.items()]
        return keys


def _none(value):
    if isinstance(value, list):
        return [_none(v) for v in value]
    return None if value == "none" else value


def sweeps() -> dict[str, Sweep]:
    """The shipped sweeps by name."""
    with open(paths.data() / "sweeps.toml", "rb") as file:
        found = tomllib.load(file)
    fields = {n: {k: tuple(v) if isinstance(v, list) else v for k, v in s.items()} for n, s in found.items()}
    return {name: Sweep(name, **settings) for name, settings in fields.items()}


def reproduce(
    name: str, lm, store: Store | None = None, out: Path | None = None, progress: bool = True, missing: bool = False
) -> Path:
    """Run a shipped sweep here and write its rows to ``data/results/NAME.jsonl``, or to ``out``.

    ``missing``: only the settings that no machine has measured yet; the rows of the others are taken as they are.
    """
    known = sweeps()
    if name not in known:
        raise ValueError(f"There is no sweep {name!r}: data/sweeps.toml has {', '.join(known)}.")
    store = Store() if store is None else store
    keys = known[name].run(lm, store, progress, missing)
    path = paths.data() / "results" / f"{name}.jsonl" if out is None else Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    store.export_keys(path, keys)
    return path


def calibrations(lm, sources=("manual", "self", "mixed"), seeds=(0, 1, 2)) -> dict[str, tuple[str, int]]:
    """hash of the windows -> (source, seed), to tell the rows of a store apart."""
    from labkit import text

    return {text.fingerprint(text.calibration(lm, source=s, seed=n)): (s, n) for s in sources for n in seeds}


def serving(lm) -> Counter[str]:
    """How many shipped rows answer for this model as it is here ("here"), and how many do not, by the first reason.

    "labkit": measured by another labkit, and not readable; "model": of other weights; "texts", "calibration": on other
    token ids. Nothing is measured, and no text is written: without the model's own stored text what was calibrated on
    it counts under "calibration".
    """
    from labkit import selftext

    model, counts = f"{lm.name}@{lm.fingerprint}", Counter()
    written = selftext.stored(lm, 32, 512) is not None
    for name, each in sweeps().items():
        file = paths.data() / "results" / f"{name}.jsonl"
        if not file.is_file():
            continue
        texts = {json.dumps(text_hashes(lm, TEXTS, **vars(r)), sort_keys=True) for r in each.readings(lm)}
        known = calibrations(lm, [s for s in each.sources if written or s == "manual"], each.seeds)
        for line in file.read_text(encoding="utf-8").splitlines():
            counts[_why_not(line, model, texts, {"", *known}) or "here"] += 1
    return counts


def _why_not(line: str, model: str, texts: set[str], calibrations: set[str]) -> str:
    """Why a shipped row does not answer for this model, "" where it does."""
    try:
        row = json.loads(line)
        key = Key(**row["key"])
        Measurement.from_dict(row["measurement"])
    except (ValueError, TypeError, KeyError, AttributeError):
        return "labkit"
    if key.model != model:
        return "model"
    if key.texts not in texts:
        return "texts"
    return "" if key.calib in calibrations else "calibration"
