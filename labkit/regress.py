"""Run notebooks with papermill and compare the numbers they record with the baselines.

    report = run(find(["00"]), profile="quick", out="reports")
    report.ok, print(report)

Each notebook runs in a process of its own, under a timeout per cell and one for all of it, with LABKIT_STATIC=1. What
``labkit.record`` wrote into it is compared with ``tests/baselines/<notebook>.json``; the time and the peak memory of the
process and its kernel are held against a budget: see :attr:`Result.alone` for what time means on a busy machine.
Reports are on disk after every notebook, so an interrupt loses only the one in flight.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from labkit._files import write_text
from labkit.measure.busy import Watch, is_busy
from labkit.measure.machine import cores
from labkit.record import read_metrics

CORES = 2  # of the laptop that the budgets are meant for
PROFILES = {  # what is promised for it, and timeouts that only a hang meets
    "quick": {"max_seconds": 90.0, "max_gb": 2.0, "timeout": 1500.0},
    "full": {"max_seconds": 360.0, "max_gb": None, "timeout": 3600.0},
}
EVERY = 0.2  # seconds between two looks at memory
NOT_TEXT = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # what XML and UTF-8 files cannot hold
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass(frozen=True)
class Metric:
    """One recorded number and what became of it: "ok", "drift", "new" (no baseline) or "missing" (no longer recorded)."""

    name: str
    verdict: str
    value: float | None  # None when missing
    expected: float | None  # None when new
    tolerance: float | None  # the largest difference allowed, in the value's unit
    label: str

    @property
    def text(self) -> str:
        """For example ``"gptq4.kld is 0.16, the baseline says 0.144 ± 0.0072 (measured): drift"``."""
        if self.verdict == "new":
            return f"{self.name} is {self.value:.6g} ({self.label}): new, no baseline yet"
        said = f"the baseline says {self.expected:.6g} ± {self.tolerance:.2g} ({self.label})"
        if self.verdict == "missing":
            return f"{self.name} is missing, {said}"
        return f"{self.name} is {self.value:.6g}, {said}: {self.verdict}"


@dataclass
class Result:
    """One notebook's run."""

    name: str
    seconds: float = 0.0
    peak: int = 0  # bytes: the resident sets of papermill, the kernel and what they started, together
    metrics: list[Metric] = field(default_factory=list)
    error: str = ""  # what stopped the notebook, with the cell's number
    timed_out: bool = False
    over: list[str] = field(default_factory=list)  # budgets exceeded, in words
    executed: Path | None = None
    cpu: float = 0.0  # CPU seconds of papermill, the kernel and what they started
    busy: float | None = None  # share of the cores that others took meanwhile; None: the system does not say

    @property
    def alone(self) -> float:
        """Seconds that a budget is held against: wall seconds, but no more than its own work can account for.

        While others take a good part of the cores, wall seconds say how busy they were. The notebook's CPU seconds, spread
        over the two cores that the budgets are meant for, then say what it needs at the least: still enough to notice
        one that does too much.
        """
        return min(self.seconds, self.cpu / min(cores(), CORES)) if is_busy(self.busy) else self.seconds

    def of(self, verdict: str) -> list[Metric]:
        return [m for m in self.metrics if m.verdict == verdict]

    @property
    def ran(self) -> bool:
        """Whether every cell ran, and the numbers can be trusted."""
        return not self.error

    @property
    def problems(self) -> list[str]:
        """Why this is not ok, one sentence each."""
        broken = [self.error] if self.error else []
        return broken + [m.text for m in self.metrics if m.verdict in ("drift", "missing")] + self.over

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def verdict(self) -> str:
        """One or two words: ok, timeout, error, drift, missing number, over budget."""
        if self.error:
            return "timeout" if self.timed_out else "error"
        if self.of("drift"):
            return "drift"
        if self.of("missing"):
            return "missing number"
        return "over budget" if self.over else "ok"


@dataclass
class Report:
    """What :func:`run` found. ``str()`` of it is the table."""

    profile: str
    max_seconds: float | None
    max_gb: float | None
    out: Path
    machine: str = ""
    versions: str = ""
    results: list[Result] = field(default_factory=list)
    planned: int = 0
    updated: list[Path] = field(default_factory=list)  # baselines written

    @property
    def ok(self) -> bool:
        """Whether every notebook that was asked for ran, and is fine."""
        return len(self.results) == self.planned and all(r.ok for r in self.results)

    def __str__(self) -> str:
        from labkit.report import table

        return table(self)


