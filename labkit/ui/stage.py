"""Figures on a page that change in place.

Each figure is redrawn inside an ``Output`` widget in plotly's own MIME form, which JupyterLab updates without a blank
frame. A ``FigureWidget`` would do the same with its own 5 MB copy of plotly.js in every figure: with three figures
the panel was seen to take 3.4 s to build instead of 0.3 s, and a saved notebook grew by those megabytes.
Where a page knows no plotly it shows the SVG of the same figure.
"""

from __future__ import annotations

import sys
import textwrap

from labkit.ui import need
from labkit.ui.static import bundle

widgets = need("ipywidgets")


LETTERS = 118  # of a title that fit side by side in a notebook's width
LINE = 18  # pixels that a line of a title is high


class Stage(widgets.Box):
    """One or several figures side by side, wrapping on narrow pages: ``stage.show(figure, ...)``."""

    def __init__(self):
        super().__init__(layout=widgets.Layout(display="flex", flex_flow="row wrap", width="100%"))
        self.add_class("labkit-stage")

    def show(self, *figures) -> None:
        """Draw these figures in place of those that are shown. May be called from any thread."""
        if len(self.children) != len(figures):
            room = {"flex": "1 1 300px", "min_width": "280px", "overflow": "hidden"}
            self.children = tuple(widgets.Output(layout=widgets.Layout(**room)) for _ in figures)
        for output, figure in zip(self.children, figures, strict=True):
            # Set in one step rather than cleared and filled, so that nothing flickers.
            data = _data(figure, LETTERS // len(figures))
            output.outputs = ({"output_type": "display_data", "data": data, "metadata": {}},)


def _data(figure, letters: int) -> dict:
    if "google.colab" in sys.modules:  # Colab has no renderer for plotly's MIME type, but runs scripts in HTML
        return {"text/html": figure.to_html(include_plotlyjs="cdn", full_html=False)}
    data = bundle(figure)
    live = data["application/vnd.plotly.v1+json"]
    _wrap(live["layout"], live["data"], letters)
    return data


def _wrap(layout: dict, traces: list[dict], letters: int) -> None:
    """Break the titles of a figure and of its x axes where a line has no more room; plotly would cut them off.

    Where the legend, between title and plot, takes more than one line, the figure gets higher too.
    """
    title = layout.get("title") or {}
    lines = textwrap.wrap(title.get("text") or "", letters) or [""]
    rows = _rows({t["name"] for t in traces if t.get("name") and t.get("showlegend", True)}, letters - 8)
    if more := LINE * (len(lines) + rows - 2):
        height = layout["height"] = (layout.get("height") or 300) + more
        layout["title"] = title | {"text": "<br>".join(lines), "y": 1 - LINE / height}
        layout["margin"] = (layout.get("margin") or {}) | {"t": (layout.get("margin") or {}).get("t", 64) + more}
    for name, axis in layout.items():
        if name.startswith("xaxis") and (text := (axis.get("title") or {}).get("text")):
            start, end = axis.get("domain") or (0, 1)
            lines = textwrap.wrap(text, max(12, round(letters * (end - start))))
            layout[name] = axis | {"title": axis["title"] | {"text": "<br>".join(lines)}}


def _rows(names: set[str], letters: int) -> int:
    """Lines that a legend of these names takes; where they do not fit in one, plotly makes all as wide as the longest."""
    wide = [len(name) + 6 for name in names] or [0]
    if len(names) < 2 or sum(wide) <= letters:
        return 1
    return -(-len(names) // max(1, letters // max(wide)))
