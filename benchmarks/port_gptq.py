"""GPTQ as the paper's procedure reads when it is written down plainly: the yardstick of bench_gptq.

One Hessian for each linear, one calibration window at a time, two whole passes through every block, a column loop over
the weight as it lies, act-order with static groups. Nothing is shared, batched or skipped.
"""

from __future__ import annotations

import torch

from labkit.formats import Integer
from labkit.walk import blocks, linears, set_weight


@torch.no_grad()
def port(lm, calib: torch.Tensor, bits: int, group_size: int, damp: float = 0.01, block_size: int = 128):
    """A copy of ``lm`` with every decoder linear rounded (kept dense)."""
    small = lm.copy()
    stack = blocks(small.model)
    states, extra = [], {}

    class Caught(Exception):
        pass

    def catch(module, args, kwargs):
        kwargs = dict(kwargs)
        states.append(args[0] if args else kwargs.pop("hidden_states"))
        extra.update(kwargs)
        raise Caught

    handle = stack[0].register_forward_pre_hook(catch, with_kwargs=True)
    for window in calib:
        try:
            small.model(window[None], use_cache=False)
        except Caught:
            pass
    handle.remove()

    def run(block, hidden):
        out = block(hidden, **extra)
        return out[0] if isinstance(out, tuple) else out

    for block in stack:
        grams, count = {}, {}

        def watch(name, grams=grams, count=count):
            def hook(module, args):
                x = args[0].reshape(-1, args[0].shape[-1]).float()
                n = count.get(name, 0)
                grams[name] = grams.get(name, 0) * (n / (n + 1)) + (2 / (n + 1)) * (x.T @ x)
                count[name] = n + 1

            return hook

        handles = [m.register_forward_pre_hook(watch(n)) for n, m in linears(block)]
        for hidden in states:
            run(block, hidden)
        for h in handles:
            h.remove()
        for name, module in list(linears(block)):
            set_weight(module, _solve(module.weight, grams.pop(name), bits, group_size, damp, block_size))
        states = [run(block, hidden) for hidden in states]
    return small


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
