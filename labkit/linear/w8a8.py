"""A linear layer that multiplies integers: int8 activations times int8 weights, added up in int32."""

from __future__ import annotations

import torch
from torch import nn

from labkit.linear.base import StoredLinear


class W8A8Linear(StoredLinear):
    """y = (round(x / s_x) · W_int8ᵀ) · s_x · s_w + b, the product in whole numbers (``torch._int_mm``).

    Weights have one scale per output row. Activations have one per token, found anew at each call ("dynamic"), or one
    for the whole layer, fixed at calibration ("static"): the first costs a pass over x, the second clips what was not
    seen. Rounding activations is part of the method, so :func:`labkit.linear.exact` does not switch it off.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        activation_scale: torch.Tensor | None = None,
    ):
        """``weight``: (out, in), rounded here. ``activation_scale``: (), largest |x| / 127; None for dynamic."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype
        scale = (weight.float().abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        self.register_buffer("int8", (weight.float() / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)  # (out,)
        self.register_buffer("activation_scale", activation_scale)
        self.bias = nn.Parameter(bias.detach(), requires_grad=False) if bias is not None else None

    @property
    def weight(self) -> torch.Tensor:
        """The weight, dequantized: (out, in)."""
        return (self.int8.float() * self.scale[:, None]).to(self.dtype)

    @property
    def stored_nbytes(self) -> int:
        """Bytes of the weight and its scales."""
        return self.int8.numel() + 4 * self.scale.numel()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features).float()
        scale = self.activation_scale
        if scale is None:
            scale = (rows.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)  # (rows, 1)
        codes = (rows / scale).round().clamp(-127, 127).to(torch.int8)
        y = _int_mm(codes, self.int8) * scale * self.scale
        y = y.view(*x.shape[:-1], -1).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def spec(self) -> dict:
        """What :meth:`from_spec` needs, beside the tensors, to make this layer again."""
        return {
            "module": "W8A8Linear",
            "shape": [self.out_features, self.in_features],
            "dtype": str(self.dtype).removeprefix("torch."),
            "static": self.activation_scale is not None,
            "bias": self.bias is not None,
        }

    @classmethod
    def from_spec(cls, spec: dict) -> W8A8Linear:
        """A layer without content, whose tensors a loader fills in."""
        empty = torch.empty(0)
        static = empty if spec["static"] else None
        layer = cls(torch.zeros(1, 1), empty if spec["bias"] else None, getattr(torch, spec["dtype"]), static)
        layer.out_features, layer.in_features = spec["shape"]
        return layer

    def extra_repr(self) -> str:
        kind = "dynamic" if self.activation_scale is None else "static"
        return f"{self.in_features}, {self.out_features}, int8 × int8, {kind} activation scale"


def _int_mm(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """int8 (rows, in) times int8 (out, in) transposed -> int32 (rows, out). CUDA's kernel wants more than 16 rows."""
    rows = len(codes)
    if codes.device.type == "cuda" and rows <= 16:  # unverified
        codes = nn.functional.pad(codes, (0, 0, 0, 17 - rows))
    return torch._int_mm(codes, weight.T)[:rows]
