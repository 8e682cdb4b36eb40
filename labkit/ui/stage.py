"""Figures on a page that change in place.

Each figure is redrawn inside an ``Output`` widget in plotly's own MIME form, which JupyterLab updates without a blank
frame. A ``FigureWidget`` would do the same with its own 5 MB copy of plotly.js in every figure: with three figures
the panel was seen to take 3.4 s to build instead of 0.3 s, and a saved notebook grew by those megabytes.
Where a page knows no plotly it shows the SVG of the same figure.
"""

from __future__ import annotations

import sys

from labkit.ui import need
from labkit.ui.static import bundle

widgets = need("ipywidgets")


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
            output.outputs = ({"output_type": "display_data", "data": _data(figure), "metadata": {}},)


def _data(figure) -> dict:
    if "google.colab" in sys.modules:  # Colab has no renderer for plotly's MIME type, but runs scripts in HTML
        return {"text/html": figure.to_html(include_plotlyjs="cdn", full_html=False)}
    return bundle(figure)
