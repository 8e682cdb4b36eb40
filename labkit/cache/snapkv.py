"""SnapKV: what the end of the prompt looks at is what the answer will need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import avg_pool1d

from labkit.cache.base import CachePolicy
from labkit.cache.store import ranked
from labkit.method import knob


@dataclass(frozen=True)
class SnapKV(CachePolicy):
    """Keep the prompt's tokens that its last ones (the observation window) attend to, with their neighbours.

    Acts once, after the prompt; every token generated later stays. Attention of the window's queries is summed, pooled
    over ``kernel`` neighbouring tokens, and each KV head keeps its own best; the window itself always stays.

    Query heads that share a KV head vote together: their attention is averaged, as in kvpress and in Ada-KV's code. The
    authors' own code repeats keys and values first, so that each query head keeps tokens of its own; with grouped
    heads, as here three to one, that would hold the shared keys up to three times.
    """

    paper: ClassVar[str] = (
        "Li et al., SnapKV: LLM Knows What You are Looking for Before Generation, NeurIPS 2024, section 4"
    )
    at_decode: ClassVar[bool] = False
    room: ClassVar[tuple[str, ...]] = ("window",)
    why: ClassVar[str] = "the observation window and one token more"

    window: int = knob(
        32, low=1, high=65536, step=1, stops=(8, 16, 32, 64), help="Last queries of the prompt that vote."
    )
    kernel: int = knob(
        7,
        low=1,
        high=63,
        step=1,
        stops=(1, 3, 5, 7, 9),
        help="Neighbours, an odd number, that share their votes.",
    )

    layers: str = knob(
        "uniform",
        choices=("uniform", "pyramid"),
        help="One budget for all layers, or more for the first and less for the last (PyramidKV), the same in total.",
    )
    heads: str = knob(
        "uniform",
        choices=("uniform", "adaptive"),
        help="One budget for all KV heads of a layer, or more where votes are spread wide (Ada-KV), the same in total.",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.kernel % 2 == 0:
            allowed = self.knobs()["kernel"].allowed
            raise ValueError(f"SnapKV.kernel = {self.kernel} is not allowed: it must be {allowed}, and odd.")

    @property
    def least(self) -> int:
        return self.window + 1

    def scores(self, step) -> torch.Tensor:
        looked_at = step.attention(first=-self.window).sum(2)  # (batch, kv_heads, tokens)
        before = looked_at[..., : -self.window]
        if before.shape[-1]:
            before = avg_pool1d(before, self.kernel, stride=1, padding=self.kernel // 2)
        return torch.cat([before, torch.full_like(looked_at[..., -self.window :], torch.inf)], -1)

    def budgets(self, step, scores: torch.Tensor) -> int | torch.Tensor:
        budget = step.budget
        if self.layers == "pyramid":
            budget = self.window + pyramid(budget - self.window, step.layer, step.depth)
        if self.heads == "adaptive":
            return self.window + adaptive(scores, budget - self.window)
        return budget


def pyramid(tokens: int | torch.Tensor, layer: int, depth: int, beta: int = 20) -> int | torch.Tensor:
    """A layer's part of ``tokens`` per layer, falling in equal steps; the last layer has a ``beta``-th of the mean.

    Cai et al., PyramidKV, COLM 2025, section 4 (beta from the authors' code). The parts of all layers sum to depth * tokens.
    """

    def up_to(end: int) -> float:  # the first layers' sum, for a mean of 1
        last = 1 / beta
        first = 2 - last
        return end * first - (first - last) / max(depth - 1, 1) * end * (end - 1) / 2 if depth > 1 else end

    part = (tokens * up_to(layer + 1) + 0.5) // 1 - (tokens * up_to(layer) + 0.5) // 1
    return part.long() if isinstance(part, torch.Tensor) else int(part)


def adaptive(scores: torch.Tensor, tokens: int | torch.Tensor, even: float = 0.2) -> torch.Tensor:
    """Tokens for each head, (batch, kv_heads), whose sum is kv_heads * tokens: more where a head has more of the best scores.

    Scores of infinity count apart. A head gets (1 - even) times its number of the kv_heads * tokens best scores of the
    layer, and ``even`` times ``tokens`` whatever its scores. Feng et al., Ada-KV, NeurIPS 2025, algorithm 1, with the
    even part as in the authors' code, 0.2 as in their runs with grouped heads. They round each head for itself; here
    the heads with the largest fractions are rounded up, so that the sum is exact. (kvpress protects the best 20 % of
    each head and lets the rest compete.) A text with fewer tokens keeps what it has.
    """
    batch, heads, _ = scores.shape
    tokens = torch.as_tensor(tokens, device=scores.device).expand(batch, 1)
    scores = scores.masked_fill(scores == torch.inf, -torch.inf)
    there = (scores > -torch.inf).sum(-1)
    rank = ranked(scores.flatten(1)[:, None]).argsort(-1).view(scores.shape)  # 0: the layer's best
    best = torch.minimum((rank < heads * tokens[..., None]).sum(-1), there)
    return torch.minimum(_rounded((1 - even) * best.double() + even * tokens), there)


def _rounded(parts: torch.Tensor) -> torch.Tensor:
    """Whole numbers (batch, heads) with the same sum as ``parts``: down, and up where the fractions are largest."""
    down = (parts + 1e-9).floor()
    left = (parts.sum(-1, keepdim=True) - down.sum(-1, keepdim=True)).round()
    place = (parts - down).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return (down + (place < left)).long()
