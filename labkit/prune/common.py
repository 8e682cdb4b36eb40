"""What all pruners share: how many weights go, in which pattern, and the mask that keeps the highest scores."""

from __future__ import annotations

import torch
from torch import nn

from labkit.method import brief, knob

SPARSITY = knob(0.5, low=0.0, high=1.0, step=0.05, help="Share of the weights that become zero.")
PATTERN = knob(
    "unstructured",
    stops=("unstructured", "2:4", "4:8"),
    help="Zeros anywhere, or N:M: of every M neighbours in a row N are kept.",
)


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """``"2:4"`` -> (2, 4): keep 2 of each 4 neighbours. ``"unstructured"`` -> None. ValueError for anything else."""
    if pattern == "unstructured":
        return None
    keep, _, of = pattern.partition(":")
    if keep.isdecimal() and of.isdecimal() and 0 < int(keep) < int(of) <= 256:
        return int(keep), int(of)
    raise ValueError(
        f"pattern = {brief(pattern)} is not allowed: it must be 'unstructured', or N:M with 0 < N < M <= 256, such as '2:4'."
    )


def check_pattern(method) -> None:
    """Raise a ValueError where a pruner's pattern is none, or contradicts its sparsity."""
    name = type(method).__name__
    try:
        pattern = parse_pattern(method.pattern)
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from None
    if pattern and abs(method.sparsity - (1 - pattern[0] / pattern[1])) > 1e-6:
        text = f"{pattern[0]} of {pattern[1]} are kept, so sparsity must be {1 - pattern[0] / pattern[1]:g}"
        raise ValueError(f"{name}.sparsity = {method.sparsity:g} contradicts pattern = {method.pattern!r}: {text}.")


def keep_mask(scores: torch.Tensor, sparsity: float, pattern: tuple[int, int] | None, per: str) -> torch.Tensor:
    """True where a weight is kept: the highest ``scores`` (out, in), exactly ``int(sparsity · n)`` of n are not.

    ``per`` "row": every row loses the same number; "matrix": the lowest of the whole matrix go. With an N:M
    ``pattern`` each group of M neighbours keeps its N highest; a shorter last group of r keeps ceil(N·r/M).
    """
    if pattern:
        return nm_mask(scores, *pattern)
    rows = scores if per == "row" else scores.reshape(1, -1)
    drop = rows.argsort(dim=1, stable=True)[:, : int(sparsity * rows.shape[1] + 1e-9)]
    keep = torch.ones_like(rows, dtype=torch.bool)
    return keep.scatter_(1, drop, False).view_as(scores)


def nm_mask(scores: torch.Tensor, keep: int, of: int) -> torch.Tensor:
    """The N = ``keep`` highest of each ``of`` = M neighbours along a row, as a mask like ``scores`` (out, in)."""
    rows, columns = scores.shape
    short = -columns % of
    groups = nn.functional.pad(scores, (0, short), value=-torch.inf).view(rows, -1, of)
    rank = groups.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
    mask = rank < keep
    if short:
        mask[:, -1] = rank[:, -1] < -(-keep * (of - short) // of)
    return mask.view(rows, -1)[:, :columns]
