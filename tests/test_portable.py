"""What differs between systems, imitated: Windows, macOS, musl, virtual machines, old code pages."""

from __future__ import annotations

import ast
import ctypes
import os
import platform
import subprocess
import sys
import types
from pathlib import Path

import pytest

from labkit import cpu, heap, install
from labkit.measure import machine

ROOT = Path(__file__).resolve().parent.parent


# ---- the heap


@pytest.fixture
def fresh_heap():
    heap._malloc_trim.cache_clear()
    yield
    heap._malloc_trim.cache_clear()


def windows(name):
    return "/" in name  # what ctypes does first there: a TypeError for None


def musl(name):
    return types.SimpleNamespace()  # a C library without malloc_trim


def forbidden(name):
    raise OSError("dlopen is not allowed here")


@pytest.mark.parametrize("library", [windows, musl, forbidden])
def test_trim_is_quiet_where_there_is_nothing_to_call(monkeypatch, fresh_heap, library):
    monkeypatch.setattr(ctypes, "CDLL", library)
    heap.trim()
    heap.trim()


def test_trim_calls_glibc(monkeypatch, fresh_heap):
    called = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace(malloc_trim=called.append))
    heap.trim()
    assert called == [0]


# ---- the processor's name

XEON = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
model name\t: Intel(R) Xeon(R) Processor
stepping\t: 8
flags\t\t: fpu avx2 avx512f amx_int8

