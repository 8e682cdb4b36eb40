"""A linear layer whose weight lies in a sparse container."""

from __future__ import annotations

import torch
from torch import nn

from labkit.linear.base import StoredLinear
from labkit.linear.packed import _exact
from labkit.linear.sparse.base import Sparse

ROWS = 64  # with more rows of x than this the matrix is made dense once, and multiplied as such


class SparseLinear(StoredLinear):
    """y = x Wᵀ + b with W in a container: a bitmask, N:M, CSR, dense with zeros, or pruned and quantized.

    A few rows of x, as in decoding, run on the container's own product. Many rows, as when a prompt is read, and all
    inside of :func:`labkit.linear.exact` multiply by the dense matrix: a dense product does so many more operations per
    second that it wins although most of them are by zero. Both are products in floating point.

    ``dtype`` is what the weight becomes. Values that are wider than it are narrowed to it; narrower ones stay as they are.
    """

    def __init__(self, container: Sparse, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.out_features, self.in_features = container.shape
        self.described = container.spec()
        self._names = tuple(container.tensors())
        for name, tensor in container.tensors().items():
            self.register_buffer(name, tensor)
        self.bias = nn.Parameter(bias.detach(), requires_grad=False) if bias is not None else None
        self._product = None  # built at the first call that uses it
        values = container.tensors().get("values")
        self.dtype = dtype or (torch.float32 if values is None else values.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @dtype.setter
    def dtype(self, dtype: torch.dtype) -> None:
        self._dtype, self._product = dtype, None
        values = self._buffers.get("values")
        if values is not None and values.element_size() > dtype.itemsize:
            self.values = values.to(dtype)

    @property
    def container(self) -> Sparse:
        """The stored weight."""
        from labkit.linear.sparse import restore

        return restore(self.described, {name: getattr(self, name) for name in self._names})

    @property
    def weight(self) -> torch.Tensor:
        """The weight, dense: (out, in). Computed at every access."""
        return self.container.decode().to(self.dtype)

    @property
    def stored_nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return self.container.nbytes

    @property
    def runtime_nbytes(self) -> int:
        """Bytes that the product holds beside them."""
        return self._product.nbytes if self._product else 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        if _exact.get() or len(rows) > ROWS:
            return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)
        if self._product is None:
            self._product = self.container.product()
        y = self._product(rows).to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def spec(self) -> dict:
        """What :meth:`from_spec` needs, beside the tensors, to make this layer again."""
        return {
            "module": "SparseLinear",
            "container": self.described,
            "tensors": self._names,
            "dtype": str(self.dtype).removeprefix("torch."),
            "bias": self.bias is not None,
        }

    @classmethod
    def from_spec(cls, spec: dict) -> SparseLinear:
        """A layer without content, whose tensors a loader fills in."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.described = spec["container"]
        layer.out_features, layer.in_features = layer.described["shape"]
        layer._names, layer._product, layer._dtype = tuple(spec["tensors"]), None, getattr(torch, spec["dtype"])
        for name in layer._names:
            layer.register_buffer(name, torch.empty(0))
        layer.bias = nn.Parameter(torch.empty(0), requires_grad=False) if spec["bias"] else None
        return layer

    def _load_from_state_dict(self, *args, **kwargs):
        self._product = None  # it knows where the rows of the old values begin
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        said = ", ".join(f"{name}={value}" for name, value in self.described.items() if name != "shape")
        return f"{self.in_features}, {self.out_features}, {said}"
