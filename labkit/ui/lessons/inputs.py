"""What each linear layer of a model is given when it reads some text: the activations behind notebook 03's views."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence

import torch
from torch import nn

from labkit.fold import Fold, folds, head_dim_of
from labkit.linear import exact
from labkit.walk import Flow, blocks, linears, weight_of


def kinds_of(stack: Sequence[nn.Module]) -> tuple[str, ...]:
    """The paths of the linears that every block has, in the first one's order. ValueError where there is none."""
    first, *others = ([name for name, _ in linears(block)] for block in stack)
    shared = tuple(name for name in first if all(name in other for other in others))
    if not shared:
        raise ValueError("No linear layer is in all blocks of this model: choose one whose blocks are more alike.")
    return shared


class Inputs:
    """The inputs of every linear layer for token windows ids (windows, length).

    Only the hidden states between blocks are kept; a layer's input is computed when it is asked for, and those of the
    newest blocks are remembered. Works on a copy of the modules: searches that swap weights for a moment never touch ``lm``.
    ``kinds``: the layers that all blocks have.
    """

    @exact()
    @torch.no_grad()
    def __init__(self, lm, ids: torch.Tensor):
        self.lm = lm.copy()
        self.stack = blocks(self.lm.model)
        self.lock = threading.RLock()  # a slider's worker and the notebook's own thread may ask at once
        self.kinds = kinds_of(self.stack)
        self.flow = Flow(self.lm.model, self.stack, ids.to(lm.device))
        self._hidden = []
        for index in range(len(self.stack)):
            self._hidden.append(self.flow.hidden)
            self.flow.advance(index)
        self._of = functools.lru_cache(4)(self._read)
        self.folds = functools.lru_cache(64)(self._folds)

    def weight(self, block: int, kind: str) -> torch.Tensor:
        """A layer's weight, fp32 (out, in)."""
        return weight_of(self.stack[block].get_submodule(kind)).detach().float()

    @exact()
    @torch.no_grad()
    def run(self, block: int, windows: int | None = None, module: nn.Module | None = None) -> torch.Tensor:
        """One block's output (windows, length, width), for the first windows or for all. ``module``: runs in its place."""
        self.flow.hidden = self._hidden[block]
        return self.flow.run(block, self.flow.few(windows), module)

    def of(self, block: int, kind: str) -> torch.Tensor:
        """The layer's input, fp32 (tokens, in)."""
        return self._of(block)[kind]

    def read(self, block: int) -> list[str]:
        """The layers of one block that read something: not an expert to which no token came."""
        seen = self._of(block)
        return [name for name, _ in linears(self.stack[block]) if name in seen]

    def _read(self, block: int) -> dict[str, torch.Tensor]:
        """The inputs of all linears of a block; those that read the same tensor share it."""
        seen: dict[str, torch.Tensor] = {}
        with self.lock:
            handles = [
                module.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]}))
                for name, module in linears(self.stack[block])
            ]
            try:
                self.run(block)
            finally:
                for handle in handles:
                    handle.remove()
        return {name: x.float().flatten(0, -2) for name, x in seen.items()}

    def _folds(self, block: int) -> list[Fold]:
        """Where factors can be folded in this block."""
        with self.lock:
            return folds(self.stack[block], lambda module: self.run(block, 1, module), head_dim_of(self.lm))
