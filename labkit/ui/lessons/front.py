"""Bits against quality, from the store: every row of a model, KL against bytes that are really held, and the Pareto front.

rows = stored(lm)                          # what the store has of this model, shipped rows included
explore(lambda text: picture(rows, text), text=["prose", "manual"])
calibrations(rows, sources(lm))            # the same method, fed differently
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence

from labkit import text
from labkit.quantize import AWQGPTQ, GPTQ
from labkit.results import Store
from labkit.ui import need, theme, words
from labkit.ui.table import Table
from labkit.ui.theme import axis, layout

go = need("plotly.graph_objects")

SOURCES = ("manual", "self", "mixed")
TEXTS = ("prose", "manual")  # the one unlike the calibration leads
MARKS = (*theme.SERIES, "#555555", "#f0e442")


def stored(lm, store=None, windows: int = 8, length: int = 512, kind: str | None = None) -> list[dict]:
    """The store's rows of this model on the lab's evaluation texts at this size: of each setting the newest that was timed.

    ``kind``: methods of one kind only, such as "quantize".
    """
    from labkit.method import methods
    from labkit.sweep import text_hashes

    hashes = json.dumps(text_hashes(lm, ("manual", "prose"), windows, length), sort_keys=True)
    rows = (Store() if store is None else store).rows(model=f"{lm.name}@{lm.fingerprint}", texts=hashes)
    rows = sorted(rows, key=lambda r: r.get("latency.decode_ms") is not None)  # stable; those without times come first
    newest = {(r["method"], r["knobs"], r["calib"]): r for r in rows if r["method"] != "uncompressed"}
    known = methods()
    return [r for r in newest.values() if kind is None or (r["method"] in known and known[r["method"]].kind == kind)]


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (bytes, KL) that no other beats in both, from few bytes to many."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def picture(rows: Sequence[Mapping], text: str = "prose") -> tuple[go.Figure, str]:
    """KL on one text against the bytes of the linear layers, one colour for each method; and what is on the front.

    The front is picked on the text that it is drawn for, so its settings look a little better than they are; how many of
    them are on the other text's front too is said.
    """
    rows = [r for r in rows if r.get(f"quality.{text}.kl") is not None]
    if not rows:
        return _empty("KL against bytes"), _NONE
    methods = {}
    for r in rows:
        methods.setdefault(r["method"], []).append(r)
    data = []
    for (name, mine), color in zip(methods.items(), MARKS * 2):
        data.append(
            go.Scatter(
                name=name,
                x=[r["memory.linears"] / 1e6 for r in mine],
                y=[float(f"{r[f'quality.{text}.kl']:.4g}") for r in mine],
                mode="markers",
                marker={"color": color, "size": 9},
                hovertext=[_hover(r, text) for r in mine],
                hoverinfo="text",
            )
        )
    best = front([(r["memory.linears"] / 1e6, r[f"quality.{text}.kl"]) for r in rows])
    data.append(
        go.Scatter(
            name="Pareto front",
            x=[x for x, _ in best],
            y=[float(f"{y:.4g}") for _, y in best],
            mode="lines",
            line={"color": theme.INK, "width": 1.5, "dash": "dot"},
            hoverinfo="skip",
        )
    )
    figure = go.Figure(
        data,
        layout(
            f"Bits against quality on {words.the(text)} (measured)",
            460,
            xaxis=axis("MB that the linear layers hold, metadata included"),
            yaxis=axis("KL, nats per token", True),
        ),
    )
    on = on_front(rows, text)
    counts = [f"{name} {n} time{'s' * (n != 1)}" for name, n in Counter(r["method"] for r in on).items()]
    said = (
        f"{len(rows)} settings on {words.the(text)}. On the front, where no other is both smaller and better: "
        f"{words.listed(counts)}."
    )
    second = next((t for t in TEXTS if t != text and all(r.get(f"quality.{t}.kl") is not None for r in rows)), None)
    if second is not None:
        elsewhere = on_front(rows, second)
        both = sum(any(r is other for other in elsewhere) for r in on)
        said += f" The front is picked on this text; {both} of its {len(on)} settings are on {words.the(second)}'s front too."
    return figure, said


def on_front(rows: Sequence[Mapping], text: str) -> list[Mapping]:
    """The rows that are on the front of this text, from few bytes to many."""
    point = {id(r): (r["memory.linears"] / 1e6, r[f"quality.{text}.kl"]) for r in rows}
    best = front(list(point.values()))
    return sorted((r for r in rows if point[id(r)] in best), key=lambda r: point[id(r)])


def sources(lm, windows: int = 32, length: int = 512, seeds: Sequence[int] = (0, 1, 2)) -> dict[str, str]:
    """The hash of a calibration -> the text it was drawn from."""
    return {
        text.fingerprint(text.calibration(lm, windows, length, seed, source)): source
        for source in SOURCES
        for seed in seeds
    }


def calibrations(rows: Sequence[Mapping], known: Mapping[str, str], method: str = "GPTQ") -> tuple[go.Figure, str]:
    """The same settings of a method with each calibration text: KL on both evaluation texts, means over draws."""
    settings: dict[str, dict[str, list]] = {}
    for r in rows:
        if r["method"] == method and r["calib"] in known:
            settings.setdefault(r["repr"], {}).setdefault(known[r["calib"]], []).append(r)
    settings = {name: by for name, by in settings.items() if len(by) > 1}
    if not settings:
        return _empty("Calibration text"), _NONE
    name = max(
        settings, key=lambda n: (sum(map(len, settings[n].values())), -json.loads(_one(settings[n])["knobs"])["bits"])
    )
    by = settings[name]
    data = []
    for which, color in zip(("manual", "prose"), theme.SERIES):
        values = {s: [r[f"quality.{which}.kl"] for r in by[s]] for s in SOURCES if s in by}
        means = [sum(v) / len(v) for v in values.values()]
        band = [(max(v) - min(v)) / 2 for v in values.values()]
        data.append(
            go.Bar(
                name=f"KL on {words.the(which)}",
                x=[f"calibrated on {s}" for s in values],
                y=[float(f"{m:.4g}") for m in means],
                error_y={"type": "data", "array": band} if any(band) else None,
                marker_color=color,
            )
        )
    figure = go.Figure(
        data,
        layout(
            f"{name} (measured)",
            340,
            barmode="group",
            xaxis=axis(),
            yaxis=axis("KL, nats per token", rangemode="tozero"),
        ),
    )
    draws = max(len(v) for v in by.values())
    spread = f" Bands: half the range over {draws} draws." if draws > 1 else ""
    return figure, f"{name}, calibrated on {words.listed([s for s in SOURCES if s in by])}.{spread}"


def parts(rows: Sequence[Mapping], known: Mapping[str, str], bits: int = 4, source: str = "mixed") -> Table:
    """The settings of GPTQ and AWQGPTQ at one width, as one types them: KL on both texts, the worst on the prose first."""
    found: dict[str, tuple] = {}
    for r in rows:
        cls = {c.__name__: c for c in (GPTQ, AWQGPTQ)}.get(r["method"])
        if cls is None or known.get(r["calib"]) != source:
            continue
        knobs, usual = json.loads(r["knobs"]), cls(bits=bits).values()
        if knobs.keys() != usual.keys() or any(knobs[n] != usual[n] for n in ("bits", "group_size", "format")):
            continue  # an older labkit's row, or another grid
        found[cls(**knobs).typed()] = tuple(r[f"quality.{text}.kl"] for text in ("manual", "prose"))
    table = sorted(found.items(), key=lambda item: -item[1][1])
    caption = f"Groups of 64, calibrated on {source}: KL in nats per token (measured)"
    return Table(("setting", "manual", "prose"), tuple((n, f"{m:.3f}", f"{p:.3f}") for n, (m, p) in table), caption)


_NONE = (
    "The store has no such rows for this model yet: labkit reproduce (or labkit sweep) measures them, and this view "
    "draws whatever is there."
)


def _one(by: Mapping[str, list]) -> Mapping:
    return next(iter(by.values()))[0]


def _hover(row: Mapping, which: str) -> str:
    bits = row["memory.bits_per_weight"]
    return (
        f"{row['repr']}<br>{bits:.2f} bits per weight, {words.percent(bits / 16)} of 16, "
        f"KL {row[f'quality.{which}.kl']:.4f} ± {row.get(f'quality.{which}.kl_se') or 0:.4f}"
    )


def _empty(title: str) -> go.Figure:
    note = {
        "x": 0.5,
        "y": 0.5,
        "xref": "paper",
        "yref": "paper",
        "text": "nothing in the store yet",
        "showarrow": False,
    }
    note |= {"font": {"size": 13}}
    return go.Figure([], layout(title, 200, xaxis=axis(), yaxis=axis(), annotations=[note]))
