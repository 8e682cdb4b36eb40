"""Wanda and SparseGPT as the papers' procedures read when they are written down plainly: the yardsticks of bench_prune."""

from __future__ import annotations

import torch
from port_walk import port_walk


def port_wanda(lm, calib: torch.Tensor, sparsity: float):
    """A copy of ``lm``: in each row the share ``sparsity`` with the smallest |w|·‖x‖ is zero."""

    def solve(weight, squares):
        weight = weight.float().clone()
        scores = weight.abs() * squares.sqrt()
        drop = scores.sort(dim=-1, stable=True)[1][:, : int(weight.shape[1] * sparsity)]
        return weight.scatter_(1, drop, 0)

    return port_walk(lm, calib, solve, norms=True)


def port_sparsegpt(lm, calib: torch.Tensor, sparsity: float, damp: float = 0.01, block_size: int = 128):
    """A copy of ``lm``: column by column, the mask chosen for each block of columns by w²/U_jj²."""

    def solve(weight, hessian):
        w = weight.float().clone()
        columns = w.shape[1]
        dead = hessian.diagonal() == 0
        hessian[dead, dead] = 1
        w[:, dead] = 0
        hessian += damp * hessian.diagonal().mean() * torch.eye(columns)
        upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
        for start in range(0, columns, block_size):
            stop = min(start + block_size, columns)
            w1, u1 = w[:, start:stop].clone(), upper[start:stop, start:stop]
            out, errors = torch.zeros_like(w1), torch.zeros_like(w1)
            scores = w1.square() / u1.diagonal().square()
            drop = scores <= scores.flatten().sort()[0][int(scores.numel() * sparsity)]
            for i in range(stop - start):
                q = w1[:, i].masked_fill(drop[:, i], 0)
                out[:, i] = q
                error = (w1[:, i] - q) / u1[i, i]
                w1[:, i:] -= error[:, None] @ u1[i, i:][None]
                errors[:, i] = error
            w[:, start:stop] = out
            w[:, stop:] -= errors @ upper[start:stop, stop:]
        return w

    return port_walk(lm, calib, solve)
