"""Is everything here that labkit needs? ``labkit doctor`` on the command line, ``labkit.doctor.report()`` in a notebook.

Nothing is installed, fetched or repaired: each line says what was found, and what to do about it. Nothing at the
top needs more than the standard library, so ``python labkit/doctor.py`` also works where torch is what is missing.
"""

from __future__ import annotations

import html
import importlib
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
import textwrap
import threading
import time
import types
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # run as a file: labkit's modules are imported without its __init__, which needs torch
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # labkit/ itself is no place to import from
    sys.modules["labkit"] = types.ModuleType("labkit")
    sys.modules["labkit"].__path__ = [str(Path(__file__).resolve().parent)]

from labkit.cpu import cores
from labkit.install import command, declared, needed
from labkit.install import installed as version

OK, NOTE, PROBLEM = "ok", "note", "problem"
OPTIONAL = {
    "kernels": "packed weights take the slow path",
    "colab": "figures and sliders cannot be shown here",
    "lab": "the notebooks cannot be opened here",
    "test": "`make test` cannot run here",
}
WIDGETS = ("ipywidgets", "anywidget", "plotly")
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")  # as in the Makefile
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
ROOM = 1.2e9  # bytes: the download and the converted model while both are there
PEAK = 2e9  # bytes: what a notebook in the quick profile may take at its peak
PATIENCE = 3.0  # seconds for the hub to answer


@dataclass(frozen=True)
class Line:
    """One thing that was looked at."""

    what: str
    status: str  # "ok"; "note": good to know, labkit works; "problem": something must be done
    found: str
    todo: str = ""


@dataclass(frozen=True)
class Report:
    """What :func:`report` found. Prints as text and shows as a table in a notebook."""

    lines: tuple[Line, ...]

    @property
    def ok(self) -> bool:
        """False where something must be done."""
        return not any(line.status == PROBLEM for line in self.lines)

    @property
    def verdict(self) -> str:
        """One sentence on all of it."""
        problems = [line.what for line in self.lines if line.status == PROBLEM]
        notes = sum(line.status == NOTE for line in self.lines)
        if problems:
            return f"To be put right: {', '.join(problems)}."
        count = {0: "", 1: " (1 note)"}.get(notes, f" ({notes} notes)")
        return f"Everything that labkit needs is here{count}."

    def __str__(self) -> str:
        wide = max((len(line.what) for line in self.lines), default=0)
        text = []
        for line in self.lines:
            head = f"{line.status:<7}  {line.what:<{wide}}  "
            text += textwrap.wrap(line.found, 120, initial_indent=head, subsequent_indent=" " * len(head))
            text += [" " * len(head) + "-> " + line.todo] if line.todo else []  # unwrapped: it holds commands to copy
        return "\n".join([*text, "", self.verdict])

    def _repr_html_(self) -> str:
        colours = {OK: "#009e73", NOTE: "#e69f00", PROBLEM: "#d55e00"}
        left = "style='text-align:left'"
        rows = "".join(
            f"<tr><td {left}><b style='color:{colours[line.status]}'>{line.status}</b></td>"
            f"<td {left}>{html.escape(line.what)}</td><td {left}>{html.escape(line.found)}"
            + (f"<br>→ {html.escape(line.todo)}" if line.todo else "")
            + "</td></tr>"
            for line in self.lines
        )
        return f"<table><caption {left}><b>{html.escape(self.verdict)}</b></caption>{rows}</table>"


def report(network: bool = True) -> Report:
    """Look at this machine, in about ten seconds. ``network=False`` does not ask whether the model hub answers."""
    lines: list[Line] = []
    for what, check in CHECKS.items():
        if what == "hub" and not network:
            continue
        try:
            lines += check()
        except Exception as error:  # whatever is broken here, the other lines are wanted
            said = f"this could not be looked at: {type(error).__name__}: {_one_line(error)}"
            lines.append(Line(what, PROBLEM, said, "see the lines above; what is missing there may be the cause"))
    return Report(tuple(lines))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


# Python and packages


