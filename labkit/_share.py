"""Memory that two tensors share until one of them is written to: what makes a copy of a model cost nothing.

torch does this itself (copy-on-write storages) but names it only privately. Where a release of torch no longer has it,
a copy takes memory of its own: slower, and as right.
"""

from __future__ import annotations

import ctypes

import torch


def twin(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of its own with the same values, a Parameter for a Parameter. Whichever is written to first, whatever writes,
    moves to memory of its own then; until that both are read from the same."""
    take_over(tensor)
    plain = tensor.detach()
    new = _lazy(plain)
    new = plain.clone() if new is None else new
    return torch.nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else new


def take_over(tensor: torch.Tensor) -> None:
    """Move a tensor that lies in memory which is not torch's own, as that of a file which safetensors has mapped: only what
    is torch's can be shared and parted later."""
    if not tensor.is_inference() and _lazy(tensor.detach()) is None:
        tensor.data = tensor.detach().clone()


def _lazy(plain: torch.Tensor) -> torch.Tensor | None:
    """A tensor that shares the memory until a write; None where there can be none."""
    try:
        return torch._lazy_clone(plain)
    except (RuntimeError, AttributeError):
        return None


def storage_address(tensor: torch.Tensor) -> int:
    """Where the storage begins that a tensor is a view of; equal for two that share memory. ``data_ptr()`` would part them,
    since it may be written through."""
    look = getattr(torch._C, "_data_address", None)  # of the storage, also for a view further on
    return look(tensor) if look else tensor.untyped_storage().data_ptr()


def address(tensor: torch.Tensor) -> int:
    """Where its first number lies."""
    return storage_address(tensor) + tensor.storage_offset() * tensor.element_size()


def raw(tensor: torch.Tensor):
    """The bytes of a contiguous tensor on the CPU, to be read while it is alive. ``numpy()`` would part it as well."""
    return (ctypes.c_char * (tensor.numel() * tensor.element_size())).from_address(address(tensor))
