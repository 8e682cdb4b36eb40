"""The panel: a method's knobs as sliders over a real model, answered from the store or measured in the background."""

from __future__ import annotations

import html
import time
from dataclasses import replace

from labkit.measure.machine import machine
from labkit.progress import listen
from labkit.ui import controls, need, words
from labkit.ui.base import STYLE, Live, button, note, part, wrapped
from labkit.ui.static import page, static
from labkit.ui.view import view, without_times
from labkit.ui.worker import Latest, explain

widgets = need("ipywidgets")


def panel(method_class, lm, store=None, texts=("manual", "prose"), windows=None, length=None, latency=True, **start):
    """Sliders for a technique's knobs, and what they do to accuracy, memory and latency of ``lm``.

    Parameters
    ----------
    method_class : type[Method]
        The technique, such as ``labkit.RTN``.
    lm : LanguageModel
        The uncompressed model.
    store : Store, optional
        Where measurements are looked up and kept; by default the one that all notebooks on this machine share.
    texts, windows, length
        What accuracy is measured on, as in :func:`labkit.measure`; the uncompressed model is scored on the same tokens.
    latency : bool
        False leaves out the timing.
    **start
        Knob values to start from: ``panel(RTN, lm, bits=8)``.

    Returns
    -------
    Panel
        An ipywidget; ``.static()`` displays what it shows without widgets. With the environment variable
        ``LABKIT_STATIC=1`` it measures in the foreground and displays only that.
    """
    how = {"texts": texts, "windows": windows, "length": length, "latency": latency}
    return Panel(method_class, lm, store, how, start)


