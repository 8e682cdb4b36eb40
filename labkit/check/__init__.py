"""The exercises of the notebooks: ``labkit.check.<exercise>(answer)`` says whether an answer is right, and why.

Each file here holds the exercises of one notebook, and a new file is all that a new notebook adds. They are imported
when the first exercise is asked for. The truth is computed from the model and the machine, the answer is never told.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil


@functools.cache
def _exercises() -> dict:
    """Every exercise of every file here, by name."""
    found: dict = {}
    for file in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{file.name}")
        for name, value in vars(module).items():
            if getattr(value, "exercise", False) and value.__module__ == module.__name__:
                if name in found:
                    raise RuntimeError(f"Two exercises are called {name}: {found[name].__module__}, {module.__name__}.")
                found[name] = value
    return found


def __dir__() -> list[str]:
    return sorted(_exercises())


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _exercises():
        raise AttributeError(f"There is no exercise {name!r}. There are: {', '.join(__dir__())}.")
    return _exercises()[name]
