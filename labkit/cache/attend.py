"""The attention function of a model under cache methods, and what a policy sees of it.

transformers lets attention be computed by a function that is registered by name. Ours computes just what torch's
scaled-dot-product attention does; afterwards it shows the layer's queries, keys and positions to the policy.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAMES = {"sdpa": "labkit", "eager": "labkit_eager"}  # of the attention functions, in a model's config
ENTRIES = 1 << 22  # of an attention matrix that are held at a time: 16 MB


def take_over(model, decoder) -> None:
    """Make the decoder of a transformers model compute its attention here, by the kernel that it has now.

    Raises ValueError where it is neither sdpa, nor the eager one of a family that has no sdpa (its own code is run then).
    """
    kernel = decoder.config._attn_implementation
    other = "sdpa" if model._supports_sdpa else "eager"
    if kernel not in (other, *NAMES.values()):
        raise ValueError(
            f"{type(model).__name__} computes its attention with {kernel!r}; cache methods need {other!r}: "
            f"call model.set_attn_implementation({other!r}) first."
        )
    decoder.config._attn_implementation = NAMES.get(kernel, kernel)


def attend(module, query, key, value, attention_mask, scaling=None, kv=None, **kwargs):
    """Attention of one layer. ``kv``: the :class:`labkit.cache.layer.KVCache` of this forward, or None without a cache."""
    return _attend(sdpa_attention_forward, module, query, key, value, attention_mask, scaling, kv, **kwargs)


def attend_eagerly(module, query, key, value, attention_mask, scaling=None, kv=None, **kwargs):
    """The same by the eager code of the model's own family, for what sdpa cannot do: capped logits, learned sinks."""
    own = sys.modules[type(module).__module__].eager_attention_forward
    return _attend(own, module, query, key, value, attention_mask, scaling, kv, **kwargs)


def _attend(compute, module, query, key, value, attention_mask, scaling, kv, **kwargs):
    layer = None if kv is None else kv.attending()
    if kv is not None and kv.seen is not None:
        kv.seen.append((attention_mask, query))
    if layer is not None:
        window = kwargs.get("sliding_window", layer.window)
        if not kv.whole:  # the model's own mask no longer fits the keys that are left
            attention_mask = layer.mask(query.shape, window)
            if attention_mask is not None and compute is not sdpa_attention_forward:  # eager code adds its mask
                see, attention_mask = attention_mask, query.new_zeros(attention_mask.shape)
                attention_mask.masked_fill_(~see, torch.finfo(query.dtype).min)
    if scaling is None and compute is not sdpa_attention_forward:
        scaling = query.shape[-1] ** -0.5
    out = compute(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if layer is not None:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        layer.attended(query, key, scaling, window, kwargs.get("softcap"), kwargs.get("s_aux"))
    return out


for _kernel, _function, _mask in (("sdpa", attend, sdpa_mask), ("eager", attend_eagerly, eager_mask)):
    ALL_ATTENTION_FUNCTIONS.register(NAMES[_kernel], _function)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAMES[_kernel], _mask)


@dataclass
class Step:
    """One forward of one layer, as a policy sees it after its attention.

    ``query``: (batch, heads, new, head_dim). ``keys``: (batch, kv_heads, tokens, head_dim), the new tokens' last; of a
    latent that is kept for all heads together (kv_heads 1), the keys of all heads that are made of it.
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
    depth: int  # layers of the model that have such a cache
    softcap: float | None = None  # the bound that logits are squeezed under
    sinks: torch.Tensor | None = None  # (heads,), a logit that takes attention from all tokens

    def attention(self, first: int = 0, last: int | None = None, upto: int | None = None) -> torch.Tensor:
        """Attention of the new tokens ``first`` to ``last``, mean over the heads of a KV head: (batch, kv_heads, new, tokens).

        In fp32. No query sees a later token; a padding query sees nothing, so its row is 0. ``upto``: leave out the slots
        from there on, which none of these queries sees.
        """
        query, keys = self.query[:, :, first:last].float() * self.scaling, self.keys[:, :, :upto].float()
        (batch, heads, new, width), groups = query.shape, keys.shape[1]
        logits = query.reshape(batch, groups, -1, width) @ keys.transpose(2, 3)
        logits = logits.view(batch, groups, heads // groups, new, -1)
        if self.softcap is not None:
            logits = (logits / self.softcap).tanh_().mul_(self.softcap)
        see = self.visible(first, last, upto)
        if see is not None:
            logits = logits.masked_fill_(~see[:, :, None], -torch.inf)
        if self.sinks is not None:
            sinks = self.sinks.float().view(groups, -1, 1, 1).expand(batch, -1, -1, new, 1)
            logits = torch.cat([logits, sinks], -1)
        given = logits.softmax(-1)
        if see is not None:
            given = given.nan_to_num_(0)
        given = given.mean(2) if self.sinks is None else given[..., :-1].mean(2)
        kv_heads = self.position.shape[1]
        return given if groups == kv_heads else given.unflatten(1, (kv_heads, -1)).mean(2)

    def visible(self, first: int = 0, last: int | None = None, upto: int | None = None) -> torch.Tensor | None:
        """Which tokens each query sees, bool (batch, kv_heads or 1, new, tokens); None: all."""
        if self.full and self.window is None and self.query.shape[2] == 1:
            return None
        return visible(self.position[..., :upto], self.now[:, first:last], self.window)

    def column_sums(self) -> torch.Tensor:
        """Attention that each token gets from all new ones together, (batch, kv_heads, tokens), some rows at a time."""
        (batch, heads, new, _), (kv_heads, tokens) = self.query.shape, self.position.shape[1:]
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
