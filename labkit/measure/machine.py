"""What a number was measured on: the machine and the versions, as they go into every stored row."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from pathlib import Path


@functools.cache
def machine() -> str:
    """For example ``"AMD EPYC 9354, 2 cores"``, with the GPU's name where there is one."""
    import torch

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = " ".join(line.split(":", 1)[1].split())
                break
    text = f"{name}, {cores()} cores"
    if torch.cuda.is_available():
        text += f", {torch.cuda.get_device_name()}"
    return text


def cores() -> int:
    """The cores this process may run on (a container often has fewer than the machine)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def versions() -> str:
    """The versions of labkit and of the libraries that numbers depend on, as one line."""
    found = []
    for package in ("labkit", "torch", "transformers", "onnxruntime"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
