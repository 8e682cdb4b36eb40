"""KIVI: keys and values in 2, 4 or 8 bits, really packed; the newest tokens in full precision.

A few channels of the keys are large for every token. A group that spans the channels of one token is stretched by them;
a group of tokens within one channel is not. Values have no such channels and are grouped within each token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from labkit.cache.base import MOST, CacheMethod, CachePolicy
from labkit.cache.store import rows
from labkit.formats.affine import Affine
from labkit.formats.pack import pack, unpack
from labkit.method import knob


@dataclass(frozen=True)
class KIVI(CacheMethod):
    """Keep the KV cache in 2, 4 or 8 bits: keys in groups of tokens per channel, values in groups of channels per token.

    Codes are packed; each group has an fp16 scale and minimum. The newest ``residual`` values stay in full precision;
    so do keys, until ``residual`` of them can be rounded at once (section 3.3: between 0 and residual - 1 wait). Attention
    over a prompt uses unrounded keys and values; later queries read what is stored. In a batch, padding is rounded with
    the tokens whose group it shares.
    """

    paper: ClassVar[str] = (
        "Liu et al., KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, ICML 2024, section 3"
    )
    lossless: ClassVar[dict] = {"bits": 8, "residual": MOST // 32 * 32}

    bits: int = knob(4, choices=(2, 4, 8), help="Bits per code.")
    group_size: int = knob(
        32, low=8, high=4096, step=8, stops=(16, 32, 64, 128), help="Numbers that share a scale and a minimum."
    )
    residual: int = knob(
        128, low=0, high=MOST, step=32, stops=(0, 32, 64, 128, 256), help="Newest tokens kept in full precision."
    )
    keys: str = knob(
        "channel", choices=("channel", "token"), help="Whether a group of keys lies along tokens or channels."
    )

    def __post_init__(self):
        super().__post_init__()
        if self.keys == "channel" and (self.residual == 0 or self.residual % self.group_size):
            knobs = self.knobs()
            raise ValueError(
                f"KIVI.residual = {self.residual} is not allowed with group_size = {self.group_size} and keys = 'channel': "
                f"it must be {knobs['residual'].allowed}, and a multiple of group_size ({knobs['group_size'].allowed})."
            )

    def stores(self) -> tuple[Rounded, Rounded]:
        """For the keys and for the values of one layer."""
        form = Affine(self.bits, self.group_size)
        return Rounded(form, self.residual, self.keys == "channel"), Rounded(form, self.residual, False)

    def keeps(self, prompt: int) -> int:
        return self.residual

    def check_policy(self, policy: CachePolicy) -> None:
        """Rounded keys that share a group of tokens cannot be evicted one by one, and the newest tokens are never evicted."""
        name = type(policy).__name__
        if policy.at_decode and self.keys == "channel":
            raise ValueError(
                f"{name} evicts single tokens while decoding, but keys = 'channel' rounds groups of {self.group_size} "
                "tokens together: use KIVI(keys='token'), or a policy that acts on the prompt only, such as SnapKV."
            )
        if policy.at_decode and policy.share is None and policy.budget <= self.residual:
            raise ValueError(
                f"{name}.budget = {policy.budget} is not allowed with KIVI.residual = {self.residual}: it must be larger, "
                "for the newest tokens are never evicted."
            )

    def protect(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores under which the tokens in full precision stay."""
        if self.residual == 0:
            return scores
        newest = torch.full_like(scores[..., -self.residual :], torch.inf)
        return torch.cat([scores[..., : -self.residual], newest], -1)


class Rounded:
    """Keys or values of one layer: packed codes of the older tokens, then the newest in full precision.

    ``by_channel``: a group is ``group_size`` tokens of one channel, else ``group_size`` channels of one token (a last
    group that does not come out even is shorter).
    """

    def __init__(self, form: Affine, residual: int, by_channel: bool):
        self.form, self.residual, self.by_channel = form, residual, by_channel
        self.codes: torch.Tensor | None = None  # uint8 (batch, kv_heads, rounded, ceil(head_dim * bits / 8))
        self.scale: torch.Tensor | None = None  # fp16 (batch, kv_heads, rounded, groups), or (…, groups, head_dim)
        self.low: torch.Tensor | None = None
        self.new: torch.Tensor | None = None  # (batch, kv_heads, tokens, head_dim)

    def append(self, new: torch.Tensor) -> None:
        self.new = new if self.new is None else torch.cat([self.new, new], 2)

    def read(self) -> torch.Tensor:
        if self.codes is None:
            return self.new
        batch, heads, tokens, _ = self.codes.shape
        width = self.new.shape[-1]
        codes = unpack(self.codes.flatten(0, 2), self.form.bits, width).view(batch, heads, tokens, width)
        old = self._ungrouped(self.form.dequantize(self._grouped(codes), (self.scale.float(), self.low.float())), width)
        return torch.cat([old.to(self.new.dtype), self.new], 2)

    def settle(self, alive: torch.Tensor | None) -> None:
        """Round what does not fit into the residual window. (Empty slots are rounded and held like others.)"""
        waiting = self.new.shape[2]
        count = waiting // self.residual * self.residual if self.by_channel else waiting - self.residual
        if count <= 0:
            return
        groups = self._grouped(self.new[:, :, :count].float())
        scale, low = params = self.form.fit(groups)
        codes = self._ungrouped(self.form.quantize(groups, params), self.new.shape[-1])
        packed = pack(codes.flatten(0, 2), self.form.bits).view(*codes.shape[:3], -1)
        made = {"codes": packed, "scale": scale.to(torch.float16), "low": low.to(torch.float16)}
        for name, tensor in made.items():
            old = getattr(self, name)
            setattr(self, name, tensor if old is None else torch.cat([old, tensor], 2))
        self.new = self.new[:, :, count:].clone()  # a view would keep all of them in memory

    def _grouped(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, kv_heads, tokens, head_dim) with the group as its last dimension."""
        size = self.form.group_size
        if self.by_channel:
            return x.unflatten(2, (-1, size)).transpose(3, 4)
        missing = -x.shape[-1] % size
        return torch.cat([x, x[..., -1:].expand(*x.shape[:3], missing)], -1).unflatten(3, (-1, size))

    def _ungrouped(self, groups: torch.Tensor, width: int) -> torch.Tensor:
        if self.by_channel:
            return groups.transpose(3, 4).flatten(2, 3)
        return groups.flatten(3)[..., :width].contiguous()

    def take(self, slots: torch.Tensor) -> None:
        """Keep these slots, (batch, kv_heads, kept). Once tokens are rounded, only rounded ones are evicted."""
        if self.codes is None:
            self.new = rows(self.new, slots)
            return
        old = slots[..., : slots.shape[-1] - self.new.shape[2]]
        for name in ("codes", "scale", "low"):
            setattr(self, name, rows(getattr(self, name), old))

    def batch(self, index: torch.Tensor) -> None:
        for name in ("codes", "scale", "low", "new"):
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, tensor[index])

    def crop(self, tokens: int) -> None:
        rounded = tokens - self.new.shape[2]
        if rounded > 0 and self.by_channel:
            raise ValueError("Tokens to take back are rounded already, in groups: begin the text again.")
        if rounded > 0:
            for name in ("codes", "scale", "low"):
                setattr(self, name, getattr(self, name)[:, :, :-rounded].clone())
        self.new = self.new[:, :, : max(self.new.shape[2] - tokens, 0)].clone()

    def tensors(self) -> list[torch.Tensor]:
        return [t for t in (self.codes, self.scale, self.low, self.new) if t is not None]
