"""The one block-by-block pass that all calibrated methods share.

Blocks are visited in order, each is fed what the already-compressed ones before it produce, and the same holds inside a
block: a linear is solved at the moment its input arrives, and multiplies with what came out. So one forward pass does it
all, statistics are exact for what the compressed layer will really read, and linears that read the same tensor (q/k/v,
gate/up) share them. Layers are found by walking, never by a file per architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import cache

import torch
from greenlet import getcurrent, greenlet
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from labkit import heap
from labkit.block_inputs import BlockInputs, hidden_of
from labkit.linear import STORED, PackedLinear, SparseLinear, exact
from labkit.progress import track

STATISTICS = ("none", "channel_norm", "channel_max", "hessian")
BATCH = (1 << 11, 1 << 14)  # calibration tokens in one batch, on a CPU and on a GPU
STRIP = 256  # rows of a Gram matrix that are computed together


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
            if self.gram is None:
                self.gram = x.new_zeros(x.shape[1], x.shape[1])
            _add_gram(self.gram, x)
        elif statistic == "channel_max":
            peak = x.abs().amax(0)
            self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)
        else:
            squares = x.square().sum(0)
            self.square_sum = squares if self.square_sum is None else self.square_sum + squares

    @classmethod
    def unseen(cls, linear: nn.Module, statistic: str) -> Stats:
        """For a linear whose input was never seen: as if all its channels were alike, and independent. ``count`` is 0."""
        weight = weight_of(linear)  # (out, in)
        ones = torch.ones(weight.shape[1], device=weight.device)
        if statistic == "hessian":
            return cls(gram=ones.diag())
        return cls(peak=ones) if statistic == "channel_max" else cls(square_sum=ones)

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
            diagonal = self.gram.diagonal()
            dead = diagonal == 0
            order = (
                diagonal.argsort(descending=True, stable=True)
                if act_order
                else torch.arange(len(diagonal), device=diagonal.device)
            )
            self.factors[damp, act_order] = order, self._inverse_factor(damp, order, dead), dead
        return self.factors[damp, act_order]

    def _inverse_factor(self, damp: float, order: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
        """The upper triangular R with RᵀR = (H + damp·mean(diag H)·I)⁻¹, its columns in ``order``: fp32 (in, in).

        Worked out in float64: where the calibration has hardly more tokens than the layer has inputs, H is so nearly
        singular that in fp32 two ways of writing this down gave models whose damage differed by a third. For a wide layer
        these matrices are what a walk holds most of, so there are few of them at a time.
        """
        back = order.flip(0)
        while True:
            # Cholesky from the last column backwards gives H = UUᵀ with U upper triangular, so H⁻¹ = U⁻ᵀU⁻¹ and R = U⁻¹.
            turned = self.gram[back[:, None], back].double().mul_(2 / max(self.count, 1))
            turned.diagonal()[dead[back]] = 1
            turned.diagonal().add_(damp * turned.diagonal().mean())
            lower, failed = torch.linalg.cholesky_ex(turned)
            if not failed:
                one = torch.eye(len(turned), dtype=turned.dtype, device=turned.device, out=turned)
                return torch.linalg.solve_triangular(lower, one, upper=False, out=one).to(self.gram.dtype).flip(0, 1)
            damp = 10 * damp
            if damp > 1e4:
                raise ValueError(
                    "The Hessian of a layer's inputs cannot be inverted: use other or longer calibration text."
                )


def _add_gram(gram: torch.Tensor, x: torch.Tensor) -> None:
    """gram += xᵀx for x (rows, in). It is symmetric: of each strip only what is right of the diagonal is multiplied."""
    for start in range(0, len(gram), STRIP):
        end = start + STRIP
        gram[start:end, start:].addmm_(x[:, start:end].T, x[:, start:])
        gram[end:, start:end] = gram[start:end, end:].T


Solve = Callable[[torch.Tensor, Stats, str], "torch.Tensor | nn.Module | object"]
Prepare = Callable[[nn.Module, "Flow", int], None]


def blocks(model) -> nn.ModuleList:
    """The decoder's list of blocks: of the decoder's ModuleLists the one that holds the most weights, experts included."""

    def weights(modules: nn.ModuleList) -> int:
        return sum(matrix.count for matrix in matrices(modules))

    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model  # a model that sees has other lists too
    lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList)]
    best = max(lists, key=weights, default=None)
    if best is None or weights(best) == 0:
        raise ValueError(
            f"{type(model).__name__} has no list of decoder blocks with weight matrices: labkit cannot walk it."
        )
    return best


@dataclass(frozen=True)
class Matrix:
    """A weight matrix, or a stack of them as experts are: what compression is about."""

    path: str  # of the linear or router; of a parameter with another name than "weight", its own
    module: nn.Module  # that holds it
    tensor: torch.Tensor | None  # None where it is not dense
    count: int  # weights
    nbytes: int  # stored bytes


def matrices(module: nn.Module, prefix: str = "") -> Iterator[Matrix]:
    """Every weight matrix in a module: of linears, and parameters of at least two dimensions (of more than one each).

    So experts (experts, out, in), routers and convolutions are among them, and norms, biases, a bias for each expert
    (experts, out) and vectors that are stored as (1, 1, width) are not.
    """
    for path, part in module.named_modules(prefix=prefix):
        if isinstance(part, STORED):
            yield Matrix(path, part, None, part.out_features * part.in_features, part.stored_nbytes)
            continue
        for name, tensor in part.named_parameters(recurse=False):
            linear = is_linear(part) and name == "weight"
            if linear or (not name.endswith("bias") and sum(size > 1 for size in tensor.shape) >= 2):
                where = path if name == "weight" else f"{path}.{name}".lstrip(".")
                yield Matrix(where, part, tensor, tensor.numel(), tensor.numel() * tensor.element_size())


def path_of(module: nn.Module, model: nn.Module) -> str:
    """Where a module is in its model, such as ``"model.layers"``."""
    return next(name for name, m in model.named_modules() if m is module)


def is_linear(module: nn.Module) -> bool:
    """nn.Linear, GPT-2's Conv1D (a transposed linear), or one of labkit's own that store something smaller.

    A class derived from nn.Linear is one too unless it computes something else, as some routers do.
    """
    return (
        (isinstance(module, nn.Linear) and _multiplies(type(module)))
        or isinstance(module, STORED)
        or _is_conv1d(module)
    )


@cache
def _multiplies(kind: type[nn.Linear]) -> bool:
    """Whether a class that derives from nn.Linear computes x Wᵀ + b, tried out on a small one where it has its own forward."""
    if kind.forward is nn.Linear.forward:
        return True
    small, draw = kind.__new__(kind), torch.Generator().manual_seed(0)
    nn.Linear.__init__(small, 4, 3, device="meta")
    weight, bias, x = (torch.randn(shape, generator=draw) for shape in ((3, 4), (3,), (2, 4)))
    small.weight, small.bias = (nn.Parameter(t, requires_grad=False) for t in (weight, bias))
    try:
        return torch.allclose(small.forward(x), nn.functional.linear(x, weight, bias), atol=1e-5)
    except (AttributeError, RuntimeError, TypeError):  # it needs what only its own constructor sets, or returns more
        return False


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight as (out, in), dequantized where it is packed."""
    weight = module.weight
    return weight.T if _is_conv1d(module) else weight


