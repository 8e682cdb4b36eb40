"""How a layer holds its keys or its values: as they are. :mod:`labkit.cache.kivi` holds them in few bits."""

from __future__ import annotations

import torch


class Plain:
    """Keys or values in the model's own precision, (batch, kv_heads, tokens, head_dim).

    Where heads keep different numbers of tokens, only the tokens that there are lie in memory, one after the other,
    (all tokens of all heads, head_dim); for the attention they are spread out again.
    """

    def __init__(self):
        self.x: torch.Tensor | None = None
        self.spare: torch.Tensor | None = None  # x and one slot more, in the same memory: the next token goes there
        self.alive: torch.Tensor | None = None  # bool (batch, kv_heads, tokens) while the empty slots are left out

    def append(self, new: torch.Tensor) -> None:
        spare, self.spare = self.spare, None
        if spare is not None and new.shape[2] == 1 and writable(spare):
            spare[:, :, -1:] = new
            self.x = spare
        else:
            self.x = new if self.x is None else torch.cat([self.read(), new], 2)
        self.alive = None

    def read(self) -> torch.Tensor:
        if self.alive is None:
            return self.x
        spread = self.x.new_zeros(*self.alive.shape, self.x.shape[-1])
        spread[self.alive] = self.x
        return spread

    def take(self, slots: torch.Tensor) -> None:
        """Keep these slots, (batch, kv_heads, kept): the rest is gone, and its memory free."""
        self.x, self.spare = rows(self.x, slots), None

    def swap(self, rows: torch.Tensor) -> None:
        """Forget one token of each head: the last one moves there, so that nothing else is copied.

        ``rows``: (batch * kv_heads,), where it lies when the tokens of all heads are counted through.
        """
        x = self.x.contiguous()
        x.view(-1, x.shape[-1]).index_copy_(0, rows, x[:, :, -1].flatten(0, 1).clone())
        self.x, self.spare = x[:, :, :-1], x

    def settle(self, alive: torch.Tensor | None) -> None:
        """The forward is over. ``alive``: bool (batch, kv_heads, tokens) where slots are empty, else None."""
        if alive is not None:
            self.x, self.alive = self.x[alive], alive

    def batch(self, index: torch.Tensor) -> None:
        """Reorder, repeat or leave out texts of the batch."""
        self.spare = None
        x, alive = self.read()[index], None if self.alive is None else self.alive[index]
        self.x, self.alive = (x, None) if alive is None else (x[alive], alive)

    def crop(self, tokens: int) -> None:
        self.x = self.x[:, :, :-tokens].clone()

    def tensors(self) -> list[torch.Tensor]:
        return [t for t in (self.x, self.alive) if t is not None]


def writable(x: torch.Tensor) -> bool:
    """Whether a tensor may be changed in place here: no gradient is kept, and inference tensors only in inference mode."""
    return not torch.is_grad_enabled() and (torch.is_inference_mode_enabled() or not x.is_inference())


def rows(x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """x (batch, kv_heads, tokens, width) at slots (batch, kv_heads, kept): whole rows, which is faster than gather."""
    batch, heads, tokens, width = x.shape
    start = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * tokens
    return x.flatten(0, 2).index_select(0, (slots + start).flatten()).view(batch, heads, -1, width)


def select(scores: torch.Tensor, budget: int) -> torch.Tensor:
    """The slots of the ``budget`` highest scores, in ascending order: (batch, kv_heads, tokens) -> (batch, kv_heads, budget).

    Of equal scores the newer token, which is the later slot, stays.
    """
    tokens = scores.shape[-1]
    if tokens - budget == 1:  # one step of decoding
        slots = torch.arange(budget, device=scores.device).expand(*scores.shape[:2], budget)
        return slots + (slots >= scores.argmin(-1, keepdim=True))
    return ranked(scores)[..., :budget].sort(-1).values


def ranked(scores: torch.Tensor) -> torch.Tensor:
    """All slots, best first; of equal scores the later slot first."""
    return scores.shape[-1] - 1 - scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices
