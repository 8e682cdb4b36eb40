"""Notebook 01's "Where do the milliseconds go?": a stacked bar for each decoded token, its table, and what they say.

    steps = breakdown.decode({"fp32": lm, "4-bit": small}, roof)
    milliseconds.show(steps)

Everything here is a pure function of the steps; what the parts are is told in :mod:`labkit.measure.breakdown`.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from labkit.measure.breakdown import EAGER, GRAPH, Step
from labkit.ui import need, plots, static, theme, words
from labkit.ui.table import Table

go = need("plotly.graph_objects")

PARTS = {  # attribute of a Step -> what it is called; from the bottom of the bar to its top
    "reading": "reading weights (modelled)",
    "kernels": "kernels, above that",
    "framework": "framework (measured)",
}
COLORS = (theme.BLUE, theme.SKY, theme.VERMILION)
CLOSE = 0.15  # parts that differ by less than this share are called about the same


def show(steps: Sequence[Step]) -> None:
    """Display the figure, the sentence and the table: live where plotly is known, else as SVG and HTML."""
    from IPython.display import display

    static.show(figure(steps), label=sentence(steps))
    page = f"<p>{html.escape(sentence(steps))}</p>{table(steps)._repr_html_()}"
    display({"text/html": page, "text/plain": f"{sentence(steps)}\n{table(steps)}"}, raw=True)


def figure(steps: Sequence[Step]) -> go.Figure:
    """One bar per model and way, in milliseconds, with its sum above it."""
    values = {title: {_name(s): 1e3 * getattr(s, part) for s in steps} for part, title in PARTS.items()}
    made = plots.bars(values, "ms per token", "One decoded token, batch 1", stacked=True, colors=COLORS, height=340)
    for s in steps:
        text = f"{words.short(1e3 * s.seconds)} ms"
        made.add_annotation(x=_name(s), y=1e3 * s.seconds, text=text, showarrow=False, yanchor="bottom")
    made.update_yaxes(range=[0, 1.12e3 * max(s.seconds for s in steps)])
    return made


def table(steps: Sequence[Step]) -> Table:
    """The same in numbers: bytes, milliseconds of each part, tokens per second."""
    head = ("step", "MB read", *(f"{title}, ms" for title in PARTS.values()), "step, ms (measured)", "tokens/s")
    rows = []
    for s in steps:
        parts = [words.short(1e3 * getattr(s, part)) for part in PARTS]
        rows.append(
            (_name(s), words.short(s.nbytes / 1e6), *parts, words.short(1e3 * s.seconds), words.short(1 / s.seconds))
        )
    return Table(head, tuple(rows), f"weights read at {steps[0].bandwidth / 1e9:.1f} GB/s (measured)")


def sentence(steps: Sequence[Step]) -> str:
    """What fewer bytes took away and what one graph took away; only what these numbers say."""
    by = {(s.model, s.way): s for s in steps}
    first, *others = dict.fromkeys(s.model for s in steps)
    said = []
    for way in dict.fromkeys(s.way for s in steps):
        for other in others:
            if (first, way) in by and (other, way) in by:
                said.append(_fewer_bytes(by[first, way], by[other, way]))
    for model in (first, *others):
        if (model, EAGER) in by and (model, GRAPH) in by:
            said.append(_one_graph(by[model, EAGER], by[model, GRAPH]))
    if (first, EAGER) in by:
        s = by[first, EAGER]
        said.append(f"The framework takes {words.percent(s.framework / s.seconds)} of {first}'s eager step.")
    if any(s.cut for s in steps):
        said.append(
            "Where framework and reading would fill more than the step, reading was cut to fit: then the roof was measured on "
            "a busier machine, or weights that are that few stayed in the processor's cache."
        )
    return " ".join(said)


def _fewer_bytes(a: Step, b: Step) -> str:
    """From model ``a`` to model ``b``, both run the same way."""
    share = words.percent(b.nbytes / a.nbytes)
    weights = (a.reading + a.kernels, b.reading + b.kernels)
    return (
        f"{'Eagerly' if a.way == EAGER else 'As one graph'}, {b.model} reads {share} of {a.model}'s bytes: reading and "
        f"kernels go from {_ms(weights[0])} to {_ms(weights[1])}, the framework {_change(a.framework, b.framework)}."
    )


def _one_graph(a: Step, b: Step) -> str:
    """From eager to one graph, the same model."""
    return f"One graph in place of {a.model}'s many operators: the framework {_change(a.framework, b.framework)}."


def _change(before: float, after: float) -> str:
    if abs(after - before) <= CLOSE * max(before, after):
        return f"stays at about {_ms(after)}"
    return f"goes from {_ms(before)} to {_ms(after)}"


def _ms(seconds: float) -> str:
    return f"{words.short(1e3 * seconds)} ms"


def _name(s: Step) -> str:
    return f"{s.model}, {s.way}"
