"""A method's result as three linked figures, a sentence before and after, and a table: a pure function.

The three figures always show the uncompressed model beside the compressed one. They keep their traces and axes from
one setting to the next, so that a bar that grows has really grown.
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass, replace

from labkit.ui import need, theme, words
from labkit.ui.theme import axis, layout

go = need("plotly.graph_objects")

BASE, NOW, RUN = "uncompressed", "compressed", "as run"
WAYS = {"latency": "eager", "engine": "one graph"}  # a Measurement's two latencies
LENGTH = {"prefill": "prefill_tokens", "decode": "context"}  # what a phase's time depends on


@dataclass(frozen=True)
class View:
    """What the panel shows for one setting of a method."""

    title: str  # "RTN: 4 bits with groups of 64"
    ask: str  # a prompt to predict, before the next move
    sentences: tuple[str, ...]  # what happened, in plain English: memory, latency, accuracy, the last move
    source: str  # where the numbers come from
    accuracy: go.Figure
    memory: go.Figure
    latency: go.Figure
    table: str  # HTML

    @property
    def sentence(self) -> str:
        return " ".join(self.sentences)

    @property
    def figures(self) -> tuple[go.Figure, go.Figure, go.Figure]:
        return self.accuracy, self.memory, self.latency

    def _ipython_display_(self) -> None:
        from labkit.ui.static import static

        static(self)


def view(method, baseline, current=None, before=None, source: str = "", ask: str | None = None) -> View:
    """Build the View of ``method``.

    Parameters
    ----------
    method : Method
        The setting that is shown.
    baseline : Measurement
        The uncompressed model.
    current : Measurement, optional
        The compressed model; None before it has been measured, when only the baseline is drawn.
    before : (Method, Measurement), optional
        The setting that was shown before, for the "before → after" sentence and the table's middle column.
    source : str
        Where the numbers come from, see :func:`labkit.ui.words.source`.
    ask : str, optional
        The question to predict; by default about the first knob's next position.
    """
    if current is None:
        parts = ["Not measured yet: the figures show the uncompressed model alone."]
    else:
        parts = [words.memory(method, baseline, current), words.left(method, current)]
        parts += [words.latency(current), words.accuracy(baseline, current)]
        if before is not None and before[0] != method:
            parts.append(words.step(method, baseline, current, *before))
        parts += [words.drift(baseline, current), *current.notes]
    name = type(method).__name__
    head = words.describe(method)
    return View(
        title=name if head == name else f"{name}: {head}",
        ask=words.question(method) if ask is None else ask,
        sentences=tuple(p for p in parts if p),
        source=source,
        accuracy=accuracy(baseline, current),
        memory=memory(baseline, current),
        latency=latency(baseline, current),
        table=table(baseline, current, before[1] if before is not None and before[0] != method else None),
    )


def accuracy(baseline, current=None) -> go.Figure:
    """Perplexity (left) and KL (right) on every text, KL with exact products and as run; bars of one standard error."""
    texts = list(baseline.quality)
    shown = [m for m in (baseline, current) if m is not None]
    values = [q.perplexity for m in shown for q in m.quality.values() if math.isfinite(q.perplexity)]
    usual = max(q.perplexity for q in baseline.quality.values())
    log = max(values) > 6 * usual
    low, high = 0.0, max(2 * usual, 1.25 * max(values))
    span = [math.log10(min(values) / 2), math.log10(high * 2)] if log else [low, high]
    rows = [current.quality.get(t) if current else None for t in texts]
    divergences = [k for q in rows if q for k in (q.kl, q.kl_run) if k is not None]
    data = []
    for m, name, color in ((baseline, BASE, theme.BASELINE), (current, NOW, theme.NOW)):
        found = [m.quality.get(t) if m else None for t in texts]
        bars = _bars(name, texts, [q and q.perplexity for q in found], [q and q.perplexity_se for q in found], color)
        data.append(
            bars | {"legendgroup": name, "hovertemplate": "%{x}: perplexity %{y:.2f}<extra>" + name + "</extra>"}
        )
    for which, name, color, how in (
        ("kl", NOW, theme.NOW, "products exact"),
        ("kl_run", RUN, theme.SKY, "as one graph: activations and head in 8 bits"),
    ):
        pairs = [(q and getattr(q, which), q and getattr(q, which + "_se")) for q in rows]
        kl = _bars(name, texts, [k for k, _ in pairs], [se for _, se in pairs], color)
        hover = "%{x}: KL %{y:.4f} nats per token<extra>" + how + "</extra>"
        links = {"xaxis": "x2", "yaxis": "y2", "showlegend": name == RUN, "legendgroup": name}
        data.append(kl | links | {"hovertemplate": hover})
    return go.Figure(
        data,
        layout(
            "Accuracy",
            barmode="group",
            xaxis=axis(showgrid=False, domain=[0, 0.4]),
            yaxis=axis("perplexity", log, range=span),
            xaxis2=axis(showgrid=False, domain=[0.6, 1], anchor="y2"),
            yaxis2=axis("KL, nats per token", anchor="x2", range=[0, max([0.5, *(1.25 * k for k in divergences)])]),
        ),
    )


def memory(baseline, current=None) -> go.Figure:
    """Bytes held: linear layers, all other weights, and the KV cache at one length, stacked.

    A line marks the uncompressed model in 16 bits (modelled). Caches weighed at different lengths are left out.
    """
    names, held = [BASE, NOW], [m.memory if m else None for m in (baseline, current)]
    lengths = {m.kv_tokens for m in held if m}
    same = len(lengths) == 1
    parts = [
        ("linears", theme.BLUE, lambda m: m.linears),
        ("other", theme.SKY, lambda m: m.weights - m.linears),
        ("KV cache", theme.ORANGE, lambda m: m.kv_bytes if same else 0),
    ]
    data = [
        _bars(label, names, [m and part(m) / 1e6 for m in held], None, color, text=False)
        | {"hovertemplate": "%{y:.1f} MB<extra>" + label + "</extra>"}
        for label, color, part in parts
    ]
    totals = [m and sum(part(m) for _, _, part in parts) / 1e6 for m in held]
    high = 1.18 * max(t for t in totals if t is not None)
    half = totals[0] * 16 / baseline.memory.bits_before
    if baseline.memory.bits_before > 16:
        line = {"type": "scatter", "mode": "lines", "line": {"color": theme.VERMILION, "dash": "dash", "width": 1.5}}
        hover = "uncompressed in 16 bits: %{y:.1f} MB<extra>modelled</extra>"
        data.append(line | {"name": "in 16 bits", "x": names, "y": [half, half], "hovertemplate": hover})
    tops = [t and (half if t <= half < t + 0.1 * high else t) for t in totals]  # the line does not cross out a label
    notes = [_note(n, at, f"{words.short(t)} MB") for n, at, t in zip(names, tops, totals) if t is not None]
    cached = f"MB, with a KV cache of {lengths.pop():,} tokens" if same else "MB of weights, without any cache"
    return go.Figure(
        data,
        layout(
            "Memory",
            barmode="stack",
            xaxis=axis(showgrid=False),
            yaxis=axis(cached, range=[0, high]),
            annotations=notes,
        ),
    )


def latency(baseline, current=None) -> go.Figure:
    """Prefill (left) and decode (right), eager and as one graph; error bars span the interquartile range.

    The labels give the paired ratio to the uncompressed model run the same way, eagerly or as one graph.
    """
    shown = (baseline, BASE, theme.BASELINE), (current, NOW, theme.NOW)
    ways = [way for way in WAYS if any(m and getattr(m, way) for m, _, _ in shown)]
    data, notes, tops = [], [], []
    for which, suffix in (("prefill", ""), ("decode", "2")):
        label = {way: WAYS[way].removeprefix("one ") if len(ways) > 1 else which for way in ways}  # room for it
        pairs = {way: _pair(baseline, current, way, which) for way in ways}
        tallest = {way: max(b.ms + b.half for b in pair.values()) for way, pair in pairs.items()}
        for _, name, color in shown:
            mine = [pair[name] for pair in pairs.values()]
            bar = _bars(name, list(label.values()), [t.ms or None for t in mine], [t.half for t in mine], color, False)
            links = {"xaxis": "x" + suffix, "yaxis": "y" + suffix, "legendgroup": name, "showlegend": not suffix}
            data.append(bar | links | {"hovertext": [t.hover for t in mine], "hoverinfo": "text"})
        for way in ways:
            t = getattr(current, way) if current else None
            speed = getattr(t, f"{which}_ratio") if t else None
            text = (f"{words.ratio(speed)} as fast" if len(ways) == 1 else words.ratio(speed)) if speed else ""
            notes.append(_note(label[way], tallest[way], text, f"x{suffix}", f"y{suffix}"))
        tops.append(1.2 * max([*tallest.values(), 1e-9]))
    first = next((getattr(m, way) for m in (current, baseline) if m for way in ways if getattr(m, way)), None)
    if not ways:
        notes = [_note(0.5, 0.5, "not measured", "paper", "paper")]
    return go.Figure(
        data,
        layout(
            "Latency",
            barmode="group",
            xaxis=axis("prefill" if len(ways) > 1 else "", showgrid=False, domain=[0, 0.36]),
            yaxis=axis(f"ms for {first.prefill_tokens:,} tokens" if first else "ms", range=[0, tops[0]]),
            xaxis2=axis("decode" if len(ways) > 1 else "", showgrid=False, domain=[0.62, 1], anchor="y2"),
            yaxis2=axis(
                f"ms per token, after {first.context:,} tokens" if first else "ms", anchor="x2", range=[0, tops[1]]
            ),
            annotations=notes,
        ),
    )


@dataclass(frozen=True)
class _Bar:
    """One bar of the latency figure: milliseconds, half the interquartile range, what hovering says."""

    ms: float = 0.0
    half: float = 0.0
    hover: str = ""


def _pair(baseline, current, way: str, which: str) -> dict[str, _Bar]:
    """How long a phase takes uncompressed and compressed, run in one of the two ways; an empty bar where it was not timed.

    A method's time may have been taken at another length than the baseline's own (a cache is timed where it evicts). Then
    the baseline's bar comes from the run in turns with the method: the method's time, times the paired ratio.
    """
    old, new = (getattr(m, way) if m else None for m in (baseline, current))
    bars = {BASE: _bar(old, way, which), NOW: _bar(new, way, which)}
    if old and new and getattr(old, LENGTH[which]) != getattr(new, LENGTH[which]):
        speed = getattr(new, f"{which}_ratio") or 0.0
        ms = getattr(new, f"{which}_ms") * speed
        bars[BASE] = _Bar(ms, 0.0, f"{which}, {WAYS[way]}: {words.short(ms)} ms<br>from the run in turns")
    return bars


def _bar(t, way: str, which: str) -> _Bar:
    if t is None:
        return _Bar()
    ms, half = getattr(t, f"{which}_ms"), getattr(t, f"{which}_iqr") / 2  # half up, half down
    hover = f"{which}, {WAYS[way]}: {words.short(ms)} ms<br>{t.threads} thread{'s' * (t.threads != 1)}"
    if speed := t.speed(which):
        hover += f"<br>{speed} the speed of the uncompressed model, {WAYS[way]} too"
    return _Bar(ms, half, hover)


def table(baseline, current=None, before=None) -> str:
    """The same numbers in HTML: one column each for the uncompressed model, the setting before, and now."""
    columns = [(name, m) for name, m in ((BASE, baseline), ("before", before), (NOW, current)) if m is not None]
    order: list[str] = []
    cells: dict[str, dict[str, str]] = {}
    units: dict[str, str] = {}
    for name, m in columns:
        at = 0
        for what, value, unit in m.table():
            if what not in cells:  # a row of its own, where this measurement has it
                order.insert(at, what)
                cells[what] = {}
            cells[what][name], units[what] = value, unit
            at = order.index(what) + 1
    left, right = (
        "text-align:left;padding:2px 12px 2px 0",
        "text-align:right;padding:2px 12px;font-variant-numeric:tabular-nums",
    )
    head = "".join(f"<th style='{right}'>{html.escape(name)}</th>" for name, _ in columns)
    body = "".join(
        f"<tr><td style='{left}'>{html.escape(what)}</td>"
        + "".join(f"<td style='{right}'>{html.escape(cells[what].get(name, '–'))}</td>" for name, _ in columns)
        + f"<td style='{left};opacity:0.75'>{html.escape(units[what])}</td></tr>"
        for what in order
    )
    return f"<table class='labkit-table'><thead><tr><th></th>{head}<th></th></tr></thead><tbody>{body}</tbody></table>"


def without_times(m):
    """The same measurement without its latency: for a baseline whose times come from another machine."""
    return replace(m, latency=None, engine=None)


def _bars(name: str, x: list, y: list, errors: list | None, color: str, text: bool = True) -> dict:
    """One bar trace with its values written on it; values that are None or not finite leave a gap."""
    y = [float(v) if v is not None and math.isfinite(v) else None for v in y]
    bars = {"type": "bar", "name": name, "x": x, "y": y, "marker": {"color": color}, "cliponaxis": False}
    if text:
        bars |= {"text": ["" if v is None else words.short(v) for v in y], "textposition": "outside"}
    if errors is not None:
        array = [float(e) if e is not None and math.isfinite(e) else 0.0 for e in errors]
        bars["error_y"] = {"type": "data", "array": array, "thickness": 1.2, "width": 3, "color": theme.INK}
    return bars


def _note(x, y, text: str, xref: str = "x", yref: str = "y") -> dict:
    """A short text that stands on top of a bar."""
    return {"x": x, "y": y, "text": text, "xref": xref, "yref": yref, "showarrow": False, "yanchor": "bottom"}
