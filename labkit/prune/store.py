"""What becomes of a pruned weight."""

from __future__ import annotations

import torch

from labkit.method import knob

CONTAINER = knob("auto", choices=("auto", "dense"), help="How zeros are stored.")


def stored(weight: torch.Tensor, pattern, container: str):
    return weight


def stored_codes(weight, mask, form, grid, pattern, container):
    return weight
