"""What the panel and the explorer share: a sentence, a figure stage, and background work with progress and cancel."""

from __future__ import annotations

import html
import os
import threading
import time

from labkit.ui import need, words
from labkit.ui.stage import Stage
from labkit.ui.worker import Latest, explain

widgets = need("ipywidgets")

# JupyterLab's own text colour inside the figures, so that they follow its light and dark themes at once.
STYLE = """<style>
.labkit-live {padding: 4px 8px}
.labkit-panel .labkit-at-sentence {min-height: 9em}
.labkit-live .js-plotly-plot .main-svg text {fill: var(--jp-ui-font-color1, #555) !important}
.labkit-live .widget-html > .widget-html-content {line-height: 1.5}
.labkit-live .widget-toggle-buttons {display: flex; align-items: center}
.labkit-live .widget-toggle-buttons > label {text-align: right; margin-right: 8px}
.labkit-note {border-left: 4px solid; padding: 4px 12px; margin: 2px 0; max-width: 72em}
.labkit-ask {border-color: #e69f00} .labkit-said {border-color: #0072b2} .labkit-error {border-color: #d55e00}
.labkit-small {opacity: 0.75; font-size: 90%}
.labkit-title {font-size: 125%; font-weight: 600}
.labkit-live table.labkit-table {font-size: 92%; border-collapse: collapse}
</style>"""


class Live(widgets.VBox):
    """A box of controls, a sentence and figures whose content is computed by a worker.

    ``controls`` (widget by name), ``error`` (the last exception or None), ``worker`` and ``last_answer_ms`` (from a
    moved control to the redrawn box) are there for tests and notebooks.
    """

    def __init__(self, worker: Latest):
        super().__init__()
        self.worker = worker
        self.is_static = os.environ.get("LABKIT_STATIC", "") not in ("", "0")
        self.controls: dict = {}
        self.error: Exception | None = None
        self.last_answer_ms: float | None = None
        self._drawing = threading.RLock()  # the kernel's thread and the worker's both draw
        self._last_progress = 0.0
        self.cancel_button = button("Cancel", "Stop at the next step; what is finished stays", self.cancel, "stop")
        self.bar = widgets.FloatProgress(min=0, max=1, layout=widgets.Layout(width="220px"))
        self.progress_text = part("progress")
        self.working = widgets.HBox([self.cancel_button, self.bar, self.progress_text])
        self.sentence, self.status = part("sentence"), part("status")
        self.stage = None if self.is_static else Stage()
        self.add_class("labkit-live")
        self._work(False)
        if self.is_static:
            self._ipython_display_ = self.static

    def static(self) -> None:
        """Display the content without widgets."""
        raise NotImplementedError

    def cancel(self) -> None:
        """Stop the running work at its next step; the figures keep what they show."""
        self.worker.cancel()
        self._work(False)
        self._say("Cancelled.", kind="error")

    def _say(self, *sentences: str, kind: str = "said") -> None:
        self.sentence.value = note(kind, *sentences)

    def _failed(self, error: Exception) -> None:
        """Any error becomes one sentence in the page; the exception itself stays in ``.error``."""
        with self._drawing:
            self.error = error
            self._work(False)
            self._say(explain(error), kind="error")

    def _progress(self, what: str, done: int, total: int) -> None:
        """Called by the work at every step; the page gets at most ten of them a second."""
        now = time.monotonic()
        if now - self._last_progress < 0.1 and done != total:
            return
        self._last_progress = now
        self.bar.value = done / total if total else 0.0
        self.progress_text.value = words.small(f"{what}: {done} of {total}" if total else what)

    def _work(self, working: bool) -> None:
        self.working.layout.display = "flex" if working else "none"


def button(text: str, tooltip: str, click, icon: str = ""):
    made = widgets.Button(description=text, tooltip=tooltip, icon=icon, layout=widgets.Layout(width="auto"))
    made.on_click(lambda _: click())
    return made


def part(name: str):
    """An HTML widget that tests and styles find as ``.labkit-at-<name>``."""
    made = widgets.HTML()
    made.add_class(f"labkit-at-{name}")
    return made


def note(kind: str, *sentences: str) -> str:
    """A coloured note, one line for each sentence: "ask", "said" or "error"."""
    return f"<div class='labkit-note labkit-{kind}'>{'<br>'.join(map(html.escape, sentences))}</div>"


def wrapped(*children):
    """Widgets in a row that wraps on narrow pages."""
    return widgets.HBox(children, layout=widgets.Layout(flex_flow="row wrap", align_items="center"))
