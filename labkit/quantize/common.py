"""The knobs that all quantizers share, and the number format they choose."""

from __future__ import annotations

import torch

from labkit import formats
from labkit.method import knob

BITS = knob(4, low=2, high=8, help="Bits per weight code.")
GROUP_SIZE = knob(
    64,
    low=8,
    high=65536,
    stops=(32, 64, 128, None),
    none="per row",
    help="Columns of a row that share a scale. A last group that does not come out even is shorter.",
)
SYMMETRIC = knob(False, help="Put zero in the middle of the grid, and store no zero point.")
FORMAT = knob(
    "int",
    choices=tuple(formats.FORMATS),
    help="How numbers are written. Formats other than int have their own width and groups: bits and the rest do not count.",
)


def format_of(method) -> formats.Format:
    """The number format that a method's knobs describe."""
    taken = set(formats.settings(method.format)) & {"bits", "group_size", "symmetric"}
    return formats.by_name(method.format, **{name: getattr(method, name) for name in taken})


def rounded(weight: torch.Tensor, form: formats.Format) -> torch.Tensor:
    """The weight (out, in) as the format would give it back."""
    groups = form.groups(weight)
    return form.round(groups, form.fit(groups)).reshape(len(weight), -1)[:, : weight.shape[1]]
