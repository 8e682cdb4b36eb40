"""What a number was measured on: the machine and the versions, as they go into every stored row."""

from __future__ import annotations

import functools
import importlib.metadata

from labkit import cpu, install
from labkit.cpu import cores

__all__ = ["cores", "machine", "versions"]


@functools.cache
def machine() -> str:
    """For example ``"AMD EPYC 9354 32-Core Processor, 2 cores"``, with the GPU's name where there is one."""
    import torch

    text = f"{cpu.name()}, {cores()} cores"
    if torch.cuda.is_available():
        text += f", {torch.cuda.get_device_name()}"
    return text


@functools.cache
def versions() -> str:
    """The versions of labkit and of the libraries that numbers depend on, as one line."""
    found = [f"labkit {install.version()}"]
    for package in ("torch", "transformers", "onnxruntime"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
