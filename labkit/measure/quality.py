"""Quality of a model on windows of text: perplexity, KL divergence to the uncompressed model, top-1 agreement.

Convention: windows do not overlap, each token but a window's first is scored, means are over tokens. No BOS is prepended,
unless the model's own tokenizer puts one before every text: then each window begins with it (:mod:`labkit.bos`).
Error bands are the standard error over windows; the windows' own values are kept, since two models that read the same
windows are compared window by window. Packed weights are multiplied exactly (``labkit.linear.exact``): what a kernel's
rounding of activations adds is not part of a weight-only method's quality, and is measured beside it (``run``).
A model under cache methods reads a prompt that is not scored, then a few tokens at a time: it must read its cache for
their damage to show (:mod:`labkit.measure.reading`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from labkit import cache, text
from labkit.linear import exact
from labkit.measure.measurement import Quality
from labkit.measure.reading import Reading
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


def perplexity(lm, windows: torch.Tensor, progress: bool = False, prompt: int | None = None) -> float:
    """exp of the mean negative log-likelihood per scored token over LongTensor windows (windows, length)."""
    return quality(lm, windows, progress=progress, prompt=prompt).perplexity


def divergence(lm, reference, windows: torch.Tensor, progress: bool = False, prompt: int | None = None) -> Divergence:
    """KL divergence per token (nats) and top-1 agreement of ``lm`` with ``reference`` on the same windows.

    ``prompt``: tokens at the beginning of each window that are not scored; None: 0, or half under cache methods.
    """
    q = quality(lm, windows, reference, progress, prompt=prompt)
    return Divergence(q.kl, q.kl_se, q.top1, q.top1_se)


@exact()
@torch.inference_mode()
def quality(
    lm,
    windows: torch.Tensor,
    reference=None,
    progress: bool = True,
    what: str = "quality",
    prompt: int | None = None,
    run=None,
) -> Quality:
    """All quality figures in one pass, window by window, so that only one window's logits are held at a time.

    ``windows``: LongTensor (windows, length). ``prompt``: tokens at the beginning of each that are not scored; None: 0, or
    half of them where ``lm`` or ``reference`` is under methods for the KV cache. ``run``: ``lm`` compiled, for the KL of
    what really runs to the reference (to ``lm`` itself where there is none).
    """
    text.check_windows(lm, windows)
    if reference is not None:
        text.check_windows(reference, windows)
    length = windows.shape[1]
    methods = [m for model in (lm, reference) if model is not None for m in cache.methods_of(model.model)]
    prompt = Reading(len(windows), length, (length // 2 if methods else 0) if prompt is None else prompt).prompt
    for method in methods:
        method.check_prompt(prompt)
    scored = slice(prompt, length - 1)  # the token at this place is read, the one after it is predicted
    nll, kl, same, kl_run = [], [], [], []
    before = None if reference is None or cache.methods_of(reference.model) else remembered(reference, windows)
    for index, ids in enumerate(track(windows, what, progress)):
        ids = ids[None]
        mine = _logits(lm, ids.to(lm.device), prompt)[0, scored]
        theirs = None
        if reference is not None:
            full = _logits(reference, ids.to(reference.device), prompt)[0] if before is None else before.logits(index)
            theirs = full[scored].to(mine.device)
            del full
            if theirs.shape != mine.shape:
                sizes = f"{theirs.shape[-1]} and {mine.shape[-1]}"
                raise ValueError(f"Two models with vocabularies of {sizes} tokens cannot be compared.")
        sums = _sums(mine, theirs, ids[0, prompt + 1 :].to(mine.device))
        if sums.isnan().any():
            broken = lm if sums[0].isnan() else reference
            raise ValueError(f"{broken.name} predicts NaN: check its weights.")
        for found, total in zip((nll, kl, same), sums / len(mine)):
            found.append(total)
        if run is not None:
            kl_run.append(_kl_run(run, ids, mine if theirs is None else theirs, prompt))
    mean, error = _band(nll)
    ppl = torch.tensor(mean).exp().item()
    found = {"perplexity": ppl, "perplexity_se": ppl * error, "tokens": len(windows) * (length - 1 - prompt)}
    each = {"nll": nll}
    if reference is not None:
        each |= {"kl": [k.clamp(min=0) for k in kl], "top1": same}
    if run is not None:
        each["kl_run"] = [k.clamp(min=0) for k in kl_run]
    for name, values in each.items():
        if name != "nll":
            found[name], found[f"{name}_se"] = _band(values)
    return Quality(**found, per_window={name: [v.item() for v in values] for name, values in each.items()})


def _logits(lm, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits of a window (1, tokens, vocabulary), read through the cache where methods act on it."""
    if cache.methods_of(lm.model):
        return cache.read(lm, ids, prompt, min(STEP, ids.shape[1]))
    return lm.model(ids).logits


def _kl_run(run, ids: torch.Tensor, reference: torch.Tensor, prompt: int) -> torch.Tensor:
    """Mean KL of a compiled model that reads ids (1, length) to reference logits (scored tokens, vocabulary), float64 ()."""
    total, at = torch.zeros((), dtype=torch.float64), -prompt
    for logits in run.read(ids):
        mine = logits[0, max(0, -at) : len(reference) - at].to(reference.device)
        if len(mine):
            theirs = reference[max(0, at) : max(0, at) + len(mine)]
            total += _sums(mine, theirs, torch.zeros(len(mine), dtype=torch.long, device=mine.device))[1]
        at += logits.shape[1]
    return total / len(reference)


def _sums(mine: torch.Tensor, theirs: torch.Tensor | None, next_ids: torch.Tensor) -> torch.Tensor:
    """Sums over a window's tokens of (nll, KL, agreement), float64 (3,), from logits (tokens, vocabulary)."""
    sums = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(mine), ROWS):
        rows = slice(start, start + ROWS)
        sums += _scores(mine[rows], next_ids[rows], None if theirs is None else theirs[rows])
    return sums


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
