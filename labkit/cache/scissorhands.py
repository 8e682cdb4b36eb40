"""Scissorhands: a token that mattered lately will matter again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from labkit.cache.base import CachePolicy
from labkit.method import knob


@dataclass(frozen=True)
class Scissorhands(CachePolicy):
    """Keep the tokens that drew more than the average attention most often lately, and the newest.

    A query votes for each token that it gives more than 1/t of its attention, t being the tokens it sees; the votes of
    the last ``window`` queries count. Once the budget is exceeded, a share ``drop`` of it is freed at once, fewest votes
    first. Heads that share a KV head vote with their mean.
    """

    paper: ClassVar[str] = (
        "Liu et al., Scissorhands: Exploiting the Persistence of Importance Hypothesis, NeurIPS 2023, algorithms 1 and 2"
    )
    room: ClassVar[tuple[str, ...]] = ("recent",)
    why: ClassVar[str] = "the newest tokens and one more"

    window: int = knob(64, low=1, high=4096, step=1, stops=(16, 32, 64, 128, 400), help="Last queries that vote.")
    recent: int = knob(10, low=0, high=65536, step=1, stops=(0, 10, 32, 64), help="Newest tokens that always stay.")
    drop: float = knob(
        0.5,
        low=0.0,
        high=0.99,
        stops=(0.0, 0.25, 0.5, 0.75),
        help="Share of the budget that is freed at once; 0: one token.",
    )

    @property
    def least(self) -> int:
        return self.recent + 1

    def scores(self, step) -> torch.Tensor:
        attention = step.attention(first=-self.window)
        see = step.visible(first=-self.window)
        seen = attention.shape[-1] if see is None else see.sum(-1, keepdim=True)
        votes = attention * seen > 1
        if step.memory is not None:
            old = step.memory.shape[2] - max(0, self.window - votes.shape[2])
            earlier = step.memory[:, :, max(0, old) :]
            new, (queries, tokens) = votes, earlier.shape[2:]
            votes = new.new_zeros(*new.shape[:2], queries + new.shape[2], new.shape[3])
            votes[:, :, :queries, :tokens] = earlier
            votes[:, :, queries:] = new
        step.memory = votes
        return votes.sum(2).float().masked_fill_(step.recent(self.recent), torch.inf)

    def budgets(self, step, scores: torch.Tensor) -> int | torch.Tensor:
        budget = step.budget
        if isinstance(budget, int) and step.full:
            left = max(self.least, budget - int(budget * self.drop))
            return left if scores.shape[-1] > budget else budget
        budget = torch.as_tensor(budget, device=scores.device)
        left = (budget - (budget * self.drop).long()).clamp(min=self.least)
        return torch.where((step.position >= 0).sum(-1) > budget, left, budget)  # each text by its own length