def find(names: Iterable[str | os.PathLike] = ()) -> list[Path]:
    """Notebook files: those named by path, or by how their name in notebooks/ begins; by default all in notebooks/.

    Solutions run only when named. Raises ValueError for a name that fits no notebook, or several.
    """
    folder = next((f for f in (Path("notebooks"), _checkout() / "notebooks") if f.is_dir()), None)
    there = sorted(folder.glob("*.ipynb")) if folder else []
    found = []
    for name in names:
        path = Path(name)
        fits = [path] if path.is_file() else [f for f in there if f.name == path.name or f.stem.startswith(str(name))]
        if len(fits) != 1:
            have = ", ".join(f.stem for f in fits or there) or "none"
            raise ValueError(
                f"{'Several notebooks fit' if fits else 'There is no notebook'} {str(name)!r}: there are {have}."
            )
        found += fits
    if not names and not there:
        raise ValueError("There are no notebooks here: run this in a checkout of labkit, or name files.")
    return list(dict.fromkeys(found)) if names else there


def _checkout() -> Path:
    return Path(__file__).resolve().parent.parent


def run(
    notebooks: Iterable[str | os.PathLike],
    profile: str = "quick",
    out: str | os.PathLike = "reports",
    timeout: float | None = None,
    cell_timeout: float | None = None,
    max_seconds: float | None = None,
    max_gb: float | None = None,
    update: bool = False,
    baselines: str | os.PathLike | None = None,
    say: Callable[[str], None] | None = print,
) -> Report:
    """Run each notebook, compare, and write ``report.html``, ``junit.xml`` and the executed notebooks to ``out``.

    ``None`` for a limit takes the profile's: see ``PROFILES``; a cell gets half of ``timeout``. ``max_gb`` counts 1e9
    bytes. ``update=True`` writes the baselines from this run, all of them or, where a notebook failed, none.
    ``say`` gets a line about each notebook as it ends. Raises ValueError for an unknown profile or a missing file.
    """
    from labkit import report as pages
    from labkit.measure.machine import machine, versions

    if profile not in PROFILES:
        raise ValueError(f"profile = {profile!r} is not allowed: it must be one of {', '.join(PROFILES)}.")
    limits = PROFILES[profile]
    timeout = limits["timeout"] if timeout is None else timeout
    cell_timeout = timeout / 2 if cell_timeout is None else cell_timeout
    files = [Path(n) for n in notebooks]
    for file in files:
        if not file.is_file():
            raise ValueError(f"There is no notebook {str(file)!r}.")
    out, names = Path(out), _names(files)
    out.mkdir(parents=True, exist_ok=True)
    report = Report(
        profile,
        limits["max_seconds"] if max_seconds is None else max_seconds,
        limits["max_gb"] if max_gb is None else max_gb,
        out,
        machine(),
        versions(),
        planned=len(files),
    )
    folder = Path(baselines) if baselines else _checkout() / "tests" / "baselines"
    expected = {name: _baseline(folder, name, profile) for name in names}  # a damaged one is known before the work
    for name, file in zip(names, files):
        if say:
            say(f"{clean(name)} ...")
        result = Result(name)
        _execute(file, out / f"{name}.ipynb", profile, timeout, cell_timeout, result)
        _read(result, expected[name])
        _budget(result, report)
        report.results.append(result)
        pages.write(report)
        if say:
            say(pages.line(result))
    if update and not report.results:
        raise ValueError("There is nothing to make baselines of: name a notebook.")
    if update and all(r.ran for r in report.results):
        for result in report.results:
            path = _write_baseline(folder, result, profile)
            _read(result, _baseline(folder, result.name, profile))
            if path:
                report.updated.append(path)
        pages.write(report)
    elif update and say:
        say("The baselines stay as they were, since a notebook failed.")
    return report


def _names(files: list[Path]) -> list[str]:
    """A name for each notebook: its stem, with its folder's name where two have the same stem, or for solutions."""
    stems = [f.stem for f in files]
    names = [
        f"{f.resolve().parent.name}-{f.stem}"
        if stems.count(f.stem) > 1 or f.resolve().parent.name == "solutions"
        else f.stem
        for f in files
    ]
    if len(set(names)) != len(names):
        raise ValueError("Two of these notebooks have the same name and folder name: run them one at a time.")
    return names


# One notebook


def _execute(file: Path, executed: Path, profile: str, timeout: float, cell_timeout: float, result: Result) -> None:
    """Run one notebook in a process of its own and fill in ``result``."""
    executed.unlink(missing_ok=True)  # an older run's
    unfit = _unfit(file)
    if unfit:
        result.error = unfit
        return
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(file.resolve()),
        str(executed.resolve()),
        "-r",
        "PROFILE",
        profile,
    ]
    command += ["--cwd", str(file.resolve().parent), "--execution-timeout", str(max(1, round(cell_timeout)))]
    command += ["--no-progress-bar", "--start-timeout", str(max(1, round(min(timeout, 120))))]
    # The kernel named python3 of this interpreter, not one in the user's folder.
    env = os.environ | {"LABKIT_STATIC": "1", "JUPYTER_PREFER_ENV_PATH": "1", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile() as log:
        start = time.monotonic()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)
        tree, others = _Tree(process.pid), Watch()
        try:
            late = _watch(process, tree, start + timeout)
        finally:
            tree.kill()
            process.wait()
            result.peak, result.cpu = tree.peak, tree.seconds
            result.busy = others.share(children=tree.seconds)
        result.seconds = time.monotonic() - start
        log.seek(0)
        said = ANSI.sub("", log.read().decode(errors="replace"))
    result.executed = executed if executed.is_file() else None
    result.error = _failure(file, executed, process.returncode, said, late, timeout, cell_timeout, result)


