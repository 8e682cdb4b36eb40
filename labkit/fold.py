"""Where a factor per channel can move from a linear layer into what feeds it, leaving the model's function unchanged.

AWQ and SmoothQuant multiply the columns of some linears by s and divide what produces their input by s. Places are
proposed by looking (a norm whose output the linears read; a linear whose rows are another's columns) and accepted only
when a random rescaling really leaves the block's output as it was, so no architecture has a file of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from labkit.walk import is_linear, set_weight, weight_of

TOLERANCE = 1e-3  # relative change of a block's output under a rescaling that is exact but for rounding


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
        """Multiply the readers' columns by ``factors`` (in,), and divide the source by them. Tensors are replaced."""
        for name in self.readers:
            reader = block.get_submodule(name)
            set_weight(reader, weight_of(reader) * factors)
        source = block.get_submodule(self.source)
        if self.head_dim is not None:  # one of each group of equal factors
            heads = _width(source) // self.head_dim
            factors = factors.view(heads, -1, self.head_dim)[:, 0].reshape(-1)
        if is_linear(source):
            set_weight(source, weight_of(source) / factors[:, None])
        else:
            source.weight = _parameter((source.weight + self.offset) / factors - self.offset, source.weight)
        if getattr(source, "bias", None) is not None:
            source.bias = _parameter(source.bias / factors, source.bias)


@torch.no_grad()
def folds(block: nn.Module, run: Callable[[], torch.Tensor], head_dim: int | None = None) -> list[Fold]:
    """The places of one block where factors can be folded. ``run()`` gives the block's output on a little input."""
    found, taken = [], set()
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


def _proposals(block: nn.Module, run, head_dim: int | None) -> list[Fold]:
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
        run()
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


def _exact(block: nn.Module, run, fold: Fold) -> bool:
    """Whether a random rescaling leaves the block's output unchanged. The block is as before afterwards."""
    modules = [block.get_submodule(n) for n in (fold.source, *fold.readers)]
    before = [dict(m._parameters) for m in modules]
    expected = run()
    width = _columns(modules[1])
    draw = torch.Generator().manual_seed(0)
    factors = fold.tie(torch.exp(0.5 * torch.randn(width, generator=draw)).to(expected.device), block)
    try:
        fold.apply(block, factors)
        return bool((run() - expected).norm() <= TOLERANCE * expected.norm())
    finally:
        for module, parameters in zip(modules, before):
            module._parameters.update(parameters)


def _parameter(values: torch.Tensor, like: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(like.dtype), requires_grad=False)


def _width(linear: nn.Module) -> int:
    return weight_of(linear).shape[0]


def _columns(linear: nn.Module) -> int:
    return weight_of(linear).shape[1]
