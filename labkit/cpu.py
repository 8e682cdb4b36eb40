"""Which processor this is, and how many of its cores we may use. Standard library alone, for ``labkit doctor`` too."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
NOTABLE = {"amx_int8": "AMX", "avx512f": "AVX-512", "avx2": "AVX2"}  # the widest is named; kernels choose by it


def cores() -> int:
    """The cores this process may run on (a container often has fewer than the machine)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def name() -> str:
    """The processor's name; where that says too little, what the system tells beside it.

    ``"Intel(R) Core(TM) i7-8650U CPU @ 1.90GHz"``, ``"Apple M2 Pro"``; but a virtual machine often calls itself just
    ``"AMD EPYC"``, so that gets ``" (family 25 model 17 stepping 1, AVX-512)"``.
    """
    if sys.platform == "darwin":
        found = _sysctl("machdep.cpu.brand_string")
    elif sys.platform == "win32":
        found = _registry()
    else:
        found = _linux()
    return found or " ".join((platform.processor() or platform.machine() or "unknown processor").split())


def _linux() -> str:
    """From /proc/cpuinfo: its first processor. An ARM core has numbers for a name: who made it, and which part it is."""
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:
        return ""
    said = {
        key.strip(): " ".join(value.split()) for key, _, value in (line.partition(":") for line in text.splitlines())
    }
    if called := said.get("model name", ""):
        numbers = [f"{k.split()[-1]} {said[k]}" for k in ("cpu family", "model", "stepping") if said.get(k)]
        flags = said.get("flags", "").split()
        numbers = [" ".join(numbers), *[label for flag, label in NOTABLE.items() if flag in flags][:1]]
        more = ", ".join(n for n in numbers if n)
        return called if _tells(called) or not more else f"{called} ({more})"
    if part := said.get("CPU part"):
        return f"{platform.machine()} (implementer {said.get('CPU implementer', '?')}, part {part})"
    return ""


def _tells(called: str) -> bool:
    """Whether the name has a model number: a digit that is not the clock's, the emulator's version or the core count's."""
    return bool(re.search(r"\d", re.sub(r"@ *[\d.]+ *[GM]Hz|version [\d.]+|\d+-Core|\([^)]*\)", "", called)))


def _sysctl(key: str) -> str:
    try:
        found = subprocess.run(["sysctl", "-n", key], capture_output=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return " ".join(found.decode(errors="replace").split())


def _registry() -> str:
    """Windows keeps the name there; ``platform.processor()`` has only family, model and stepping."""
    try:
        import winreg

        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"HARDWARE\DESCRIPTION\System\CentralProcessor\0") as key:
            return " ".join(str(winreg.QueryValueEx(key, "ProcessorNameString")[0]).split())
    except (ImportError, OSError):
        return ""