def check_finite(weight: torch.Tensor, path: str) -> None:
    """Raise a ValueError that names the layer where a weight holds NaN or infinity: one is enough to spoil the sum."""
    if not torch.isfinite(weight.float().sum()):
        raise ValueError(f"The weight of {path} holds NaN or infinity: load the model again or check its file.")


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
) -> str | None:
    """Replace every linear of the decoder by ``solve(weight, stats, path)``, block by block, in place on ``lm``.

    ``solve`` takes the weight (out, in) in fp32, its :class:`Stats` and the layer's path in the model. It returns a new
    weight of that shape, an encoded one (``labkit.formats.Encoded``), which becomes a packed linear, or a module that
    takes the linear's place (its bias and dtype are set here). ``prepare(block, flow, index)``, where it
    is given, may change the block's dense weights before its statistics are gathered. Returns what could not be done as
    asked, in a few words, or None. Raises ValueError on a NaN in a weight or in an activation, naming the layer.
    """
    if statistic not in STATISTICS:
        raise ValueError(f"statistic = {statistic!r} is not allowed: it must be one of {', '.join(STATISTICS)}.")
    stack = blocks(lm.model)
    prefix = path_of(stack, lm.model)
    flow = Flow(lm.model, stack, calib.to(lm.device)) if statistic != "none" else None
    for index in track(range(len(stack)), what, progress):
        block = stack[index]
        if prepare:
            unpack(block)
            prepare(block, flow, index)

        def compressed(name: str, module: nn.Module, stats: Stats, path: str = f"{prefix}.{index}") -> nn.Module:
            weight = weight_of(module).detach().float()
            check_finite(weight, f"{path}.{name}")
            return take_place(module, solve(weight, stats, f"{path}.{name}"))

        if flow:
            flow.compress(index, statistic, compressed)
            continue
        for name, module in list(linears(block)):
            block.set_submodule(name, compressed(name, module, Stats()))
    unseen = list(flow.unseen) if flow else []
    del flow
    heap.trim()
    if not unseen:
        return None
    named = f"{unseen[0]} and {len(unseen) - 1} more" if len(unseen) > 1 else unseen[0]
    return f"no input of {named} was seen in the calibration, so its channels count as if they were alike"


