"""The attention function of a model under cache methods, and what a policy sees of it.

transformers lets attention be computed by a function that is registered by name. Ours computes just what torch's
scaled-dot-product attention does; afterwards it shows the layer's queries, keys and positions to the policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "labkit"  # of the attention function, in a model's config
ENTRIES = 1 << 22  # of an attention matrix that are held at a time: 16 MB


def take_over(model) -> None:
    """Make a transformers model compute its attention here. Raises ValueError where it uses another kernel than sdpa."""
    kernel = model.config._attn_implementation
    if kernel not in ("sdpa", NAME):
        raise ValueError(
            f"{type(model).__name__} computes its attention with {kernel!r}; cache methods need 'sdpa': "
            "call model.set_attn_implementation('sdpa') first."
        )
    model.config._attn_implementation = NAME


def attend(module, query, key, value, attention_mask, scaling=None, kv=None, **kwargs):
    """Attention of one layer. ``kv``: the :class:`labkit.cache.layer.KVCache` of this forward, or None without a cache."""
    layer = None if kv is None else kv.layers[module.layer_idx]
    window = kwargs.get("sliding_window")
    if layer is not None and not kv.whole:  # the model's own mask no longer fits the keys that are left
        attention_mask = layer.mask(query.shape, window)
    out = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if layer is not None:
        layer.attended(query, key, query.shape[-1] ** -0.5 if scaling is None else scaling, window)
    return out


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)


@dataclass
class Step:
    """One forward of one layer, as a policy sees it after its attention.

    ``query``: (batch, heads, new, head_dim). ``keys``: (batch, kv_heads, tokens, head_dim), the new tokens' last.
    ``position``: (batch, kv_heads, tokens), each token's place in its own text, -1 for padding and empty slots.
    ``now``: (batch, new), the places of the new tokens. ``lengths``: (batch,), tokens of each text so far.
    ``budget``: tokens to keep, a number or (batch, 1). ``memory``: what the policy wrote here the last time, with its
    last dimension cut to the tokens that were kept; None at first.
    """

    query: torch.Tensor
    keys: torch.Tensor
    position: torch.Tensor
    now: torch.Tensor
    lengths: torch.Tensor
    scaling: float
    window: int | None  # tokens that a query of this layer sees, itself included; None: all
    full: bool  # no slot is empty and no token is padding
    budget: int | torch.Tensor
    memory: Any
    layer: int
    depth: int  # layers of the model

    def attention(self, first: int = 0, last: int | None = None, upto: int | None = None) -> torch.Tensor:
        """Attention of the new tokens ``first`` to ``last``, mean over the heads of a KV group: (batch, kv_heads, new, tokens).

        In fp32. No query sees a later token; a padding query sees nothing, so its row is 0. ``upto``: leave out the slots
        from there on, which none of these queries sees.
        """
        query, keys = self.query[:, :, first:last].float() * self.scaling, self.keys[:, :, :upto].float()
        (batch, heads, new, width), kv_heads = query.shape, keys.shape[1]
        logits = query.reshape(batch, kv_heads, -1, width) @ keys.transpose(2, 3)
        logits = logits.view(batch, kv_heads, heads // kv_heads, new, -1)
        see = self.visible(first, last, upto)
        if see is None:
            return logits.softmax(-1).mean(2)
        return logits.masked_fill_(~see[:, :, None], -torch.inf).softmax(-1).nan_to_num_(0).mean(2)

    def visible(self, first: int = 0, last: int | None = None, upto: int | None = None) -> torch.Tensor | None:
        """Which tokens each query sees, bool (batch, kv_heads or 1, new, tokens); None: all."""
        if self.full and self.window is None and self.query.shape[2] == 1:
            return None
        return visible(self.position[..., :upto], self.now[:, first:last], self.window)

    def column_sums(self) -> torch.Tensor:
        """Attention that each token gets from all new ones together, (batch, kv_heads, tokens), some rows at a time."""
        (batch, heads, new, _), (kv_heads, tokens) = self.query.shape, self.keys.shape[1:3]
        if new == 1:
            return self.attention()[:, :, 0]
        drawn = torch.zeros(batch, kv_heads, tokens, device=self.keys.device)
        rows = max(1, ENTRIES // (batch * heads * tokens))
        for first in range(0, new, rows):
            last = min(first + rows, new)
            upto = (
                tokens - new + last
            )  # the new tokens lie last, in order: slots from there on are in these rows' future
            drawn[..., :upto] += self.attention(first, last, upto).sum(2)
        return drawn

    def recent(self, tokens: int | torch.Tensor) -> torch.Tensor:
        """Which tokens are among the last ``tokens`` of their text, bool (batch, kv_heads, tokens)."""
        return self.position >= (self.lengths[:, None] - tokens)[..., None]


def visible(position: torch.Tensor, now: torch.Tensor, window: int | None) -> torch.Tensor:
    """bool (batch, kv_heads, new, tokens): the slot holds a token that is not later than the query, nor out of its window."""
    position, now = position[:, :, None], now[:, None, :, None]
    see = (position >= 0) & (position <= now)
    return see if window is None else see & (now - position < window)
