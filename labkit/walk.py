"""The one block-by-block pass that all calibrated methods share.

Blocks are visited in order. Each is fed what the already-compressed blocks before it produce; the statistic its linears
need is gathered, once for linears that read the same input (q/k/v, gate/up); they are replaced; and the block, now
compressed, computes the next block's input. Layers are found by walking, never by a file per architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from labkit.linear import STORED, PackedLinear, exact
from labkit.progress import track

STATISTICS = ("none", "channel_norm", "channel_max", "hessian")


@dataclass
class Stats:
    """What a linear's inputs looked like over the calibration, accumulated in fp32.

    ``count``: input rows seen. ``square_sum``: (in,), only for "channel_norm". ``peak``: (in,), the largest
    |x|, only for the statistic "channel_max". ``gram``: (in, in), the sum of x xᵀ, only for "hessian".
    """

    count: int = 0
    square_sum: torch.Tensor | None = None
    gram: torch.Tensor | None = None
    peak: torch.Tensor | None = None
    factors: dict = field(default_factory=dict)  # what cholesky() has computed

    def add(self, x: torch.Tensor, statistic: str) -> None:
        x = x.detach().reshape(-1, x.shape[-1]).float()
        self.count += x.shape[0]
        if statistic == "hessian":
            self.gram = x.T @ x if self.gram is None else self.gram.addmm_(x.T, x)
        elif statistic == "channel_max":
            peak = x.abs().amax(0)
            self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)
        else:
            squares = x.square().sum(0)
            self.square_sum = squares if self.square_sum is None else self.square_sum + squares

    @property
    def channel_norm(self) -> torch.Tensor:
        """‖x_j‖₂ per input channel, (in,)."""
        return (self.gram.diagonal() if self.gram is not None else self.square_sum).sqrt()

    @property
    def hessian(self) -> torch.Tensor:
        """The mean of 2xxᵀ, (in, in): the Hessian of the layer's squared output error (GPTQ, section 3)."""
        return self.gram * (2 / max(self.count, 1))

    def cholesky(self, damp: float, act_order: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(order, factor, dead): the columns' order, the upper Cholesky factor of H⁻¹ in that order, inputs that are zero.

        Computed once for all linears that share these statistics. ``damp``: the share of H's mean diagonal that is added
        to the diagonal; ten times as much is tried, again and again, while H is not positive definite. With ``act_order``
        the largest diagonal entries come first (GPTQ's "desc_act").
        """
        if (damp, act_order) not in self.factors:
            hessian = self.hessian
            diagonal = hessian.diagonal().clone()
            dead = diagonal == 0
            order = (
                diagonal.argsort(descending=True, stable=True)
                if act_order
                else torch.arange(len(diagonal), device=diagonal.device)
            )
            hessian = hessian[order][:, order]
            hessian.diagonal()[dead[order]] = 1
            self.factors[damp, act_order] = order, _inverse_factor(hessian, damp), dead
        return self.factors[damp, act_order]


def _inverse_factor(hessian: torch.Tensor, damp: float) -> torch.Tensor:
    """The upper triangular U with UᵀU = (H + damp·mean(diag H)·I)⁻¹, (in, in)."""
    mean = hessian.diagonal().mean()
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            # H = LLᵀ, so H⁻¹ = L⁻ᵀL⁻¹; of its two triangular factors GPTQ needs the one with UᵀU = H⁻¹.
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper
        damp = 10 * damp
        if damp > 1e4:
            raise ValueError(
                "The Hessian of a layer's inputs cannot be inverted: use other or longer calibration text."
            )


Solve = Callable[[torch.Tensor, Stats, str], "torch.Tensor | nn.Module | object"]
Prepare = Callable[[nn.Module, "Flow", int], None]


def blocks(model) -> nn.ModuleList:
    """The decoder's list of blocks: the ModuleList that holds the most weights of linears."""

    def weights(modules: nn.ModuleList) -> int:
        shapes = (
            m.weight.shape if _is_conv1d(m) else (m.out_features, m.in_features)
            for m in modules.modules()
            if is_linear(m)
        )
        return sum(rows * columns for rows, columns in shapes)

    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    best = max(lists, key=weights, default=None)
    if best is None or weights(best) == 0:
        raise ValueError(
            f"{type(model).__name__} has no list of decoder blocks with linear layers: labkit cannot walk it."
        )
    return best


def is_linear(module: nn.Module) -> bool:
    """nn.Linear, GPT-2's Conv1D (a transposed linear), or one of labkit's own that store something smaller."""
    return isinstance(module, (nn.Linear, *STORED)) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight as (out, in), dequantized where it is packed."""
    weight = module.weight
    return weight.T if _is_conv1d(module) else weight


def set_weight(module: nn.Module, weight: torch.Tensor) -> None:
    """Give a dense linear a new weight (out, in); the old tensor, which other models may share, is left as it is."""
    weight = weight.T.contiguous() if _is_conv1d(module) else weight
    module.weight = nn.Parameter(weight.to(module.weight.dtype), requires_grad=False)


def linears(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers of one block, by path."""
    return ((name, m) for name, m in block.named_modules() if is_linear(m))


@exact()
@torch.no_grad()
def walk(
    lm,
    calib,
    statistic: str,
    solve: Solve,
    what: str = "compressing",
    progress: bool = True,
    prepare: Prepare | None = None,
) -> None:
    """Replace every linear of the decoder by ``solve(weight, stats, path)``, block by block, in place on ``lm``.

    ``solve`` takes the weight (out, in) in fp32, its :class:`Stats` and the layer's path in the model. It returns a new
    weight of that shape, an encoded one (``labkit.formats.Encoded``), which becomes a packed linear, or a module that
    takes the linear's place (its bias and dtype are set here). ``prepare(block, flow, index)``, where it
    is given, may change the block's dense weights before its statistics are gathered. Raises ValueError on a NaN in a
    weight or in an activation, naming the layer.
    """
    if statistic not in STATISTICS:
        raise ValueError(f"statistic = {statistic!r} is not allowed: it must be one of {', '.join(STATISTICS)}.")
    stack = blocks(lm.model)
    prefix = next(name for name, m in lm.model.named_modules() if m is stack)
    flow = Flow(lm.model, stack, calib.to(lm.device)) if statistic != "none" else None
    for index in track(range(len(stack)), what, progress):
        if prepare:
            unpack(stack[index])
            prepare(stack[index], flow, index)
        stats = flow.gather(index, statistic) if flow else {}
        for name, module in list(linears(stack[index])):
            weight = weight_of(module).detach().float()
            path = f"{prefix}.{index}.{name}"
            if not torch.isfinite(weight).all():
                raise ValueError(f"The weight of {path} holds NaN or infinity: load the model again or check its file.")
            replace(stack[index], name, module, solve(weight, stats.get(name, Stats()), path))
        if flow:
            flow.advance(index)


def replace(block: nn.Module, name: str, module: nn.Module, solved) -> None:
    """Put a solved weight, dense (out, in) or encoded, in the place of a linear."""
    dtype = module.dtype if isinstance(module, STORED) else module.weight.dtype
    if isinstance(solved, nn.Module):
        solved.bias, solved.dtype = module.bias, dtype
        block.set_submodule(name, solved)
    elif not isinstance(solved, torch.Tensor):
        block.set_submodule(name, PackedLinear(solved, module.bias, dtype=dtype))
    elif isinstance(module, STORED):
        dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        dense.weight, dense.bias = nn.Parameter(solved.to(dtype), requires_grad=False), module.bias
        block.set_submodule(name, dense)
    else:
        set_weight(module, solved)


def unpack(block: nn.Module) -> None:
    """Make packed linears dense, with the same values."""
    for name, module in list(linears(block)):
        if isinstance(module, STORED):
            replace(block, name, module, module.weight)


class _Stop(Exception):
    """Ends a forward pass as soon as nothing more of it is needed."""


class Flow:
    """The hidden states between blocks, and the other arguments (masks, rotary tables) that each block takes."""

    def __init__(self, model, stack: nn.ModuleList, calib: torch.Tensor, batch: int = 8):
        self.stack = stack
        size = max(
            d for d in range(1, min(batch, len(calib)) + 1) if len(calib) % d == 0
        )  # equal batches: one mask fits all
        self.extra: list[tuple[tuple, dict]] = [((), {})] * len(stack)
        self.hidden: list[torch.Tensor] = []
        for i, ids in enumerate(calib.split(size)):
            self._capture(model, ids, everything=i == 0)

    def _capture(self, model, ids: torch.Tensor, everything: bool) -> None:
        """Record block 0's input, and in the first batch every block's other arguments."""

        def record(index: int):
            def hook(module, args, kwargs):
                args, kwargs = list(args), dict(kwargs)
                hidden = args.pop(0) if args else kwargs.pop("hidden_states")
                if index == 0:
                    self.hidden.append(hidden)
                self.extra[index] = (tuple(args), kwargs)
                if not everything:
                    raise _Stop

            return hook

        picked = range(len(self.stack)) if everything else range(1)
        handles = [self.stack[i].register_forward_pre_hook(record(i), with_kwargs=True) for i in picked]
        try:
            model.base_model(ids, use_cache=False)
        except _Stop:
            pass
        finally:
            for h in handles:
                h.remove()

    def gather(self, index: int, statistic: str) -> dict[str, Stats]:
        """The statistics of one block's linears; linears that were handed the same tensor share one object."""
        found: dict[str, Stats] = {}
        leaders: dict[str, str] = {}  # linear -> the linear whose Stats it shares
        seen: dict[int, str] = {}
        order: list[str] = []
        names = dict(linears(self.stack[index]))

        def hook_for(name: str):
            def hook(module, args):
                x = args[0]
                if name not in leaders:  # first batch: find out who shares
                    leaders[name] = seen.setdefault(id(x), name)
                    order.append(name)
                    keep.append(x)  # an id is only unique while its tensor lives
                if leaders[name] == name:
                    found.setdefault(name, Stats()).add(x, statistic)
                    # After the first batch the last leader is known: what follows is not needed for statistics.
                    if not keep and name == last[0]:
                        raise _Stop

            return hook

        keep: list[torch.Tensor] = []
        last = [""]
        handles = [m.register_forward_pre_hook(hook_for(name)) for name, m in names.items()]
        try:
            for hidden in self.hidden:
                try:
                    self.run(index, hidden)
                except _Stop:
                    continue
                finally:
                    keep.clear()
                    last[0] = [name for name in order if leaders[name] == name][-1]
        finally:
            for h in handles:
                h.remove()
        for name, stats in found.items():
            total = stats.gram.diagonal() if stats.gram is not None else stats.square_sum
            if not torch.isfinite(stats.peak if total is None else total).all():
                raise ValueError(
                    f"The inputs of {name} in block {index} hold NaN or infinity: check the model's weights."
                )
        return {name: found[leader] for name, leader in leaders.items()}

    def few(self, windows: int) -> torch.Tensor:
        """The hidden states of the first windows of the first batch, (windows, length, width); :meth:`run` takes them."""
        return self.hidden[0][:windows]

    def advance(self, index: int) -> None:
        """Run the (compressed) block: its outputs are the next block's inputs. The last block's are not needed."""
        if index + 1 < len(self.stack):
            self.hidden = [self.run(index, hidden) for hidden in self.hidden]

    def run(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """One block's output for hidden states (windows, length, width) of one of the batches in ``self.hidden``."""
        full = len(self.hidden[0])

        def cut(value):  # masks made for a full batch
            batched = isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] == full
            return value[: len(hidden)] if batched and len(hidden) < full else value

        args, kwargs = self.extra[index]
        args, kwargs = [cut(a) for a in args], {k: cut(v) for k, v in kwargs.items()}
        out = self.stack[index](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out
