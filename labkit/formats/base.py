"""What every number format is, and what every encoded weight is.

form = NF4()                                # a Format describes how numbers are written down
params = form.fit(form.groups(weight))      # what each group stores beside its codes: scales, zero points
codes = form.quantize(form.groups(weight), params)
encoded = form.encode(weight)               # all of it in one call: an Encoded, packed to the bit
encoded.decode()                            # fp32 (out, in)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

import torch

from labkit.formats.pack import pack, unpack

# What a matrix stores beside its codes, as fp32 or uint8 tensors: (out, groups) each, or () for one number per matrix.
Params = tuple[torch.Tensor, ...]


class Encoded:
    """What is stored for one weight matrix, and nothing else.

    Subclasses have ``form`` (the :class:`Format` that decodes it), ``shape`` (out, in), ``tensors`` and ``params``.
    """

    def tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors by name; ``packed`` holds the codes."""
        raise NotImplementedError

    def spec(self) -> dict:
        """What :func:`labkit.formats.restore` needs beside the tensors; it goes through JSON unchanged."""
        return {"format": self.form.name, "shape": list(self.shape), **asdict(self.form)}

    def codes(self) -> torch.Tensor:
        """uint8 (out, in)."""
        return unpack(self.tensors()["packed"], self.form.bits, self.shape[1])

    def params(self) -> Params:
        """The groups' parameters as :meth:`Format.dequantize` takes them."""
        raise NotImplementedError

    def decode(self) -> torch.Tensor:
        """The weight that is stored here, fp32 (out, in)."""
        return self.form.expand(self.codes(), self.params())

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """True bits per weight: codes, their padding to whole bytes, scales and all other metadata."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])


@dataclass
class Packed(Encoded):
    """Packed codes and a format's own tensors. (Integers have :class:`labkit.formats.Quantized` instead.)"""

    form: Format
    shape: tuple[int, int]
    stored: dict[str, torch.Tensor]

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(self.stored)

    def params(self) -> Params:
        return self.form.load(self.stored, self.shape)


