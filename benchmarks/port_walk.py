"""The pass of GPTQ, SparseGPT and Wanda, written down plainly: what the ports of bench_gptq and bench_prune share.

One statistic for each linear, one calibration window at a time, two whole passes through every block. Nothing is shared,
batched or skipped.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from labkit.walk import blocks, linears, set_weight


@torch.no_grad()
def port_walk(lm, calib: torch.Tensor, solve: Callable, norms: bool = False):
    """A copy of ``lm`` with every decoder linear's weight (out, in) replaced by ``solve(weight, statistic)``.

    The statistic is the mean of 2xxᵀ over windows, or with ``norms`` the mean of |x|² (in,).
    """
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
                new = x.square().sum(0) if norms else 2 * (x.T @ x)
                grams[name] = grams.get(name, 0) * (n / (n + 1)) + new / (n + 1)
                count[name] = n + 1

            return hook

        handles = [m.register_forward_pre_hook(watch(n)) for n, m in linears(block)]
        for hidden in states:
            run(block, hidden)
        for h in handles:
            h.remove()
        for name, module in list(linears(block)):
            set_weight(module, solve(module.weight, grams.pop(name)))
        states = [run(block, hidden) for hidden in states]
    return small
