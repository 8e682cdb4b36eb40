"""Colours and layout shared by every figure.

The palette is Okabe and Ito's (2008, "Color Universal Design"), which stays distinct for colour-blind readers.
Backgrounds are transparent and text is a mid grey, so figures stay readable on light and on dark pages.
"""

from __future__ import annotations

GREY, BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = (
    "#8c8c8c",
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#d55e00",
    "#cc79a7",
    "#56b4e9",
)
SERIES = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY)
BASELINE, NOW = GREY, BLUE  # the uncompressed model and the compressed one, in every figure

INK = "#757575"  # at least 4:1 against white and against JupyterLab's dark page
GRID = "rgba(128,128,128,0.22)"
CLEAR = "rgba(0,0,0,0)"


def layout(title: str = "", height: int = 300, **more) -> dict:
    """The layout every figure starts from; keyword arguments add to it or replace parts of it."""
    # An empty template instead of plotly's own keeps a figure at 3 KB instead of 10 and halves the time to build it.
    base = {
        "template": {},
        "title": {"text": title, "font": {"size": 14}, "x": 0.01, "xanchor": "left", "y": 0.97, "yanchor": "top"},
        "font": {"size": 12, "color": INK},
        "paper_bgcolor": CLEAR,
        "plot_bgcolor": CLEAR,
        "height": height,
        "margin": {"l": 56, "r": 12, "t": 64, "b": 44},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 11}},
        "hoverlabel": {"align": "left"},
    }
    return base | more


def axis(title: str = "", log: bool = False, **more) -> dict:
    """A labelled axis; ``log`` says so in its title, since bars on a log axis do not start at zero."""
    base = {
        "title": {"text": f"{title} (log scale)" if log else title, "font": {"size": 12}, "standoff": 6},
        "type": "log" if log else "-",
        "gridcolor": GRID,
        "zerolinecolor": GRID,
        "linecolor": INK,
        "automargin": True,
    }
    return base | more
