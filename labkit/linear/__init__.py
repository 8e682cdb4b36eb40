"""Linear layers that store packed or sparse weights and run on real kernels."""

from labkit.linear.bnb import BnbLinear
from labkit.linear.packed import PackedLinear, exact
from labkit.linear.sparse import SparseLinear
from labkit.linear.w8a8 import W8A8Linear

# All of them: each has weight, stored_nbytes, spec and from_spec.
STORED = (PackedLinear, W8A8Linear, BnbLinear, SparseLinear)


def from_spec(spec: dict):
    """An empty layer as its ``spec()`` describes it, whose tensors a loader fills in. ValueError for an unknown one."""
    known = {cls.__name__: cls for cls in STORED}
    name = spec.get("module") if isinstance(spec, dict) else None
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"module = {name!r} is not allowed: it must be one of {', '.join(known)}")
    return known[name].from_spec(spec)


__all__ = ["STORED", "BnbLinear", "PackedLinear", "SparseLinear", "W8A8Linear", "exact", "from_spec"]