class Panel(Live):
    """The widget behind :func:`panel`; ``.view`` is the View on display, None before the first measurement."""

    def __init__(self, method_class, lm, store=None, how=None, start=None, measure=None, hashes=None):
        """``measure`` stands in for :func:`labkit.measure` and ``hashes`` for ``labkit.sweep.text_hashes``."""
        from labkit.results import Store

        start, knobs = dict(start or {}), method_class.knobs()
        if unknown := sorted(set(start) - set(knobs)):
            raise ValueError(
                f"{method_class.__name__} has no knob {unknown[0]!r}: it has {', '.join(knobs) or 'none'}."
            )
        first = method_class(**start)  # a bad value is refused in one sentence
        self._start = first.values()
        super().__init__(Latest())
        self.method_class, self.lm = method_class, lm
        self.store = Store() if store is None else store
        self._how = {"texts": ("manual", "prose"), "windows": None, "length": None, "latency": True} | dict(how or {})
        self._measure_with = measure
        self._hashes = self._texts(first) if hashes is None else hashes
        self._calib = None
        if method_class.calibrated:
            from labkit import text

            self._calib = text.calibration(lm)
        self.view = None
        self._shown = None  # (Method, Measurement) on display
        self._upward: bool | None = None  # which way the last knob went
        self._quiet = False
        self._build()
        self._answer()

    # ------------------------------------------------------------------------------------------------ controls

    def _build(self) -> None:
        knobs = self.method_class.knobs()
        self.controls = {name: controls.control(knob, self._start[name]) for name, knob in knobs.items()}
        for name, widget in self.controls.items():
            widget.observe(lambda change, name=name: self._moved(name, change), names="value")
        self.reset_button = button("Reset", "Back to the values this panel started with", self.reset, "undo")
        self.measure_button = button("Measure here", "Measure this setting on this machine", self.measure_here, "play")
        self.ask, self.table = part("ask"), part("table")
        head = f"<span class='labkit-title'>{html.escape(f'{self.method_class.__name__} on {self.lm.name}')}</span><br>"
        self.children = (
            widgets.HTML(STYLE + head + words.small(self.method_class.summary())),
            *(controls.row(widget, knobs[name].help) for name, widget in self.controls.items()),
            wrapped(self.reset_button, self.measure_button, self.working),
            self.ask,
            self.sentence,
            *([] if self.stage is None else [self.stage]),
            self.status,
            self.table,
        )
        self.add_class("labkit-panel")
        self._offer(False)

    def method(self):
        """The technique at the values of the controls; raises ValueError where they do not go together."""
        return self.method_class(**{name: controls.read(w) for name, w in self.controls.items()})

    def reset(self) -> None:
        """Back to the start values, in one step."""
        self._quiet = True
        try:
            for name, widget in self.controls.items():
                controls.write(widget, self._start[name])
        finally:
            self._quiet = False
        self._answer()

    def cancel(self) -> None:
        """Stop a running measurement at its next step; the figures keep what they show."""
        super().cancel()
        self._offer(True)
        self._say(f"Cancelled: {words.describe(self.method())} was not measured.{self._still()}", kind="error")

    def measure_here(self) -> None:
        """Measure the current setting on this machine, whatever the store holds."""
        try:
            self._measure(self.method())
        except Exception as error:
            self._failed(error)

    def _moved(self, name: str, change) -> None:
        if self._quiet:
            return
        stops = [value for _, value in getattr(self.controls[name], "options", ())]
        if change["old"] in stops and change["new"] in stops:
            self._upward = stops.index(change["new"]) > stops.index(change["old"])
        self._answer(name)

    # ------------------------------------------------------------------------------------------------ answers

    def _answer(self, moved: str | None = None) -> None:
        """Show the controls' setting: from the store when it has it, else measured in the background."""
        start = time.perf_counter()
        self.worker.cancel()
        try:
            method = self.method()
            key = self._key(method)
            found = self.store.find(key)
            baseline = self._baseline(found, key.uncompressed()) if found else None
            if baseline is None:
                self._measure(method, moved)
                return
            with self._drawing:
                self._draw(method, baseline, found.measurement, found, moved)
                self.last_answer_ms = 1000 * (time.perf_counter() - start)
                self._status(f"answered in {self.last_answer_ms:.0f} ms from the store")
        except Exception as error:  # knobs that do not go together, a store that cannot be read
            self._failed(error)

    def _measure(self, method, moved: str | None = None) -> None:
        """Measure ``method`` (and the uncompressed model, where that is missing) and put it into the store."""
        if self.is_static:
            with listen(lambda what, done, total: None):  # a progress bar would be one more widget on the page
                pair = self._compute(method)
            self._measured(method, moved, pair)
            return
        self._offer(False)
        self._work(True)
        self._last_progress = 0.0
        self._progress("waiting to start", 0, 0)
        self.status.value = words.small(self.view.source) if self.view else ""  # of the figures that still show
        self.ask.value = note("ask", words.waiting(method))
        self._say(f"{words.sentence(words.describe(method))} Not in the store yet: measuring it now.{self._still()}")
        self.worker.submit(
            lambda: self._compute(method),
            lambda pair: self._measured(method, moved, pair),
            self._failed,
            self._progress,
        )

    def _compute(self, method):
        """Runs in the background: (baseline, current), both in the store afterwards."""
        measure = self._measure_with
        if measure is None:
            from labkit.measure import measure
        key = self._key(method)
        baseline = self.store.get(key.uncompressed())
        if baseline is None or (self._how["latency"] and baseline.latency is None):
            baseline = measure(self.lm, **self._how)
            self._keep(key.uncompressed(), baseline)
        current = measure(method(self.lm, self._calib), against=self.lm, **self._how)
        self._keep(key, current)
        return baseline, current

    def _keep(self, key, measured) -> None:
        if self._key(None).model != key.model:
            raise RuntimeError("The model was changed while it was being measured: nothing was kept. Measure it again.")
        self.store.put(key, measured)

    def _measured(self, method, moved, pair) -> None:
        with self._drawing:
            if method != self.method():  # the hand moved on while the result came in
                return
            self._draw(method, *pair, None, moved)
            self._status("Measured just now, and kept in the store.")

    def _baseline(self, found, key):
        """The uncompressed model (of this key) measured where ``found`` was; one from elsewhere comes without its times."""
        same = self.store.get(replace(key, machine=found.key.machine, versions=found.key.versions))
        if same is not None:
            return same
        other = self.store.find(key)
        if other is None or other.key.machine == found.key.machine:
            return other and other.measurement
        return without_times(other.measurement)

    def _texts(self, method) -> dict[str, str]:
        """The hash of each text; how methods of this class are read is settled here, for the uncompressed model too."""
        from labkit.measure.reading import Reading
        from labkit.sweep import text_hashes

        reading = Reading.of(self.lm, method, self._how["windows"], self._how["length"])
        self._how |= vars(reading)
        return text_hashes(self.lm, self._how["texts"], **vars(reading))

    def _key(self, method):
        from labkit.results import Key

        return Key.of(self.lm, method, self._hashes, self._calib)

    # ------------------------------------------------------------------------------------------------ showing

    def _draw(self, method, baseline, current, found, moved) -> None:
        """``found`` is the store's row, None for a measurement made just now."""
        origin = words.source(found, machine(), current.label)
        ask = words.question(method, moved, self._upward)
        self.view = view(method, baseline, current, self._shown, origin, ask)
        self.error = None
        self._shown = (method, current)
        self.ask.value = note("ask", self.view.ask)
        self._say(*self.view.sentences)
        self.table.value = self.view.table
        if self.stage is not None:
            self.stage.show(*self.view.figures)
        self._work(False)
        measured_here = found is None or (found.here and not found.shipped)
        self._offer(not measured_here or (self._how["latency"] and current.latency is None))

    def _status(self, how: str) -> None:
        self.status.value = words.small(f"{self.view.source} {words.sentence(how)}")

    def _still(self) -> str:
        return f" The figures still show {words.describe(self._shown[0])}." if self._shown else ""

    def _failed(self, error: Exception) -> None:
        super()._failed(error)
        self._offer(True)
        if self.is_static:
            raise error

    def _offer(self, measuring: bool) -> None:
        self.measure_button.layout.display = None if measuring else "none"

    def static(self) -> None:
        """Display sentence, table and one SVG, without widgets. Waits for a first measurement that is under way."""
        from IPython.display import display

        if self.view is None:
            self.worker.join()
        if self.view is None:
            text = explain(self.error) if self.error else "Nothing has been measured yet."
            display({"text/html": f"<p>{html.escape(text)}</p>", "text/plain": text}, raw=True)
        else:
            static(self.view)

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The widget, with its words and table as the fallback that GitHub shows."""
        bundle = dict(super()._repr_mimebundle_(**kwargs) or {})
        if self.view is not None:
            bundle |= {"text/plain": f"{self.view.title}. {self.view.sentence}", "text/html": page(self.view)}
        return bundle
