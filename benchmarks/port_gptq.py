"""GPTQ, with act-order and static groups, as it reads when it is written down plainly: the yardstick of bench_gptq.

An own column loop over the weight as it lies, one Hessian for each linear.
"""

from __future__ import annotations

import torch
from port_walk import port_walk

from labkit.formats import Integer


def port(lm, calib: torch.Tensor, bits: int, group_size: int, damp: float = 0.01, block_size: int = 128):
    """A copy of ``lm`` with every decoder linear rounded (kept dense)."""
    return port_walk(lm, calib, lambda weight, gram: _solve(weight, gram, bits, group_size, damp, block_size))


def _solve(weight, hessian, bits, group_size, damp, block_size):
    form = Integer(bits, group_size)
    w = weight.float().clone()
    columns = w.shape[1]
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    w[:, dead] = 0
    scale, zero = form.fit(form.groups(w))  # static groups
    order = hessian.diagonal().argsort(descending=True)
    w, hessian = w[:, order], hessian[order][:, order]
    hessian += damp * hessian.diagonal().mean() * torch.eye(columns)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    out = torch.zeros_like(w)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        w1, errors = w[:, start:stop].clone(), torch.zeros(len(w), stop - start)
        u1 = upper[start:stop, start:stop]
        for i in range(stop - start):
            s, z = (p[:, order[start + i] // group_size] for p in (scale, zero))
            q = (((w1[:, i] / s).round() + z).clamp(0, 2**bits - 1) - z) * s
            out[:, start + i] = q
            error = (w1[:, i] - q) / u1[i, i]
            w1[:, i:] -= error[:, None] @ u1[i, i:][None]
            errors[:, i] = error
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return out[:, order.argsort()]
