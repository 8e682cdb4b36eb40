"""The formats by name: what a method's ``format`` knob offers, and how a saved matrix finds its format again."""

from __future__ import annotations

from dataclasses import fields

import torch

from labkit.formats.affine import Affine
from labkit.formats.base import Encoded, Format
from labkit.formats.integer import Integer
from labkit.formats.mx import MXFP4, MXFP6, MXFP8
from labkit.formats.nf4 import NF4
from labkit.formats.nvfp4 import NVFP4
from labkit.formats.scaled_float import FP4, FP6, Float8

# name -> the class, and those of its settings that the name decides.
FORMATS: dict[str, tuple[type, dict]] = {
    "int": (Integer, {}),
    "nf4": (NF4, {}),
    "fp4": (FP4, {}),
    "mxfp4": (MXFP4, {}),
    "nvfp4": (NVFP4, {}),
    "fp6_e2m3": (FP6, {"variant": "e2m3"}),
    "fp6_e3m2": (FP6, {"variant": "e3m2"}),
    "mxfp6": (MXFP6, {}),
    "fp8_e4m3": (Float8, {"variant": "e4m3"}),
    "fp8_e5m2": (Float8, {"variant": "e5m2"}),
    "mxfp8": (MXFP8, {}),
    "affine": (Affine, {}),
}


def settings(name: str) -> tuple[str, ...]:
    """The settings that :func:`by_name` takes for a format: ``("bits", "group_size", "symmetric")`` for "int"."""
    cls, decided = _find(name)
    return tuple(f.name for f in fields(cls) if f.name not in decided)


def by_name(name: str, **chosen) -> Format:
    """A format by its name: ``by_name("int", bits=3, group_size=64)``, ``by_name("mxfp4")``."""
    cls, decided = _find(name)
    for key, value in chosen.items():
        if key not in settings(name) and not (key in decided and decided[key] == value):
            allowed = ", ".join(settings(name)) or "nothing"
            raise ValueError(f"The format {name!r} has no setting {key!r}: it takes {allowed}.")
    return cls(**decided | chosen)


def restore(spec: dict, tensors: dict[str, torch.Tensor]) -> Encoded:
    """An encoded matrix from its ``spec()`` and its ``tensors()``."""
    chosen = {k: v for k, v in spec.items() if k not in ("format", "shape")}
    return by_name(spec["format"], **chosen).wrap(tensors, tuple(spec["shape"]))


def _find(name: str) -> tuple[type, dict]:
    if name not in FORMATS:
        raise ValueError(f"format = {name!r} is not allowed: it must be one of {', '.join(FORMATS)}.")
    return FORMATS[name]