def take_place(module: nn.Module, solved) -> nn.Module:
    """The module that takes a linear's place: of a dense weight (out, in), an encoded one, or as it is."""
    dtype = module.dtype if isinstance(module, STORED) else module.weight.dtype
    if isinstance(solved, nn.Module):
        solved.bias, solved.dtype = module.bias, dtype
        return solved
    if not isinstance(solved, torch.Tensor):
        return PackedLinear(solved, module.bias, dtype=dtype)
    if isinstance(module, STORED):
        return _dense(solved.to(dtype), module.bias)
    set_weight(module, solved)
    return module


def _dense(weight: torch.Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """A linear of this weight (out, in)."""
    linear = nn.Linear(*weight.T.shape, bias=False, device="meta")
    linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), bias
    return linear


def unpack(block: nn.Module) -> None:
    """Make packed linears dense, with the same values."""
    for name, module in list(linears(block)):
        if isinstance(module, STORED):
            block.set_submodule(name, take_place(module, module.weight))


class _Due(nn.Module):
    """Stands in for a linear: a batch that arrives waits until the linear is compressed, then goes through it."""

    def __init__(self, name: str, linear: nn.Module):
        super().__init__()
        self.name, self.linear = name, linear
        self.done = self.product = None  # what it became, and what multiplies while batches pass

    def __getattr__(self, name: str):
        """A block that looks at a linear's weight (its dtype, or all of it, as Mamba does) sees that of what is there."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.done or self.linear, name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.done is None:
            getcurrent().parent.switch((self.name, x))
        return (self.product or self.done)(x)


def _unpacked(module: nn.Module) -> nn.Module:
    """What computes the same under exact(): where each call would unpack the weight, a linear with it, unpacked once."""
    return _dense(module.weight, module.bias) if isinstance(module, (PackedLinear, SparseLinear)) else module


class Flow:
    """The hidden states between blocks, and the other arguments (masks, rotary tables) that each block takes.

    ``hidden``: batches (windows, length, width) of about ``BATCH`` tokens. Small ones, since what a block makes on its way
    then stays in the processor's caches, and is never there for all the tokens at once. Families that have several
    streams put the windows along another axis, ``inputs.axis``. ValueError for a model that cannot be walked.
    """

    def __init__(self, model, stack: nn.ModuleList, calib: torch.Tensor):
        self.stack = stack
        self.unseen: dict[str, None] = {}  # linears that no token came to, in the order of the blocks
        batch = max(1, BATCH[calib.device.type != "cpu"] // calib.shape[1])
        self.inputs = BlockInputs(model, stack, calib)
        self.hidden = [self.inputs.add(ids) for ids in calib.split(batch)]

    def visit(
        self, index: int, statistic: str, each: Callable[[str, nn.Module, Stats], nn.Module]
    ) -> list[torch.Tensor]:
        """Run a block on all batches, in step; each linear becomes ``each(name, module, stats)`` when all have reached it.

        Returns the block's outputs. Every batch runs in a coroutine of its own, which stops where a linear is due.
        """
        block, seen = self.stack[index], WeakTensorKeyDictionary()
        due = {name: _Due(name, module) for name, module in linears(block)}
        for name, stand_in in due.items():
            block.set_submodule(name, stand_in)
        batches = [greenlet(lambda batch=batch: self._pass(index, batch)) for batch in range(len(self.hidden))]
        for batch in batches:
            batch.gr_context = copy_context()  # what exact() has set holds in there too
        try:
            at = [batch.switch() for batch in batches]  # (the linear that is due, its input), or in the end the output
            while waiting := [i for i, batch in enumerate(batches) if not batch.dead]:
                name = min((at[i][0] for i in waiting), key=list(due).index)  # experts: not all batches come to each
                here = [i for i in waiting if at[i][0] == name]
                first = at[here[0]][1]
                if first not in seen:  # else another linear has read the same tensors: q/k/v, gate/up
                    seen[first] = Stats()
                    for i in here:
                        seen[first].add(at[i][1], statistic)
                    seen[first].check(f"{name} in block {index}")
                    heap.trim()  # what stays, and what comes and goes, leave holes between them: hundreds of MB
                due[name].done = each(name, due[name].linear, seen[first])
                due[name].product = _unpacked(due[name].done)
                del first
                for i in here:
                    at[i] = None  # only the batch itself now holds its input
                    at[i] = batches[i].switch()
                due[name].product = None
            for name, stand_in in due.items():  # an expert without a token, or a weight that the block uses by itself
                if stand_in.done is None:
                    self.unseen[f"{name} in block {index}"] = None
                    stand_in.done = each(name, stand_in.linear, Stats.unseen(stand_in.linear, statistic))
            return at
        finally:
            for batch in batches:
                batch.throw()  # those that an error left waiting end here
            for name, stand_in in due.items():
                block.set_submodule(name, stand_in.done or stand_in.linear)

    def compress(self, index: int, statistic: str, compressed: Callable[[str, nn.Module, Stats], nn.Module]) -> None:
        """Replace each linear of a block by ``compressed(name, module, stats)``, and go on to the next block."""
        self.hidden = self.visit(index, statistic, compressed)

    def gather(self, index: int, statistic: str, advance: bool = False) -> dict[str, Stats]:
        """The statistics of one block's linears as they are; linears that were handed the same tensor share one object.

        ``advance``: go on to the next block in the same pass.
        """
        found: dict[str, Stats] = {}

        def note(name: str, module: nn.Module, stats: Stats) -> nn.Module:
            found[name] = stats
            return module

        outputs = self.visit(index, statistic, note)
        if advance:
            self.hidden = outputs
        return found

    def few(self, windows: int | None) -> torch.Tensor:
        """The hidden states of the first windows, or of all (None): (windows, length, width), which :meth:`run` takes."""
        axis = self.inputs.axis
        hidden = _joined(self.hidden[:windows], axis)
        return hidden if windows is None else hidden.narrow(axis, 0, min(windows, hidden.shape[axis]))

    def advance(self, index: int) -> None:
        """Run the block as it is: its outputs are the next block's inputs. The last block's are not needed."""
        if index + 1 < len(self.stack):
            self.hidden = [self._pass(index, batch) for batch in range(len(self.hidden))]

    def run(self, index: int, hidden: torch.Tensor, block: nn.Module | None = None) -> torch.Tensor:
        """One block's output for hidden states of the calibration's first windows: (windows, length, width).

        ``block``: another one that runs in its place.
        """
        block = self.stack[index] if block is None else block
        axis, start, outputs = self.inputs.axis, 0, []
        for windows, (args, kwargs) in self.inputs.pieces(index, hidden.shape[axis]):
            outputs.append(hidden_of(block(hidden.narrow(axis, start, windows), *args, **kwargs)))
            start += windows
        return _joined(outputs, axis)

    def _pass(self, index: int, batch: int) -> torch.Tensor:
        """One block's output for a batch. What it leaves for later blocks is kept."""
        args, kwargs = self.inputs.calls[batch][index]
        return hidden_of(self.stack[index](self.hidden[batch], *args, **kwargs))


def _joined(batches: list[torch.Tensor], axis: int) -> torch.Tensor:
    return batches[0] if len(batches) == 1 else torch.cat(batches, axis)
