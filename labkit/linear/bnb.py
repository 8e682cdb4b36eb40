"""Linear layers that bitsandbytes computes: NF4 and FP4 with double quantization, and LLM.int8 with its outlier columns."""

from __future__ import annotations

import torch
from torch import nn

from labkit import install


def library():
    """bitsandbytes, or an ImportError that says what to install."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise install.missing("bitsandbytes", "lab") from error
    return bitsandbytes


class BnbLinear(nn.Module):
    """y = x Wᵀ + b through bitsandbytes, on weights in its own layout.

    "nf4", "fp4": 4-bit codes, a scale per 64 weights (itself stored in 8 bits with ``double_quant``); unpacked to x's
    dtype and multiplied. "int8": int8 × int8, but columns where some |x| passes ``threshold`` in floating point.
    """

    def __init__(
        self, type: str, shape: tuple[int, int], dtype: torch.dtype, threshold: float, tensors: dict, bias=None
    ):
        super().__init__()
        self.type, self.dtype, self.threshold = type, dtype, threshold
        self.out_features, self.in_features = shape
        self._names, self._made = tuple(tensors), None
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.bias = nn.Parameter(bias.detach(), requires_grad=False) if bias is not None else None

    @classmethod
    def encode(cls, weight: torch.Tensor, type: str, double_quant: bool, threshold: float) -> BnbLinear:
        """Let the library round a weight (out, in)."""
        functional = library().functional
        if type == "int8":
            codes, scale, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
            tensors = {"int8": codes, "scale": scale}
        else:
            packed, state = functional.quantize_4bit(
                weight, quant_type=type, compress_statistics=double_quant, blocksize=64
            )
            tensors = {"packed": packed} | {k.replace(".", "__"): v for k, v in state.as_dict(packed=True).items()}
        return cls(type, tuple(weight.shape), weight.dtype, threshold, tensors)

    def _state(self):
        """The library's own description of a 4-bit weight; made again where the codes were loaded or moved."""
        if self._made is not None and self._made[0] is self.packed:
            return self._made[1]
        stored = {name.replace("state__", "state."): getattr(self, name) for name in self._names if name != "packed"}
        self._made = self.packed, library().functional.QuantState.from_dict(stored, device=self.packed.device)
        return self._made[1]

    @property
    def weight(self) -> torch.Tensor:
        """The weight, dequantized: (out, in)."""
        if self.type == "int8":
            return (self.int8.float() * self.scale[:, None] / 127).to(self.dtype)
        return library().functional.dequantize_4bit(self.packed, self._state()).to(self.dtype)

    @property
    def stored_nbytes(self) -> int:
        """Bytes of the codes, the scales and the library's tables."""
        return sum(t.numel() * t.element_size() for t in (getattr(self, n) for n in self._names))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bnb = library()
        if self.type != "int8":
            return bnb.matmul_4bit(x, self.packed.t(), quant_state=self._state(), bias=self.bias)
        state = bnb.MatmulLtState()
        state.CB, state.SCB, state.threshold, state.has_fp16_weights = self.int8, self.scale, self.threshold, False
        return bnb.matmul(x, self.int8, state=state, bias=self.bias)

    def spec(self) -> dict:
        """What :meth:`from_spec` needs, beside the tensors, to make this layer again."""
        return {
            "module": "BnbLinear",
            "type": self.type,
            "shape": [self.out_features, self.in_features],
            "dtype": str(self.dtype).removeprefix("torch."),
            "threshold": self.threshold,
            "tensors": self._names,
            "bias": self.bias is not None,
        }

    @classmethod
    def from_spec(cls, spec: dict) -> BnbLinear:
        """A layer without content, whose tensors a loader fills in."""
        tensors = {name: torch.empty(0) for name in spec["tensors"]}
        bias = torch.empty(0) if spec["bias"] else None
        return cls(spec["type"], spec["shape"], getattr(torch, spec["dtype"]), spec["threshold"], tensors, bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bitsandbytes {self.type}"
