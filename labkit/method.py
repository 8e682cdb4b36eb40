"""What every technique is: a frozen dataclass whose fields are its knobs.

    small = RTN(bits=4, group_size=64)(lm)      # a new LanguageModel; lm is untouched, bit for bit

From one ``knob(...)`` declaration come the validation, the slider, the command-line flag, the papermill
parameter, the cache key, the ``repr`` and the README's method table.
"""

from __future__ import annotations

import json
import math
import numbers
import re
import typing
import warnings
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar


@dataclass(frozen=True)
class Knob:
    """One setting of a method: its type, its allowed values, and the words that explain it."""

    name: str
    type: type
    default: Any
    low: float | None = None
    high: float | None = None
    step: float | None = None
    choices: tuple | None = None
    form: tuple[str, str] | None = None  # of a string: a regular expression for all of it, and what it says in words
    stops: tuple = ()  # the positions a slider offers; any value in [low, high] stays valid
    none: str | None = None  # what None means; None is refused where this is None
    help: str = ""

    @property
    def allowed(self) -> str:
        """The allowed values in words, for error messages and ``--help``."""
        if self.choices:
            text = "one of " + ", ".join(repr(c) for c in self.choices)
        elif self.form:
            text = self.form[1]
        elif self.type is bool:
            text = "True or False"
        elif self.low is not None and self.high is not None:
            text = f"{self._kind} from {self.low} to {self.high}"
        elif self.low is not None:
            text = f"{self._kind}, {self.low} or more"
        else:
            text = self._kind
        return text + (f", or None ({self.none})" if self.none else "")

    @property
    def _kind(self) -> str:
        return {int: "a whole number", float: "a number", str: "a string"}[self.type]

    def check(self, value: Any, owner: str = "") -> Any:
        """Return the value as its declared type, or raise a ValueError that names it and what is allowed."""
        clean = self._clean(value)
        if clean is MISSING:
            where = f"{owner}.{self.name}" if owner else self.name
            raise ValueError(f"{where} = {brief(value)} is not allowed: it must be {self.allowed}.")
        return clean

    def _clean(self, value: Any) -> Any:
        if value is None:
            return None if self.none else MISSING
        if self.type is bool:
            return value if isinstance(value, bool) else MISSING
        if self.type is int:
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                return MISSING
            value = int(value)
        elif self.type is float:
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                return MISSING
            try:
                value = float(value)
            except OverflowError:  # a whole number beyond 1e308
                return MISSING
            if not math.isfinite(value):
                return MISSING
        elif not isinstance(value, self.type):
            return MISSING
        if self.choices is not None:
            return value if value in self.choices else MISSING
        if self.form and not re.fullmatch(self.form[0], value):
            return MISSING
        if (self.low is not None and value < self.low) or (self.high is not None and value > self.high):
            return MISSING
        return value

    def parse(self, text: str) -> Any:
        """Read a value from the command line or a papermill parameter: ``"64"``, ``"none"``, ``"true"``."""
        word = text.strip()
        if word.lower() in ("none", "null"):
            return self.check(None)
        if self.type is bool:
            value = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(
                word.lower(), word
            )
        elif self.type is str:
            value = word
        else:
            try:
                value = self.type(word)
            except ValueError:
                value = word
        return self.check(value)

    def positions(self) -> list:
        """The values a slider steps through, in order."""
        if self.choices:
            return list(self.choices)
        if self.type is bool:
            return [False, True]
        if self.stops:
            return list(self.stops)
        if self.low is None or self.high is None:
            return [self.default]
        step = self.step or (1 if self.type is int else (self.high - self.low) / 20)
        count = round((self.high - self.low) / step)
        return [self.type(round(self.low + i * step, 10)) for i in range(count + 1)]


def brief(value: Any) -> str:
    """A value's repr for an error message: on one line, and not longer than one."""
    try:
        text = repr(value).replace("\n", " ")
    except Exception:  # an int of more digits than Python prints
        text = f"this {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:79]}…"


def reason_of(error: BaseException) -> str:
    """The first line of what an error says, without its full stop."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return (lines[0] if len(lines[0]) <= 240 else f"{lines[0][:239]}…").rstrip(".: ")


def check_model(lm, part: str = "history") -> None:
    """Raise a ValueError for anything but a LanguageModel; the transformers model inside one is easily mistaken for it."""
    if not hasattr(lm, part):
        raise ValueError(f"A LanguageModel, as labkit.load() makes it, is needed here, not {type(lm).__name__}.")


def knob(default, low=None, high=None, step=None, choices=None, form=None, stops=(), none=None, help=""):
    """Declare a method's field as a knob; see :class:`Knob` for what each argument means."""
    choices = tuple(choices) if choices is not None else None
    described = {"low": low, "high": high, "step": step, "choices": choices, "form": form, "stops": tuple(stops)}
    return field(default=default, metadata={"knob": described | {"none": none, "help": help}})


class DoneInPart(UserWarning):
    """A method could not do a part of what it is there for."""


def both(*said: str | None) -> str | None:
    """What several parts of a method have to say, in one; None where that is nothing."""
    return "; ".join(filter(None, said)) or None


ON_WEIGHTS = ("quantize", "prune", "structure", "train")  # kinds of methods that are there to change weights


