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

KV_TOKENS = 1000  # the cache length that the memory figure shows
BASE, NOW = "uncompressed", "compressed"
WAYS = {"latency": "eager", "engine": "one graph"}  # a Measurement's two latencies


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
        parts = [words.memory(method, baseline, current), words.latency(current), words.accuracy(baseline, current)]
        if before is not None and before[0] != method:
            parts.append(words.step(method, baseline, current, *before))
        parts.append(words.drift(baseline, current))
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
    """Perplexity (left) and KL divergence (right) on every text; error bars are one standard error."""
    texts = list(baseline.quality)
    shown = [m for m in (baseline, current) if m is not None]
    values = [q.perplexity for m in shown for q in m.quality.values() if math.isfinite(q.perplexity)]
    usual = max(q.perplexity for q in baseline.quality.values())
    log = max(values) > 6 * usual
    low, high = 0.0, max(2 * usual, 1.25 * max(values))
    span = [math.log10(min(values) / 2), math.log10(high * 2)] if log else [low, high]
    divergences = [q.kl for q in current.quality.values() if q.kl is not None] if current else []
    data = []
    for m, name, color in ((baseline, BASE, theme.BASELINE), (current, NOW, theme.NOW)):
        rows = [m.quality.get(t) if m else None for t in texts]
        bars = _bars(name, texts, [q and q.perplexity for q in rows], [q and q.perplexity_se for q in rows], color)
        data.append(
            bars | {"legendgroup": name, "hovertemplate": "%{x}: perplexity %{y:.2f}<extra>" + name + "</extra>"}
        )
    rows = [current.quality.get(t) if current else None for t in texts]
    kl = _bars(NOW, texts, [q and q.kl for q in rows], [q and q.kl_se for q in rows], theme.NOW)
    hover = "%{x}: KL %{y:.4f} nats per token<extra>against the uncompressed model</extra>"
    data.append(kl | {"xaxis": "x2", "yaxis": "y2", "showlegend": False, "legendgroup": NOW, "hovertemplate": hover})
    return go.Figure(
        data,
        layout(
            "Accuracy",
            barmode="group",
            xaxis=axis(showgrid=False, domain=[0, 0.5]),
            yaxis=axis("perplexity", log, range=span),
            xaxis2=axis(showgrid=False, domain=[0.7, 1], anchor="y2"),
            yaxis2=axis("KL, nats per token", anchor="x2", range=[0, max([0.5, *(1.25 * k for k in divergences)])]),
        ),
    )


def memory(baseline, current=None) -> go.Figure:
    """Bytes held: linear layers, all other weights, and the KV cache of 1,000 tokens, stacked."""
    names = [BASE, NOW]
    parts = (
        ("linears", theme.BLUE, lambda m: m.linears),
        ("other", theme.SKY, lambda m: m.weights - m.linears),
        ("KV cache", theme.ORANGE, lambda m: m.kv_per_token * KV_TOKENS),
    )
    held = [m.memory if m else None for m in (baseline, current)]
    data = [
        _bars(label, names, [m and part(m) / 1e6 for m in held], None, color, text=False)
        | {"hovertemplate": "%{y:.1f} MB<extra>" + label + "</extra>"}
        for label, color, part in parts
    ]
    totals = [m and sum(part(m) for _, _, part in parts) / 1e6 for m in held]
    high = 1.18 * max(t for t in totals if t is not None)
    notes = [_note(n, t, f"{words.short(t)} MB") for n, t in zip(names, totals) if t is not None]
    return go.Figure(
        data,
        layout(
            "Memory",
            barmode="stack",
            xaxis=axis(showgrid=False),
            yaxis=axis(f"MB, with a KV cache of {KV_TOKENS:,} tokens", range=[0, high]),
            annotations=notes,
        ),
    )


