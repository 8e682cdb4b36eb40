"""What labkit's own linears have in common: how they follow their model to another dtype or device."""

from __future__ import annotations

import torch
from torch import nn


class StoredLinear(nn.Module):
    """A linear whose weight is kept in other tensors than one of floats; ``dtype`` is what it becomes when it is unpacked.

    ``.half()`` is about that dtype, not about codes, scales and tables: those stay as they are stored. A table rounded to
    16 bits would change every weight, a scale of 1e-8 would be 0, and a library that reads fp32 would read garbage.
    """

    dtype: torch.dtype
    bias: nn.Parameter | None

    def _apply(self, fn, recurse=True):
        became = fn(torch.empty(0, dtype=self.dtype, device=next(self.buffers()).device))

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        super()._apply(moved, recurse)
        self.dtype = became.dtype
        if self.bias is not None:
            self.bias.data = self.bias.data.to(self.dtype)
        return self
