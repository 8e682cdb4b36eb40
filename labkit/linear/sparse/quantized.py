"""Pruned and quantized: which weights are kept, a few bits for each of these, and scales as a dense matrix has them.

4 bits and 2:4 take, for every four weights, two codes and two positions: 3 bits per weight, and the scales. A bitmask at
half of the weights takes the same 1 + 4 / 2 (SparseGPT, Frantar and Alistarh 2023, section 3.5, prunes and rounds in
one pass).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch

from labkit.formats import Integer, Params, pack, unpack
from labkit.linear.sparse.base import Sparse
from labkit.linear.sparse.bitmask import Bitmask
from labkit.linear.sparse.nm import NM


@dataclass
class SparseQuantized(Sparse):
    """Integer codes of the kept weights.

    ``where``: the bitmask's mask or the positions of N:M, uint8. ``codes``: uint8, packed at ``form.bits``: (1, bytes) for
    a bitmask, (out, bytes) for N:M. ``scale``: (out, groups). ``zero``: as :class:`labkit.formats.Quantized` has it,
    None where every zero point is the middle code. Groups are of ``form.group_size`` dense columns.
    """

    name: ClassVar[str] = "quantized"

    where: torch.Tensor
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    shape: tuple[int, int]
    form: Integer
    pattern: tuple[int, int] | None  # (n, m), or None for a bitmask

    @classmethod
    def from_dense(cls, weight: torch.Tensor, form: Integer, pattern: tuple[int, int] | None = None) -> SparseQuantized:
        """Round a pruned weight (out, in) to the nearest values of each group's grid; its zeros stay zero."""
        groups = form.groups(weight.float())
        params = form.fit(groups)
        codes = form.quantize(groups, params).view(len(weight), -1)[:, : weight.shape[1]]
        return cls.assemble(codes, params, form, pattern)

    @classmethod
    def assemble(
        cls, codes: torch.Tensor, params: Params, form: Integer, pattern: tuple[int, int] | None = None
    ) -> SparseQuantized:
        """Pack codes (out, in) and the groups' parameters that a method has chosen.

        A weight is dropped where its code is its group's zero point, for then its value is exactly 0. ``pattern``: (n, m),
        or None for a bitmask. Raises ValueError for weights that do not fit the pattern.
        """
        codes, columns = codes.to(torch.uint8), codes.shape[1]
        zeros = params[1].repeat_interleave(form.size(columns), 1)[:, :columns]
        kept, stored = codes != zeros, form.store(params)
        if pattern is None:
            inner = Bitmask.of(codes, kept)
            where, packed = inner.mask, pack(inner.values[None], form.bits).clone()  # not a view of padded bytes
        else:
            inner = NM.of(codes, kept, *pattern)
            where, packed = inner.positions, pack(inner.values, form.bits)
        return cls(where, packed, stored["scale"], stored.get("zero"), tuple(codes.shape), form, pattern)

    def tensors(self) -> dict[str, torch.Tensor]:
        found = {name: getattr(self, name) for name in ("where", "codes", "scale", "zero")}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def spec(self) -> dict:
        return super().spec() | asdict(self.form) | {"pattern": self.pattern and list(self.pattern)}

    @classmethod
    def restore(cls, spec: dict, tensors: dict[str, torch.Tensor]) -> SparseQuantized:
        form = Integer(spec["bits"], spec["group_size"], spec["symmetric"])
        pattern = spec["pattern"] and tuple(spec["pattern"])
        return cls(shape=tuple(spec["shape"]), form=form, pattern=pattern, **({"zero": None} | tensors))

    def decode(self) -> torch.Tensor:
        """The dense matrix that the codes say, fp32 (out, in)."""
        if self.pattern is None:
            inner = Bitmask(self.where, self.codes, self.shape)
            kept = inner.kept()
            inner.values = unpack(self.codes, self.form.bits, int(kept.sum()))[0]
        else:
            n, m = self.pattern
            codes = unpack(self.codes, self.form.bits, n * -(-self.shape[1] // m))
            inner = NM(self.where, codes, self.shape, n, m)
            kept = inner.kept()
        values = self.form.expand(inner.decode(), self._params())
        return torch.where(kept, values, torch.zeros_like(values))

    def _params(self) -> Params:
        scale = self.scale.float()
        if self.zero is None:
            return scale, torch.full_like(scale, 1 << (self.form.bits - 1))
        return scale, unpack(self.zero, self.form.bits, scale.shape[1]).float()
