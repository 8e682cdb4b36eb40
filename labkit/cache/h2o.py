"""H2O: heavy hitters, the tokens that have drawn the most attention so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from labkit.cache.base import CachePolicy
from labkit.method import knob


@dataclass(frozen=True)
class H2O(CachePolicy):
    """Keep the tokens that have drawn the most attention so far, and the newest; at prefill and at every decode step.

    A token's score is the attention it got from all queries that saw it, prompt included, summed; it goes on growing
    while the token stays. Heads that share a KV head count with their mean.
    """

    paper: ClassVar[str] = (
        "Zhang et al., H2O: Heavy-Hitter Oracle for Efficient Generative Inference, NeurIPS 2023, section 4"
    )
    why: ClassVar[str] = "a heavy hitter and a new token"

    recent: float = knob(
        0.5, low=0.0, high=0.99, stops=(0.0, 0.25, 0.5, 0.75, 0.9), help="Share of the budget for the newest tokens."
    )

    @property
    def least(self) -> int:
        return 2

    def scores(self, step) -> torch.Tensor:
        drawn = step.column_sums()
        if step.memory is not None:
            drawn[..., : step.memory.shape[-1]].add_(step.memory)
        step.memory = drawn
        newest = (step.budget * self.recent) // 1
        return drawn.masked_fill(step.recent(newest), torch.inf)
