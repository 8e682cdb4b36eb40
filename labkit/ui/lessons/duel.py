"""The duel at equal bytes: the best quantized, the best pruned, and the best pruned and quantized model for a budget.

    rows = front.stored(lm)                       # what the store has of this model
    explore(lambda **s: view(rows, **s), **settings())
    table(rows)                                   # the same at every budget

The baseline is fp32, so a pruned row holds fp32 values, while a quantized one is smaller by its nature. To be fair,
pruned rows are counted with 16-bit values, at 16 × density and their mask (*modelled*); the bits that they hold are
*measured* and said beside it. Rows with quantized weights are counted as they are held.

The best of many settings looks better than it is on the text that it was picked on. So each side's setting is picked on
one text and its KL is reported on the other, and how many it was picked from is said: a side with more settings to
choose from has an easier time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from labkit.prune.common import parse_pattern
from labkit.ui import need, theme, words
from labkit.ui.lessons import front
from labkit.ui.table import Table
from labkit.ui.theme import axis, layout

go = need("plotly.graph_objects")

BUDGETS = (16, 12, 10, 9, 8, 7, 6, 5, 4.5, 4, 3.5, 3, 2.5, 2)  # bits per weight
SIDES = ("quantized", "pruned", "both")
COLORS = dict(zip(SIDES, (theme.BLUE, theme.ORANGE, theme.GREEN)))
TEXTS = ("prose", "manual")  # the one unlike the calibration leads
WAYS = {"eager": "latency.decode_ms", "one graph": "engine.decode_ms"}  # how a model runs -> its column in the store
OPEN = "not yet"  # the guess of who has not guessed


@dataclass(frozen=True)
class Fighter:
    """A row of the store, and what it is counted at."""

    side: str  # one of SIDES
    name: str  # the method as one types it
    bits: float  # bits per weight that count
    held: float  # bits per weight that are held: measured
    label: str  # how ``bits`` was got: "measured" or "modelled"
    kl: dict[str, float]  # text -> nats per token
    decode_ms: dict[str, float]  # one of WAYS -> milliseconds per token, where it was measured
    machine: str  # that measured them
    borrowed: bool = False  # the times are of the same setting with another calibration


def fighters(rows: Sequence[Mapping]) -> list[Fighter]:
    """The rows that quantize, prune, or do both, on both texts; others are left out."""
    found = []
    # A time does not depend on the calibration: what was not timed with its own has that of the same setting.
    timed = {(r["method"], r["knobs"]): r for r in rows if _times(r)}
    for row in rows:
        side = side_of(row)
        if side is None or any(row.get(f"quality.{t}.kl") is None for t in TEXTS):
            continue
        held = row["memory.bits_per_weight"]
        bits, label = (at_16_bits(row), "modelled") if side == "pruned" else (held, "measured")
        own = bool(_times(row))
        clock = row if own else timed.get((row["method"], row["knobs"]), {})
        kl, times = {t: row[f"quality.{t}.kl"] for t in TEXTS}, _times(clock)
        borrowed = bool(times) and not own
        found.append(Fighter(side, _typed(row), bits, held, label, kl, times, clock.get("machine", ""), borrowed))
    return found


def _times(row: Mapping) -> dict[str, float]:
    return {way: row[column] for way, column in WAYS.items() if row.get(column)}


def side_of(row: Mapping) -> str | None:
    """Whether a row's method quantizes, prunes, or does both; None for any other."""
    import labkit

    known, kinds = labkit.methods(), set()
    for name, values in _steps(row):
        if name not in known:
            return None
        kinds.add(known[name].kind)
        if known[name].kind == "prune" and values.get("bits"):
            kinds.add("quantize")
    return {("quantize",): "quantized", ("prune",): "pruned", ("prune", "quantize"): "both"}.get(tuple(sorted(kinds)))


def _steps(row: Mapping) -> list[tuple[str, dict]]:
    """The methods of a row, by name and knob values: of a Recipe its parts."""
    knobs = json.loads(row["knobs"])
    return knobs if isinstance(knobs, list) else [(row["method"], knobs)]


def _typed(row: Mapping) -> str:
    """A row's method as one types it; of a knob that is no longer known, as it was typed then."""
    import labkit

    try:
        parts = [labkit.methods()[name](**values) for name, values in _steps(row)]
    except (TypeError, ValueError):
        return row["repr"]
    return (parts[0] if len(parts) == 1 else labkit.Recipe(*parts)).typed()


