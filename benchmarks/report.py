"""What a benchmark gives back, and how a run of them is shown: as text, Markdown and JSON.

from report import Row

TITLE = "Decode, 4-bit against fp32"
TIMEOUT = 600                                   # seconds, optional

def run(quick: bool) -> list[Row]:
    ...
    return [
        Row("fp32", 55.0, "ms/token"),
        Row("4-bit", 21.0, "ms/token", baseline="fp32", ratio=2.6, target="at least 2.3x", ok=2.6 >= 2.3),
    ]
"""

from __future__ import annotations

import json
import math
import numbers
from dataclasses import asdict, dataclass, field, fields

LABELS = ("measured", "simulated", "modelled")
STATUSES = ("passed", "missed", "crashed", "timed out", "interrupted")


@dataclass(frozen=True)
class Row:
    """One figure of a benchmark. Raises ValueError, naming the row, when it does not hold together."""

    name: str
    value: float
    unit: str
    baseline: str | None = None  # what the ratio is taken against
    ratio: float | None = None  # paired where it is a time; the name or the target says which way is good
    label: str = "measured"
    target: str | None = None  # in words: "at least 2.3x"
    ok: bool | None = None  # whether the target is met; None without a target

    def __post_init__(self):
        for what, value in (("value", self.value), ("ratio", self.ratio)):
            if value is None and what == "ratio":
                continue
            real = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not real or not math.isfinite(value):
                raise ValueError(f"row {self.name!r}: {what} = {value!r} is not a finite number.")
            object.__setattr__(self, what, float(value))
        for what in ("name", "unit"):
            if not isinstance(getattr(self, what), str):
                raise ValueError(f"row {self.name!r}: {what} = {getattr(self, what)!r} is not a string.")
        if self.label not in LABELS:
            raise ValueError(f"row {self.name!r}: label = {self.label!r} is not one of {', '.join(LABELS)}.")
        if (self.target is None) != (self.ok is None):
            raise ValueError(f"row {self.name!r}: a target needs ok=True or False, and ok needs a target.")
        if self.ok is not None:
            object.__setattr__(self, "ok", bool(self.ok))  # numpy's bools too

    @classmethod
    def from_dict(cls, row: dict) -> Row:
        return cls(**{f.name: row[f.name] for f in fields(cls)})


@dataclass(frozen=True)
class Outcome:
    """How one benchmark ended."""

    name: str
    title: str
    status: str  # one of STATUSES
    seconds: float
    rows: list[Row] = field(default_factory=list)
    error: str = ""  # the end of what it printed, when it crashed or was stopped

    @property
    def ok(self) -> bool:
        return self.status == "passed"


@dataclass(frozen=True)
class Report:
    """A whole run, with what it ran on."""

    machine: str
    versions: str
    threads: int
    quick: bool
    when: str
    outcomes: list[Outcome]

    @property
    def ok(self) -> bool:
        return all(o.ok for o in self.outcomes)

    @property
    def verdict(self) -> str:
        """One sentence: what was met, what was missed, what broke."""
        rows = [r for o in self.outcomes for r in o.rows if r.ok is not None]
        met = sum(r.ok for r in rows)
        text = f"{met} of {len(rows)} targets met" if rows else "no targets in this run"
        for status in STATUSES[2:]:
            names = [o.name for o in self.outcomes if o.status == status]
            if names:
                text += f"; {status}: {', '.join(names)}"
        return f"{'OK' if self.ok else 'NOT OK'}: {text}."

    def heading(self) -> list[str]:
        """What the run was made on, line by line."""
        threads = f"{self.threads} thread{'s' if self.threads != 1 else ''}"
        profile = "quick profile" if self.quick else "full profile"
        return [f"{self.machine}; {threads}; {profile}; {self.when}", self.versions]

    def text(self) -> str:
        parts = ["\n".join(self.heading()), *(outcome_text(o) for o in self.outcomes), self.verdict]
        return "\n\n".join(parts)

    def markdown(self) -> str:
        parts = ["# Benchmarks", "  \n".join(self.heading()), f"**{self.verdict}**"]
        for o in self.outcomes:
            parts.append(f"## {o.title}\n\n`{o.name}`: {o.status} in {o.seconds:.0f} s")
            if o.rows:
                table = [_cells(r) for r in o.rows]
                rule = "|".join(["---", "--:", "---", "--:", "---", "---", "---"])
                lines = ["|".join(_HEAD), rule, *("|".join(c.replace("|", "\\|") for c in row) for row in table)]
                parts.append("\n".join(f"|{line}|" for line in lines))
            if o.error:
                # Indented, not fenced: a benchmark's output may hold a fence of its own.
                parts.append("\n".join("    " + line for line in o.error.splitlines()))
        return "\n\n".join(parts) + "\n"

    def json(self) -> str:
        return json.dumps(asdict(self) | {"ok": self.ok, "verdict": self.verdict}, indent=1) + "\n"


_HEAD = ("figure", "value", "unit", "ratio", "against", "target", "verdict")


def outcome_text(outcome: Outcome) -> str:
    """One benchmark as a table for the terminal."""
    lines = [f"{outcome.title} ({outcome.name}: {outcome.status}, {outcome.seconds:.0f} s)"]
    if outcome.rows:
        table = [_HEAD, *(_cells(r) for r in outcome.rows)]
        widths = [max(len(row[i]) for row in table) for i in range(len(_HEAD))]
        right = (1, 3)  # numbers
        for row in table:
            cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths)))
            lines.append(("  " + "  ".join(cells)).rstrip())
    if outcome.error:
        lines += ["  " + line for line in outcome.error.splitlines()]
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    unit = row.unit if row.label == "measured" else f"{row.unit} ({row.label})"
    ratio = "" if row.ratio is None else f"{row.ratio:.3g}x" if abs(row.ratio) < 100 else f"{row.ratio:.0f}x"
    verdict = {None: "", True: "met", False: "MISSED"}[row.ok]
    return row.name, number(row.value), unit, ratio, row.baseline or "", row.target or "", verdict


def number(value: float) -> str:
    """Four significant digits, thousands separated."""
    if value and not 1e-3 <= abs(value) < 1e7:
        return f"{value:.3e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
