"""AWQ: before rounding, make the columns with large inputs larger, so that they lose less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from labkit.fold import Fold, folds, head_dim_of
from labkit.formats import Encoded, Format
from labkit.method import Method, knob
from labkit.quantize.common import BITS, FORMAT, GROUP_SIZE, SYMMETRIC, format_of, rounded
from labkit.walk import Flow, Prepare, Stats, set_weight, walk, weight_of

WINDOWS = 4  # calibration windows that the scale search looks at; why so few are enough: text.calibration
GRID = 20  # the scale search tries the exponents 0, 1/20, … 19/20; the clip search cuts ranges in steps of 1/20
SHORTEST = 0.5  # the smallest share of a group's range that the clip search tries
UNCLIPPED = ("q_proj", "k_proj", "query", "key", "Wqkv", "qkv_proj", "c_attn")  # as in the paper's code


@dataclass(frozen=True)
class AWQ(Method):
    """Scale up the weights that meet large activations before rounding, and scale their inputs down to match.

    Per channel s = mean|x|^r; of 20 exponents r the one whose rounding changes the enclosing module's output least. The
    inverse goes into what produces the input (a norm, or the rows of the layer before), so the model's function stays.
    Then each group's range is cut to the share that changes the layer's output least.

    Scales as in the authors' code: the grid, the normalisation by √(max·min), the loss on the output of the module that
    reads them. Different here:

    - Inputs come from blocks that are already quantized; the authors' are those of the uncompressed model.
    - v is scaled against o under grouped-query attention too, one factor for all heads that share a KV head; the authors'
      code skips it there.
    - The scale search reads ``windows`` windows of the calibration; the authors' reads all of it.
    - The clip search is ours: both ends of a group's range shrink in proportion, in steps of 1/20 down to one half, and
      the loss is exact over all calibration tokens. The authors' clamps the weights at ±c·max|w|, fits the range anew,
      goes down to 0.55 and looks at 512 tokens.
    """

    kind: ClassVar[str] = "quantize"
    paper: ClassVar[str] = "Lin et al., AWQ, MLSys 2024, section 3.2"
    calibrated: ClassVar[bool] = True
    lossless: ClassVar[dict] = {"bits": 8, "group_size": 32}
    lossless_kl: ClassVar[float] = 2e-3

    bits: int = BITS
    group_size: int | None = GROUP_SIZE
    symmetric: bool = SYMMETRIC
    format: str = FORMAT
    scale: bool = knob(True, help="Off: no scaling, clipping alone.")
    clip: bool = knob(True, help="Off: each grid spans the whole range of its group.")
    windows: int = knob(
        WINDOWS, low=1, high=128, stops=(1, 2, 4, 8), help="Calibration windows that the scale search looks at."
    )

    def apply(self, lm, calib, progress: bool) -> None:
        form = format_of(self)

        def solve(weight: torch.Tensor, stats: Stats, path: str) -> Encoded:
            if not self.clip or path.endswith(UNCLIPPED):
                return form.encode(weight)
            return clipped(weight, stats.gram, form)

        prepare = scaling(lm, form, self.windows) if self.scale else None
        walk(lm, calib, "hessian", solve, f"AWQ to {form.bits} bits", progress, prepare)


def scaling(lm, form: Format, windows: int) -> Prepare:
    """What the walk does with each block before its statistics are gathered: find the folds, and apply the best factors."""

    def prepare(block: nn.Module, flow: Flow, index: int) -> None:
        one, hidden = flow.few(1), flow.few(windows)
        for fold in folds(block, lambda: flow.run(index, one), head_dim_of(lm)):
            fold.apply(block, best_factors(block, fold, lambda: flow.run(index, hidden), form).factors)

    return prepare


@dataclass(frozen=True)
class Search:
    """What the scale search tried: the mean squared error of the module's output at each exponent, and the best factors."""

    exponents: list[float]
    losses: list[float]
    factors: torch.Tensor  # (in,)