def python() -> Iterator[Line]:
    from packaging.specifiers import SpecifierSet

    found, wanted = platform.python_version(), SpecifierSet(declared()[0])
    if not wanted.contains(found, prereleases=True):
        yield Line("Python", PROBLEM, f"{found}; labkit needs {wanted}", "install Python 3.11 or newer")
    elif found.startswith("3.10."):
        todo = "with Python 3.11 or newer 2-bit weights run on a packed kernel too"
        yield Line("Python", NOTE, f"{found}; the onnxruntime for it has no 2-bit kernel", todo)
    else:
        yield Line("Python", OK, f"{found} in {sys.prefix}")


def packages() -> Iterator[Line]:
    """One line for the core and one for each extra. A missing extra is no problem; one that is too old is."""
    for group, requirements in needed().items():
        missing, old, good = [], [], []
        for requirement in requirements:
            have = version(requirement.name)
            if have is None:
                missing.append(requirement)
            elif not requirement.specifier.contains(have, prereleases=True):
                old.append((requirement, have))
            else:
                good.append(f"{requirement.name} {have}")
        what = "packages" if group == "core" else f"packages [{group}]"
        if not missing and not old:
            yield Line(what, OK, ", ".join(good))
            continue
        said = [f"{r.name} is missing" for r in missing]
        said += [f"{r.name} {have} is too old (needed: {r.specifier})" for r, have in old]
        if group != "core" and not old:
            yield Line(
                what, NOTE, f"{', '.join(said)}: {OPTIONAL.get(group, 'not needed by the core')}", command(missing)
            )
        else:
            yield Line(what, PROBLEM, ", ".join(said), command([*missing, *(r for r, _ in old)]))


def _named(names) -> list:
    """The requirements with these names, from whatever group."""
    return [r for group in needed().values() for r in group if r.name in names]


# The machine


def device() -> Iterator[Line]:
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        try:
            good = torch.ones(8, device="cuda").sum().item() == 8
        except RuntimeError as error:
            good, name = False, f"{name}: {_one_line(error)}"
        if good:
            yield Line("device", OK, f"{name}, CUDA {torch.version.cuda}; a kernel ran on it")
        else:
            todo = "install a torch that was built for this GPU's driver, or set CUDA_VISIBLE_DEVICES= to use the CPU"
            yield Line("device", PROBLEM, f"a GPU is seen, but a kernel on it failed ({name})", todo)
    elif shutil.which("nvidia-smi"):
        why = "has no CUDA" if torch.version.cuda is None else f"(CUDA {torch.version.cuda}) cannot use its driver"
        todo = "install a CUDA build of torch that fits the driver; on the CPU everything works too"
        yield Line("device", NOTE, f"CPU; there seems to be an NVIDIA GPU, but torch {torch.__version__} {why}", todo)
    else:
        yield Line("device", OK, f"CPU, {torch.backends.cpu.get_cpu_capability()}")


def share() -> float | None:
    """How many cores' worth of time a container's limit grants, or None where there is no limit (cgroup v2, then v1)."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = (Path(f"/sys/fs/cgroup/cpu/cpu.cfs_{n}_us").read_text() for n in ("quota", "period"))
        except OSError:
            return None
    try:
        return float(quota) / float(period) if float(quota) > 0 else None
    except (ValueError, ZeroDivisionError):  # "max"
        return None


def processor() -> Iterator[Line]:
    have, limit = cores(), share()
    if limit is not None and limit < have:
        said = f"{have} cores are seen, but this container may use {limit:.3g} of them: timings will stutter"
        yield Line("cores", NOTE, said, f"set OMP_NUM_THREADS={max(1, int(limit))} before Python starts")
    else:
        yield Line("cores", OK, f"{have}, {platform.machine()}")
    bad = []
    for name in THREADS:
        if (text := os.environ.get(name)) is None:
            continue
        counts = text.replace(" ", "").split(",")  # OpenMP takes a list, one number per nesting level
        if not all(c.isdecimal() and int(c) > 0 for c in counts):
            bad.append((f"{name}={text!r} is not a number of threads and is ignored", f"unset {name}"))
        elif int(counts[0]) > have:
            said = f"{name}={text} is more than the {have} cores here: threads will wait for each other"
            bad.append((said, f"unset {name}, or set it to {have}"))
    for said, todo in bad:
        yield Line("threads", NOTE, said, todo)
    if not bad:
        chosen = ", ".join(f"{n}={os.environ[n]}" for n in THREADS if n in os.environ) or "the libraries' own choice"
        torch = sys.modules.get("torch")
        yield Line("threads", OK, chosen + (f"; torch uses {torch.get_num_threads()}" if torch else ""))


def available() -> tuple[float, float] | None:
    """(available, total) bytes of memory, a container's limit included; None where nothing tells."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        read = {line.split(":")[0]: 1024.0 * int(line.split()[1]) for line in lines if line.endswith("kB")}
        free, total = read["MemAvailable"], read["MemTotal"]
    except (OSError, KeyError, ValueError):
        try:
            import psutil
        except ImportError:
            return None
        free, total = float(psutil.virtual_memory().available), float(psutil.virtual_memory().total)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            most, now = (float(Path(p).read_text()) for p in (limit, used))
        except (OSError, ValueError):  # no such limit, or "max"
            continue
        free, total = min(free, most - now), min(total, most)
    return free, total


