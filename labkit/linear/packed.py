"""A linear layer whose weight stays packed, and where its codes lie: with us, or with a kernel's runtime."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

from labkit import formats, identity
from labkit.linear import matmulnbits, tinygemm
from labkit.linear.base import StoredLinear

KERNELS = (matmulnbits, tinygemm)

_exact: ContextVar[bool] = ContextVar("labkit_exact", default=False)


@contextmanager
def exact() -> Iterator[None]:
    """Inside, packed linears unpack their weight and multiply in floating point, as papers on weight-only methods do.

    Outside, a kernel may round activations too: that is what runs. Accuracy is measured inside, time outside.
    """
    token = _exact.set(True)
    try:
        yield
    finally:
        _exact.reset(token)


class PackedLinear(StoredLinear):
    """y = x Wᵀ + b with W as packed codes and what its format stores beside them.

    Where a kernel takes the format, it computes everything (outside of :func:`exact`), and it keeps the codes in an
    order of its own. So that they are not held twice, ours are released once it is built, and read back out of it when
    somebody asks for them. Other formats unpack the weight to ``dtype`` at every call and take a dense product:
    correct, and as slow as it is.
    """

    def __init__(self, weight: formats.Encoded, bias: torch.Tensor | None = None, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.format, self.dtype = weight.spec(), dtype
        self.stored_nbytes = weight.nbytes
        self._names = tuple(weight.tensors())
        for name, tensor in weight.tensors().items():
            self.register_buffer(name, tensor)
        self.bias = nn.Parameter(bias.detach(), requires_grad=False) if bias is not None else None
        self._kernel = None  # built at the first call that can use it
        self.released: dict[str, str] = {}  # the digest of the codes, while only the kernel has them

    @property
    def quantized(self) -> formats.Encoded:
        """The stored weight. Brings the codes back where a kernel has them."""
        self.take_back()
        return formats.restore(self.format, self._stored())

    @property
    def weight(self) -> torch.Tensor:
        """The weight, dequantized: (out, in). Computed at every access."""
        return self.quantized.decode().to(self.dtype)

    @property
    def runtime_nbytes(self) -> int:
        """Bytes that the kernel's runtime holds for this layer."""
        return self._kernel.nbytes if self._kernel else 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not _exact.get() and self._ready():
            y = self._kernel(x.reshape(-1, self.in_features)).view(*x.shape[:-1], -1).to(x.dtype)
            return y if self.bias is None else y + self.bias
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)

    def _ready(self) -> bool:
        """Build the kernel, where there is one, and hand it the codes."""
        if self._kernel is None:
            weight = self.quantized
            found = next((k for k in KERNELS if k.takes(weight, self.scale.device)), None)
            if found is None:
                return False
            self._kernel = found.Kernel(weight)
            self.released = {"packed": identity.digest(self.packed)}
            self.packed = None
        return True

    def take_back(self) -> None:
        """Read the codes out of the kernel, exactly, and let go of it.

        Each unit vector times the matrix is one column of decoded weights. A unit vector survives the rounding of
        activations, and a code is a whole number: what the kernel's arithmetic adds to it (below 0.05) rounds away.
        """
        if self._kernel is None:
            return
        unit = torch.eye(self.in_features, device=self.scale.device)
        columns = self._kernel(unit).float()  # (in, out)
        no_codes = columns.new_empty(self.out_features, 0, dtype=torch.uint8)
        shell = formats.restore(self.format, self._stored() | {"packed": no_codes})
        codes = shell.form.quantize(shell.form.groups(columns.T), shell.params())
        codes = codes.view(self.out_features, -1)[:, : self.in_features].contiguous()
        packed = formats.pack(codes, shell.form.bits)
        if identity.digest(packed) != self.released["packed"]:
            raise RuntimeError(
                "The kernel's runtime did not give back the codes that it was given: it cannot be trusted."
            )
        self.packed, self._kernel, self.released = packed, None, {}

    def _stored(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in self._names}

    def spec(self) -> dict:
        """What :meth:`from_spec` needs, beside the tensors, to make this layer again."""
        return {
            "module": "PackedLinear",
            "format": self.format,
            "tensors": self._names,
            "dtype": str(self.dtype).removeprefix("torch."),
            "bias": self.bias is not None,
            "nbytes": self.stored_nbytes,
        }

    @classmethod
    def from_spec(cls, spec: dict) -> PackedLinear:
        """A layer without content, whose tensors a loader fills in."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.out_features, layer.in_features = spec["format"]["shape"]
        layer.format, layer.dtype = spec["format"], getattr(torch, spec["dtype"])
        layer._names, layer._kernel, layer.stored_nbytes = tuple(spec["tensors"]), None, spec["nbytes"]
        layer.released = {}
        for name in layer._names:
            layer.register_buffer(name, torch.empty(0))
        layer.bias = nn.Parameter(torch.empty(0), requires_grad=False) if spec["bias"] else None
        return layer

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self.take_back()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _apply(self, fn, recurse=True):
        self.take_back()  # kernels stay on the device they were built for
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        said = ", ".join(f"{name}={value}" for name, value in self.format.items())
        return f"{self.in_features}, {self.out_features}, {said}"
