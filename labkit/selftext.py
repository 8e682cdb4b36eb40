"""Calibration text that the model writes itself: no corpus, no licence, and the model's own distribution.

Sampled at temperature 1, top-p 0.95, each window from one common word. Stored once: shipped for the embedded model,
generated and cached for any other.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from labkit import bos, paths, positions
from labkit._files import whole_file
from labkit.progress import track

STARTERS = (
    "The",
    "A",
    "In",
    "When",
    "It",
    "We",
    "There",
    "My",
    "This",
    "If",
    "One",
    "Some",
    "How",
    "After",
    "For",
    "What",
    "She",
    "He",
    "They",
    "Many",
    "People",
    "Today",
    "Water",
    "Music",
    "Time",
    "Once",
    "Every",
    "Most",
    "You",
    "Their",
    "Our",
    "Life",
    "New",
    "As",
    "At",
    "On",
    "Before",
    "Why",
    "Where",
)


def self_samples(lm, windows: int, length: int, seed: int = 0, progress: bool = True) -> torch.Tensor:
    """``windows`` self-written windows, LongTensor (windows, length); ``seed`` picks which of the stored ones."""
    kept = stored(lm, windows, length)
    if kept is None:
        kept = write(lm, windows, length, progress=progress)
        _keep(lm, kept)
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))[:windows]
    return kept[order, :length].long()


@torch.inference_mode()
def write(lm, windows: int, length: int, batch: int = 32, seed: int = 0, progress: bool = True) -> torch.Tensor:
    """Let the model write; the end-of-text token is never chosen, so that every window is full."""
    draw = torch.Generator().manual_seed(seed)
    words = (STARTERS[i % len(STARTERS)] for i in range(windows))
    begin = bos.beginning(lm.tokenizer)
    starts = [begin + bos.ids_of(lm.tokenizer, word)[:1] for word in words]
    if length < len(starts[0]):
        raise ValueError(
            f"length = {length} is not allowed: what this model writes begins with {len(starts[0])} tokens."
        )
    barred = [t for t in lm.tokenizer.all_special_ids if t is not None]
    done = []
    for group in torch.tensor(starts, device=lm.device).split(batch):
        ids, cache = group, None
        for _ in track(range(length - ids.shape[1]), "the model writes its calibration text", progress):
            new, here = (
                (ids, {}) if cache is None else (ids[:, -1:], positions.after(lm.model, ids.shape[1] - 1, 1, len(ids)))
            )
            out = lm.model(new, past_key_values=cache, use_cache=True, **here)
            cache = out.past_key_values
            logits = out.logits[:, -1].float()
            if logits.isnan().any():
                raise ValueError("The model predicts NaN and cannot write its calibration text: check its weights.")
            logits[:, barred] = -torch.inf
            ids = torch.cat([ids, _nucleus(logits, draw).to(ids.device)], dim=1)
        done.append(ids.cpu())
    return torch.cat(done)


def _nucleus(logits: torch.Tensor, draw: torch.Generator, top_p: float = 0.95) -> torch.Tensor:
    """One token per row from the smallest set that holds ``top_p`` of the probability. (batch, vocabulary) -> (batch, 1)."""
    probs, order = logits.softmax(-1).cpu().sort(-1, descending=True)
    probs[probs.cumsum(-1) - probs > top_p] = 0
    return order.gather(1, torch.multinomial(probs, 1, generator=draw))


def _places(lm) -> list[Path]:
    name = f"{lm.fingerprint}.safetensors"
    folders = dict.fromkeys((paths.data(), paths.cache(), paths.own()))  # the last is where a new one is kept
    return [folder / "self" / name for folder in folders]


def stored(lm, windows: int, length: int) -> torch.Tensor | None:
    """What this model has written before, at least (windows, length) and begun as its texts begin now, or None: then
    :func:`self_samples` takes minutes."""
    from safetensors.torch import load_file

    begin = torch.tensor(bos.beginning(lm.tokenizer))
    for path in _places(lm):
        if path.is_file():
            ids = load_file(path)["ids"]
            large = ids.shape[0] >= windows and ids.shape[1] >= length
            if large and (ids[:, : len(begin)] == begin).all():
                return ids
    return None


def _keep(lm, ids: torch.Tensor) -> None:
    from safetensors.torch import save_file

    path = _places(lm)[-1]
    try:
        with whole_file(path) as part:
            save_file({"ids": ids.to(torch.int32).contiguous()}, part)
    except OSError as error:  # read-only or full: it must be written again next time, which takes minutes
        warnings.warn(f"The text that the model wrote could not be kept in {path}: {error}.", stacklevel=3)
