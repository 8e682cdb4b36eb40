"""Tensors on their way into a graph: one file that the runtime maps into memory, and how each linear is laid out in it.

The graph itself stays small and names places in the file. The runtime maps each tensor, repacks it into the order that
its kernel likes, and lets go of the mapping, one tensor after the other: at no time are all weights held twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from onnx import TensorProto
from torch import nn

from labkit._share import raw
from labkit.formats import Encoded, Integer, Quantized, pack
from labkit.linear import STORED, matmulnbits

ALIGN = 1 << 16  # where a mapping may begin, on every system
KINDS = {
    torch.float32: TensorProto.FLOAT,
    torch.uint8: TensorProto.UINT8,
    torch.int64: TensorProto.INT64,
}


class Weights:
    """The initializers of a graph. Large ones are appended to ``file``, small ones stay in the graph.

    Those of ``aligned_from`` bytes or more begin where every system can map them; the gaps before them are holes.
    """

    def __init__(self, file: Path, aligned_from: int = 0, inline: int = 1024):
        self.file, self.aligned_from, self.inline = file, aligned_from, inline
        self.initializers: list[TensorProto] = []
        self.sizes: dict[str, int] = {}  # bytes by name
        self._out = file.open("wb")

    def add(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...] | None = None) -> str:
        """Store a tensor under a name, which is returned."""
        tensor = tensor.detach().cpu().contiguous()
        proto = TensorProto(name=name, data_type=KINDS[tensor.dtype], dims=shape or tuple(tensor.shape))
        data = memoryview(raw(tensor))
        if len(data) < self.inline:
            proto.raw_data = data.tobytes()
        else:
            step = ALIGN if len(data) >= self.aligned_from else 64
            self._out.seek(-self._out.tell() % step, 1)
            proto.data_location = TensorProto.EXTERNAL
            place = {"location": self.file.name, "offset": self._out.tell(), "length": len(data)}
            for key, value in place.items():
                proto.external_data.add(key=key, value=str(value))
            self._out.write(data)
        self.initializers.append(proto)
        self.sizes[name] = len(data)
        return name

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())

    def close(self) -> None:
        self._out.close()


def whole(module: nn.Module) -> tuple[Quantized, torch.Tensor | None] | None:
    """A linear's weight as integers in groups that the operator takes, and their rest; None for any other linear."""
    weight = getattr(module, "quantized", None)
    return matmulnbits.whole(weight) if isinstance(weight, Encoded) else None


def packed(module: nn.Module) -> Quantized | None:
    """The codes of a linear, when the operator can multiply by them: as they are, or written with more bits each."""
    found = whole(module)
    return found and widened(found[0])


def kind_of(module: nn.Module) -> str:
    """How a linear that stores something smaller says what that is: its format, or the name of its class."""
    form = module.quantized.spec() if hasattr(module, "quantized") else {"layer": type(module).__name__}
    return ", ".join(f"{k}={v}" for k, v in form.items() if k != "shape")


def unpacked(modules: Iterable[nn.Module]) -> dict[str, int]:
    """Of linears that store something smaller than a dense weight, those that a graph would hold dense: kind -> how many."""
    return dict(Counter(kind_of(m) for m in modules if isinstance(m, STORED) and packed(m) is None))


def widened(weight: Quantized) -> Quantized:
    """The same codes, each in as many bits as the operator takes: 3 bits become 4; 5, 6 and 7 become 8."""
    bits = min(width for width in matmulnbits.widths() if width >= weight.bits)
    if bits == weight.bits:
        return weight
    codes, zeros = pack(weight.codes(), bits), pack(weight.zeros(), bits)
    return Quantized(codes, weight.scale, zeros, bits, weight.group_size, weight.columns)


def rest(modules: list[nn.Module]) -> torch.Tensor | None:
    """What whole zero points leave of affine weights below one another, fp32 (groups, out); None where nothing is left."""
    found = [whole(m) or (None, None) for m in modules]
    if all(left is None for _, left in found):
        return None
    parts = [torch.zeros(codes.scale.shape) if left is None else left for codes, left in found]
    return torch.cat(parts).T.contiguous()


def sums(columns: int, group_size: int) -> torch.Tensor:
    """The matrix that adds up each group of its input: fp32 (columns, groups) of ones and zeros."""
    group = torch.arange(columns) // group_size
    return nn.functional.one_hot(group).float()


def rows(module: nn.Module) -> int:
    """Output features, from the tensor where there is one: a pruned linear may say otherwise."""
    return module.weight.shape[0] if isinstance(module, nn.Linear) else module.out_features


def layout(weights: list[Quantized]) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes of one or more matrices over the same input, below one another, as MatMulNBits wants them.

    Returns the block size; B uint8 (out, blocks, bytes); scales fp32 (out, blocks); zeros, packed uint8 (out, bytes), or
    None where every zero is the middle code.
    """
    sizes, codes, scales, zeros = zip(*(matmulnbits.layout(w) for w in weights))
    if all(w.zero is None for w in weights):
        return sizes[0], torch.cat(codes), torch.cat(scales), None
    return sizes[0], torch.cat(codes), torch.cat(scales), torch.cat(zeros)


def alike(weights: list[Quantized | None]) -> bool:
    """True when these matrices can be one: the same bits, groups and input width."""
    return None not in weights and len({(w.bits, w.group_size, w.columns) for w in weights}) == 1


def encode(weight: torch.Tensor, bits: int, group_size: int, step: int = 8192) -> Quantized:
    """Round an embedding or a head (rows, hidden) to the nearest codes, a few thousand rows at a time."""
    form = Integer(bits, group_size)
    parts = [form.encode(w.float()) for w in weight.detach().split(step)]
    joined = [torch.cat([getattr(p, field) for p in parts]).cpu() for field in ("packed", "scale", "zero")]
    return Quantized(*joined, bits, parts[0].group_size, weight.shape[1])
