"""What the uncompressed model says about some windows, worked out once: many models are compared with it.

Logits over a whole vocabulary are too many to keep (100 MB for a window of 512 tokens). What goes into the output layer is
not: it is kept, and the output layer, a fifth of this lab's model, is all that runs again.
"""

from __future__ import annotations

import weakref

import torch

from labkit import identity, text

KEPT = 4  # sets of windows per model

# transformers model -> {windows and weights: Reference}
_models: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def remembered(lm, windows: torch.Tensor) -> Reference:
    """The :class:`Reference` of a model on windows (windows, length), kept while all of its weights are what they were."""
    known = _models.setdefault(lm.model, {})
    key = (text.fingerprint(windows), str(lm.device), identity.fingerprint(lm.model))
    if key not in known:
        while len(known) >= KEPT:
            known.pop(next(iter(known)))  # the oldest
        known[key] = Reference(lm, windows)
    return known[key]


class Reference:
    """A model's logits on windows, one window at a time. The model is held weakly."""

    def __init__(self, lm, windows: torch.Tensor):
        self._model, self.windows = weakref.ref(lm.model), windows.clone()
        self._inputs: list[torch.Tensor | None] = [None] * len(windows)  # of the output layer, (length, width)

    def logits(self, index: int) -> torch.Tensor:
        """(length, vocabulary)"""
        model = self._model()
        head, kept = model.get_output_embeddings(), self._inputs[index]
        if kept is not None:
            return head(kept)
        seen = []
        handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            logits = model(self.windows[index : index + 1].to(model.device)).logits[0]
        finally:
            handle.remove()
        # Some families scale or cap what the output layer gives: there is nothing to keep then.
        if len(seen) == 1:
            off = (head(seen[0][0, :2]) - logits[:2]).abs().max()
            if off <= 32 * torch.finfo(logits.dtype).eps * logits[:2].abs().max():
                self._inputs[index] = seen[0][0].clone()
        return logits
