"""A linear layer whose weight stays packed: few rows go through a 4-bit kernel, many through a dense product."""

from __future__ import annotations

import torch
from torch import nn

from labkit.formats import Quantized
from labkit.linear import matmulnbits

DENSE_ROWS = 32  # from this many rows on, unpacking once and a dense product beat the packed kernel


class PackedLinear(nn.Module):
    """y = x Wᵀ + b with W as packed codes, scales and zeros.

    On CPU, 2, 4 and 8 bits run on onnxruntime's MatMulNBits for up to ``DENSE_ROWS`` rows (which rounds activations to
    int8); everything else unpacks the weight to ``dtype`` first, every time, and takes a dense product: correct, and as
    slow as it is.
    """

    def __init__(self, weight: Quantized, bias: torch.Tensor | None = None, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.bits, self.group_size = weight.bits, weight.group_size
        self.in_features, self.out_features = weight.columns, weight.packed.shape[0]
        self.dtype = dtype
        self.register_buffer("packed", weight.packed)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero", weight.zero)
        self.bias = nn.Parameter(bias.detach(), requires_grad=False) if bias is not None else None
        self._kernel: matmulnbits.Kernel | None = None  # built at the first call; holds the runtime's own copy

    @property
    def quantized(self) -> Quantized:
        """The stored weight."""
        return Quantized(self.packed, self.scale, self.zero, self.bits, self.group_size, self.in_features)

    @property
    def weight(self) -> torch.Tensor:
        """The weight, dequantized: (out, in). Computed at every access."""
        return self.quantized.decode().to(self.dtype)

    @property
    def runtime_nbytes(self) -> int:
        """Bytes of the kernel's own copy of the weight, once it has been built."""
        return self._kernel.nbytes if self._kernel else 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.numel() // self.in_features
        if x.device.type == "cpu" and rows <= DENSE_ROWS and matmulnbits.takes(self.bits, self.group_size):
            if self._kernel is None:
                self._kernel = matmulnbits.Kernel(self.quantized)
            y = self._kernel(x.reshape(rows, -1).float()).view(*x.shape[:-1], -1).to(x.dtype)
            return y if self.bias is None else y + self.bias
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)

    def spec(self) -> dict:
        """What :meth:`from_spec` needs, beside the tensors, to make this layer again."""
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "dtype": str(self.dtype).removeprefix("torch."),
            "zero": self.zero is not None,
            "bias": self.bias is not None,
        }

    @classmethod
    def from_spec(cls, spec: dict) -> PackedLinear:
        """An empty layer, whose tensors a loader fills in."""
        empty = torch.empty(spec["out_features"], 0, dtype=torch.uint8)
        weight = Quantized(
            empty, empty.half(), empty if spec["zero"] else None, spec["bits"], spec["group_size"], spec["in_features"]
        )
        return cls(weight, torch.empty(0) if spec["bias"] else None, getattr(torch, spec["dtype"]))

    def __getstate__(self):
        # A copy shares the tensors and builds its own kernel when it is first called: sessions cannot be copied.
        return self.__dict__ | {"_kernel": None}

    def _apply(self, fn, recurse=True):
        self._kernel = None
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}"
