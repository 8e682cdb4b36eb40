"""Where a factor per channel can move from a linear layer into what feeds it, leaving the model's function unchanged.

AWQ and SmoothQuant multiply the columns of some linears by s and divide what produces their input by s. Places are
proposed by looking (a norm whose output the linears read; a linear whose rows are another's columns) and accepted only
when a random rescaling really leaves the block's output as it was, so no architecture has a file of its own.

In 16 bits rounding alone changes a block's output more than that, so the proof is made on a copy in fp32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import nn

from labkit.block_inputs import mapped
from labkit.walk import is_linear, set_weight, weight_of

# The most that a rescaling may change a block's output, of the output itself and of what the readers add to it.
TOLERANCE = 1e-3

Run = Callable[[nn.Module], torch.Tensor]  # the output of a block, or of a copy of it, on a little input


@dataclass(frozen=True)
class Fold:
    """``readers`` (paths in the block) read what ``source`` produces; a factor may move from one to the other.

    ``offset``: 1 for norms that multiply by 1 + weight (Gemma). ``head_dim``: set where each of the source's heads
    feeds several of the reader's (v -> o under grouped-query attention): those share their factors.
    """

    source: str
    readers: tuple[str, ...]
    offset: float = 0.0
    head_dim: int | None = None

    def tie(self, factors: torch.Tensor, block: nn.Module) -> torch.Tensor:
        """Factors (in,) made equal where they have to be: their geometric mean over the heads that share a source."""
        if self.head_dim is None:
            return factors
        heads = _width(block.get_submodule(self.source)) // self.head_dim
        shared = factors.log().view(heads, -1, self.head_dim).mean(1, keepdim=True).exp()
        return shared.expand(heads, len(factors) // heads // self.head_dim, self.head_dim).reshape(-1)

    def apply(self, block: nn.Module, factors: torch.Tensor) -> None:
        """Divide the source by ``factors`` (in,), and multiply the readers' columns by them. Tensors are replaced."""
        source = block.get_submodule(self.source)
        if is_linear(source):
            rows = factors
            if self.head_dim is not None:  # one of each group of equal factors
                heads = _width(source) // self.head_dim
                rows = factors.view(heads, -1, self.head_dim)[:, 0].reshape(-1)
            set_weight(source, weight_of(source) / rows[:, None])
        else:
            rows = factors = self._divide_norm(source, factors)
        if getattr(source, "bias", None) is not None:
            source.bias = _parameter(source.bias / rows, source.bias)
        for name in self.readers:
            reader = block.get_submodule(name)
            set_weight(reader, weight_of(reader) * factors)

    def _divide_norm(self, norm: nn.Module, factors: torch.Tensor) -> torch.Tensor:
        """Divide a norm's gains, and return the factors by which they really became smaller.

        Rounding to 16 bits changes a gain by up to 0.4 %, and one that is stored less 1 by far more: 0.01 lies next to
        -0.99, where steps of bf16 are 0.004. A gain that would become zero stays as it was.
        """
        gain = norm.weight + self.offset
        new = _parameter(gain / factors - self.offset, norm.weight)
        if norm.weight.dtype.itemsize >= 4:
            norm.weight = new
            return factors
        gain, kept = norm.weight.float() + self.offset, new.float() + self.offset
        lost = (kept == 0) & (gain != 0)
        norm.weight = _parameter(torch.where(lost, norm.weight, new), norm.weight)
        return torch.where(lost, 1.0, torch.where(gain == 0, factors, gain / kept))


@dataclass
class Places:
    """In how many blocks a method has found a place for its factors; ``done``: what it does there, in a word."""

    done: str = "scaled"
    blocks: int = 0
    found: int = 0

    def count(self, places: Collection[Fold]) -> None:
        """One more block, with these places."""
        self.blocks += 1
        self.found += bool(places)

    def said(self) -> str | None:
        """``"scaled in 12 of 30 blocks"``; None where it was all of them."""
        if self.found == self.blocks:
            return None
        return f"{self.done} in {self.found or 'none'} of {self.blocks} blocks"


