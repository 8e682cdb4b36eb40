"""Run labkit's benchmarks and say whether their targets are met.

Every benchmarks/bench_NAME.py runs in a process of its own, so that its memory, thread pools and caches are its own
too, and is stopped when it takes too long. The tables are printed as they come; the whole report is written as
Markdown and JSON.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # benchmarks say `from report import Row`
sys.path.insert(1, str(HERE.parent))  # and `import labkit`, from the checkout they lie in

from report import Outcome, Report, Row, outcome_text  # noqa: E402

EPILOG = """\
Exit status: 0 when every benchmark ran and met its targets, 1 when a target was missed or a benchmark crashed or took
too long, 2 for a wrong command line, 130 when interrupted (what had finished is still reported).

Timings compare only within one run on an otherwise idle machine.

examples:
  python benchmarks/run.py --list
  python benchmarks/run.py --quick
  python benchmarks/run.py --only roofline gemv --out report.md
"""


@dataclass(frozen=True)
class Bench:
    """A benchmark file, and what it says of itself."""

    name: str
    path: Path
    title: str
    timeout: float | None  # seconds, when the file sets TIMEOUT


def discover(folder: Path) -> list[Bench]:
    """The benchmarks of a folder by name. TITLE and TIMEOUT are read without running the file."""
    found = []
    for path in sorted(folder.glob("bench_*.py")):
        name = path.stem.removeprefix("bench_")
        said = {}
        with suppress(SyntaxError):  # a broken file is reported when it runs
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                    said |= {t.id: node.value.value for t in node.targets if isinstance(t, ast.Name)}
        timeout = said.get("TIMEOUT")
        if not isinstance(timeout, (int, float)) or timeout <= 0:
            timeout = None
        found.append(Bench(name, path, str(said.get("TITLE", name)), timeout))
    return found


# --- in the child process ------------------------------------------------------------------------


def child(path: Path, quick: bool, result: Path) -> int:
    """Run one benchmark and leave its rows in ``result``. What goes wrong is printed, for the parent to show."""
    try:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        rows = module.run(quick)
        if not isinstance(rows, list) or not rows or not all(isinstance(r, Row) for r in rows):
            raise TypeError(f"{path.name}: run(quick) must return a list of report.Row with at least one, not {rows!r}")
        result.write_text(json.dumps([asdict(r) for r in rows]), encoding="utf-8")
    except Exception:
        traceback.print_exc()
        return 1
    return 0


# --- in the parent process -----------------------------------------------------------------------


def run_bench(bench: Bench, quick: bool, timeout: float, threads: int, verbose: bool, note) -> Outcome:
    """One benchmark in its own process group. ``note(seconds)`` is called about once a second meanwhile."""
    env = os.environ | {k: str(threads) for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    env["PYTHONUNBUFFERED"] = "1"  # what it printed before it hung is worth seeing
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="labkit-bench-") as scratch:
        result, log = Path(scratch, "rows.json"), Path(scratch, "log")
        command = [sys.executable, str(HERE / "run.py"), "--child", str(bench.path), "--result", str(result)]
        command += ["--quick"] * quick
        with log.open("wb") as out:
            sink = None if verbose else out
            process = subprocess.Popen(command, env=env, stdout=sink, stderr=sink, start_new_session=True)
            stopped = False
            try:
                while process.poll() is None:
                    elapsed = time.monotonic() - start
                    if elapsed > timeout:
                        stopped = True
                        break
                    note(elapsed)
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(min(1.0, max(timeout - elapsed, 0.01)))
            finally:  # also when interrupted; the whole group, for a benchmark may have children that outlive it
                _end(process)
        seconds = time.monotonic() - start
        tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-30:]
        if stopped:
            error = "\n".join([f"stopped after {timeout:g} s; it had printed:", *tail])
            return Outcome(bench.name, bench.title, "timed out", seconds, error=error)
        if process.returncode != 0 or not result.exists():
            code = process.returncode
            what = f"ended by signal {-code}" if code < 0 else f"exit status {code}"
            return Outcome(bench.name, bench.title, "crashed", seconds, error="\n".join([what, *tail]))
        rows = [Row.from_dict(r) for r in json.loads(result.read_text(encoding="utf-8"))]
    status = "missed" if any(r.ok is False for r in rows) else "passed"
    return Outcome(bench.name, bench.title, status, seconds, rows)


def _end(process: subprocess.Popen) -> None:
    """End the process and everything it started that is still in its group."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    elif process.poll() is None:
        process.kill()
    process.wait()


