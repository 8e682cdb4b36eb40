"""torch's own int4 kernel for NVIDIA GPUs ("tinygemm"): 4-bit weights, bf16 activations.

*Unverified*: written after torch's sources and run through its shape checks, but nobody has run it on a GPU yet.

    weight = (code - 8) * scale + shift,  scale and shift in bf16, (groups, out, 2)
"""

from __future__ import annotations

import torch

from labkit.formats import Quantized

GROUPS = (32, 64, 128, 256)


def takes(weight, device: torch.device) -> bool:
    """True for 4-bit integers in groups the kernel knows, on a GPU of the Ampere generation or newer."""
    if not isinstance(weight, Quantized) or weight.bits != 4 or device.type != "cuda":
        return False
    fits = weight.group_size in GROUPS and weight.columns % weight.group_size == 0 and weight.packed.shape[0] % 8 == 0
    return fits and torch.cuda.get_device_capability(device) >= (8, 0)


class Kernel:
    """One matrix, ready to multiply: ``kernel(x)`` for x (rows, in) gives (rows, out), computed in bf16."""

    def __init__(self, weight: Quantized):
        tiles = next(t for t in (8, 4, 2) if weight.columns % (16 * t) == 0)
        codes = weight.codes()
        pairs = (codes[:, ::2] << 4) | codes[:, 1::2]  # this kernel wants the first code in the high half
        self.packed = torch._convert_weight_to_int4pack(pairs.contiguous(), tiles)
        scale = weight.scale.float()
        shift = (8 - weight.zeros().float()) * scale
        self.scale_and_shift = torch.stack([scale.T, shift.T], -1).to(torch.bfloat16).contiguous()  # (groups, out, 2)
        self.group_size = weight.group_size
        self.nbytes = sum(t.numel() * t.element_size() for t in (self.packed, self.scale_and_shift))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(torch.bfloat16).contiguous()
        return torch._weight_int4pack_mm(x, self.packed, self.group_size, self.scale_and_shift)

    def __deepcopy__(self, memo) -> Kernel:
        return self  # it never changes