def memory() -> Iterator[Line]:
    found = available()
    if found is None:
        yield Line("memory", NOTE, "this system does not tell", "a notebook takes up to 2 GB: see that they are free")
        return
    free, total = found
    said = f"{free / 1e9:.1f} GB of {total / 1e9:.1f} GB are free"
    if free < PEAK / 2:
        yield Line("memory", PROBLEM, f"{said}; loading the model alone takes 1 GB", "close other programs or kernels")
    elif free < PEAK:
        todo = 'close other programs or kernels, and keep PROFILE = "quick"'
        yield Line("memory", NOTE, f"{said}; a notebook takes up to {PEAK / 1e9:.0f} GB", todo)
    else:
        yield Line("memory", OK, said)


# labkit's own files


def disk() -> Iterator[Line]:
    from labkit import paths

    todo = "set LABKIT_CACHE to a folder that can be written to, on a disk with room"
    try:
        where = paths.cache()
        with tempfile.TemporaryFile(dir=where):
            pass
    except OSError as error:
        said = f"nothing can be written there: {_one_line(error)}"
        if _converted() is None:
            yield Line("cache", PROBLEM, said, todo)
        else:  # a class shares the model
            yield Line("cache", NOTE, f"{said}; the model is read from it, your own files go to {paths.own()}")
        return
    free = shutil.disk_usage(where).free
    said = f"{where}, {free / 1e9:.1f} GB free"
    if free >= ROOM:
        yield Line("cache", OK, said)
    elif _converted() is None:
        yield Line("cache", PROBLEM, f"{said}; the model needs {ROOM / 1e9:.1f} GB to be fetched and converted", todo)
    else:
        yield Line("cache", NOTE, f"{said}; saved models and results need room", todo)


def _converted() -> Path | None:
    """The converted model's folder, where it is complete. Unlike ``embedded.folder()`` this makes nothing."""
    from labkit import embedded

    return embedded.place() if embedded.complete() else None


def model() -> Iterator[Line]:
    """The embedded model: fetched? converted? does it load and predict?"""
    from labkit import assets, embedded

    folder, asset = _converted(), assets.assets()[embedded.ASSET]
    if folder is None:
        size = asset.path.stat().st_size if asset.path.is_file() else None
        if size is None:
            yield Line("model", PROBLEM, f"{embedded.NAME} is not fetched", "labkit fetch")
        elif size != (asset.file_size or asset.size):
            yield Line("model", PROBLEM, f"{asset.path} is damaged: it has {size:,} bytes", "labkit fetch")
        else:
            todo = "labkit fetch does it now; otherwise the first labkit.load() does"
            yield Line("model", NOTE, f"{embedded.NAME} is fetched, but not yet converted", todo)
        return
    import torch

    from labkit.model import load  # by path: load() alone would repair what is damaged, and we only look

    start = time.perf_counter()
    try:
        lm = load(folder, device="cpu")
    except ValueError as error:
        yield Line("model", PROBLEM, f"the converted model cannot be read: {_one_line(error)}", "labkit fetch")
        return
    seconds = time.perf_counter() - start
    with torch.inference_mode():
        logits = lm.model(lm.encode("A model predicts the next word")).logits
    if torch.isfinite(logits).all():
        yield Line("model", OK, f"{embedded.NAME} loads ({seconds:.1f} s) and predicts, from {folder}")
    else:
        todo = f"remove {folder}, then labkit fetch"
        yield Line("model", PROBLEM, "the converted model predicts NaN: its file is damaged", todo)