class Format:
    """A number format. Subclasses are frozen dataclasses with ``bits`` and ``group_size`` as fields or class attributes.

    ``group_size``: columns of a row that share parameters; None means the whole row. A subclass implements ``fit``,
    ``quantize``, ``dequantize``, ``levels``, and the pair ``store`` and ``load``.
    """

    name: ClassVar[str]

    def groups(self, weight: torch.Tensor) -> torch.Tensor:
        """(out, in) -> (out, groups, size); a shorter last group is filled with its row's last value, which moves no range."""
        size = self.size(weight.shape[1])
        short = -weight.shape[1] % size
        if short:
            weight = torch.cat([weight, weight[:, -1:].expand(-1, short)], 1)
        return weight.reshape(len(weight), -1, size)

    def size(self, columns: int) -> int:
        """How many columns a group of a matrix of ``columns`` really has."""
        return min(self.group_size or columns, columns)

    def fit(self, groups: torch.Tensor, shrink: float | torch.Tensor = 1.0, like: Params | None = None) -> Params:
        """Each group's parameters, already rounded to how they are stored: (out, groups, size) -> tensors (out, groups).

        ``shrink`` scales the range that the grid spans (a number, or a tensor that broadcasts to (out, groups)): below
        1 it clips the largest weights and makes all steps finer. ``like``: parameters of the same group in the whole
        matrix; whatever a format keeps for many groups together (a tensor scale) is then taken from there.
        """
        raise NotImplementedError

    def quantize(self, x: torch.Tensor, params: Params) -> torch.Tensor:
        """The code of the nearest value, uint8, for x of any shape that broadcasts with params[..., None]."""
        raise NotImplementedError

    def dequantize(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        """The value of each code, fp32."""
        raise NotImplementedError

    def round(self, x: torch.Tensor, params: Params) -> torch.Tensor:
        """The nearest value, fp32: ``dequantize(quantize(x))`` in one step. Applied twice it changes nothing more."""
        return self.dequantize(self.quantize(x, params), params)

    def levels(self) -> torch.Tensor:
        """All representable values at scale 1, sorted, fp32: the format's value table."""
        raise NotImplementedError

    def store(self, params: Params) -> dict[str, torch.Tensor]:
        """Parameters as the tensors that are kept, by name."""
        raise NotImplementedError

    def load(self, stored: dict[str, torch.Tensor], shape: tuple[int, int]) -> Params:
        """The inverse of :meth:`store`."""
        raise NotImplementedError

    def slice(self, params: Params, group: int) -> Params:
        """The parameters of one group of every row: tensors (out, 1)."""
        return tuple(p[:, group : group + 1] if p.ndim else p for p in params)

    def join(self, parts: list[Params]) -> Params:
        """The inverse of :meth:`slice`: one matrix's parameters from those of its groups, in order."""
        return tuple(torch.cat(p, 1) if p[0].ndim else p[0] for p in zip(*parts))

    def expand(self, codes: torch.Tensor, params: Params) -> torch.Tensor:
        """Codes (out, in) -> values fp32 (out, in)."""
        return self.dequantize(self.groups(codes), params).reshape(len(codes), -1)[:, : codes.shape[1]]

    def encode(self, weight: torch.Tensor) -> Encoded:
        """Round a weight (out, in) to the nearest values of its groups. ValueError unless it is a matrix of finite numbers."""
        groups = self.groups(finite_matrix(weight))
        params = self.fit(groups)
        codes = self.quantize(groups, params).view(len(weight), -1)[:, : weight.shape[1]]
        return self.assemble(codes, params)

    def assemble(self, codes: torch.Tensor, params: Params) -> Encoded:
        """Pack codes (out, in) and parameters that a method has chosen."""
        packed = pack(codes.to(torch.uint8).contiguous(), self.bits)
        return self.wrap({"packed": packed, **self.store(params)}, tuple(codes.shape))

    def wrap(self, tensors: dict[str, torch.Tensor], shape: tuple[int, int]) -> Encoded:
        """An encoded matrix from tensors that are already as stored."""
        return Packed(self, shape, tensors)


def finite_matrix(weight: torch.Tensor) -> torch.Tensor:
    """The weight in fp32, or a ValueError: not a matrix, empty, or holding NaN or infinity."""
    if weight.ndim != 2 or not weight.numel():
        raise ValueError(f"A weight of shape {tuple(weight.shape)} cannot be encoded: it must be a matrix (out, in).")
    weight = weight.float()
    bad = weight.numel() - int(torch.isfinite(weight).sum())
    if bad:
        raise ValueError(f"The weight holds {bad} NaN or infinite values: only finite numbers can be encoded.")
    return weight


def check_group_size(size: int | None) -> None:
    if size is not None and size < 1:
        raise ValueError(f"group_size = {size!r} is not allowed: it must be 1 or more, or None (per row).")


# The least scale that fp16 holds to within 1 %. It is subnormal: 64 units of 2^-24.
FINE = 2.0**-18


def stored(scale: torch.Tensor) -> torch.Tensor:
    """A scale as it will be kept, in fp32: fp16's nearest, or below ``FINE`` the scale itself.

    Never zero (an all-zero group), never infinite.
    """
    half = torch.finfo(torch.float16)
    small = scale.clamp(min=torch.finfo(torch.float32).smallest_normal)
    kept = torch.where(scale < FINE, small, scale.clamp(max=half.max).to(torch.float16).float())
    return torch.where(scale > 0, kept, half.smallest_normal)


def scale_dtype(scale: torch.Tensor) -> torch.dtype:
    """What the scales of a matrix are stored in: fp16, or fp32 where one of them is below ``FINE``."""
    return torch.float32 if bool((scale < FINE).any()) else torch.float16