def latency(baseline, current=None) -> go.Figure:
    """Prefill (left) and decode (right), eager and as one graph; error bars span the interquartile range.

    The labels give the paired ratio to the uncompressed model run eagerly.
    """
    shown = (baseline, BASE, theme.BASELINE), (current, NOW, theme.NOW)
    ways = [way for way in WAYS if any(m and getattr(m, way) for m, _, _ in shown)]
    data, notes, tops = [], [], []
    for which, suffix in (("prefill", ""), ("decode", "2")):
        label = {way: WAYS[way].removeprefix("one ") if len(ways) > 1 else which for way in ways}  # room for it
        tallest = {}
        for m, name, color in shown:
            times = {way: getattr(m, way) for way in ways if m}
            ms = {way: t and getattr(t, f"{which}_ms") for way, t in times.items()}
            half = {way: t and getattr(t, f"{which}_iqr") / 2 for way, t in times.items()}  # half up, half down
            for way in ways:
                tallest[way] = max(tallest.get(way, 0.0), (ms.get(way) or 0.0) + (half.get(way) or 0.0))
            bar = _bars(
                name, list(label.values()), [ms.get(w) for w in ways], [half.get(w) for w in ways], color, False
            )
            hover = f"{which}, %{{x}}: %{{y:.1f}} ms<extra>{name}</extra>"
            links = {"xaxis": "x" + suffix, "yaxis": "y" + suffix, "legendgroup": name, "showlegend": not suffix}
            data.append(bar | links | {"hovertemplate": hover})
        for way in ways:
            t = getattr(current, way) if current else None
            speed = getattr(t, f"{which}_ratio") if t else None
            text = (f"{words.ratio(speed)} as fast" if len(ways) == 1 else words.ratio(speed)) if speed else ""
            notes.append(_note(label[way], tallest[way], text, f"x{suffix}", f"y{suffix}"))
        tops.append(1.2 * max([*tallest.values(), 1e-9]))
    tokens = next((getattr(m, way).prefill_tokens for m, _, _ in shown if m for way in ways if getattr(m, way)), 0)
    if not ways:
        notes = [_note(0.5, 0.5, "not measured", "paper", "paper")]
    return go.Figure(
        data,
        layout(
            "Latency",
            barmode="group",
            xaxis=axis("prefill" if len(ways) > 1 else "", showgrid=False, domain=[0, 0.36]),
            yaxis=axis(f"ms for {tokens} tokens" if tokens else "ms", range=[0, tops[0]]),
            xaxis2=axis("decode" if len(ways) > 1 else "", showgrid=False, domain=[0.62, 1], anchor="y2"),
            yaxis2=axis("ms per token", anchor="x2", range=[0, tops[1]]),
            annotations=notes,
        ),
    )


def table(baseline, current=None, before=None) -> str:
    """The same numbers in HTML: one column each for the uncompressed model, the setting before, and now."""
    columns = [(BASE, baseline), ("before", before), (NOW, current)]
    columns = [(name, m) for name, m in columns if m is not None]
    rows = []

    def row(what: str, unit: str, cell) -> None:
        cells = [cell(m) for _, m in columns]
        if any(cells):
            rows.append((what, [c or "–" for c in cells], unit))

    for text in baseline.quality:

        def quality(name, scale=1.0, digits=2, text=text):
            def cell(m):
                q = m.quality.get(text)
                x = getattr(q, name) if q else None
                return (
                    ""
                    if x is None
                    else f"{x * scale:,.{digits}f} ± {(getattr(q, name + '_se') or 0) * scale:,.{digits}f}"
                )

            return cell

        row(f"perplexity, {text}", "lower is better", quality("perplexity"))
        row(f"KL, {text}", "nats per token", quality("kl", digits=4))
        row(f"same top token, {text}", "%", quality("top1", 100, 1))
    row("weights held", "MB", lambda m: words.short(m.memory.weights / 1e6))
    row("linear layers", "MB", lambda m: words.short(m.memory.linears / 1e6))
    row("bits per linear weight", "metadata included", lambda m: f"{m.memory.bits_per_weight:.2f}")
    row(f"KV cache, {KV_TOKENS:,} tokens", "MB", lambda m: words.short(m.memory.kv_per_token * KV_TOKENS / 1e6))
    row("weights as one graph", "MB", lambda m: m.memory.engine and words.short(m.memory.engine / 1e6))
    for way, name in WAYS.items():
        name = "" if way == "latency" else f", {name}"

        def time(m, phase: str, digits: int, way=way) -> str:
            t = getattr(m, way)
            return t and f"{getattr(t, phase + '_ms'):,.{digits}f} ± {getattr(t, phase + '_iqr'):,.{digits}f}"

        row(f"prefill{name}", "ms, median ± IQR", lambda m, time=time: time(m, "prefill", 0))
        row(f"decode{name}", "ms per token", lambda m, time=time: time(m, "decode", 1))
        for phase in ("prefill", "decode"):
            paired = "paired with the uncompressed model, eager"
            row(f"{phase} speed{name}", paired, lambda m, p=phase, way=way: _speed(getattr(m, way), p))

    left, right = (
        "text-align:left;padding:2px 12px 2px 0",
        "text-align:right;padding:2px 12px;font-variant-numeric:tabular-nums",
    )
    head = "".join(f"<th style='{right}'>{html.escape(name)}</th>" for name, _ in columns)
    body = "".join(
        f"<tr><td style='{left}'>{html.escape(what)}</td>"
        + "".join(f"<td style='{right}'>{html.escape(c)}</td>" for c in cells)
        + f"<td style='{left};opacity:0.75'>{html.escape(unit)}</td></tr>"
        for what, cells, unit in rows
    )
    return f"<table class='labkit-table'><thead><tr><th></th>{head}<th></th></tr></thead><tbody>{body}</tbody></table>"


def without_times(m):
    """The same measurement without its latency: for a baseline whose times come from another machine."""
    return replace(m, latency=None, engine=None)


def _speed(t, phase: str) -> str:
    speed = getattr(t, f"{phase}_ratio") if t else None
    return words.ratio(speed) if speed else ""


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
