"""Sliders over any pure function that returns a figure: ``explore(compute, batch=[1, 2, 4, 8])``."""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Mapping

from labkit.method import Knob
from labkit.ui import controls, need
from labkit.ui import static as twin
from labkit.ui.base import STYLE, Live, part, wrapped
from labkit.ui.view import View
from labkit.ui.worker import Latest

widgets = need("ipywidgets")
go = need("plotly.graph_objects")


def explore(
    compute: Callable,
    start: Mapping | None = None,
    help: Mapping[str, str] | None = None,
    slow: bool | Callable[..., bool] = False,
    **settings,
):
    """Controls for the arguments of ``compute``, and what it returns below them.

    Parameters
    ----------
    compute : callable
        A pure function of the settings. It returns a plotly figure, several figures, ``(figures, sentence)``,
        ``(figures, sentence, html)`` with a table or a text in HTML below the figures, or a View. It runs in the
        background; where it loops over ``labkit.progress.track`` its progress is shown and it can be cancelled.
    start : dict, optional
        The values to start from; by default each setting's first.
    help : dict, optional
        A few words beside each control.
    slow : bool or callable
        True for functions that measure: they wait until the hand rests, and never run two at a time. A function of the
        settings says which of them still have to be measured; the others are shown at once.
    **settings
        One control each: a list of positions becomes a slider, strings become buttons, a dict of label: value a
        slider with those labels, True or False (or a list of both) a check box, a Knob its own control, a widget stays itself.

    Returns
    -------
    Explorer
        An ipywidget; ``.static()`` displays the current figures with their SVG twins.
    """
    return Explorer(compute, settings, dict(start or {}), dict(help or {}), slow)


class Explorer(Live):
    """The widget behind :func:`explore`; ``.figures`` and ``.text`` are what it shows."""

    def __init__(self, compute, settings, start, help, slow):
        unknown = sorted({*start, *help} - set(settings))
        if unknown:
            raise ValueError(f"explore has no setting {', '.join(unknown)}; its settings are {', '.join(settings)}.")
        super().__init__(Latest(wait=0.3 if slow else 0.0, exclusive=bool(slow)))
        self.compute = compute
        self.slow = slow if callable(slow) else lambda **_: slow
        self.figures: tuple = ()
        self.text = ""
        self.table = part("table")
        self.controls = {name: _control(name, spec, start) for name, spec in settings.items()}
        for widget in self.controls.values():
            widget.observe(lambda _: self._answer(), names="value")
        self.children = (
            widgets.HTML(STYLE),
            *(controls.row(widget, help.get(name, "")) for name, widget in self.controls.items()),
            wrapped(self.working),
            self.sentence,
            *([] if self.stage is None else [self.stage]),
            self.table,
        )
        if self.slow(**self.values()) and not self.is_static:
            self._answer()
        else:  # a quick one shows its first figure before the cell ends
            try:
                self._draw(self._call())
            except Exception as error:
                self._failed(error)
                if self.is_static:
                    raise

    def values(self) -> dict:
        """The settings as they stand."""
        return {name: controls.read(widget) for name, widget in self.controls.items()}

    def _call(self):
        return _parts(self.compute(**self.values()))

    def _answer(self) -> None:
        start = time.perf_counter()
        now = self.values()

        def done(result) -> None:
            with self._drawing:
                if now != self.values():
                    return
                self._draw(result)
                self.last_answer_ms = 1000 * (time.perf_counter() - start)

        def progress(what: str, at: int, total: int) -> None:
            self._work(True)
            self._progress(what, at, total)

        if self.worker.wait and not self.slow(**now):  # measured before: no need to wait for the hand to rest
            self.worker.cancel()
            try:
                done(_parts(self.compute(**now)))
            except Exception as error:
                self._failed(error)
            return
        self.worker.submit(lambda: _parts(self.compute(**now)), done, self._failed, progress)

    def _draw(self, result) -> None:
        self.figures, self.text, table = result
        self.error = None
        self._work(False)
        if self.text:
            self._say(self.text)
        else:
            self.sentence.value = ""
        self.table.value = table
        if self.stage is not None:
            self.stage.show(*self.figures)

    def static(self) -> None:
        """Display sentence, table and figures without widgets."""
        from IPython.display import display

        if not self.figures:
            self.worker.join()
        words = f"<p>{html.escape(self.text)}</p>{self.table.value}"
        if self.text or self.table.value:
            display({"text/html": words, "text/plain": self.text}, raw=True)
        twin.show(*self.figures, label=self.text)


def _control(name: str, spec, start: Mapping):
    """The widget for one setting; see :func:`explore`."""
    if isinstance(spec, widgets.Widget):
        return spec
    if isinstance(spec, Knob):
        return controls.control(spec, spec.check(start.get(name, spec.default)))
    if isinstance(spec, bool) or (isinstance(spec, list | tuple) and {type(v) for v in spec} == {bool}):
        first = spec if isinstance(spec, bool) else spec[0]
        return controls.control(Knob(name, bool, first), start.get(name, first))
    options = list(spec.items()) if isinstance(spec, Mapping) else [(_shown(v), v) for v in spec]
    if not options:
        raise ValueError(f"explore's setting {name} has no positions to choose from.")
    values = [v for _, v in options]
    value = start.get(name, values[0])
    if value not in values:
        raise ValueError(f"{name} = {value!r} is not one of explore's positions: {', '.join(map(str, values))}.")
    if all(isinstance(v, str) for v in values):
        return controls.control(Knob(name, str, value, choices=tuple(values)), value)
    return controls.slider(options, value, name)


def _shown(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _parts(result) -> tuple[tuple, str, str]:
    """What ``compute`` returned, as (figures, sentence, table)."""
    if isinstance(result, View):
        return result.figures, result.sentence, result.table
    if isinstance(result, tuple) and len(result) in (2, 3) and all(isinstance(part, str) for part in result[1:]):
        return _parts(result[0])[0], result[1], result[2] if len(result) == 3 else ""
    figures = tuple(result) if isinstance(result, (list, tuple)) else (result,)
    for figure in figures:
        if not isinstance(figure, go.Figure):
            raise TypeError(f"explore's function returned {type(figure).__name__}, not a plotly figure or a View")
    return figures, "", ""