def run_all(benches: list[Bench], args: argparse.Namespace) -> tuple[list[Outcome], bool]:
    """Run them one after the other. Returns the outcomes and whether it was interrupted."""
    outcomes = []
    tty = sys.stderr.isatty() and not args.verbose
    for i, bench in enumerate(benches, 1):
        head = f"[{i}/{len(benches)}] {bench.name}: {bench.title}"
        timeout = args.timeout or bench.timeout or 900.0
        if not tty:
            print(f"{head} …", file=sys.stderr, flush=True)

        def note(seconds: float, head=head) -> None:
            if tty:
                print(f"\r\033[K{head} … {seconds:.0f} s", end="", file=sys.stderr, flush=True)

        started = time.monotonic()
        try:
            outcome = run_bench(bench, args.quick, timeout, args.threads, args.verbose, note)
        except KeyboardInterrupt:
            rest = [Outcome(b.name, b.title, "interrupted", 0.0) for b in benches[i:]]
            outcomes += [Outcome(bench.name, bench.title, "interrupted", time.monotonic() - started), *rest]
            return outcomes, True
        finally:
            if tty:
                print("\r\033[K", end="", file=sys.stderr, flush=True)
        outcomes.append(outcome)
        print(outcome_text(outcome) + "\n", flush=True)
    return outcomes, False


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="benchmarks/run.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--only", nargs="+", metavar="NAME", default=[], help="run these benchmarks only (see --list)")
    p.add_argument("--list", action="store_true", help="list the benchmarks and stop")
    p.add_argument("--quick", action="store_true", help="fewer rounds and smaller cases: a check, not a record")
    p.add_argument("--out", type=Path, metavar="FILE", help="FILE.md and FILE.json (default: benchmarks/reports/TIME)")
    p.add_argument("--threads", type=_threads, metavar="N", help="CPU threads of each benchmark (default: all cores)")
    p.add_argument("--timeout", type=_seconds, metavar="S", help="seconds per benchmark (default: its own, else 900)")
    p.add_argument("--verbose", action="store_true", help="show what the benchmarks print while they run")
    p.add_argument("--folder", type=Path, default=HERE, help=argparse.SUPPRESS)
    p.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    p.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return p


def _threads(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 1 or more")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    if args.child:
        return child(args.child, args.quick, args.result)
    if not args.folder.is_dir():
        p.error(f"{args.folder} is not a folder")
    benches = discover(args.folder)
    if args.list:
        width = max([len(b.name) for b in benches], default=0)
        print("\n".join(f"{b.name:<{width}}  {b.title}" for b in benches))
        return 0
    names = [b.name for b in benches]
    unknown = [n for n in args.only if n not in names]
    if unknown:
        p.error(f"--only {' '.join(unknown)}: no such benchmark. There are: {', '.join(names) or 'none'}")
    if args.out and args.out.suffix not in ("", ".md", ".json"):
        p.error(f"--out {args.out}: the report is written as .md and .json")
    if args.only:
        benches = [b for b in benches if b.name in args.only]
    if not benches:
        p.error(f"there is no bench_*.py in {args.folder}")

    from labkit._files import write_text
    from labkit.measure.machine import cores, machine, versions

    args.threads = args.threads or cores()
    when = datetime.now(timezone.utc)
    outcomes, interrupted = run_all(benches, args)
    report = Report(machine(), versions(), args.threads, args.quick, when.isoformat(timespec="seconds"), outcomes)
    out = args.out or args.folder / "reports" / when.strftime("%Y-%m-%dT%H-%M-%S")
    for suffix, content in ((".md", report.markdown()), (".json", report.json())):
        write_text(out.with_suffix(suffix), content)
    print("\n".join(report.heading()))
    print(f"{report.verdict} Report: {out.with_suffix('.md')} and .json")
    return 130 if interrupted else 0 if report.ok else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # asked to end: end the running benchmark too, and report
    sys.exit(main())