def in_float32(block: nn.Module) -> nn.Module:
    """A copy of a block that computes in fp32, whatever it is handed; the block itself where none of it is narrower."""
    tensors = [*block.parameters(), *block.buffers()]
    if all(t.dtype.itemsize >= 4 for t in tensors if t.is_floating_point()):
        return block
    twin = copy.deepcopy(block).float()
    twin.register_forward_pre_hook(_widen, with_kwargs=True)
    return twin


def _widen(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Hidden states, masks, rotary tables and all else that a block takes: what is in floats becomes fp32."""
    return mapped((args, kwargs), lambda at, x: x.float() if torch.is_tensor(x) and x.is_floating_point() else x)


@torch.no_grad()
def folds(block: nn.Module, run: Run, head_dim: int | None = None) -> list[Fold]:
    """The places of one block where factors can be folded. ``run(block)`` gives the output of the block it is handed."""
    block, found, taken = in_float32(block), [], set()
    for fold in _proposals(block, run, head_dim):
        if not taken.intersection(fold.readers) and _exact(block, run, fold):
            found.append(fold)
            taken.update(fold.readers)
    return found


def head_dim_of(lm) -> int | None:
    """Channels of an attention head, for folds between v and o; None where the config does not say."""
    config = lm.model.config
    heads = getattr(config, "num_attention_heads", None)
    return getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)


def _proposals(block: nn.Module, run: Run, head_dim: int | None) -> list[Fold]:
    """Norms whose very output tensor linears read; then, the latest first, linears whose rows fit another's columns."""
    made: dict[int, str] = {}  # id of a tensor -> the module that made it
    read: dict[str, int] = {}  # linear -> id of its input, in the order of the calls
    keep = []

    def note(name):
        def hook(module, args, out):
            if isinstance(out, torch.Tensor):
                made.setdefault(id(out), name)
                keep.append(out)
            if is_linear(module):
                read.setdefault(name, id(args[0]))
                keep.append(args[0])

        return hook

    leaves = [(n, m) for n, m in block.named_modules() if n and not any(m.children())]
    handles = [m.register_forward_hook(note(n)) for n, m in leaves]
    try:
        run(block)
    finally:
        for handle in handles:
            handle.remove()
    modules = dict(leaves)
    proposals = []
    for tensor in dict.fromkeys(read.values()):
        source = made.get(tensor)
        if source and getattr(modules[source], "weight", None) is not None and modules[source].weight.dim() == 1:
            readers = tuple(n for n, t in read.items() if t == tensor)
            proposals += [Fold(source, readers, offset) for offset in (0.0, 1.0)]
    order = list(read)
    for reader in order:
        width = _columns(modules[reader])
        for source in reversed(order[: order.index(reader)]):
            if _width(modules[source]) == width:
                proposals.append(Fold(source, (reader,)))
            elif head_dim and width % _width(modules[source]) == 0 and _width(modules[source]) % head_dim == 0:
                proposals.append(Fold(source, (reader,), head_dim=head_dim))
    return proposals


def _exact(block: nn.Module, run: Run, fold: Fold) -> bool:
    """Whether a random rescaling leaves the block's output unchanged. The block is as before afterwards.

    Where weights are small any rescaling does: so the change must also be little of what the readers add to the output.
    """
    modules = [block.get_submodule(n) for n in (fold.source, *fold.readers)]
    before = [dict(m._parameters) for m in modules]
    expected = run(block)
    width = _columns(modules[1])
    draw = torch.Generator().manual_seed(0)
    factors = fold.tie(torch.exp(0.5 * torch.randn(width, generator=draw)).to(expected.device), block)
    try:
        fold.apply(block, factors)
        change = (run(block) - expected).norm()
        if not change <= TOLERANCE * expected.norm():  # NaN too
            return False
        for reader in modules[1:]:
            set_weight(reader, torch.zeros_like(weight_of(reader)))
        return bool(change <= TOLERANCE * (run(block) - expected).norm())
    finally:
        for module, parameters in zip(modules, before):
            module._parameters.update(parameters)


def _parameter(values: torch.Tensor, like: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(like.dtype), requires_grad=False)


def _width(linear: nn.Module) -> int:
    return weight_of(linear).shape[0]


def _columns(linear: nn.Module) -> int:
    return weight_of(linear).shape[1]
