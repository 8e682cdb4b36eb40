"""Quality of a model on windows of text: perplexity, KL divergence to the uncompressed model, top-1 agreement.

Convention: windows do not overlap, no BOS is prepended, each token but a window's first is scored, means are over
tokens. Error bands are the standard error over windows. Packed weights are multiplied exactly (``labkit.linear.exact``):
what a kernel's rounding of activations adds is not part of a weight-only method's quality.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from labkit import text
from labkit.linear import exact
from labkit.measure.measurement import Quality
from labkit.progress import track


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
    for ids in track(windows, what, progress):
        ids = ids[None].to(lm.device)
        mine = lm.model(ids).logits[0, :-1].float().log_softmax(-1)
        if mine.isnan().any():
            raise ValueError(f"{lm.name} predicts NaN: check its weights.")
        nll.append(-mine.gather(1, ids[0, 1:, None]).mean())
        if reference is not None:
            theirs = reference.model(ids.to(reference.device)).logits[0, :-1].float().log_softmax(-1).to(mine.device)
            if theirs.shape != mine.shape:
                sizes = f"{theirs.shape[-1]} and {mine.shape[-1]}"
                raise ValueError(f"Two models with vocabularies of {sizes} tokens cannot be compared.")
            if theirs.isnan().any():
                raise ValueError(f"{reference.name}, which is compared with, predicts NaN: check its weights.")
            same.append((mine.argmax(-1) == theirs.argmax(-1)).float().mean())
            kl.append((theirs.exp() * (theirs - mine)).sum(-1).mean().clamp(min=0))
    mean, error = _band(nll)
    ppl = torch.tensor(mean).exp().item()
    found = Quality(ppl, ppl * error, windows.shape[0] * (windows.shape[1] - 1))
    if reference is None:
        return found
    (kl_mean, kl_se), (top1, top1_se) = _band(kl), _band(same)
    return Quality(found.perplexity, found.perplexity_se, found.tokens, kl_mean, kl_se, top1, top1_se)


def _band(values: list[torch.Tensor]) -> tuple[float, float]:
    """Mean and standard error; one window alone has no error band, so it says 0."""
    stacked = torch.stack(values).double()
    error = stacked.std().item() / len(values) ** 0.5 if len(values) > 1 else 0.0
    return stacked.mean().item(), error
