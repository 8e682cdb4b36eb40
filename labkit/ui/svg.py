"""The same plotly figures as plain SVG, for pages that run no script: GitHub, nbconvert, a printed sheet.

Draws what labkit's figures use: grouped, stacked and overlaid bars with error bars, lines, markers, heat maps, texts,
annotations, linear, logarithmic and categorical axes, a legend. A few KB each, and no browser is needed to make one.
Colours follow the reader's light or dark setting; the background is painted, so text never meets an unknown page.
"""

from __future__ import annotations

import math
import re
from html import escape, unescape

from labkit.ui.heat import cells

# Colours stand as attributes, which survive where a page strips styles; the style only adds the dark setting. Its
# rules name our own class, since nbconvert puts the SVG right into the page.
STYLE = (
    "<style>@media(prefers-color-scheme:dark){.labkit-svg .bg{fill:#14171a}.labkit-svg text{fill:#d8d8d8}"
    ".labkit-svg .e{stroke:#bbb}}</style>"
)
INK, EDGE, GRID = "#3b3b3b", "fill='none' stroke='#555' stroke-width='1.2'", "stroke='#8888' stroke-width='.5'"
CHAR = 6.0  # px a character takes at 11 px, on average
DASHES = {"dash": "6 4", "dot": "2 3", "dashdot": "6 3 2 3"}


def draw(*figures, width: int = 340, height: int = 300, label: str = "") -> str:
    """Draw plotly figures side by side as one SVG; ``label`` is read aloud by screen readers."""
    if not figures:
        raise ValueError("svg.draw needs at least one figure.")
    parts = [f"<g transform='translate({i * width},0)'>{_figure(f, width, height)}</g>" for i, f in enumerate(figures)]
    total = width * len(figures)
    name = f"<title>{escape(label)}</title>" if label else ""
    font = f"fill='{INK}' text-anchor='middle' font-family='system-ui, sans-serif' font-size='11'"
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {total} {height}' width='{total}' height='{height}' "
        f"role='img' class='labkit-svg' {font}>{name}{STYLE}"
        f"<rect class='bg' fill='#fff' width='{total}' height='{height}' rx='6'/>{''.join(parts)}</svg>"
    )


def _figure(fig, width: int, height: int) -> str:
    layout = fig.layout
    legend, rows = _legend(fig, width)
    top, bottom, left, right = 34 + 16 * rows, 46, 58, max(18, layout.margin.r or 0)
    out = [_text(14, 20, _plain(layout.title.text or ""), "start", 13, bold=True), legend]
    frames = {}
    for suffix in _axes(fig):
        xs, ys = layout["xaxis" + suffix], layout["yaxis" + suffix]
        a, b = xs.domain or (0.0, 1.0)
        inner = width - left - right
        box = (left + a * inner, left + b * inner, top, height - bottom)
        traces = [t for t in fig.data if (t.xaxis or "x")[1:] == suffix]
        maps = [t for t in traces if t.type == "heatmap"]  # their axes have ranges of their own
        traces = [t for t in traces if t.type != "heatmap"]
        frame = _Frame(traces, xs, ys, box, layout.barmode or "group")
        frames[suffix] = frame
        out += [cells(t, frame.px, frame.py) for t in maps]
        out += [frame.grid(xs, ys), frame.draw(traces, layout.barmode or "group", layout.bargap)]
    for note in layout.annotations or ():
        out.append(_annotation(note, frames, (left, width - right, top, height - bottom)))
    return "".join(out)


def _axes(fig) -> list[str]:
    """The subplots in use: "" for the first, "2" for the second, and so on."""
    return list(dict.fromkeys((t.xaxis or "x")[1:] for t in fig.data)) or [""]


