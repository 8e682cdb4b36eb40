"""Two models on the same windows of text, compared window by window.

Texts differ far more than methods do: a hard window is hard for every model. The standard error over windows of one
model measures mostly that, so two overlapping error bands say nothing about which model is better. In the difference of
two models on one window the window's difficulty cancels, and what is left is a matter of the models. (Paired t interval;
see any textbook, or Dror et al., The Hitchhiker's Guide to Testing Statistical Significance in NLP, ACL 2018.)
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace

from labkit.measure.measurement import Measurement, Quality
from labkit.table import Table

# What can be compared: its name, its unit, the factor into that unit, and whether more of it is better.
WHAT = {
    "nll": ("log perplexity", "nats per token", 1.0, False),
    "kl": ("KL", "nats per token", 1.0, False),
    "kl_run": ("KL as run", "nats per token", 1.0, False),
    "top1": ("same top token", "%", 100.0, True),
}
CONFIDENCE = 0.95
BETTER, WORSE, UNSURE = "better", "worse", "cannot tell"


@dataclass(frozen=True)
class Paired:
    """How far a second model is from a first, on the same windows; ``verdict`` speaks of the second."""

    difference: float  # mean over windows of second minus first, in nats per token, or as a share (top-1)
    low: float | None  # its 95 % interval; None where one window, or none, was compared
    high: float | None
    windows: int
    verdict: str  # "better", "worse" or "cannot tell"
    why: str = ""  # why it cannot be told, where the two were not comparable at all

    def __str__(self) -> str:
        return f"{self.verdict}: {self.why}" if self.why else self.verdict


def paired(a: Quality, b: Quality, what: str = "kl") -> Paired:
    """The mean difference of ``b`` to ``a`` over windows that both have read, with a 95 % t interval.

    ``what``: "nll" (log perplexity), "kl", "kl_run" or "top1". From one window no interval can be had, and the verdict
    is "cannot tell". The interval takes windows for independent: they should be spread over the text.

    Raises ValueError for an unknown ``what``, and where the two did not score the same windows.
    """
    if what not in WHAT:
        raise ValueError(f"what = {what!r} is not allowed: it must be one of {', '.join(WHAT)}.")
    if why := _unlike(a, b, what):
        raise ValueError(f"These two cannot be compared by {what}, window by window: {why}.")
    differences = [after - before for before, after in zip(a.per_window[what], b.per_window[what])]
    mean = sum(differences) / len(differences)
    low, high = interval(differences)
    return Paired(mean, low, high, len(differences), _verdict(low, high, higher_is_better=WHAT[what][3]))


def interval(values: list[float]) -> tuple[float, float] | tuple[None, None]:
    """The 95 % t interval of the mean of independent values; (None, None) from one, or where they are not numbers.

    Infinite values all of one sign (a broken model's loss) give an infinite interval, on that side.
    """
    if len(values) < 2 or any(math.isnan(v) for v in values):
        return None, None
    mean = sum(values) / len(values)
    if not math.isfinite(mean):
        return (None, None) if math.isnan(mean) else (mean, mean)
    half = t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The t with P(\\|T\\| < t) = ``confidence`` under Student's distribution of that many degrees of freedom.

    By bisection of the distribution function, which is a finite sum for whole degrees of freedom (Abramowitz and Stegun,
    Handbook of Mathematical Functions, 26.7.3 and 26.7.4): scipy is no dependency of labkit's.
    """
    low, high = 0.0, 1.0
    while _within(high, freedom) < confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return (low + high) / 2


def between(a: Measurement, b: Measurement, text: str, what: str = "kl") -> Paired:
    """:func:`paired` for one text of two measurements; where they are not comparable, "cannot tell" and why.

    The uncompressed model's own KL is 0 on every token; as run it has one, since its graph's head has 8 bits.
    """
    first, second = a.quality.get(text), b.quality.get(text)
    if first is None or second is None:
        return _unknown("not measured on both")
    if a.texts.get(text) != b.texts.get(text):
        return _unknown("other text")
    if what.startswith("kl"):
        if a.model != b.model:
            return _unknown("another reference")
        if a.method == "uncompressed" and what not in first.per_window and what in second.per_window:
            zeros = {what: [0.0] * len(second.per_window[what])}
            first = replace(first, tokens=second.tokens, per_window=zeros)
    if why := _unlike(first, second, what):
        return _unknown(why)
    return paired(first, second, what)


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` returns: prints as a table, renders as HTML."""

    first: str
    second: str
    found: dict[tuple[str, str], Paired]  # (text, what) -> difference

    def table(self) -> Table:
        rows = []
        for (text, what), p in self.found.items():
            name, unit, scale, _ = WHAT[what]
            band = "–" if p.low is None else f"{_signed(p.low * scale)} to {_signed(p.high * scale)}"
            change = "–" if math.isnan(p.difference) else _signed(p.difference * scale)
            rows.append((text, f"{name}, {unit}", change, band, str(p.windows or "–"), str(p)))
        head = ("text", "what", "difference", f"{CONFIDENCE:.0%} interval".replace("%", " %"), "windows", "verdict")
        return Table(head, tuple(rows), f"{self.second} against {self.first}, window by window (measured)")

    def __str__(self) -> str:
        return str(self.table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def compare(a: Measurement, b: Measurement) -> Comparison:
    """Is ``b`` better or worse than ``a``? By text, the paired difference of all that both have values by window for.

    ``a`` may be the uncompressed model, whose KL is 0. Raises ValueError where the two have no text in common, or a text
    of one name that is not the same text.

    >>> labkit.compare(labkit.measure(rtn, against=lm), labkit.measure(gptq, against=lm))  # doctest: +SKIP
    """
    for one in (a, b):
        if not isinstance(one, Measurement):
            raise ValueError(f"compare takes two Measurements, as labkit.measure returns them, not {one!r:.60}.")
    texts = [t for t in a.quality if t in b.quality]
    if not texts:
        raise ValueError(f"No text in common: {', '.join(a.quality)} against {', '.join(b.quality)}.")
    for text in texts:
        if a.texts.get(text) != b.texts.get(text):
            raise ValueError(
                f"{text!r} is not the same text in both (hashes of its tokens: {a.texts.get(text)} and "
                f"{b.texts.get(text)}): measure both with the same texts, windows and length."
            )
    found = {}
    for text in texts:
        for what in WHAT:
            known = [getattr(m.quality[text], "perplexity" if what == "nll" else what) is not None for m in (a, b)]
            if known[1] and (known[0] or (what.startswith("kl") and a.method == "uncompressed")):
                found[text, what] = between(a, b, text, what)
    return Comparison(a.method, b.method, found)


def _unlike(a: Quality, b: Quality, what: str) -> str:
    """Why two qualities have no pairs of windows, "" where they have."""
    before, after = a.per_window.get(what), b.per_window.get(what)
    if not before or not after:
        return "no values by window"
    if len(before) != len(after) or a.tokens != b.tokens:
        return "other tokens were scored"
    return ""


def _unknown(why: str) -> Paired:
    return Paired(math.nan, None, None, 0, UNSURE, why)


def _verdict(low: float | None, high: float | None, higher_is_better: bool) -> str:
    if low is None or low <= 0 <= high:
        return UNSURE
    return BETTER if (low > 0) == higher_is_better else WORSE


def _within(t: float, freedom: int) -> float:
    """P(\\|T\\| < t) of Student's distribution with a whole number of degrees of freedom."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(2 + odd, freedom + 1, 2):  # the last term has the power freedom - 2 of the cosine
        total += term
        term *= math.cos(angle) ** 2 * (k - 1) / k
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


def _signed(x: float) -> str:
    """``+0.0123``: four decimals below 1, for a difference is small; fewer above."""
    return f"{x:+.4f}" if abs(x) < 1 else f"{x:+.2f}"
