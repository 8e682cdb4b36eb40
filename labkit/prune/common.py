"""What all pruners share: how many weights go, in which pattern, and the mask that keeps the highest scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from labkit.method import Method, knob

SPARSITY = knob(0.5, low=0.0, high=1.0, step=0.05, help="Share of the weights that become zero.")
PATTERN = knob(
    "unstructured",
    form=(r"unstructured|[1-9]\d{0,2}:[1-9]\d{0,2}", "'unstructured', or N:M such as '2:4'"),
    stops=("unstructured", "2:4", "4:8"),
    help="Zeros anywhere, or N:M: of every M neighbours in a row N are kept (N < M <= 256).",
)


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """``"2:4"`` -> (2, 4): keep 2 of each 4 neighbours. ``"unstructured"`` -> None."""
    if pattern == "unstructured":
        return None
    keep, of = map(int, pattern.split(":"))
    return keep, of


@dataclass(frozen=True)
class Pruner(Method):
    """A method that sets weights to zero: so many of them, anywhere or in a pattern that agrees with that number."""

    kind: ClassVar[str] = "prune"
    lossless: ClassVar[dict] = {"sparsity": 0.0}
    lossless_kl: ClassVar[float] = 1e-6

    sparsity: float = SPARSITY
    pattern: str = PATTERN

    def __post_init__(self):
        super().__post_init__()
        name, pattern = type(self).__name__, parse_pattern(self.pattern)
        if not pattern:
            return
        keep, of = pattern
        if not keep < of <= 256:
            allowed = f"{self.knobs()['pattern'].allowed}, with N < M <= 256"
            raise ValueError(f"{name}.pattern = {self.pattern!r} is not allowed: it must be {allowed}.")
        if abs(self.sparsity - (1 - keep / of)) > 1e-6:
            text = f"{keep} of {of} are kept, so sparsity must be {1 - keep / of:g}"
            raise ValueError(f"{name}.sparsity = {self.sparsity:g} contradicts pattern = {self.pattern!r}: {text}.")


def keep_mask(scores: torch.Tensor, sparsity: float, pattern: tuple[int, int] | None, per: str) -> torch.Tensor:
    """True where a weight is kept: the highest ``scores`` (out, in), exactly ``int(sparsity · n)`` of n are not.

    ``per`` "row": every row loses the same number; "matrix": the lowest of the whole matrix go. With an N:M
    ``pattern`` each group of M neighbours keeps its N highest; a shorter last group of r keeps ceil(N·r/M).
    """
    if pattern:
        return nm_mask(scores, *pattern)
    rows = scores if per == "row" else scores.reshape(1, -1)
    count = int(sparsity * rows.shape[1] + 1e-9)
    drop = rows.topk(count, dim=1, largest=False, sorted=False).indices
    keep = torch.ones_like(rows, dtype=torch.bool)
    return keep.scatter_(1, drop, False).view_as(scores)


def nm_mask(scores: torch.Tensor, keep: int, of: int) -> torch.Tensor:
    """The N = ``keep`` highest of each ``of`` = M neighbours along a row, as a mask like ``scores`` (out, in)."""
    rows, columns = scores.shape
    short = -columns % of
    groups = nn.functional.pad(scores, (0, short), value=-torch.inf).view(rows, -1, of)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    mask.scatter_(2, groups.topk(keep, dim=2, sorted=False).indices, True)
    if short:
        fewer = -(-keep * (of - short) // of)
        mask[:, -1] = torch.zeros_like(mask[:, -1]).scatter_(1, groups[:, -1].topk(fewer, dim=1).indices, True)
    return mask.view(rows, -1)[:, :columns]
