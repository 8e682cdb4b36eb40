"""A transformers cache whose layers forget: real removal, the tensors shrink."""

from __future__ import annotations

import copy

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer

from labkit.cache.attend import Step, visible
from labkit.cache.base import CachePolicy
from labkit.cache.examine import PLAIN, Findings
from labkit.cache.rotary import Turning, cos_sin, turn
from labkit.cache.store import Plain, ranked, select, writable


class KVCache(Cache):
    """The cache of one text (or one batch of texts) under cache methods. ``get_seq_length`` counts every token seen.

    Layers of keys and values are a :class:`KVLayer`; what else a model keeps (the state of a recurrence or a convolution)
    is left to transformers. ``whole``: nothing has been evicted before this forward, so that positions and masks are as
    without a policy.
    """

    def __init__(self, methods: tuple, model, found: Findings = PLAIN):
        super().__init__(layers=[])
        self.methods, self.found = methods, found
        self.policy = next((m for m in methods if isinstance(m, CachePolicy)), None)
        self.quantizer = next((m for m in methods if not isinstance(m, CachePolicy)), None)
        self.turning = found.turned(next(model.parameters()).device)  # empty: keys keep the places they were made for
        self.depth = sum(_keeps_keys(state) for state in found.layers) or model.config.num_hidden_layers
        self.layers = self._empty()
        self.whole = True
        self.lengths: torch.Tensor | None = None  # (batch,), tokens of each text so far, padding apart
        self.now: torch.Tensor | None = None  # (batch, new), the places of the new tokens in their text; -1: padding
        self.padded = False  # some of the new tokens are padding
        self.limit: int | torch.Tensor | None = None  # what budget() found after the prompt
        self.seen: list | None = None  # while a model is examined: the masks and queries of its attention
        self.latest: KVLayer | None = None  # that was updated, while its attention is not computed
        self._gap: tuple | None = None

    def _empty(self) -> list:
        """A layer of its kind for each block."""
        layers, rank = [], 0
        for index, state in enumerate(self.found.layers):
            if not _keeps_keys(state):
                layers.append(copy.deepcopy(state))
                continue
            layers.append(KVLayer(self, index, rank) if state is None else KVStateLayer(self, index, rank, state))
            rank += 1
        return layers

    def attending(self) -> KVLayer | None:
        """The layer that was handed keys and whose attention comes now; None: this one reads another layer's keys again."""
        layer, self.latest = self.latest, None
        return layer

    def begin(self, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
        """A forward with new tokens (batch, new, ...) begins. Gives their rotary positions where the model's own do not do."""
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
            raise ValueError("A model under cache methods takes an attention_mask of shape (batch, tokens), or none.")
        batch, new = ids.shape[:2]
        real = torch.ones(batch, new, dtype=torch.bool, device=ids.device) if mask is None else mask[:, -new:].bool()
        if self.lengths is None:
            self.lengths = torch.zeros(batch, dtype=torch.long, device=ids.device)
        order = real.cumsum(1) - 1
        self.now = torch.where(real, self.lengths[:, None] + order, -1).int()
        self.lengths = self.lengths + order[:, -1] + 1
        self.padded = mask is not None and not bool(real.all())
        self.whole = all(layer.whole for layer in self.layers if isinstance(layer, KVLayer))
        return self.now.clamp(min=0) if self.turning else None

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        while len(self.layers) <= layer_idx:
            self.layers.append(KVLayer(self, len(self.layers), len(self.layers)))
        self.latest = self.layers[layer_idx]
        return self.latest.update(key_states, value_states)

    def closed(self, x: torch.Tensor, position: torch.Tensor, turning: Turning) -> torch.Tensor:
        """Turned keys (batch, kv_heads, tokens, width) as if the tokens that are left, (batch, 1, tokens), were all."""
        slots, by, turns = self.gap(position)
        if id(turning) not in turns:
            turns[id(turning)] = cos_sin(by, turning.angles)
        closed = x.clone()
        closed[:, :, slots] = turn(x[:, :, slots], turning, *turns[id(turning)])
        return closed

    def gap(self, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """(slots, by, turns): the slots of tokens (batch, 1, tokens) that gaps lie behind, how many places close these
        gaps, (batch, 1, slots), and the turns that do so, as far as they are known.

        Only distances count in rotary attention: turning the few tokens before a gap is turning all the others back.
        Computed by the first layer of a forward, and the same in the others.
        """
        if self._gap is None or not torch.equal(self._gap[0], position):
            empty = position < 0
            place = position.argsort(-1).argsort(-1) - empty.sum(-1, keepdim=True)  # among the tokens that are left
            evicted = self.lengths[:, None, None] - (~empty).sum(-1, keepdim=True)
            by = (place - position + evicted).masked_fill(empty, 0)
            slots = by.any(1).any(0).nonzero()[:, 0]
            self._gap = position, slots, by[..., slots], {}
        return self._gap[1:]

    def budget(self) -> int | torch.Tensor:
        """Tokens to keep: a number, or (batch, 1) where texts of different lengths keep a share of theirs."""
        if self.limit is None:
            self.limit = self.policy.budget if self.policy.share is None else self._part(self.policy.share)
        return self.limit

    def _part(self, share: float) -> int | torch.Tensor:
        least = self.policy.least
        if self.quantizer is not None and self.policy.at_decode:
            least = max(least, self.quantizer.residual + 1)
        tokens = (share * self.lengths.double()).round().long().clamp(min=least)
        return int(tokens[0]) if bool((tokens == tokens[0]).all()) else tokens[:, None]

    def reorder_cache(self, beam_idx):
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats):
        self.batch_select_indices(
            torch.arange(len(self.lengths), device=self.lengths.device).repeat_interleave(repeats)
        )

    def batch_select_indices(self, indices):
        indices = indices.to(self.lengths.device)
        self.lengths = self.lengths[indices]
        if isinstance(self.limit, torch.Tensor):
            self.limit = self.limit[indices]
        for layer in self.layers:
            layer.batch(indices) if isinstance(layer, KVLayer) else layer.reorder_cache(indices)

    def crop(self, tokens_to_remove):
        super().crop(tokens_to_remove)
        self.lengths = self.lengths - abs(tokens_to_remove)

    def reset(self):
        self.layers, self.lengths, self.limit = self._empty(), None, None


class KVLayer(CacheLayerMixin):
    """Keys and values of one layer, each slot's token, and what the policy remembers of it."""

    supports_early_init = False
    is_sliding = False

    def __init__(self, cache: KVCache, index: int, rank: int):
        self.cache, self.index, self.rank = cache, index, rank  # rank: among the layers that have keys
        self.window = cache.found.windows[index] if cache.found.windows else None  # where the attention does not say
        self.turning = cache.turning[index] if cache.turning else (None, None)  # of keys, of values
        make = cache.quantizer.stores if cache.quantizer is not None else lambda: (Plain(), Plain())
        self.k, self.v = make()
        self.position: torch.Tensor | None = None  # int32 (batch, kv_heads, tokens), -1: empty; only under a policy
        self.memory: torch.Tensor | None = None  # the policy's, (batch, kv_heads, ..., tokens)
        self.seen, self.whole, self.full, self.waiting = 0, True, True, False
        self.shuffled = False  # slots are not in the order of the text, since swap() has filled gaps

    @property
    def is_initialized(self) -> bool:
        return self.seen > 0

    @property
    def keys(self) -> torch.Tensor | None:
        """(batch, kv_heads, tokens, head_dim) as the attention reads them, before any re-rotation."""
        return self.k.read() if self.seen else None

    @property
    def values(self) -> torch.Tensor | None:
        return self.v.read() if self.seen else None

    @property
    def tokens(self) -> int:
        """Slots of each head."""
        return self.k.read().shape[2] if self.position is None else self.position.shape[2]

    def update(self, key_states, value_states, *args, **kwargs):
        if self.waiting:
            raise RuntimeError(
                "A layer's attention was not computed by labkit's function, so its policy saw nothing: leave the model's "
                "attention implementation as it is."
            )
        heads, new = key_states.shape[1:3]
        self.waiting, self.seen = True, self.seen + new
        if self.shuffled and new > 1:
            self._take(self.position.argsort(-1))
        self.k.append(key_states)
        self.v.append(value_states)
        cache = self.cache
        if cache.policy is not None:
            self.position = _longer(self.position, cache.now, heads)
            self.full = self.full and not cache.padded
        return self._closed(self.k.read(), self.turning[0]), self._closed(self.v.read(), self.turning[1])

    def _closed(self, x: torch.Tensor, turning: Turning | None) -> torch.Tensor:
        """Keys as if the tokens that are left were the whole text: those before a gap are turned on, until it is closed."""
        if self.whole or turning is None:
            return x
        return self.cache.closed(x, self.position[:, :1], turning)  # such a policy keeps the same tokens in all heads

    def mask(self, query: torch.Size, window: int | None) -> torch.Tensor | None:
        """bool (batch, heads, new, tokens) for queries of that shape, or None: everything is seen."""
        if query[2] == 1 and self.full and window is None:
            return None
        padding = (self.cache.now < 0)[:, None, :, None]  # must see something too, though nobody reads its output
        see = visible(self.position, self.cache.now, window) | padding
        return see.repeat_interleave(query[1] // see.shape[1], 1)

    def attended(self, query, keys, scaling: float, window: int | None, softcap=None, sinks=None) -> None:
        """The attention is computed: the policy evicts, then what is left is put away. For the arguments see :class:`Step`."""
        self.waiting = False
        cache, policy, prefill = self.cache, self.cache.policy, self.seen == query.shape[2]
        if policy is not None and (policy.at_prefill if prefill else policy.at_decode):
            known = (query, keys, self.position, cache.now, cache.lengths, scaling, window, self.full)
            step = Step(*known, cache.budget(), self.memory, self.rank, cache.depth, softcap, sinks)
            scores = policy.scores(step)
            self.memory = step.memory
            if window is not None and self.seen >= window:  # the next query sees no further back
                gone = self.position <= (cache.lengths[:, None, None] - window)
                self.position, self.full = self.position.masked_fill(gone, -1), False
            if cache.quantizer is not None and not prefill:
                self._settle(None)
                scores = cache.quantizer.protect(scores)
            if not self.full:
                scores = scores.masked_fill(self.position < 0, -torch.inf)
            self._keep(scores, policy.budgets(step, scores))
        self._settle(None if self.whole or self.full else self.position >= 0)

    def _settle(self, alive: torch.Tensor | None) -> None:
        self.k.settle(alive)
        self.v.settle(alive)

    def _keep(self, scores: torch.Tensor, budget: int | torch.Tensor) -> None:
        """Evict all but the ``budget`` best of each head; the order of the rest stays. Empty slots score -infinity."""
        tokens, uneven = scores.shape[-1], isinstance(budget, torch.Tensor)
        most = min(tokens, int(budget.max()) if uneven else budget)
        if tokens == most and not (uneven and int(budget.min()) < tokens):
            return
        plain = isinstance(self.k, Plain) and writable(self.k.x)
        if plain and self.full and not uneven and tokens - most == 1:  # one step of decoding
            self._swap(scores)
            return
        if self.shuffled:
            order = self.position.argsort(-1)
            self._take(order)
            scores = scores.gather(-1, order)
        if uneven:
            slots, order = ranked(scores)[..., :most].sort(-1)
            self._take(slots)
            self.position = self.position.masked_fill(order >= budget[..., None], -1)
        else:
            self._take(select(scores, most))
        self.whole = False
        self.full = not uneven and (self.full or bool((self.position >= 0).all()))

    def _take(self, slots: torch.Tensor) -> None:
        """Keep these slots of each head, (batch, kv_heads, kept), in this order."""
        self.k.take(slots)
        self.v.take(slots)
        self.position = self.position.gather(2, slots)
        if self.memory is not None:
            self.memory = self.memory.gather(-1, _wide(slots, self.memory))
        self.shuffled = False

    def _swap(self, scores: torch.Tensor) -> None:
        """Evict the worst slot of each head, of equal ones the oldest token; the newest token takes its place."""
        better = scores > scores.amin(-1, keepdim=True)
        slot = self.position.masked_fill(better, torch.iinfo(torch.int32).max).argmin(-1, keepdim=True)
        first = torch.arange(0, self.position.numel(), self.position.shape[2], device=slot.device)  # slot of each head
        rows = first + slot.flatten()
        self.k.swap(rows)
        self.v.swap(rows)
        self.position = _swapped(self.position, slot)
        if self.memory is not None:
            self.memory = _swapped(self.memory, _wide(slot, self.memory))
        self.whole, self.shuffled = False, True

    def held(self) -> list[torch.Tensor]:
        """Every tensor that this layer keeps between two forwards."""
        own = (self.position, self.memory)
        return [*self.k.tensors(), *self.v.tensors(), *(t for t in own if t is not None)]

    def batch(self, index: torch.Tensor) -> None:
        for store in (self.k, self.v):
            store.batch(index)
        for name in ("position", "memory"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, value[index])

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens back. Only before anything was evicted or rounded; a policy's memory keeps their traces."""
        if (tokens := abs(tokens_to_remove)) == 0:
            return
        if not self.whole:
            raise ValueError(
                "Tokens have been evicted from this cache, so it cannot be cut back: begin the text again."
            )
        for store in (self.k, self.v):
            store.crop(tokens)
        for name in ("position", "memory"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, value[..., :-tokens])
        self.seen -= tokens

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, key_states, value_states) -> None:
        """Nothing to prepare: the first update brings shapes and device."""


class KVStateLayer(LinearAttentionLayer, KVLayer):
    """A layer that has keys and values and the state of a recurrence beside them, which no method touches."""

    is_compileable = False

    def __init__(self, cache: KVCache, index: int, rank: int, state: LinearAttentionLayer):
        KVLayer.__init__(self, cache, index, rank)
        LinearAttentionLayer.__init__(self, state.number_of_states)

    def batch(self, index: torch.Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, index)
        KVLayer.batch(self, index)

    def held(self) -> list[torch.Tensor]:
        states = (*self.conv_states.values(), *self.recurrent_states.values())
        return [*KVLayer.held(self), *(t for t in states if t is not None)]


def _keeps_keys(state) -> bool:
    """Whether a layer whose state transformers keeps in this, or in keys and values alone (None), has keys."""
    return state is None or isinstance(state, CacheLayerMixin)


def _longer(old: torch.Tensor | None, new: torch.Tensor, heads: int) -> torch.Tensor:
    """(batch, heads, tokens) with (batch, new) more, the same for all heads."""
    new = new[:, None].expand(-1, heads, -1)
    return new if old is None else torch.cat([old, new], 2)


def _swapped(x: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """x (..., tokens) with its last column moved to ``slot`` (..., 1)."""
    return x.scatter(-1, slot, x[..., -1:])[..., :-1]


def _wide(slots: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Slots (batch, kv_heads, n) for a policy's memory, (batch, kv_heads, ..., tokens): the same for all of its rows."""
    return slots if memory.dim() == 3 else slots[:, :, None].expand(-1, -1, memory.shape[2], -1)