def at_16_bits(row: Mapping) -> float:
    """Bits per weight of a pruned row with 16-bit values: a bit for each position, or N:M's places, and what is kept.

    With ``container="dense"`` zeros are stored like the rest, and 16 it is; "csr" takes a 32-bit column for each value.
    """
    _, knobs = _steps(row)[-1]  # of a Recipe of pruners the last one's count
    pattern, container = parse_pattern(knobs["pattern"]), knobs.get("container", "auto")
    kept = pattern[0] / pattern[1] if pattern else 1 - knobs["sparsity"]
    if container == "dense":
        return 16.0
    if container == "csr":
        return (16 + 32) * kept
    return 16 * kept + (kept * (pattern[1] - 1).bit_length() if pattern else 1)


def other(text: str) -> str:
    """The text on which entries are picked, when they are judged on ``text``."""
    return next(t for t in TEXTS if t != text)


def entries(found: Sequence[Fighter], side: str, budget: float) -> list[Fighter]:
    """The settings of a side that fit into the budget."""
    return [f for f in found if f.side == side and f.bits <= budget]


def best(found: Sequence[Fighter], side: str, budget: float, text: str) -> Fighter | None:
    """A side's entry for the duel on ``text``: of what fits, the one with the least KL on the *other* text; or None."""
    return min(entries(found, side, budget), key=lambda f: f.kl[other(text)], default=None)


def settings() -> dict:
    """The controls of :func:`view`, for ``explore``."""
    return {"budget": list(BUDGETS), "text": list(TEXTS), "guess": [OPEN, *SIDES]}


def view(rows: Sequence[Mapping], budget: float, text: str = TEXTS[0], guess: str = OPEN) -> tuple[tuple, str]:
    """The duel at ``budget`` bits per weight; nothing is told before there is a ``guess``."""
    found = fighters(rows)
    if not found:
        return (front._empty("Equal bytes"),), front._NONE
    if guess == OPEN:
        asked = f"At {budget:g} bits per weight, which loses least on {words.the(text)}: "
        return (_ask(budget),), f"{asked}a model that is quantized, pruned, or both? Guess, and the answer is drawn."
    chosen = {side: best(found, side, budget, text) for side in SIDES}
    here = {side: f for side, f in chosen.items() if f}
    if not here:
        return (curves(found, budget, text),), f"Nothing in the store is as small as {budget:g} bits per weight."
    winner = min(here, key=lambda side: here[side].kl[text])
    said = "Your guess was right" if guess == winner else f"Your guess was {guess}"
    head = f"At {budget:g} bits per weight, {_called(winner)} loses least on {words.the(text)}. {said}. "
    sides = {"both": "doing both"}
    counts = words.listed([f"{len(entries(found, side, budget))} {sides.get(side, side)}" for side in SIDES])
    head += f"(Each side's setting was picked on {words.the(other(text))}, out of those that fit: {counts}.) "
    told = [_told(side, f, text) for side, f in chosen.items()]
    timed = {side: f for side, f in here.items() if f.decode_ms}
    return (curves(found, budget, text), bars(here), *([times(timed)] if timed else [])), head + " ".join(told)


def curves(found: Sequence[Fighter], budget: float, text: str) -> go.Figure:
    """For each side the KL on ``text`` of its entry within a number of bits, and a line at the budget.

    The entries are picked on the other text, so that a curve need not fall all the way.
    """
    data = []
    for side in SIDES:
        picked: list[Fighter] = []
        for size in sorted({f.bits for f in found if f.side == side}):
            pick = best(found, side, size, text)
            picked += [] if picked and pick is picked[-1] else [pick]
        if not picked:
            continue
        x, y = zip(*[(f.bits, float(f"{f.kl[text]:.4g}")) for f in picked])
        line = {"color": COLORS[side], "width": 2}
        data.append(go.Scatter(name=_adjective(side), x=x, y=y, mode="lines+markers", line=line))
    top = max(f.kl[text] for f in found)
    low = min(f.kl[text] for f in found if f.kl[text] > 0) if any(f.kl[text] > 0 for f in found) else 1e-3
    mark = {"color": theme.VERMILION, "width": 2, "dash": "dash"}
    data.append(go.Scatter(name="budget", x=[budget] * 2, y=[low, top], mode="lines", line=mark, hoverinfo="skip"))
    return go.Figure(
        data,
        layout(
            f"Each side's pick within a number of bits, on {words.the(text)}",
            380,
            xaxis=axis("bits per weight; pruned: modelled at 16-bit values, others measured"),
            yaxis=axis("KL, nats per token (measured)", True),
        ),
    )