def best_factors(block: nn.Module, fold: Fold, run, form: Format) -> Search:
    """The factors for one fold; ``run()`` passes a sample through the block. The block is as before afterwards."""
    module = block.get_submodule(_common(fold.readers))
    readers = [block.get_submodule(name) for name in fold.readers]
    seen = {}
    handles = [
        module.register_forward_pre_hook(
            lambda m, args, kwargs: seen.update(args=args, kwargs=kwargs), with_kwargs=True
        ),
        readers[0].register_forward_pre_hook(lambda m, args: seen.update(x=args[0])),
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()

    def output() -> torch.Tensor:
        out = module(*seen["args"], **seen["kwargs"])
        return out[0] if isinstance(out, tuple) else out

    expected = output()
    mean = seen["x"].abs().float().flatten(0, -2).mean(0).clamp(min=1e-8)  # (in,)
    exponents, losses, tried = [step / GRID for step in range(GRID)], [], []
    before = [reader.weight for reader in readers]
    weights = [weight_of(reader).float() for reader in readers]
    try:
        for exponent in exponents:
            factors = fold.tie(mean.pow(exponent).clamp(min=1e-4), block)
            factors = factors / (factors.max() * factors.min()).sqrt()
            for reader, weight in zip(readers, weights):
                set_weight(reader, rounded(weight * factors, form) / factors)
            losses.append((output() - expected).float().square().mean().item())
            tried.append(factors)
    finally:
        for reader, weight in zip(readers, before):
            reader.weight = weight
    return Search(exponents, losses, tried[losses.index(min(losses))])


def clipped(weight: torch.Tensor, gram: torch.Tensor, form: Format) -> Encoded:
    """Encode a weight (out, in) with each group's range cut to the share that changes x·w over that group least.

    Not the clipping of AWQ's code, which clamps the weights symmetrically and fits the range again: see :class:`AWQ`. The
    squared change over the calibration is dᵀGd, with d what rounding did to the group's weights and G the group's
    block of ``gram`` (in, in), the sum of xxᵀ.
    """
    groups = form.groups(weight)  # (out, groups, size)
    params = form.fit(groups, best_shares(groups, gram, form))
    codes = form.quantize(groups, params).view(len(weight), -1)[:, : weight.shape[1]]
    return form.assemble(codes, params)


def best_shares(groups: torch.Tensor, gram: torch.Tensor, form: Format) -> torch.Tensor:
    """The share of each group's range whose grid changes x·w over that group least: (out, groups)."""
    blocks = _diagonal_blocks(gram, groups.shape[-1])
    best = torch.full(groups.shape[:2], torch.inf, device=groups.device)
    shares = torch.ones_like(best)
    for step in range(round((1 - SHORTEST) * GRID) + 1):
        share = 1 - step / GRID
        change = (groups - form.round(groups, form.fit(groups, share))).transpose(0, 1)  # (groups, out, size)
        loss = ((change @ blocks) * change).sum(-1).T
        shares = torch.where(loss < best, share, shares)
        best = torch.minimum(loss, best)
    return shares


def _diagonal_blocks(gram: torch.Tensor, size: int) -> torch.Tensor:
    """The blocks (groups, size, size) on the diagonal of a matrix (in, in); a shorter last one is filled with zeros."""
    short = -len(gram) % size
    padded = nn.functional.pad(gram, (0, short, 0, short))
    return torch.stack([padded[i : i + size, i : i + size] for i in range(0, len(padded), size)])


def _common(paths: tuple[str, ...]) -> str:
    """The path of the smallest module that holds all of these: ``self_attn`` for q, k and v; a single one is itself."""
    if len(paths) == 1:
        return paths[0]
    first, *rest = (p.split(".") for p in paths)
    shared = [part for i, part in enumerate(first) if all(p[: i + 1] == first[: i + 1] for p in rest)]
    return ".".join(shared)
