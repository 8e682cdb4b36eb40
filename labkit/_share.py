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
    plain = tensor.detach()
    try:
        new = torch._lazy_clone(plain)
    except RuntimeError:  # memory that is not torch's own, as the file's that safetensors has mapped: it moves once
        if tensor.is_inference():
            new = plain.clone()
        else:
            tensor.data = plain.clone()
            new = torch._lazy_clone(tensor.detach())
    except AttributeError:
        new = plain.clone()
    return torch.nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else new


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
