"""Multi-head latent attention: one short vector per token is cached, from which every head makes its keys and values.

DeepSeek-V2, arXiv:2405.04434, section 2.1. A token's keys and values come from a latent vector c = W_DKV h of, say, 512
numbers: k_i = W_UK_i c and v_i = W_UV_i c for head i. Only c is cached, and beside it one rotary key of 64 numbers for all
heads, since a key that is turned by its position could not be taken apart as below.

Plain decoding makes the keys and values of all tokens again at each step. Absorbed decoding never makes them: q_i · W_UK_i c
= (W_UK_iᵀ q_i) · c, so the query goes into the latent space once, and what the head reads there, Σ a_t c_t, is taken out
by W_UV_i once. All heads then read the same c: to the memory it is attention with a single KV head.
"""

from __future__ import annotations

import torch
from torch import nn


class MultiHeadLatentAttention(nn.Module):
    """One layer. ``hidden``: width of the model; ``latent``: of what is cached; ``rope``: of the rotary part, even.

    The query is not compressed, as in DeepSeek-V2-Lite (the larger models put a second latent there, to save weights).
    """

    def __init__(self, hidden: int, heads: int, head_dim: int, latent: int, rope: int, theta: float = 10_000.0):
        super().__init__()
        self.heads, self.head_dim, self.latent, self.rope = heads, head_dim, latent, rope
        self.q = nn.Linear(hidden, heads * (head_dim + rope), bias=False)
        self.down = nn.Linear(hidden, latent + rope, bias=False)  # W_DKV and W_KR in one
        self.norm = nn.RMSNorm(latent, eps=1e-6)
        self.up_key = nn.Parameter(torch.randn(heads, head_dim, latent) * latent**-0.5)  # W_UK
        self.up_value = nn.Parameter(torch.randn(heads, head_dim, latent) * latent**-0.5)  # W_UV
        self.o = nn.Linear(heads * head_dim, hidden, bias=False)
        self.scale = (head_dim + rope) ** -0.5
        self.theta = theta

    def forward(self, x: torch.Tensor, cache: torch.Tensor | None = None, absorbed: bool = False):
        """x (batch, new, hidden) after what is cached -> (output of the same shape, the cache with the new tokens).

        ``cache``: (batch, tokens, latent + rope), all that is kept of a text; None at its beginning.
        """
        query, rotary_query, new = self.project(x, 0 if cache is None else cache.shape[1])
        cache = new if cache is None else torch.cat([cache, new], 1)
        c, rotary_key = cache.split([self.latent, self.rope], -1)  # (b, t, latent), (b, t, rope)
        attend = self.absorbed if absorbed else self.plain
        position = rotary_query @ rotary_key.transpose(1, 2)[:, None]  # (b, heads, new, t)
        out = attend(query, position, c)  # (b, heads, new, head_dim)
        return self.o(out.transpose(1, 2).flatten(2)), cache

    def project(self, x: torch.Tensor, start: int):
        """Queries (b, heads, new, head_dim), their rotary part (b, heads, new, rope); to cache: (b, new, latent + rope)."""
        query = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        query, rotary_query = query.split([self.head_dim, self.rope], -1)
        c, rotary_key = self.down(x).split([self.latent, self.rope], -1)
        position = torch.arange(start, start + x.shape[1], device=x.device)
        new = torch.cat([self.norm(c), self.turn(rotary_key, position)], -1)
        return query, self.turn(rotary_query, position), new

    def plain(self, query: torch.Tensor, position: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Keys and values of all tokens are made first: tokens * latent * head_dim multiplies per head, twice."""
        keys = torch.einsum("btl,hdl->bhtd", c, self.up_key)
        values = torch.einsum("btl,hdl->bhtd", c, self.up_value)
        return self.weights(query @ keys.transpose(2, 3) + position) @ values

    def absorbed(self, query: torch.Tensor, position: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """The same, without a key or a value ever being made: heads look at the latent vectors themselves."""
        query = torch.einsum("bhnd,hdl->bhnl", query, self.up_key)
        read = self.weights(query @ c.transpose(1, 2)[:, None] + position) @ c[:, None]  # (b, heads, new, latent)
        return torch.einsum("bhnl,hdl->bhnd", read, self.up_value)

    def weights(self, logits: torch.Tensor) -> torch.Tensor:
        """Causal softmax of (b, heads, new, tokens), whose last ``new`` tokens are the queries' own."""
        new, tokens = logits.shape[-2:]
        later = torch.ones(new, tokens, dtype=torch.bool, device=logits.device).triu(tokens - new + 1)
        return (logits * self.scale).masked_fill(later, -torch.inf).softmax(-1)

    def turn(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of x (..., new, rope): halves are turned against each other by position * theta^(-2i / rope)."""
        speed = self.theta ** (-torch.arange(0, self.rope, 2, device=x.device, dtype=torch.float64) / self.rope)
        angle = position[:, None] * speed
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