def bars(here: Mapping[str, Fighter]) -> go.Figure:
    """KL of each side's pick, on both texts."""
    data = []
    for name, color in zip(TEXTS, (theme.ORANGE, theme.BLUE)):
        y = [float(f"{f.kl[name]:.4g}") for f in here.values()]
        data.append(go.Bar(name=words.the(name), x=list(here), y=y, marker_color=color))
    look = {"barmode": "group", "xaxis": axis(), "yaxis": axis("KL, nats per token", rangemode="tozero")}
    return go.Figure(data, layout("The picks within the budget (measured)", 300, **look))


def times(here: Mapping[str, Fighter]) -> go.Figure:
    """Decode time of each side's pick, eagerly and as one graph, as the machine that is named measured it."""
    data = []
    for way, color in zip(WAYS, (theme.GREY, theme.GREEN)):
        own = {side: f.decode_ms[way] for side, f in here.items() if way in f.decode_ms}
        data.append(go.Bar(name=way, x=list(own), y=[float(f"{y:.3g}") for y in own.values()], marker_color=color))
    machines = " and ".join(dict.fromkeys(f.machine for f in here.values()))
    top = max(y for trace in data for y in trace.y)  # eager and one graph may be a hundred times apart
    scale = axis("decode, ms per token", True, range=[0, math.log10(top) + 0.1])  # from 1 ms
    look = {"barmode": "group", "xaxis": axis(), "yaxis": scale}
    return go.Figure(data, layout(f"Their time (measured on {machines})", 300, **look))


def table(rows: Sequence[Mapping], budgets: Sequence[float] = BUDGETS, text: str = TEXTS[0]) -> Table:
    """Who wins at every budget on ``text``, with each side's pick and how many it was picked from."""
    found, lines = fighters(rows), []
    for budget in budgets if found else ():
        chosen = {side: best(found, side, budget, text) for side in SIDES}
        here = {side: f.kl[text] for side, f in chosen.items() if f}
        cells = [
            f"{words.short(here[side])} ({chosen[side].bits:.2f}, of {len(entries(found, side, budget))})"
            if side in here
            else "–"
            for side in SIDES
        ]
        lines.append((f"{budget:g}", *cells, min(here, key=here.get) if here else "nobody fits"))
    caption = (
        f"KL on {words.the(text)} (measured) of the setting that loses least on {words.the(other(text))}; in brackets the "
        "bits per weight that count, and out of how many settings it was picked"
        if found
        else front._NONE
    )
    return Table(
        ("budget, bits per weight", "quantized", "pruned", "pruned and quantized", "winner"), tuple(lines), caption
    )


def _ask(budget: float) -> go.Figure:
    note = {"x": 0.5, "y": 0.5, "xref": "paper", "yref": "paper", "showarrow": False, "font": {"size": 13}}
    note |= {"text": f"{budget:g} bits per weight: your guess?"}
    return go.Figure([], layout("Equal bytes", 200, xaxis=axis(), yaxis=axis(), annotations=[note]))


def _called(side: str) -> str:
    return {"quantized": "quantizing", "pruned": "pruning", "both": "pruning and quantizing"}[side]


def _adjective(side: str) -> str:
    return "pruned and quantized" if side == "both" else side


def _told(side: str, f: Fighter | None, text: str) -> str:
    name = _adjective(side).capitalize()
    if f is None:
        return f"{name}: nothing in the store is so small."
    second = other(text)
    size = f"{f.bits:.2f} bits" if f.label == "measured" else f"{f.bits:.2f} bits modelled, {f.held:.2f} held"
    how = {"eager": "eagerly", "one graph": "as one graph"}
    ms = "".join(f", {words.short(x)} ms per token {how[way]}" for way, x in f.decode_ms.items())
    ms += " (the time is of the same setting with another calibration)" if f.borrowed else ""
    return (
        f"{name}: {f.name} with {size}, KL {words.short(f.kl[text])} ({words.short(f.kl[second])} on {words.the(second)})"
        f"{ms}."
    )