def texts() -> Iterator[Line]:
    """Are the texts those that every machine measures on, and does the tokenizer here split them in the same way?"""
    from labkit import shipped

    known = shipped.shipped()
    if damaged := [name for name in known if not shipped.intact(name)]:
        said = f"{', '.join(damaged)} in {shipped.paths.data()}: not as it was shipped, so numbers here are others' no more"
        yield Line("texts", PROBLEM, said, "`git checkout data`; without a checkout, install the package again")
        return
    texts = {name: what for name, what in known.items() if what.ids}
    named = " and ".join(f"{name} ({what.tokens:,} tokens)" for name, what in texts.items())
    folder = _converted()
    if folder is None:
        said = f"{named} are as shipped; whether the tokenizer splits them as it should shows once the model is there"
        yield Line("texts", NOTE, said, "labkit fetch")
        return
    from transformers import AutoTokenizer

    from labkit import text

    how = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(folder, **how)
    other = [name for name, what in texts.items() if text.fingerprint(text.whole(tokenizer, name)) != what.ids]
    if other:
        have = f"transformers {version('transformers')}, tokenizers {version('tokenizers')}"
        said = f"the tokenizer here splits {' and '.join(other)} into other ids ({have}): no shipped result matches"
        todo = f"remove {folder}, then labkit fetch; if that does not help, install other versions of these two"
        yield Line("texts", PROBLEM, said, todo)
    else:
        yield Line("texts", OK, f"{named}: the same ids as on every machine")


def shipped_rows() -> Iterator[Line]:
    """How many of the measurements that come with labkit answer on this machine."""
    what, folder = "shipped results", _converted()
    if folder is None:
        yield Line(what, NOTE, "whether they fit shows once the model is there", "labkit fetch")
        return
    from labkit import embedded
    from labkit.model import load
    from labkit.reproduce import serving

    lm = load(folder, device="cpu", dtype="float32")
    lm.name = embedded.NAME
    counts = serving(lm)
    here, total = counts["here"], sum(counts.values())
    if here == total:
        yield Line(what, OK, f"all {total} answer here, for the model on the CPU in fp32")
        return
    why = {
        "labkit": ("were measured by another labkit", "update labkit"),
        "model": (f"are of other weights than those here ({lm.fingerprint})", f"remove {folder}, then labkit fetch"),
        "texts": ("are on other token ids", "see the line on texts"),
        "calibration": ("were calibrated on other token ids", "see the line on texts"),
    }
    reasons = [(counts[name], said, todo) for name, (said, todo) in why.items() if counts[name]]
    said = f"{here} of {total} answer here; " + ", ".join(f"{n} {said}" for n, said, _ in reasons)
    todo = "; ".join(dict.fromkeys(todo for _, _, todo in reasons))
    yield Line(what, NOTE, said, f"{todo}; what is missing is measured when a panel asks for it")


def kernels() -> Iterator[Line]:
    """One tiny product at each width through onnxruntime's MatMulNBits, against the dequantized weight."""
    import torch

    from labkit.formats import Integer
    from labkit.linear import matmulnbits

    if not matmulnbits.widths():
        todo = command(needed().get("kernels", []))
        yield Line("kernels", NOTE, "onnx or onnxruntime is missing: packed weights take the slow path", todo)
        return
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 128, generator=draw), torch.randn(2, 128, generator=draw)
    good, bad = [], []
    for bits in (2, 4, 8):
        form = Integer(bits, 32).encode(weight)
        exact = x @ form.decode().T
        try:
            error = (matmulnbits.Kernel(form)(x) - exact).norm() / exact.norm()
        except Exception as reason:  # onnxruntime has error classes of its own
            bad.append(f"{bits} bits: {_one_line(reason)[:120]}")
            continue
        # The kernel rounds activations to int8, which costs about 0.5 %; a NaN is not below 2 % either.
        good.append(bits) if error < 0.02 else bad.append(f"{bits} bits: the product is off by {100 * error:.0f} %")
    have = f"onnxruntime {version('onnxruntime')}"
    if good == [4, 8] and platform.python_version().startswith("3.10."):  # there is no newer one to install
        yield Line("kernels", NOTE, f"{have} multiplies with 4 and 8 bits; 2 bits need Python 3.11 or newer")
    elif bad:
        todo = command(needed().get("kernels", []), "--upgrade")
        yield Line("kernels", PROBLEM, f"{have}: MatMulNBits fails at {'; '.join(bad)}", todo)
    else:
        yield Line("kernels", OK, f"{have} multiplies with packed weights of {', '.join(map(str, good))} bits")


