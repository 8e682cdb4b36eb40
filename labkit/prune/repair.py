"""Given which weights are kept, the values that change the layer's output least: least squares, row by row."""

from __future__ import annotations

import torch

ROWS = 32  # rows solved together


def repaired(weight: torch.Tensor, mask: torch.Tensor, hessian: torch.Tensor, damp: float = 0.01) -> torch.Tensor:
    """The weight (out, in), zero outside of ``mask``, with the least (w - ŵ)H(w - ŵ)ᵀ in every row; exact but for ``damp``.

    For a row that keeps the columns S it solves H_SS ŵ_S = (H w)_S. ``damp`` times the mean diagonal is added to H on
    both sides, which pulls ŵ towards w where the inputs say little.
    """
    damped = hessian.clone()
    damped.diagonal().add_(damp * hessian.diagonal().mean().clamp(min=1e-12))
    target = weight @ damped  # (out, in)
    out = torch.zeros_like(weight)
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        width = int(mask[rows].sum(1).max())
        if width == 0:
            continue
        columns = (~mask[rows]).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]  # the kept ones first
        kept = mask[rows].gather(1, columns)  # False where a row keeps fewer than the longest
        system = damped[columns[:, :, None], columns[:, None, :]] * (kept[:, :, None] & kept[:, None, :])
        system.diagonal(dim1=1, dim2=2).add_((~kept).to(system.dtype))  # ŵ = 0 there
        right = target[rows].gather(1, columns) * kept
        solved = torch.cholesky_solve(right[:, :, None], torch.linalg.cholesky(system))[:, :, 0]
        out[rows] = torch.zeros_like(out[rows]).scatter(1, columns, solved * kept)
    return out
