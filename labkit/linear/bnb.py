"""Linear layers that bitsandbytes computes: NF4 and FP4 with double quantization, and LLM.int8 with its outlier columns.

Where its 4-bit kernels are wrong or do not exist we unpack the same codes ourselves: rows of some widths (bitsandbytes
0.50.2 mistakes the blocks of rows that are a multiple of 16 and not of 64 wide on a CPU with AVX-512), odd widths, and
float64, where it hands back memory that nobody wrote to. :func:`right` tries a width out before it is used.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from labkit import install
from labkit.linear.base import StoredLinear

BLOCK, NESTED = 64, 256  # weights that share a scale, and scales that share one themselves
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that the library computes in


def library():
    """bitsandbytes, or an ImportError that says what to install."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise install.missing("bitsandbytes", "lab") from error
    return bitsandbytes


class BnbLinear(StoredLinear):
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
            # It takes fp16, which has no number for small weights: each row goes in times a power of two.
            exponent = torch.frexp(weight.float().abs().amax(1)).exponent
            rows = torch.ldexp(weight.float(), -exponent[:, None])
            codes, scale, _ = functional.int8_vectorwise_quant(rows.to(torch.float16))
            codes = codes.masked_fill_((scale == 0)[:, None], 0)  # it divides by the scale
            tensors = {"int8": codes, "scale": torch.ldexp(scale, exponent)}
        else:
            packed, state = functional.quantize_4bit(
                weight, quant_type=type, compress_statistics=double_quant, blocksize=BLOCK
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
        return self._decoded().to(self.dtype)

    def _decoded(self) -> torch.Tensor:
        """4-bit codes unpacked by us, fp32 (out, in): blocks run on from one row into the next."""
        state, count = self._state(), self.out_features * self.in_features
        absmax = state.absmax
        if state.nested:
            coarse = state.state2.absmax.repeat_interleave(NESTED)[: absmax.numel()]
            absmax = state.state2.code[absmax.int()] * coarse + state.offset
        pairs = self.packed.view(torch.uint8).flatten()
        codes = torch.stack([pairs >> 4, pairs & 15], 1).flatten()[:count]
        values = state.code[codes.int()] * absmax.repeat_interleave(BLOCK)[:count]
        return values.view(self.out_features, self.in_features)

    def library_computes(self, dtype: torch.dtype) -> bool:
        """Whether the library's kernel multiplies by this weight, for inputs of a dtype; else it is unpacked by us."""
        if self.type == "int8":
            return True
        return dtype in DTYPES and right(self.type, self.in_features, self._state().nested, dtype, self.packed.device)

    @property
    def stored_nbytes(self) -> int:
        """Bytes of the codes, the scales and the library's tables."""
        return sum(t.numel() * t.element_size() for t in (getattr(self, n) for n in self._names))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bnb = library()
        if not self.library_computes(x.dtype):
            return nn.functional.linear(x, self._decoded().to(x.dtype), self.bias)
        if self.type != "int8":
            return self._product(x)
        state = bnb.MatmulLtState()
        state.CB, state.SCB, state.threshold, state.has_fp16_weights = self.int8, self.scale, self.threshold, False
        return bnb.matmul(x, self.int8, state=state, bias=self.bias)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        return library().matmul_4bit(x, self.packed.t(), quant_state=self._state(), bias=self.bias)

    def _load_from_state_dict(self, *args, **kwargs):
        self._made = None
        super()._load_from_state_dict(*args, **kwargs)

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


@functools.cache
@torch.no_grad()
def right(type: str, width: int, double_quant: bool, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the library's product with 4-bit rows of this width is the product with what their codes say.

    Tried once on 64 random rows, in which blocks of 64 begin at every place where they can.
    """
    if width % 2:  # it would call a compiler
        return False
    draw = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, width, generator=draw).to(device) for rows in (BLOCK, 32))
    layer, x = BnbLinear.encode(weight, type, double_quant, 0.0), x.to(dtype)
    truth = nn.functional.linear(x.float(), layer._decoded())
    found = torch.cat([layer._product(x[:1]), layer._product(x[1:])]).float()  # a GPU has other kernels for one row
    return bool((found - truth).norm() <= 0.05 * truth.norm())  # 16 bits are 0.01 off at most, wrong blocks 0.4
