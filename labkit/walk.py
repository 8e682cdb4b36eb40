"""The one block-by-block pass that all calibrated methods share.

Blocks are visited in order, each is fed what the already-compressed ones before it produce, and the same holds inside a
block: a linear is solved at the moment its input arrives, and multiplies with what came out. So one forward pass does it
all, statistics are exact for what the compressed layer will really read, and linears that read the same tensor (q/k/v,
gate/up) share them. Layers are found by walking, never by a file per architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from labkit import heap
from labkit.linear import STORED, PackedLinear, exact
from labkit.progress import track

STATISTICS = ("none", "channel_norm", "channel_max", "hessian")
AT_ONCE = 1 << 15  # calibration tokens that pass through a block together; more go twice, in batches, to save memory


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
            self.gram = _gram(x) if self.gram is None else self.gram.add_(_gram(x))
        elif statistic == "channel_max":
            peak = x.abs().amax(0)
            self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)
        else:
            squares = x.square().sum(0)
            self.square_sum = squares if self.square_sum is None else self.square_sum + squares

    def check(self, where: str) -> None:
        """Raise a ValueError that names the layer when its inputs were not all finite."""
        seen = (
            self.gram.diagonal() if self.gram is not None else self.peak if self.peak is not None else self.square_sum
        )
        if not torch.isfinite(seen).all():
            raise ValueError(f"The inputs of {where} hold NaN or infinity: check the model's weights.")

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


def _gram(x: torch.Tensor) -> torch.Tensor:
    """xᵀx for x (rows, in). Of such a product numpy computes one half (BLAS's syrk) and copies the other; torch both."""
    if x.device.type != "cpu":
        return x.T @ x
    rows = x.contiguous().numpy()
    return torch.from_numpy(rows.T @ rows)


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
        block = stack[index]
        if prepare:
            unpack(block)
            prepare(block, flow, index)

        def compressed(name: str, module: nn.Module, stats: Stats, path: str = f"{prefix}.{index}") -> nn.Module:
            weight = weight_of(module).detach().float()
            if not torch.isfinite(weight).all():
                text = f"The weight of {path}.{name} holds NaN or infinity: load the model again or check its file."
                raise ValueError(text)
            return take_place(module, solve(weight, stats, f"{path}.{name}"))

        if flow and len(flow.hidden) == 1:
            flow.compress(index, statistic, compressed)
            continue
        stats = flow.gather(index, statistic) if flow else {}
        for name, module in list(linears(block)):
            block.set_submodule(name, compressed(name, module, stats.get(name, Stats())))
        if flow:
            flow.advance(index)
    del flow
    heap.trim()


def take_place(module: nn.Module, solved) -> nn.Module:
    """The module that takes a linear's place: of a dense weight (out, in), an encoded one, or as it is."""
    dtype = module.dtype if isinstance(module, STORED) else module.weight.dtype
    if isinstance(solved, nn.Module):
        solved.bias, solved.dtype = module.bias, dtype
        return solved
    if not isinstance(solved, torch.Tensor):
        return PackedLinear(solved, module.bias, dtype=dtype)
    if isinstance(module, STORED):
        dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        dense.weight, dense.bias = nn.Parameter(solved.to(dtype), requires_grad=False), module.bias
        return dense
    set_weight(module, solved)
    return module


def unpack(block: nn.Module) -> None:
    """Make packed linears dense, with the same values."""
    for name, module in list(linears(block)):
        if isinstance(module, STORED):
            block.set_submodule(name, take_place(module, module.weight))


class _Stop(Exception):
    """Ends a forward pass as soon as nothing more of it is needed."""


class _Due(nn.Module):
    """Stands in for a linear until its input arrives: then the linear is compressed, and computes its output."""

    def __init__(self, compress: Callable[[torch.Tensor], nn.Module]):
        super().__init__()
        self.compress, self.done = compress, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.done is None:
            self.done = self.compress(x)
        return self.done(x)


class Flow:
    """The hidden states between blocks, and the other arguments (masks, rotary tables) that each block takes.

    ``hidden``: batches of (windows, length, width); all in one while they are no more than ``AT_ONCE`` tokens.
    """

    def __init__(self, model, stack: nn.ModuleList, calib: torch.Tensor):
        self.stack = stack
        self.extra: list[tuple[tuple, dict]] = [((), {})] * len(stack)
        self.hidden: list[torch.Tensor] = []
        self._capture(model, calib[:1], everything=True)  # made for one window, these fit any number of them
        for ids in calib.split(max(1, AT_ONCE // calib.shape[1])):
            self._capture(model, ids, everything=False)

    def _capture(self, model, ids: torch.Tensor, everything: bool) -> None:
        """Record block 0's input, or every block's other arguments."""

        def record(index: int):
            def hook(module, args, kwargs):
                args, kwargs = list(args), dict(kwargs)
                hidden = args.pop(0) if args else kwargs.pop("hidden_states")
                if not everything:
                    self.hidden.append(hidden)
                    raise _Stop
                self.extra[index] = (tuple(args), kwargs)

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

    def compress(self, index: int, statistic: str, compressed: Callable[[str, nn.Module, Stats], nn.Module]) -> None:
        """Replace each linear of a block by ``compressed(name, module, stats)``, all in the pass that makes ``hidden``."""
        block, seen = self.stack[index], WeakTensorKeyDictionary()
        layers = dict(linears(block))

        def due(name: str, module: nn.Module) -> _Due:
            def compress(x: torch.Tensor) -> nn.Module:
                if x not in seen:
                    seen[x] = Stats()
                    seen[x].add(x, statistic)
                    seen[x].check(f"{name} in block {index}")
                return compressed(name, module, seen[x])

            return _Due(compress)

        waiting = {name: due(name, module) for name, module in layers.items()}
        for name, stand_in in waiting.items():
            block.set_submodule(name, stand_in)
        try:
            self.hidden = [self.run(index, hidden) for hidden in self.hidden]
            for name, stand_in in waiting.items():  # an expert that no token was sent to has no statistics
                stand_in.done = stand_in.done or compressed(name, layers[name], Stats())
        finally:
            for name, stand_in in waiting.items():
                block.set_submodule(name, stand_in.done or layers[name])

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
            stats.check(f"{name} in block {index}")
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
        args, kwargs = self.extra[index]
        out = self.stack[index](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out