class _Frame:
    """One subplot: its box in pixels and the map from data to pixels."""

    def __init__(self, traces, xaxis, yaxis, box, barmode):
        self.left, self.right, self.top, self.bottom = box
        xs = [x for t in traces for x in _values(t.x)]
        self.categories = list(dict.fromkeys(xs)) if any(isinstance(x, str) for x in xs) else None
        self.xlog, self.ylog = xaxis.type == "log", yaxis.type == "log"
        self.barmode = barmode
        self.x = None if self.categories else _span(xaxis, [x for x in xs if x is not None], self.xlog)
        self.y = _span(yaxis, self._heights(traces), self.ylog, bars=any(t.type == "bar" for t in traces))

    def _heights(self, traces) -> list[float]:
        """All y values to fit in: with error bars, and summed per category where bars are stacked."""
        found, sums = [], {}
        for t in traces:
            errors = _values(t.error_y.array) if t.error_y else []
            for i, (x, y) in enumerate(zip(_values(t.x), _values(t.y))):
                if y is None:
                    continue
                found.append(y + (errors[i] if i < len(errors) else 0))
                if t.type == "bar" and self.barmode == "stack":
                    sums[x] = sums.get(x, 0) + y
        return found + list(sums.values())

    def px(self, x) -> float:
        if self.categories:
            at = (self.categories.index(x) + 0.5) / len(self.categories) if x in self.categories else 0.5
        else:
            at = _share(x, self.x, self.xlog)
        return self.left + at * (self.right - self.left)

    def py(self, y) -> float:
        at = min(max(_share(y, self.y, self.ylog), -0.02), 1.06)
        return self.bottom - at * (self.bottom - self.top)

    def grid(self, xaxis, yaxis) -> str:
        out = []
        for v in _ticks(self.y, self.ylog, (self.bottom - self.top) / 32):
            y = self.py(v)
            out.append(f"<line {GRID} x1='{self.left:.1f}' x2='{self.right:.1f}' y1='{y:.1f}' y2='{y:.1f}'/>")
            if yaxis.showticklabels is not False:
                out.append(_text(self.left - 5, y + 4, _label(v), "end"))
        if self.categories:
            for c in self.categories:
                out.append(_text(self.px(c), self.bottom + 15, str(c)))
        else:
            for v in _ticks(self.x, self.xlog, (self.right - self.left) / 55):
                x = self.px(v)
                out.append(f"<line {GRID} x1='{x:.1f}' x2='{x:.1f}' y1='{self.top:.1f}' y2='{self.bottom:.1f}'/>")
                if xaxis.showticklabels is not False:
                    out.append(_text(x, self.bottom + 15, _label(v)))
        out.append(f"<path class='e' {EDGE} d='M{self.left:.1f} {self.bottom:.1f}H{self.right:.1f}'/>")
        if xaxis.title.text:
            out.append(_text((self.left + self.right) / 2, self.bottom + 34, _plain(xaxis.title.text)))
        if yaxis.title.text:
            x, y = self.left - 42, (self.top + self.bottom) / 2
            out.append(
                f"<g transform='translate({x:.1f},{y:.1f}) rotate(-90)'>{_text(0, 0, _plain(yaxis.title.text))}</g>"
            )
        return "".join(out)

    def draw(self, traces, barmode, bargap) -> str:
        bars = [t for t in traces if t.type == "bar"]
        stack: dict = {}
        out = [
            self._bars(t, i, len(bars), barmode, 0.2 if bargap is None else bargap, stack) for i, t in enumerate(bars)
        ]
        return "".join(out + [self._scatter(t) for t in traces if t.type == "scatter"])

    def _bars(self, t, i, count, barmode, gap, stack) -> str:
        xs, out = _values(t.x), []
        slots = len(self.categories) if self.categories else max(len(xs), 1)
        room = (self.right - self.left) / slots * (1 - gap)
        wide = room / count if barmode == "group" else room
        floor = 10 ** self.y[0] if self.ylog else 0.0
        errors = _values(t.error_y.array) if t.error_y else []
        labels = _values(t.text) if isinstance(t.text, (tuple, list)) else []
        for j, (x, y) in enumerate(zip(xs, _values(t.y))):
            if y is None:
                continue
            low = stack.get(x, floor) if barmode == "stack" else floor
            stack[x] = low + y if barmode == "stack" else y
            mid = self.px(x) + ((i - (count - 1) / 2) * wide if barmode == "group" else 0)
            top, base = self.py(low + y if barmode == "stack" else y), self.py(low)
            top, base = min(top, base), max(top, base)
            see = f" opacity='{t.opacity}'" if t.opacity not in (None, 1) else ""
            out.append(
                f"<rect x='{mid - 0.48 * wide:.1f}' y='{top:.1f}' width='{0.96 * wide:.1f}' "
                f"height='{max(base - top, 0):.1f}' fill='{escape(str(t.marker.color))}'{see}/>"
            )
            if j < len(errors) and errors[j]:
                a, b = self.py(y + errors[j]), self.py(max(y - errors[j], floor))
                out.append(
                    f"<path class='e' {EDGE} d='M{mid:.1f} {a:.1f}V{b:.1f}M{mid - 3:.1f} {a:.1f}h6M{mid - 3:.1f} {b:.1f}h6'/>"
                )
                top = min(top, a)
            if j < len(labels) and labels[j]:
                out.append(_text(mid, top - 4, _plain(str(labels[j]))))
        return "".join(out)

    def _scatter(self, t) -> str:
        points = [
            (self.px(x), self.py(y)) for x, y in zip(_values(t.x), _values(t.y)) if x is not None and y is not None
        ]
        color = escape(str(t.line.color or t.marker.color or "#888"))
        out, mode = [], t.mode or "lines"
        if "lines" in mode and points:
            path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
            dash = f" stroke-dasharray='{DASHES[t.line.dash]}'" if t.line.dash in DASHES else ""
            out.append(f"<path d='{path}' fill='none' stroke='{color}' stroke-width='{t.line.width or 2}'{dash}/>")
        if "markers" in mode:
            color = escape(str(t.marker.color or color))
            out += [f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4' fill='{color}'/>" for x, y in points]
        if "text" in mode:
            for (x, y), words in zip(points, _values(t.text)):
                room = self.right - x > CHAR * len(str(words))
                out.append(_text(x + (7 if room else -7), y + 13, _plain(str(words)), "start" if room else "end"))
        return "".join(out)


def _annotation(note, frames, box) -> str:
    left, right, top, bottom = box
    x_frame, y_frame = (frames.get(ref[1:]) if ref != "paper" else None for ref in (note.xref or "x", note.yref or "y"))
    x = x_frame.px(10**note.x if x_frame.xlog else note.x) if x_frame else left + note.x * (right - left)
    y = y_frame.py(10**note.y if y_frame.ylog else note.y) if y_frame else bottom - note.y * (bottom - top)
    anchor = {"left": "start", "right": "end"}.get(note.xanchor, "")
    return _text(x, y + (4 if note.yanchor == "middle" else -5), _plain(note.text or ""), anchor, note.font.size)


def _legend(fig, width: int) -> tuple[str, int]:
    """Coloured squares and names under the title, wrapped to the width: (svg, number of rows)."""
    traces = [t for t in fig.data if t.type != "heatmap"]
    named = {t.name: t.marker.color or t.line.color for t in traces if t.name and t.showlegend is not False}
    if len(named) < 2:
        return "", 0
    out, x, row = [], 14.0, 0
    for name, color in named.items():
        wide = 20 + CHAR * len(name)
        if x > 14 and x + wide > width - 6:
            x, row = 14.0, row + 1
        out.append(f"<rect x='{x:.0f}' y='{30 + 16 * row}' width='9' height='9' fill='{escape(str(color))}'/>")
        out.append(_text(x + 13, 38 + 16 * row, name, "start"))
        x += wide + 8
    return "".join(out), row + 1


def _values(values) -> list:
    """A trace's data as plain Python values; None and NaN become None."""
    out = []
    for v in [] if values is None else values:
        v = v.item() if hasattr(v, "item") else v
        out.append(None if isinstance(v, float) and math.isnan(v) else v)
    return out


def _span(axis, values, log: bool, bars: bool = False) -> tuple[float, float]:
    """The axis range: in powers of ten on a log axis, from zero where bars stand on it."""
    if axis.range is not None:
        return float(axis.range[0]), float(axis.range[1])
    if log:
        good = [math.log10(v) for v in values if v is not None and v > 0] or [0.0]
        return min(good) - 0.1, max(good) + 0.1
    low, high = min(values, default=0.0), max(values, default=1.0)
    low = min(0.0, low) if bars else low
    pad = 0.06 * ((high - low) or abs(high) or 1.0)
    return (low if bars else low - pad), high + pad


def _share(v: float, span: tuple[float, float], log: bool) -> float:
    if log:
        v = math.log10(v) if v > 0 else span[0]
    return (v - span[0]) / ((span[1] - span[0]) or 1.0)


def _ticks(span: tuple[float, float], log: bool, count: float) -> list[float]:
    """Round numbers inside the span: 1, 2 or 5 times a power of ten."""
    low, high = span
    if log:
        steps = (1, 2, 5) if high - low < 2.2 else (1,)
        skip = max(1, math.ceil((high - low) / max(count, 2)))
        decades = range(math.floor(low), math.ceil(high) + 1)
        return [m * 10.0**d for d in decades for m in steps if d % skip == 0 and low <= math.log10(m * 10.0**d) <= high]
    raw = (high - low) / max(count, 2)
    base = 10.0 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    size = next(m * base for m in (1, 2, 5, 10) if m * base >= raw * 0.999)
    first = math.ceil(low / size - 1e-9)
    return [i * size for i in range(first, math.floor(high / size + 1e-9) + 1)]


def _label(v: float) -> str:
    """A tick's label: ``0.1``, ``500``, ``20k``, ``1M``."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(v) >= size:
            return f"{v / (1e3 if suffix == 'k' else size):g}{suffix}"
    return f"{v:.6g}"


def _plain(text: str) -> str:
    """Plotly's small HTML as plain text."""
    return unescape(re.sub(r"<[^>]+>", "", re.sub(r"<br\s*/?>", " ", text)))


def _text(x: float, y: float, text: str, anchor: str = "", size: float | None = None, bold: bool = False) -> str:
    """Text in the figure's own size and centered on ``x``, unless told otherwise."""
    if not text:
        return ""
    more = f" text-anchor='{anchor}'" if anchor else ""
    more += f" font-size='{size:g}'" if size else ""
    more += " font-weight='600'" if bold else ""
    return f"<text x='{x:.1f}' y='{y:.1f}'{more}>{escape(text)}</text>"