def _unfit(file: Path) -> str:
    """Why this notebook cannot be run, or an empty string."""
    try:
        notebook = json.loads(file.read_text(encoding="utf-8"))
        cells, metadata = notebook["cells"], notebook["metadata"]
        tags = [tag for cell in cells for tag in cell["metadata"].get("tags", [])]
        kernel = metadata.get("kernelspec", {}).get("name")
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{file.name} is not a Jupyter notebook."
    if not kernel:
        return f"{file.name} has no kernelspec in its metadata: JupyterLab would stop and ask for a kernel."
    if "parameters" not in tags:
        return f"{file.name} has no cell tagged 'parameters': PROFILE cannot be set."
    return ""


class _Tree:
    """A process and all that it starts, whose memory and CPU time are watched and which is ended as a whole."""

    def __init__(self, pid: int):
        import psutil  # comes with ipykernel

        self.errors = psutil.Error
        self.seen = {pid: psutil.Process(pid)}
        self.top = self.seen[pid]
        self.peak = 0
        self._cpu: dict[int, float] = {}

    @property
    def seconds(self) -> float:
        """CPU seconds of all of them, the dead ones' as they were last seen."""
        return sum(self._cpu.values())

    def look(self) -> None:
        """Note who is there, what they have worked, and the bytes resident in all of them together."""
        with contextlib.suppress(self.errors):
            self.seen |= {p.pid: p for p in self.top.children(recursive=True)}
        now = highest = 0
        for pid, process in self.seen.items():
            with contextlib.suppress(self.errors):
                now += process.memory_info().rss
                times = process.cpu_times()
                self._cpu[pid] = times.user + times.system
            with contextlib.suppress(OSError, AttributeError):  # Linux: also what came and went between two looks
                status = Path(f"/proc/{pid}/status").read_text()
                highest = max(highest, 1024 * int(re.search(r"VmHWM:\s+(\d+)", status).group(1)))
        self.peak = max(self.peak, now, highest)

    def kill(self) -> None:
        """End what is left. The kernel has a session of its own and would outlive papermill."""
        self.look()
        for process in self.seen.values():
            with contextlib.suppress(self.errors):  # gone; psutil also refuses a number that is another process by now
                process.kill()


def _watch(process: subprocess.Popen, tree: _Tree, deadline: float) -> bool:
    """Wait for the process and watch its memory; True when the deadline came first."""
    while process.poll() is None:
        if time.monotonic() > deadline:
            return True
        tree.look()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(EVERY)
    return False


def _failure(
    file: Path, executed: Path, code: int, said: str, late: bool, timeout: float, cell_timeout: float, result: Result
) -> str:
    """One sentence on what stopped the notebook, or an empty string; sets ``timed_out``."""
    where, error, unrun = _last_cell(file, executed)
    result.timed_out = late or "CellTimeoutError" in said
    if late:
        return f"{where} was still running when the notebook's {timeout:g} seconds were over."
    if "CellTimeoutError" in said:
        return f"{where} took longer than the {cell_timeout:g} seconds that a cell may take."
    if "DeadKernelError" in said:
        return f"{where} ended its kernel: a crash, or the system ran out of memory."
    if code and error:
        return f"{where}: {error}"
    if code:
        last = next((line for line in reversed(said.splitlines()) if line.strip()), "no message")
        return f"papermill stopped with exit code {code}: {last.strip()}"
    if unrun:
        return f"{where} ended the notebook early; {unrun} cells never ran."
    return ""


