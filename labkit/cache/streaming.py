"""StreamingLLM: the first few tokens, on which heads without a better use rest their attention, and a sliding window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from labkit.cache.base import CachePolicy
from labkit.method import knob


@dataclass(frozen=True)
class StreamingLLM(CachePolicy):
    """Keep the first tokens (attention sinks) and the newest; positions count places in the shortened cache.

    So no query is ever further from a key than the budget, however long the text. Rotary attention reads nothing but
    distances: instead of turning all newer keys back at each step, the sinks are turned on. How a model turns its keys is
    read from its keys when the method is applied (:mod:`labkit.cache.examine`); a turn that cannot be carried on is a
    ValueError then. Where positions are learned (OPT, GPT-2), what is cached cannot be turned, and true positions stay.
    """

    paper: ClassVar[str] = (
        "Xiao et al., Efficient Streaming Language Models with Attention Sinks, ICLR 2024, section 3.2"
    )
    rerotates: ClassVar[bool] = True
    room: ClassVar[tuple[str, ...]] = ("sinks",)
    why: ClassVar[str] = "the sinks and one token more"

    sinks: int = knob(4, low=0, high=1024, step=1, stops=(0, 1, 2, 4, 8, 16), help="First tokens that always stay.")

    @property
    def least(self) -> int:
        return self.sinks + 1

    def scores(self, step) -> torch.Tensor:
        return step.position.float().masked_fill_(step.position < self.sinks, torch.inf)
