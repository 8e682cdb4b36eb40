"""record(): a notebook writes down a number, ``labkit regress`` reads it back from the executed notebook."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from pathlib import Path

MIME = "application/vnd.labkit.metrics+json"
LABELS = ("measured", "simulated", "modelled")
NAME = re.compile(r"[a-z_][a-z0-9_]*(\.[a-z_][a-z0-9_]*)*")


def record(name: str, value, rel_tol: float = 0.05, abs_tol: float | None = None, label: str = "measured"):
    """Write ``value`` into this notebook's outputs under ``name``, and return it.

    A later run agrees when it is within ``rel_tol`` (a share of the value) or ``abs_tol`` (in the value's unit).
    ``label`` says how the number was got: "measured", "simulated" or "modelled". Outside a notebook the same line
    is printed. Raises ValueError for a name, value, tolerance or label that is not allowed.

    >>> record("gptq4.kld", 0.144)
    gptq4.kld = 0.144 (measured)
    0.144
    """
    metric = _metric(name, value, rel_tol, abs_tol, label)
    line = f"{name} = {metric['value']:.6g} ({label})"
    if _in_kernel():
        from IPython.display import display

        display({MIME: metric, "text/plain": line}, raw=True)
    else:
        print(line)
    return value


def read_metrics(path: str | os.PathLike) -> dict[str, dict]:
    """The metrics that an executed notebook recorded: name -> {name, value, rel_tol, abs_tol, label}.

    Raises ValueError when the file is not a notebook, a metric is damaged, or two cells recorded the same name.
    """
    try:
        cells = json.loads(Path(path).read_text(encoding="utf-8"))["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        found = [output["data"][MIME] for output in outputs if MIME in output.get("data", {})]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a Jupyter notebook ({type(error).__name__}: {error}).") from error
    metrics: dict[str, dict] = {}
    for metric in found:
        try:
            metric = _metric(**metric)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} has a damaged metric {metric!r}: {error}") from error
        if metric["name"] in metrics:
            raise ValueError(f"{path} records {metric['name']} twice: give each number a name of its own.")
        metrics[metric["name"]] = metric
    return metrics


def _metric(name, value, rel_tol, abs_tol, label) -> dict:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"name = {name!r} is not allowed: it must be lower-case words with dots, as in 'gptq4.kld'.")
    number = _number(value)
    if number is None:
        raise ValueError(f"value = {value!r} of {name} is not allowed: it must be a finite number.")
    for tolerance, given in {"rel_tol": rel_tol, "abs_tol": abs_tol}.items():
        if not (tolerance == "abs_tol" and given is None) and not (_number(given) or 0) > 0:
            raise ValueError(f"{tolerance} = {given!r} of {name} is not allowed: it must be a number above 0.")
    if label not in LABELS:
        raise ValueError(f"label = {label!r} of {name} is not allowed: it must be one of {', '.join(LABELS)}.")
    abs_tol = None if abs_tol is None else _number(abs_tol)
    return {"name": name, "value": number, "rel_tol": _number(rel_tol), "abs_tol": abs_tol, "label": label}


def _number(value) -> float | None:
    """A Python, numpy or 0-d torch number as a finite float, else None. Text and truth values are not numbers."""
    if isinstance(value, bool | str | bytes | None):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return number if math.isfinite(number) else None


def _in_kernel() -> bool:
    """Whether a Jupyter kernel runs this code; plain IPython in a terminal keeps no outputs."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return hasattr(shell, "kernel")
