"""Fewer KV heads: what GQA does in training, done to a trained model by pooling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from labkit.cache.base import check_weights
from labkit.linear import STORED
from labkit.method import Method, knob
from labkit.walk import blocks, weight_of


@dataclass(frozen=True)
class FewerKVHeads(Method):
    """Merge KV heads into fewer: the heads of each group become their mean, and more query heads share them.

    The cache shrinks in proportion, and so do the matrices that make keys and values. The paper trains the merged model
    on, with 5 % of the original compute; without that, heads that learned different things are averaged away.
    """

    kind: ClassVar[str] = "cache"
    paper: ClassVar[str] = "Ainslie et al., GQA, EMNLP 2023, section 2.1"
    lossless: ClassVar[dict] = {"kv_heads": 3}  # as many as the embedded model has

    kv_heads: int = knob(
        1, low=1, high=1024, stops=(1, 3), help="KV heads of each layer afterwards; it must divide what the model has."
    )
    pool: str = knob(
        "mean", choices=("mean", "first"), help="A group's new head: the mean of its heads, or the first of them."
    )

    def apply(self, lm, calib, progress: bool) -> None:
        check_weights(lm.model)
        for index, block in enumerate(blocks(lm.model)):
            attention = next((m for m in block.modules() if hasattr(m, "k_proj") and hasattr(m, "v_proj")), None)
            if not hasattr(attention, "num_key_value_groups"):
                raise ValueError(f"{type(lm.model).__name__} has no KV heads that several query heads could share.")
            before = attention.k_proj.out_features // attention.head_dim
            if before % self.kv_heads:
                raise ValueError(
                    f"FewerKVHeads.kv_heads = {self.kv_heads} is not allowed for {lm.name}, block {index}: "
                    f"it must divide its {before} KV heads."
                )
            if before != self.kv_heads:
                for name in ("k_proj", "v_proj"):
                    setattr(attention, name, self.pooled(getattr(attention, name), attention.head_dim))
                attention.num_key_value_groups *= before // self.kv_heads
        lm.model.config.get_text_config().num_key_value_heads = self.kv_heads

    def pooled(self, linear: nn.Module, head_dim: int) -> nn.Linear:
        """A dense linear with ``kv_heads * head_dim`` rows in place of all heads' rows."""
        weight = weight_of(linear)
        dtype = linear.dtype if isinstance(linear, STORED) else weight.dtype

        def pool(rows: torch.Tensor) -> torch.Tensor:  # (heads * head_dim, ...)
            groups = rows.detach().float().unflatten(0, (self.kv_heads, -1, head_dim))
            one = groups.mean(1) if self.pool == "mean" else groups[:, 0]
            return one.flatten(0, 1).to(dtype)

        made = nn.Linear(linear.in_features, self.kv_heads * head_dim, bias=False, device="meta")
        made.weight = nn.Parameter(pool(weight), requires_grad=False)
        if linear.bias is not None:
            made.bias = nn.Parameter(pool(linear.bias), requires_grad=False)
        return made
