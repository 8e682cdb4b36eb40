"""Showing a view or a figure so that it stays true where no script runs.

A notebook output may carry several forms of the same thing. ``show`` gives plotly's own form, which JupyterLab
draws live, and an SVG of the same figure, which GitHub and nbconvert draw. ``static`` gives a table and one SVG.
"""

from __future__ import annotations

import html
import json

from labkit.ui import svg


def bundle(figure, label: str = "") -> dict:
    """One figure as a MIME bundle: live in JupyterLab and VS Code, SVG on GitHub and in nbconvert."""
    wide = figure.layout.width or 720
    return {
        "application/vnd.plotly.v1+json": _json(figure),
        "image/svg+xml": svg.draw(figure, width=int(wide), height=int(figure.layout.height or 340), label=label),
        "text/plain": label or figure.layout.title.text or "figure",
    }


def show(*figures, label: str = "") -> None:
    """Display plotly figures, each with its SVG twin: ``show(plots.lines(...))``."""
    from IPython.display import display

    for figure in figures:
        display(bundle(figure, label), raw=True)


def static(view) -> None:
    """Display a View without widgets: its sentence and table, then its three figures as one SVG."""
    from IPython.display import display

    text = f"{view.title}. {view.sentence} {view.source}"
    display({"text/html": page(view), "text/plain": text}, raw=True)
    display({"image/svg+xml": svg.draw(*view.figures, label=text), "text/plain": text}, raw=True)


def page(view) -> str:
    """A View's words and table as HTML; plain tags, since GitHub drops styles."""
    lines = [f"<p><b>{html.escape(view.title)}</b></p>", f"<p>{html.escape(view.sentence)}</p>", view.table]
    if view.source:
        lines.append(f"<p><i>{html.escape(view.source)}</i></p>")
    return "".join(lines)


def _json(figure) -> dict:
    # Without plotly's tool bar, which would cover the titles; dragging zooms and a double click resets all the same.
    return json.loads(figure.to_json()) | {"config": {"displayModeBar": False}}
