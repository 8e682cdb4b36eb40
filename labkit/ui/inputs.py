"""What each linear layer of a model is given when it reads some text: the activations behind notebook 03's views."""

from __future__ import annotations

import functools
import threading

import torch

from labkit.fold import Fold, folds
from labkit.linear import exact
from labkit.quantize.awq import head_dim_of
from labkit.walk import Flow, blocks, linears, weight_of


class Inputs:
    """The inputs of every linear layer for token windows ids (windows, length).

    Only the hidden states between blocks are kept; a layer's input is computed when it is asked for, and the newest ones
    are remembered. Works on a copy of the modules: searches that swap weights for a moment never touch ``lm``.
    """

    @exact()
    @torch.no_grad()
    def __init__(self, lm, ids: torch.Tensor):
        self.lm = lm.copy()
        self.stack = blocks(self.lm.model)
        self.lock = threading.RLock()  # a slider's worker and the notebook's own thread may ask at once
        self.kinds = tuple(name for name, _ in linears(self.stack[0]))
        self.flow = Flow(self.lm.model, self.stack, ids.to(lm.device), batch=len(ids))
        self._hidden = []
        for index in range(len(self.stack)):
            self._hidden.append(self.flow.hidden)
            self.flow.advance(index)
        self.of = functools.lru_cache(16)(self._of)
        self.folds = functools.lru_cache(64)(self._folds)

    def weight(self, block: int, kind: str) -> torch.Tensor:
        """A layer's weight, fp32 (out, in)."""
        return weight_of(self.stack[block].get_submodule(kind)).detach().float()

    @exact()
    @torch.no_grad()
    def run(self, block: int, windows: int | None = None) -> torch.Tensor:
        """One block's output (windows, length, width), for the first windows or for all."""
        self.flow.hidden = self._hidden[block]
        return self.flow.run(block, self._hidden[block][0][:windows])

    def _of(self, block: int, kind: str) -> torch.Tensor:
        """The layer's input, fp32 (tokens, in)."""
        seen = []
        with self.lock:
            module = self.stack[block].get_submodule(kind)
            handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
            try:
                self.run(block)
            finally:
                handle.remove()
        return seen[0].float().flatten(0, -2)

    def _folds(self, block: int) -> list[Fold]:
        """Where factors can be folded in this block."""
        with self.lock:
            return folds(self.stack[block], lambda: self.run(block, 1), head_dim_of(self.lm))
