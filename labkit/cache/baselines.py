"""The two policies that every claim about eviction is measured against: keep the newest tokens, keep any tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from labkit.cache.base import CachePolicy
from labkit.method import knob

WORD = 0xFFFFFFFF  # 32 bits


@dataclass(frozen=True)
class RecentKV(CachePolicy):
    """Keep the newest tokens of the KV cache: a sliding window, the baseline without sinks.

    Keys keep their true positions; between a query and the newest tokens the distances are the same either way.
    """

    paper: ClassVar[str] = "the window attention of Xiao et al., StreamingLLM, ICLR 2024, figure 1b"

    def scores(self, step) -> torch.Tensor:
        return step.position.float()


@dataclass(frozen=True)
class RandomKV(CachePolicy):
    """Keep a random choice of tokens in the KV cache, with the newest: the baseline of chance.

    Each token draws a lot when it comes, one per layer and head, and the highest lots stay: at any time what is kept is
    a uniform sample of all that was seen. A lot depends on the seed and on the token's place in its own text alone.
    """

    paper: ClassVar[str] = "reservoir sampling: Vitter, Random Sampling with a Reservoir, ACM TOMS 1985"
    room: ClassVar[tuple[str, ...]] = ("recent",)
    why: ClassVar[str] = "the newest tokens and one more"

    recent: int = knob(32, low=0, high=65536, step=1, stops=(0, 8, 32, 64), help="Newest tokens that are always kept.")
    seed: int = knob(0, low=0, high=1_000_000, stops=tuple(range(10)), help="Which lots are drawn.")

    @property
    def least(self) -> int:
        return self.recent + 1

    def scores(self, step) -> torch.Tensor:
        heads = torch.arange(step.position.shape[1], device=step.position.device)[:, None]
        held = 0 if step.memory is None else step.memory.shape[-1]  # these have drawn theirs
        lots = lot(step.position[..., held:].long(), heads, step.layer, self.seed)
        step.memory = lots if held == 0 else torch.cat([step.memory, lots], -1)
        return step.memory.masked_fill(step.recent(self.recent), torch.inf)


def lot(position: torch.Tensor, head: torch.Tensor, layer: int, seed: int) -> torch.Tensor:
    """A number in [0, 1) for each token, fp32: the same one whenever the same arguments are given."""
    word = position & WORD
    for part in (head + 1, layer + 1, seed + 1):
        word = ((word ^ (word >> 16)) * 0x45D9F3B + part * 0x9E3779B1) & WORD
    for _ in range(2):
        word = ((word ^ (word >> 16)) * 0x45D9F3B) & WORD
    return ((word ^ (word >> 16)) & 0xFFFFFF).float() / (1 << 24)
