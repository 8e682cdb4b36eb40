"""What an answer can be, and the Note that comes back for it."""

from __future__ import annotations

import functools
import html
import inspect
import math
import numbers
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

GREEN, YELLOW = "#009e73", "#e69f00"


@dataclass(frozen=True)
class Note:
    """What an exercise says: green when the answer is right, yellow with a hint when it is not. True when right."""

    right: bool
    text: str
    head: str = ""

    def __bool__(self) -> bool:
        return self.right

    def __str__(self) -> str:
        return f"{self.head or ('Right.' if self.right else 'Not yet.')} {self.text}"

    __repr__ = __str__  # a notebook's cell ends with the note itself

    def _repr_html_(self) -> str:
        # The word says what the colour says, and the style is inline, since a saved page has no style sheet of ours.
        head, _, text = str(self).partition(". ")
        style = f"border-left:4px solid {GREEN if self.right else YELLOW};padding:4px 12px;margin:2px 0;max-width:72em"
        return f"<div style='{style}'><b>{html.escape(head)}.</b> {html.escape(text)}</div>"


def right(why: str) -> Note:
    return Note(True, why)


def hint(text: str) -> Note:
    return Note(False, text)


POINT = "In Python a comma separates two values: write a decimal fraction with a point, as in 4.5."
TOGETHER = "Several words are one answer when they stand in braces, as in {'this', 'that'}."


@dataclass(frozen=True)
class Kind:
    """A kind of answer: what it is called, ``read``, which returns the clean answer or raises ValueError, and what to say
    of two values in place of one."""

    wanted: str
    read: Callable
    several: str = POINT


def number(of: str) -> Kind:
    """A finite number; numpy's and torch's count too."""

    def read(answer) -> float:
        if isinstance(answer, bool | str | bytes | list | tuple | dict) or getattr(answer, "shape", ()) != ():
            raise ValueError
        value = answer.item() if hasattr(answer, "item") else answer
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError
        return float(value)

    return Kind(f"a number, {of}", read)


def whole(of: str) -> Kind:
    """A whole number from 1; 8.0 is one too."""

    def read(answer) -> int:
        value = number(of).read(answer)
        if value != int(value) or value < 1:
            raise ValueError
        return int(value)

    return Kind(f"a whole number from 1, {of}", read)


def some_of(options: Iterable[str]) -> Kind:
    """One or several of these words: a string for one, or a set, list or tuple of strings."""
    options = tuple(options)

    def read(answer) -> frozenset[str]:
        words = [answer] if isinstance(answer, str) else list(answer) if isinstance(answer, set | list | tuple) else []
        if not words or any(w not in options for w in words):
            raise ValueError
        return frozenset(words)

    example = ", ".join(repr(o) for o in options)
    return Kind(f"one or several of {example}, such as {{{options[0]!r}}}", read, TOGETHER)


def exercise(kind: Kind):
    """Make an exercise of a function of a clean answer; no answer, or one of another kind, is told what is wanted."""

    def wrap(check: Callable[..., Note]):
        parameters = list(inspect.signature(check).parameters.values())
        # What an exercise takes besides the answer is a model or a measurement, unless it says that it is a number; that
        # is one of bytes, and larger than what stands behind a comma.
        number_next = len(parameters) > 1 and str(parameters[1].annotation).startswith(("int", "float"))

        @functools.wraps(check)
        def run(answer=None, *args, **kwargs) -> Note:
            if answer is None or answer is ...:
                return Note(False, f"Put {kind.wanted}, in place of the dots.", "No answer yet.")
            second = bool(args) and _is_answer(args[0], kind)
            if second and number_next and isinstance(args[0], numbers.Real):
                second = args[0] < 1000
            if second or 1 + len(args) > len(parameters):
                given = (answer, *args)
                said = f"{_shown(given)} are {len(given)} answers, and one is asked for: {kind.wanted}. {kind.several}"
                return hint(said)
            try:
                clean = kind.read(answer)
            except (ValueError, TypeError):
                return hint(
                    f"{_shown(answer)} is not the kind of answer that is asked for: {kind.wanted}.{_slip(answer, kind)}"
                )
            return check(clean, *args, **kwargs)

        run.exercise = True
        return run

    return wrap


NUMERAL = re.compile(r"\s*[-+]?[\d.,'\s]*\d[\d.,'\s]*%?\s*")


def _is_answer(value, kind: Kind) -> bool:
    """Whether a value is one of the answers that somebody gave, not what an exercise takes besides."""
    if isinstance(value, str) and not NUMERAL.fullmatch(value):
        try:
            kind.read(value)
        except (ValueError, TypeError):
            return False
        return True
    return isinstance(value, str | numbers.Number)


def _shown(answer) -> str:
    text = ", ".join(map(repr, answer)) if isinstance(answer, tuple) else repr(answer)
    return text if len(text) <= 60 else text[:57] + "..."


def _slip(answer, kind: Kind) -> str:
    """What was probably meant by an answer of another kind, as a further sentence: a decimal comma, or quotation marks."""
    if kind.several is not POINT:
        return ""
    if isinstance(answer, tuple | list) and len(answer) == 2 and all(isinstance(a, numbers.Real) for a in answer):
        return f" {POINT}"
    if not isinstance(answer, str) or not NUMERAL.fullmatch(answer):
        return ""
    return f" {POINT}" if "," in answer else " Leave the quotation marks out."


def near(answer: float, truth: float, share: float = 0.05) -> bool:
    """Whether an answer is within a share of the truth."""
    return abs(answer - truth) <= share * abs(truth)
