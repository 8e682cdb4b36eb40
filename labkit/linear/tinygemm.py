"""torch's own kernels for NVIDIA GPUs: 4-bit weights in groups ("tinygemm") or 8-bit ones per row, bf16 activations.

*Unverified*: written after torch's sources, but nobody has run it on a GPU yet.

    4 bits: weight = (code - 8) * scale + shift, with scale and shift in bf16, (groups, out, 2)
    8 bits: weight = (code - 128) * scale, with scale in bf16, (out,)
"""

from __future__ import annotations

import torch

from labkit.formats import Encoded, integers

GROUPS = (32, 64, 128, 256)


def takes(weight, device: torch.device) -> bool:
    """True for 4-bit codes in groups the kernel knows, and 8-bit integers per row, on an Ampere GPU or a newer one."""
    found = integers(weight)
    if found is None or device.type != "cuda" or weight.shape[0] % 8:
        return False
    whole, rest = found
    if whole.bits == 4:
        fits = whole.group_size in GROUPS and whole.columns % whole.group_size == 0
        if rest is not None:  # in bf16 a shift of many steps would lose the last of them
            fits = fits and bool((rest.abs() <= whole.scale).all())
    else:
        fits = whole.bits == 8 and whole.zero is None and whole.group_size == whole.columns
    return fits and torch.cuda.get_device_capability(device) >= (8, 0)


class Kernel:
    """One matrix, ready to multiply: ``kernel(x)`` for x (rows, in) gives (rows, out), computed in bf16."""

    def __init__(self, encoded: Encoded):
        weight, rest = integers(encoded)
        codes, scale = weight.codes(), weight.scale.float()
        self.bits, self.group_size = weight.bits, weight.group_size
        if self.bits == 8:
            self.packed = (codes.int() - 128).to(torch.int8).contiguous()
            self.scale = scale[:, 0].to(torch.bfloat16).contiguous()
        else:
            tiles = next(t for t in (8, 4, 2) if weight.columns % (16 * t) == 0)
            pairs = (codes[:, ::2] << 4) | codes[:, 1::2]  # this kernel wants the first code in the high half
            self.packed = torch._convert_weight_to_int4pack(pairs.contiguous(), tiles)
            shift = (8 - weight.zeros().float()) * scale + (0 if rest is None else rest)
            self.scale = torch.stack([scale.T, shift.T], -1).to(torch.bfloat16).contiguous()  # (groups, out, 2)
        self.nbytes = sum(t.numel() * t.element_size() for t in (self.packed, self.scale))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(torch.bfloat16).contiguous()
        if self.bits == 8:
            return torch._weight_int8pack_mm(x, self.packed, self.scale)
        return torch._weight_int4pack_mm(x, self.packed, self.group_size, self.scale)

    def __deepcopy__(self, memo) -> Kernel:
        return self  # it never changes
