"""One widget for each kind of knob, made from its declaration."""

from __future__ import annotations

from labkit.ui import need, words

widgets = need("ipywidgets")

WIDE = {"description_width": "110px"}
UNSET = "\0none"  # stands for None in a selection, where ipywidgets takes None for "nothing selected"


def read(widget):
    """The value of a control; None where its position means None."""
    return None if widget.value == UNSET else widget.value


def write(widget, value) -> None:
    """Move a control to ``value``."""
    widget.value = UNSET if value is None else value


def control(knob, value):
    """A widget for ``knob`` that starts at ``value``; :func:`read` gives its value, :func:`write` sets it.

    Numbers become a slider over ``knob.positions()``, choices become buttons (a menu when there are more than four),
    booleans a check box, free strings a text field. A value between two positions is added to them.
    """
    if knob.type is bool:
        return widgets.Checkbox(
            value=value, description=_label(knob.name), tooltip=knob.help, style=WIDE, layout=_wide()
        )
    stops = knob.positions()
    if value not in stops:
        stops = _insert(stops, value)
    options = [(words.value(knob, v), v) for v in stops]
    if knob.choices:
        kind = widgets.ToggleButtons if len(options) <= 4 else widgets.Dropdown
        style = WIDE | ({"button_width": "auto"} if kind is widgets.ToggleButtons else {})
        options, value = _selectable(options, value)
        layout = _wide()
        return kind(
            options=options, value=value, description=_label(knob.name), tooltip=knob.help, style=style, layout=layout
        )
    if knob.type is str:
        return widgets.Text(
            value=value,
            description=_label(knob.name),
            tooltip=knob.help,
            continuous_update=False,
            style=WIDE,
            layout=_wide(),
        )
    return slider(options, value, knob.name, knob.help)


def slider(options: list[tuple[str, object]], value, name: str, tooltip: str = ""):
    """A slider over labelled positions, which need not be numbers: ``[("32", 32), ("per row", None)]``."""
    options, value = _selectable(options, value)
    return widgets.SelectionSlider(
        options=options,
        value=value,
        description=_label(name),
        tooltip=tooltip,
        continuous_update=True,
        style=WIDE,
        layout=_wide(),
    )


def row(widget, help: str):
    """A control with its help beside it."""
    note = widgets.HTML(words.small(help))
    return widgets.HBox([widget, note], layout=widgets.Layout(flex_flow="row wrap", align_items="center"))


def _selectable(options, value) -> tuple[list, object]:
    return [(text, UNSET if v is None else v) for text, v in options], UNSET if value is None else value


def _wide():
    return widgets.Layout(width="420px", max_width="100%")


def _label(name: str) -> str:
    return name.replace("_", " ")


def _insert(stops: list, value) -> list:
    """Put a value where it belongs among ascending numbers; before a final None, which stands for the extreme."""
    at = next((i for i, s in enumerate(stops) if s is None or s > value), len(stops))
    return [*stops[:at], value, *stops[at:]]