def _last_cell(file: Path, executed: Path) -> tuple[str, str, int]:
    """("Cell 5 of 12 (`first line`)", its error in one line, code cells that never ran), from the executed notebook.

    Cells are counted from 1 as they stand in ``file``, not in the executed copy, which has cells of papermill's.
    """
    try:
        original = json.loads(file.read_text(encoding="utf-8"))["cells"]
        cells = json.loads(executed.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError):  # killed before or while it was written
        return "The notebook", "", 0
    code = [c for c in cells if c.get("cell_type") == "code" and "".join(c["source"]).strip()]
    started = [c for c in code if c["metadata"].get("papermill", {}).get("start_time")]
    unrun = len(code) - len(started)
    if not started:
        return "The notebook", "", unrun
    failed = [c for c in started if c["metadata"]["papermill"].get("exception")]
    last = (failed or started)[-1]
    source = "".join(last["source"]).strip().splitlines()[0]
    error = next((o for o in last.get("outputs", []) if o.get("output_type") == "error"), None)
    message = ""
    if error:
        lines = [line for line in ANSI.sub("", error.get("evalue") or "").splitlines() if line.strip()]
        message = error["ename"] + (f": {lines[0].strip()}" if lines else "")
    if "injected-parameters" in last["metadata"].get("tags", []):
        return "The cell of injected parameters", message, unrun
    ids = [c.get("id") for c in original]
    if last.get("id") in ids:
        number = ids.index(last["id"]) + 1
    else:  # an old notebook, without ids
        number = next((i for i, c in enumerate(original, 1) if "".join(c["source"]) == "".join(last["source"])), "?")
    return f"Cell {number} of {len(original)} (`{source[:80]}`)", message, unrun


# Its numbers


def _read(result: Result, expected: dict[str, dict]) -> None:
    """Compare what the executed notebook recorded with the baseline."""
    found = {}
    if result.executed:
        try:
            found = read_metrics(result.executed)
        except ValueError as error:
            result.error = result.error or str(error)
    result.metrics = compare(found, expected)
    if result.error:  # it did not get that far: the error says more
        result.metrics = [m for m in result.metrics if m.verdict != "missing"]


def compare(found: dict[str, dict], expected: dict[str, dict]) -> list[Metric]:
    """The verdict on each number of a run and of its baseline, in the order of the run.

    A number agrees when it is within the baseline's ``rel_tol`` (a share of the baseline's value) or ``abs_tol``,
    whichever allows more, and its label ("measured", "simulated", "modelled") is the same.
    """
    metrics = []
    for name, metric in found.items():
        base = expected.get(name)
        if base is None:
            metrics.append(Metric(name, "new", metric["value"], None, None, metric["label"]))
            continue
        tolerance = _tolerance(base)
        agrees = abs(metric["value"] - base["value"]) <= tolerance and metric["label"] == base["label"]
        label = base["label"] if metric["label"] == base["label"] else f"was {base['label']}, now {metric['label']}"
        metrics.append(Metric(name, "ok" if agrees else "drift", metric["value"], base["value"], tolerance, label))
    for name, base in expected.items():
        if name in found:
            continue
        metrics.append(Metric(name, "missing", None, base["value"], _tolerance(base), base["label"]))
    return metrics


def _tolerance(base: dict) -> float:
    return max(abs(base["value"]) * base["rel_tol"], base["abs_tol"] or 0.0)


def _budget(result: Result, report: Report) -> None:
    if report.max_seconds is not None and result.alone > report.max_seconds:
        took = f"It took {result.seconds:.0f} s"
        if result.alone < result.seconds:
            took += (
                f" while others took {100 * result.busy:.0f} % of the cores; its {result.cpu:.0f} s of CPU time alone need "
                f"{result.alone:.0f} s"
            )
        result.over.append(f"{took}, over the budget of {report.max_seconds:g} s.")
    if report.max_gb is not None and result.peak > report.max_gb * 1e9:
        result.over.append(f"Its memory peaked at {result.peak / 1e9:.2f} GB, over the budget of {report.max_gb:g} GB.")


# Baselines


def _path(folder: Path, name: str, profile: str) -> Path:
    return folder / (f"{name}.json" if profile == "quick" else f"{name}.{profile}.json")


def _baseline(folder: Path, name: str, profile: str) -> dict[str, dict]:
    """What the baseline says; empty where there is none. ValueError where it is damaged."""
    path = _path(folder, name, profile)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for base in found.values():
            float(base["value"]), float(base["rel_tol"]), float(base["abs_tol"] or 0), str(base["label"])
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a baseline ({type(error).__name__}: {error}): restore it, or remove it and run with --update."
        ) from error
    return found


def _write_baseline(folder: Path, result: Result, profile: str) -> Path | None:
    """Write what the notebook recorded, whole or not at all; a notebook that records nothing has no file."""
    path = _path(folder, result.name, profile)
    metrics = read_metrics(result.executed)
    if not metrics:
        path.unlink(missing_ok=True)
        return None
    fields = ("value", "rel_tol", "abs_tol", "label")
    kept = {name: {f: metric[f] for f in fields} for name, metric in sorted(metrics.items())}
    write_text(path, json.dumps(kept, indent=1) + "\n")
    return path


def clean(text: str) -> str:
    """The text without what a report cannot hold: control characters and lone surrogates."""
    return NOT_TEXT.sub("", text)
