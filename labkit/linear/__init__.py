"""Linear layers that store packed weights and run on real kernels."""

from labkit.linear.packed import PackedLinear, exact

__all__ = ["PackedLinear", "exact"]
