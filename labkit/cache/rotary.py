"""How a model turns its keys, read from the keys themselves, and turning them from one rotary position to another.

One token without any before it has the same key in every layer wherever it stands, but for the turn that its place gives
it. So the keys of one token at several places show the turn and nothing else: which channels are a pair, which way and how
fast each pair goes, and what is not turned at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

CLOSE = 0.05  # of a channel's size: what rounding to 16 bits or 8-bit activations may do, far below a wrong turn
DEPENDENT = ("dynamic", "longrope")  # rotary embeddings whose angles change with the length of the text


@dataclass(frozen=True, eq=False)
class Turning:
    """How the last dimension of keys is turned: channels ``first[i]`` and ``second[i]`` by ``angles[i]`` per position.

    ``angles``: fp32 (pairs,); below 0 the pair turns backwards. Channels in neither slice are not turned.
    """

    angles: torch.Tensor
    first: slice
    second: slice

    def to(self, device: torch.device) -> Turning:
        return self if self.angles.device == device else Turning(self.angles.to(device), self.first, self.second)


def cos_sin(by: torch.Tensor, angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, (..., tokens, pairs), of turning ``by`` (..., tokens) positions."""
    turned = by[..., None].float() * angles
    return turned.cos(), turned.sin()


def turn(keys: torch.Tensor, turning: Turning, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Keys (..., tokens, width), already turned, turned on; cos and sin are :func:`cos_sin`'s.

    Turning by a and then by b is turning by a + b.
    """
    first, second = keys[..., turning.first].float(), keys[..., turning.second].float()
    turned = keys.clone()
    turned[..., turning.first] = (first * cos).addcmul_(second, sin, value=-1)
    turned[..., turning.second] = (second * cos).addcmul_(first, sin)
    return turned


def frequencies(model) -> list[torch.Tensor]:
    """The different sets of angles per position, (pairs,) each, that a model's rotary embeddings hold.

    Raises ValueError where they depend on the length of the text: no key could then be moved to another place.
    """
    found: list[torch.Tensor] = []
    for module in model.modules():
        held = dict(module.named_buffers(recurse=False)) | {n: t for n, t in vars(module).items() if torch.is_tensor(t)}
        for name, angles in held.items():
            if not name.endswith("inv_freq") or angles.dim() != 1:
                continue
            kind = getattr(module, "rope_type", "default")
            kinds = kind.values() if isinstance(kind, dict) else [kind]
            if bad := [k for k in kinds if k in DEPENDENT]:
                raise ValueError(
                    f"it turns its keys by angles that depend on the length of the text ({bad[0]}), so they cannot be moved "
                    "to new positions"
                )
            if not any(torch.equal(angles.float(), other) for other in found):
                found.append(angles.detach().float().clone())
    return found


def fit(keys: torch.Tensor, places: torch.Tensor, angles: list[torch.Tensor], known: list[Turning]) -> Turning | None:
    """How keys (places, heads, width) of one token at several places, the first of them 0, were turned; None: not at all.

    ``angles``: the sets to choose from. ``known``: what fitted other layers; it is tried first, and what is new comes on
    top. Raises ValueError where no turn explains the keys.
    """
    keys = keys.float()
    if misfit(keys, places, None) < CLOSE:
        return None
    for turning in known:
        if turning.second.stop <= keys.shape[-1] and misfit(keys, places, turning) < CLOSE:
            return turning
    for turning in turnings(keys.shape[-1], angles):
        if misfit(keys, places, turning) < CLOSE:
            known.append(turning)
            return turning
    raise ValueError("no turn of pairs of channels, by the angles that it holds, explains them")


def turnings(width: int, angles: list[torch.Tensor]) -> Iterator[Turning]:
    """Every turn of ``width`` channels: halves or neighbours as pairs, forwards or backwards, wherever they begin."""
    for speeds in angles:
        pairs = len(speeds)
        for start in sorted(range(width - 2 * pairs + 1), key=lambda s: (s not in (0, width - 2 * pairs), s)):
            end = start + 2 * pairs
            halves = slice(start, start + pairs), slice(start + pairs, end)
            neighbours = slice(start, end, 2), slice(start + 1, end, 2)
            for pair in (halves, neighbours):
                for way in (speeds, -speeds):
                    yield Turning(way, *pair)


def misfit(keys: torch.Tensor, places: torch.Tensor, turning: Turning | None) -> float:
    """How far a turn's keys are from keys (places, heads, width), in the worst channel, as a share of its pair's size."""
    start = keys[:1].expand_as(keys)
    size = start[0].square()  # (heads, width); of a pair, both channels'
    expected = start
    if turning is not None:
        cos, sin = cos_sin(places, turning.angles)
        expected = turn(start, turning, cos[:, None], sin[:, None])
        both = size[:, turning.first] + size[:, turning.second]
        size = size.clone()
        size[:, turning.first] = size[:, turning.second] = both
    size = size.mean(0).sqrt()  # (width,)
    floor = 0.01 * size.square().mean().sqrt() + 1e-12  # channels that are all but empty say nothing
    return float(((expected - keys).square().mean((0, 1)).sqrt() / (size + floor)).max())