def engine() -> Iterator[Line]:
    """What was measured once for models as one graph, and is used since."""
    from labkit.engine import threads

    known = [str(choice) for choice in threads.choices()]
    nothing = "nothing is remembered: threads are measured when a model is first compiled"
    yield Line("engine", OK, "; ".join(known) or nothing)


def store() -> Iterator[Line]:
    from labkit.results import Store, StoreError

    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            opened = Store()
            count = len(opened.rows())
            opened.close()
    except StoreError as error:
        yield Line("results", PROBLEM, _one_line(error), "free some disk space, or set LABKIT_CACHE to another folder")
        return
    text = f"{opened.path}, {count:,} measurements"
    if said:  # a broken file was set aside, or rows of an older labkit were: it says so itself, and that first
        yield Line("results", NOTE, f"{text}; {_one_line(said[0].message)}")
    else:
        yield Line("results", OK, text)


# Notebooks, browser, hub


def lab() -> Iterator[Line]:
    """JupyterLab and the widgets: not only there, but importable."""
    missing = [name for name in ("jupyterlab", "ipykernel", *WIDGETS) if importlib.util.find_spec(name) is None]
    if missing:
        said = f"{', '.join(missing)} missing: the notebooks cannot be opened here"
        yield Line("notebooks", NOTE, said, command(_named(missing)))
        return
    try:
        for name in WIDGETS:
            importlib.import_module(name)
        importlib.import_module("ipywidgets").IntSlider()
    except Exception as error:
        todo = command(_named(WIDGETS), "--force-reinstall")
        yield Line("notebooks", PROBLEM, f"a widget cannot be made: {type(error).__name__}: {_one_line(error)}", todo)
        return
    yield Line("notebooks", OK, ", ".join(f"{name} {version(name)}" for name in ("jupyterlab", *WIDGETS)))


def browser() -> Iterator[Line]:
    found = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if found and importlib.util.find_spec("playwright") is not None:
        yield Line("browser tests", OK, found)
    elif found:
        todo = command(_named(["playwright"]))
        yield Line("browser tests", NOTE, f"{found}, but playwright is missing: they are skipped", todo)
    else:
        todo = "only for these tests: `make browser`, or install chromium yourself"
        yield Line("browser tests", NOTE, "there is no Chromium: they are skipped", todo)


def hub() -> Iterator[Line]:
    """Whether the model hub answers. The embedded model does not need it, so this is never a problem."""
    without = "the embedded model, local folders and the texts `manual` and `prose` need no network"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield Line("hub", NOTE, f"HF_HUB_OFFLINE is set: other models come only from the hub's own cache; {without}")
        return
    from huggingface_hub.constants import ENDPOINT

    said: list[str] = []

    def ask():
        request = urllib.request.Request(ENDPOINT, method="HEAD", headers={"User-Agent": "labkit doctor"})
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
                said.append("" if reply.status < 400 else f"answers {reply.status}")
        except urllib.error.HTTPError as error:
            said.append(f"answers {error.code} {error.reason}")
        except Exception as error:  # a proxy, a certificate, a name that is not known, …
            said.append(f"does not answer ({_one_line(getattr(error, 'reason', error))[:120]})")

    # In a thread: looking up a name has no timeout of its own.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE + 1)
    why = said[0] if said else f"does not answer within {PATIENCE:g} s"
    if why:
        yield Line("hub", NOTE, f"{ENDPOINT} {why}; {without}")
    else:
        yield Line("hub", OK, f"{ENDPOINT} answers: any of its models can be loaded by its id")


CHECKS: dict[str, Callable[[], Iterator[Line]]] = {
    "Python": python,
    "packages": packages,
    "device": device,
    "cores": processor,
    "memory": memory,
    "cache": disk,
    "model": model,
    "texts": texts,
    "kernels": kernels,
    "engine": engine,
    "results": store,
    "shipped results": shipped_rows,
    "notebooks": lab,
    "browser tests": browser,
    "hub": hub,
}


if __name__ == "__main__":
    found = report("--no-network" not in sys.argv[1:])
    print(found)
    sys.exit(0 if found.ok else 1)
