"""Where a text goes on after what is in the cache, told to the model: not every family counts right by itself.

Bamba's (transformers 5.23) looks for the number of tokens so far in a layer that keeps none, and begins anew at 0.
"""

from __future__ import annotations

import inspect

import torch


def after(model, read: int, tokens: int, rows: int = 1) -> dict:
    """The argument for ``tokens`` more tokens after ``read``: position_ids (rows, tokens); {} for a model that takes none."""
    if not read or "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return {"position_ids": torch.arange(read, read + tokens, device=model.device).expand(rows, -1)}