processor\t: 1
model name\t: another
"""
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n\nprocessor\t: 1\n"


def called(name: str, **also) -> str:
    return "\n".join([f"model name\t: {name}", *(f"{k.replace('_', ' ')} : {v}" for k, v in also.items())]) + "\n"


@pytest.mark.parametrize(
    "text, name",
    [
        (XEON, "Intel(R) Xeon(R) Processor (family 6 model 143 stepping 8, AMX)"),
        (called("AMD EPYC", cpu_family=25, model=17, flags="avx2 avx512f"), "AMD EPYC (family 25 model 17, AVX-512)"),
        (called("Intel(R) Xeon(R) CPU @ 2.20GHz", model=79), "Intel(R) Xeon(R) CPU @ 2.20GHz (model 79)"),
        (called("QEMU Virtual CPU version 2.5+", flags="avx2"), "QEMU Virtual CPU version 2.5+ (AVX2)"),
        (called("Intel Xeon Processor (Skylake, IBRS)", model=85), "Intel Xeon Processor (Skylake, IBRS) (model 85)"),
        (called("AMD EPYC  9354   32-Core Processor", model=17), "AMD EPYC 9354 32-Core Processor"),
        (called("Intel(R) Core(TM) i7-8650U CPU @ 1.90GHz", model=142), "Intel(R) Core(TM) i7-8650U CPU @ 1.90GHz"),
        (ARM, "aarch64 (implementer 0x41, part 0xd0c)"),
        ("nothing known\n", "aarch64"),
    ],
)  # fmt: skip
def test_linux(monkeypatch, tmp_path, text, name):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(platform, "processor", lambda: "")
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    assert cpu.name() == name


def test_macos(monkeypatch):
    asked = []

    def run(command, **_):
        asked.append(command)
        return types.SimpleNamespace(stdout=b"Apple M2 Pro\n")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(subprocess, "run", run)
    assert cpu.name() == "Apple M2 Pro" and asked == [["sysctl", "-n", "machdep.cpu.brand_string"]]

    def missing(*_, **__):
        raise FileNotFoundError("sysctl")

    monkeypatch.setattr(subprocess, "run", missing)
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    assert cpu.name() == "arm"


def test_windows(monkeypatch):
    class Key:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    registry = types.ModuleType("winreg")
    registry.HKEY_LOCAL_MACHINE = 0
    registry.OpenKey = lambda root, path: Key()
    registry.QueryValueEx = lambda key, name: ({"ProcessorNameString": " AMD Ryzen 7  5800X "}[name], 1)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "winreg", registry)
    assert cpu.name() == "AMD Ryzen 7 5800X"
    monkeypatch.setitem(sys.modules, "winreg", None)
    monkeypatch.setattr(platform, "processor", lambda: "AMD64 Family 25 Model 33 Stepping 0, AuthenticAMD")
    assert cpu.name() == "AMD64 Family 25 Model 33 Stepping 0, AuthenticAMD"


def test_cores_without_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert cpu.cores() == 8
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cpu.cores() == 1


def test_cores_are_counted_in_one_place():
    counting = [p for p in (ROOT / "labkit").rglob("*.py") if "cpu_count" in p.read_text(encoding="utf-8")]
    assert [p.name for p in counting] == ["cpu.py"]


def test_the_machine_of_a_row():
    machine.machine.cache_clear()
    assert machine.machine().startswith(f"{cpu.name()}, {cpu.cores()} cores")
    assert machine.versions().startswith(f"labkit {install.version()}, torch ")


# ---- text


NO_TEXT = {"os.open", "bundle.open"}  # they give numbers and bytes
PIP = "log.read_text(errors='replace')"  # pip writes in the system's own encoding
ASCII = {"statm", "path", "Path", "cpuinfo"}  # what is read of /proc and /sys, by the first name of the call


def unencoded(source: str) -> list[str]:
    """The calls that open a text file and do not say in which encoding."""
    found = []
    for node in ast.walk(ast.parse(source)):
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if name.split(".")[-1] not in ("open", "fdopen", "read_text", "write_text") or name in NO_TEXT:
            continue
        modes = [c.value for a in node.args[:2] for c in ast.walk(a) if isinstance(getattr(c, "value", None), str)]
        encoded = any(k.arg == "encoding" for k in node.keywords) or name == "_files.write_text" or name == "write_text"
        if not encoded and not any(set(mode) <= set("rwab+") and "b" in mode for mode in modes):
            found.append(ast.unparse(node))
    return found


def test_every_text_file_names_its_encoding():
    """Else Windows reads and writes its old code page."""
    assert unencoded("p.open()\nopen(p, 'w')\np.read_text()\nopen(p, 'wb')\nopen(p, encoding='x')") == [
        "p.open()",
        "open(p, 'w')",
        "p.read_text()",
    ]
    for path in sorted((ROOT / "labkit").rglob("*.py")):
        for call in unencoded(path.read_text(encoding="utf-8")):
            system = "read_text()" in call and call.split("(")[0].split(".")[0] in ASCII
            assert system or call == PIP, f"{path.name}: {call}"


@pytest.mark.parametrize("page", ["cp1252", "cp437", "ascii"])
def test_the_command_line_survives_a_code_page(page):
    env = os.environ | {"PYTHONIOENCODING": page, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "labkit", "show", "wanda"], env=env, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert rb"\u2016x" in done.stdout  # a letter that none of these pages has


# ---- what to install


def test_in_a_checkout_the_extra_is_installed_from_it():
    said = str(install.missing("plotly", "lab"))
    assert said.startswith("This needs plotly, which is not installed: ")
    assert said.endswith(f'-m pip install -e "{ROOT.as_posix()}[lab]"')
    assert install.version() == "0.1.0"


@pytest.fixture
def no_checkout(monkeypatch, tmp_path):
    """The package as it lies in site-packages, with the metadata that the wheel has."""
    lines = [f'{text}; extra == "{g}"' if g != "core" else text for g, text in install.declared()[1] if ";" not in text]
    about = type("About", (), {"get_all": lambda self, name: lines, "__getitem__": lambda self, name: ">=3.10"})()
    monkeypatch.setattr(install, "__file__", str(tmp_path / "site-packages" / "labkit" / "install.py"))
    monkeypatch.setattr(install.importlib.metadata, "metadata", {install.DISTRIBUTION: about}.get)
    return tmp_path / "site-packages"


def test_elsewhere_the_package_itself_is_named(no_checkout, monkeypatch):
    monkeypatch.setattr(install, "installed", {install.DISTRIBUTION: "0.1.0"}.get)
    assert install.version() == "0.1.0"
    assert str(install.missing("plotly", "colab")).endswith('-m pip install "plotly>=6.0"')
    assert str(install.missing("ipywidgets", "colab")).endswith("-m pip install ipywidgets")  # not of that extra
    for extra in ("kernels", "colab", "lab", "test"):
        assert "labkit" not in install.extra_command(extra).partition("pip install")[2]
    monkeypatch.setattr(install, "installed", lambda name: None)
    assert install.version() == "(not installed)"


def test_a_project_around_the_package_is_not_ours(no_checkout):
    no_checkout.mkdir()
    (no_checkout / "pyproject.toml").write_text('[project]\nname = "mine"\nversion = "7"\n')
    assert str(install.missing("plotly", "colab")).endswith('-m pip install "plotly>=6.0"')


def test_no_message_tells_to_install_labkit_by_name():
    """PyPI's labkit is another project, and whoever registers a name that we only use owns what is installed by it."""
    tree = [*(ROOT / "labkit").rglob("*.py"), *(ROOT / "notebooks").rglob("*.ipynb"), ROOT / "README.md"]
    for path in tree:
        for line in path.read_text(encoding="utf-8").splitlines():
            for word in ("labkit[", "labkit-llm[", "install labkit"):
                linked = "labkit-llm[colab] @ git+https://" in line
                assert word not in line or linked, f"{path.relative_to(ROOT)}: {line.strip()[:120]}"
