"""Quality of a model on windows of text: perplexity, KL divergence to the uncompressed model, top-1 agreement.

Convention: windows do not overlap, no BOS is prepended, each token but a window's first is scored, means are over
tokens. Error bands are the standard error over windows. Packed weights are multiplied exactly (``labkit.linear.exact``):
what a kernel's rounding of activations adds is not part of a weight-only method's quality. A model under cache methods
reads half a window as its prompt, then a few tokens at a time: it must read its cache for their damage to show.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from labkit import cache, text
from labkit.linear import exact
from labkit.measure.measurement import Quality
from labkit.measure.reference import remembered
from labkit.progress import track

ROWS = (
    64  # tokens whose distributions over the vocabulary are worked on at a time: a window's would take hundreds of MB
)

STEP = 16  # tokens that a model under cache methods reads at a time after its prompt


@dataclass(frozen=True)
class Divergence:
    """How far a model's predictions are from a reference's."""

    kl: float  # nats per token, KL(reference ‖ model)
    kl_se: float
    top1: float  # share of tokens with the same most likely next token
    top1_se: float


def perplexity(lm, windows: torch.Tensor, progress: bool = False) -> float:
    """exp of the mean negative log-likelihood per token over LongTensor windows (windows, length)."""
    return quality(lm, windows, progress=progress).perplexity


def divergence(lm, reference, windows: torch.Tensor, progress: bool = False) -> Divergence:
    """KL divergence per token (nats) and top-1 agreement of ``lm`` with ``reference`` on the same windows."""
    q = quality(lm, windows, reference, progress)
    return Divergence(q.kl, q.kl_se, q.top1, q.top1_se)


@exact()
@torch.inference_mode()
def quality(lm, windows: torch.Tensor, reference=None, progress: bool = True, what: str = "quality") -> Quality:
    """All quality figures in one pass, window by window, so that only one window's logits are held at a time."""
    text.check_windows(lm, windows)
    if reference is not None:
        text.check_windows(reference, windows)
    nll, kl, same = [], [], []
    before = None if reference is None else remembered(reference, windows)
    for index, ids in enumerate(track(windows, what, progress)):
        ids = ids[None]
        mine = _logits(lm, ids.to(lm.device))[0, :-1]
        theirs = None
        if before is not None:
            theirs = before.logits(index)[:-1].to(mine.device)
            if theirs.shape != mine.shape:
                sizes = f"{theirs.shape[-1]} and {mine.shape[-1]}"
                raise ValueError(f"Two models with vocabularies of {sizes} tokens cannot be compared.")
        sums = torch.zeros(3, dtype=torch.float64)
        for start in range(0, len(mine), ROWS):
            rows = slice(start, start + ROWS)
            sums += _scores(mine[rows], ids[0, 1:][rows].to(mine.device), None if theirs is None else theirs[rows])
        if sums.isnan().any():
            broken = lm if sums[0].isnan() else reference
            raise ValueError(f"{broken.name} predicts NaN: check its weights.")
        for found, total in zip((nll, kl, same), sums / len(mine)):
            found.append(total)
    mean, error = _band(nll)
    ppl = torch.tensor(mean).exp().item()
    found = Quality(ppl, ppl * error, windows.shape[0] * (windows.shape[1] - 1))
    if reference is None:
        return found
    (kl_mean, kl_se), (top1, top1_se) = _band([k.clamp(min=0) for k in kl]), _band(same)
    return Quality(found.perplexity, found.perplexity_se, found.tokens, kl_mean, kl_se, top1, top1_se)


def _logits(lm, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a window (1, tokens, vocabulary), read through the cache where methods act on it."""
    if cache.methods_of(lm.model):
        return cache.read(lm, ids, max(1, ids.shape[1] // 2), min(STEP, ids.shape[1]))
    return lm.model(ids).logits


def token_kl(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """KL(before ‖ after) in nats, of log-probabilities (…, vocabulary): (…). Of equal ones it can come out just below 0."""
    return (before.exp() * (before - after)).sum(-1)


def _scores(mine: torch.Tensor, next_ids: torch.Tensor, theirs: torch.Tensor | None) -> torch.Tensor:
    """Sums over some tokens of (nll, KL, agreement), from logits (tokens, vocabulary); the last two 0 without theirs."""
    mine = mine.float().log_softmax(-1)
    nll = -mine.gather(1, next_ids[:, None]).sum()
    if theirs is None:
        return torch.tensor([nll.item(), 0.0, 0.0], dtype=torch.float64)
    theirs = theirs.float().log_softmax(-1)
    kl = token_kl(theirs, mine).sum()
    same = (mine.argmax(-1) == theirs.argmax(-1)).sum()
    return torch.tensor([nll.item(), kl.item(), same.item()], dtype=torch.float64)


def _band(values: list[torch.Tensor]) -> tuple[float, float]:
    """Mean and standard error; one window alone has no error band, so it says 0."""
    stacked = torch.stack(values).double()
    error = stacked.std().item() / len(values) ** 0.5 if len(values) > 1 else 0.0
    return stacked.mean().item(), error