@dataclass(frozen=True)
class Method:
    """A compression technique. Subclasses declare knobs and implement :meth:`apply`.

    Class attributes that describe a technique:

    - ``kind``: "quantize", "prune", "structure", "train", "cache" or "conditional".
    - ``paper``: where the technique comes from (authors, title, venue, section).
    - ``calibrated``: True when ``apply`` needs calibration windows.
    - ``lossless``: knob values at which the technique should change (almost) nothing,
      and ``lossless_kl``, the KL divergence per token (nats) allowed there.
    """

    kind: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    calibrated: ClassVar[bool] = False
    lossless: ClassVar[dict] = {}
    lossless_kl: ClassVar[float] = 0.0

    def __post_init__(self):
        for name, spec in self.knobs().items():
            object.__setattr__(self, name, spec.check(getattr(self, name), type(self).__name__))

    def __call__(self, lm, calib=None, progress: bool = True):
        """Return a new, compressed LanguageModel; every untouched tensor is shared with ``lm``.

        ``calib`` is a LongTensor ``(windows, length)`` of token ids; a calibrated method that is given none takes
        ``labkit.text.calibration(lm)``. ``progress=False`` switches the progress bar off. Where much of the decoder's
        weights is left as it was, a :class:`labkit.LeftUncompressed` warning names it.
        """
        from labkit.coverage import tell

        small = self._compress(lm, calib, progress)
        if small.coverage is not lm.coverage:
            tell(self, small.coverage)
        return small

    def _compress(self, lm, calib, progress: bool):
        """What a call does, but for the warning: a recipe speaks once, for all of its methods."""
        from labkit.coverage import coverage

        calib = self._windows(lm, calib)
        small = lm.copy()
        said = self.apply(small, calib, progress)
        small.history = (*lm.history, f"{self!r} ({said})" if said else repr(self))
        if said:
            warnings.warn(f"{self.typed()}: {said}.", DoneInPart, stacklevel=3)
        if self.kind in ON_WEIGHTS:
            small.coverage = coverage(small, lm)
        return small

    def _windows(self, lm, calib):
        """The calibration windows given, checked, or where they are needed and missing the default ones."""
        check_model(lm)
        if calib is None and not self.calibrated:
            return None
        from labkit import text

        if calib is None:
            return text.calibration(lm)
        text.check_windows(lm, calib)
        return calib

    def apply(self, lm, calib, progress: bool) -> str | None:
        """Compress ``lm`` in place. ``lm`` is a private copy: replace its tensors, never write into them.

        Returns None, or in a few words what could not be done as asked, such as "smoothed in 12 of 30 blocks". They stand
        after the method in the model's history, hence in every measurement, and in a warning.
        """
        raise NotImplementedError

    @classmethod
    def knobs(cls) -> dict[str, Knob]:
        """The knobs of this technique, in the order in which they are declared."""
        types = typing.get_type_hints(cls)
        return {
            f.name: Knob(f.name, _plain_type(types[f.name]), f.default, **f.metadata["knob"])
            for f in fields(cls)
            if "knob" in f.metadata
        }

    @classmethod
    def summary(cls) -> str:
        """The first line of the docstring: one sentence on what the technique does."""
        return (cls.__doc__ or "").strip().splitlines()[0]

    def values(self) -> dict[str, Any]:
        """The knob values of this instance."""
        return {name: getattr(self, name) for name in self.knobs()}

    def typed(self) -> str:
        """This method as one would type it: the first knob, and those that are not at their defaults."""
        values, knobs = self.values(), self.knobs()
        shown = [n for i, n in enumerate(knobs) if i == 0 or values[n] != knobs[n].default]
        return f"{type(self).__name__}({', '.join(f'{n}={values[n]!r}' for n in shown)})"

    def key(self) -> str:
        """Canonical JSON of the knob values: the method's part of a cache key."""
        return json.dumps(self.values(), sort_keys=True)


def _plain_type(hint) -> type:
    """``int | None`` -> ``int``; a plain type stays itself."""
    args = [a for a in typing.get_args(hint) if a is not type(None)]
    return args[0] if args else hint


@dataclass(frozen=True, init=False, repr=False)
class Recipe(Method):
    """Several techniques, applied one after the other; itself a Method.

    All calibrated ones get the same windows: without ``calib`` they are drawn once, from the model that comes in. Drawn
    anew each time, half of the second one's text would be written by a model that the first has already damaged.

    >>> Recipe(Wanda(sparsity=0.5), GPTQ(bits=4)).typed()
    'Recipe(Wanda(sparsity=0.5), GPTQ(bits=4))'
    """

    methods: tuple[Method, ...] = ()

    def __init__(self, *methods: Method):
        for m in methods:
            if not isinstance(m, Method):
                raise ValueError(f"Recipe takes methods such as RTN(bits=4), not {m!r}.")
        object.__setattr__(self, "methods", methods)

    @property
    def calibrated(self) -> bool:
        """Whether any of its methods, also inside another Recipe, needs calibration windows."""
        return any(m.calibrated for m in self.methods)

    def _compress(self, lm, calib, progress: bool):
        calib = self._windows(lm, calib)
        for m in self.methods:
            lm = m._compress(lm, calib, progress)
        return lm

    def typed(self) -> str:
        return f"Recipe({', '.join(m.typed() for m in self.methods)})"

    def key(self) -> str:
        return json.dumps([[type(m).__name__, json.loads(m.key())] for m in self.methods])

    def __repr__(self) -> str:
        return f"Recipe({', '.join(map(repr, self.methods))})"


def methods() -> dict[str, type[Method]]:
    """Every technique that labkit exports, by name, in alphabetical order."""
    import labkit

    public = {name: vars(labkit).get(name) for name in labkit.__all__}  # vars: what is imported lazily is no method
    return {
        name: obj
        for name, obj in sorted(public.items())
        if isinstance(obj, type) and issubclass(obj, Method) and obj not in (Method, Recipe)
    }
