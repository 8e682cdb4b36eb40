"""What each part of a pruner is worth: leave it out, or feed it another text, and measure.

bench = breakit.Damage(lm, blocks=3, windows=8)
broken = parts(bench)                           # one breakit.Outcome for each switch
fed = calibrations(bench)                       # Wanda and SparseGPT, calibrated on each text
breakit.table(broken, bench.unit); breakit.bars(broken, bench.unit, group="compensation")
turn(stored_fed(rows, sources) or fed)          # whole models from the store where it has them
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from labkit.method import knob
from labkit.progress import track
from labkit.prune import Magnitude, SparseGPT, Wanda
from labkit.prune.common import keep_mask, parse_pattern
from labkit.prune.store import stored
from labkit.ui import need, plots, words
from labkit.ui.lessons.breakit import KL, Damage, Outcome
from labkit.ui.lessons.front import SOURCES
from labkit.walk import walk

go = need("plotly.graph_objects")

FOREIGN = "prose"  # the text that no calibration is like


@dataclass(frozen=True)
class Blind(Wanda):
    """Wanda that does not look at the channels with the largest inputs: their norms count like the median channel's."""

    skip: int = knob(4, low=0, high=65536, help="Channels of each layer whose norm is not looked at.")

    def apply(self, lm, calib, progress: bool) -> None:
        def solve(weight, stats, path: str):
            norm = stats.channel_norm.clone()
            norm[norm.topk(min(self.skip, len(norm))).indices] = norm.median()
            mask = keep_mask(weight.abs() * norm, self.sparsity, parse_pattern(self.pattern), self.per)
            return stored(weight * mask, self.pattern, self.container)

        walk(lm, calib, "channel_norm", solve, "Wanda, blind to outliers", progress)


def parts(bench: Damage, sparsity: float = 0.5) -> list[Outcome]:
    """Pruners with a part changed or left out; each group's first is the whole method."""
    magnitude, wanda, sparsegpt = (m(sparsity=sparsity, container="dense") for m in (Magnitude, Wanda, SparseGPT))
    groups = {
        "who competes": {
            "Wanda, in each row": wanda,
            "Wanda, in each matrix": replace(wanda, per="matrix"),
            "magnitude, in each row": replace(magnitude, per="row"),
            "magnitude, in each matrix": magnitude,
        },
        "compensation": {
            "SparseGPT": sparsegpt,
            "its choice, no compensation": replace(sparsegpt, compensate=False),
            "Wanda": wanda,
        },
        "outlier channels": {
            "Wanda": wanda,
            "without the largest": Blind(**wanda.values(), skip=1),
            "without the 4 largest": Blind(**wanda.values(), skip=4),
            "without the 64 largest": Blind(**wanda.values(), skip=64),
            "without all norms": replace(magnitude, per="row"),
        },
    }
    calib, known, found = bench.calibration(), {}, []
    for group, methods in groups.items():
        base = None
        for name, method in track(methods.items(), group, show=False):
            if repr(method) not in known:  # each setting is measured once
                known[repr(method)] = bench.of(method, calib)
            damage = known[repr(method)]
            base = base or damage
            found.append(Outcome(group, name, damage, {t: d / max(base[t], 1e-12) for t, d in damage.items()}))
    return found


def calibrations(bench: Damage, sparsity: float = 0.5) -> list[Outcome]:
    """Wanda and SparseGPT calibrated on the manual, on the model's own text and on half of each; Wanda's mixed is the 1."""
    found, base = [], None
    for source in reversed(SOURCES):  # mixed first
        calib = bench.calibration(source)
        for method in (Wanda, SparseGPT):
            damage = bench.of(method(sparsity=sparsity, container="dense"), calib)
            base = base or damage
            change = {t: d / max(base[t], 1e-12) for t, d in damage.items()}
            found.append(Outcome("calibration", f"{method.__name__}, {source}", damage, change))
    return found


def stored_fed(rows: Sequence[Mapping], known: Mapping[str, str]) -> list[Outcome]:
    """The same from the store: whole models at the default settings. Empty unless both methods have two sources or more.

    ``rows``: ``front.stored(lm)``; ``known``: ``front.sources(lm)``, the hash of a calibration -> its text.
    """
    pruned: dict[tuple[str, str], list] = {}
    for row in rows:
        plain = any(row["method"] == m.__name__ and row["knobs"] == m().key() for m in (Wanda, SparseGPT))
        if plain and row["calib"] in known:
            pruned.setdefault((row["method"], known[row["calib"]]), []).append(row)
    sources = [s for s in reversed(SOURCES) if all((m, s) in pruned for m in ("Wanda", "SparseGPT"))]
    if len(sources) < 2:
        return []
    found, base = [], None
    for source in sources:
        for method in ("Wanda", "SparseGPT"):
            draws = pruned[method, source]
            damage = {t: sum(r[f"quality.{t}.kl"] for r in draws) / len(draws) for t in ("manual", FOREIGN)}
            base = base or damage
            change = {t: d / max(base[t], 1e-12) for t, d in damage.items()}
            found.append(Outcome("calibration", f"{method}, {source}", damage, change))
    return found


def turn(found: Sequence[Outcome], text: str = FOREIGN, unit: str = KL) -> tuple[go.Figure, str]:
    """Wanda beside SparseGPT for each calibration, on one text; and where their order turns round."""
    series: dict[str, dict[str, float]] = {}
    for outcome in found:
        method, _, source = outcome.name.partition(", ")
        series.setdefault(method, {})[f"calibrated on {source}"] = float(f"{outcome.damage[text]:.4g}")
    title = f"{words.sentence(words.the(text))[:-1]}{unit.removeprefix(KL)} (measured)"
    told = []
    for place in next(iter(series.values())):
        wanda, sparsegpt = series["Wanda"][place], series["SparseGPT"][place]
        better = "SparseGPT" if sparsegpt < wanda else "Wanda"
        told.append(
            f"{place}, {better} is better ({words.short(min(wanda, sparsegpt))} to {words.short(max(wanda, sparsegpt))})"
        )
    return plots.bars(series, KL, title, height=320), f"KL on {words.the(text)}: {words.listed(told)}."
