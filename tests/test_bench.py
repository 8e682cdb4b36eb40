"""benchmarks/run.py and report.py: benchmarks that pass, miss, crash and hang, in a folder of their own."""

from __future__ import annotations

import importlib.util
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def _load(name: str):
    """A file of benchmarks/ as a module; it is a folder of scripts, not a package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


report = _load("report")
run = _load("run")
Row = report.Row

BODIES = {
    "passing": """
        import os
        from report import Row
        TITLE = "A target that is met"
        def run(quick):
            print("seen only with --verbose")
            return [Row("dense", 10.0, "ms"),
                    Row("packed", 4.0, "ms", "dense", 2.5, target="at least 2.3x", ok=True),
                    Row("threads", int(os.environ["OMP_NUM_THREADS"]), "threads"),
                    Row("quick", float(quick), "")]
    """,
    "missing": """
        from report import Row
        TITLE = "A target that is missed"
        def run(quick):
            return [Row("packed", 9.0, "ms", "dense", 1.1, target="at least 2.3x", ok=False)]
    """,
    "crashing": """
        TITLE = "One that raises"
        def run(quick):
            print("so far so good")
            raise RuntimeError("broken on purpose")
    """,
    "dying": """
        import os, signal
        TITLE = "One that is killed"
        def run(quick):
            print("last words")
            os.kill(os.getpid(), signal.SIGKILL)
    """,
    "hanging": """
        import pathlib, subprocess, sys, time
        TITLE = "One that hangs, with a child that hangs"
        TIMEOUT = 15
        def run(quick):
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            pathlib.Path(__file__).with_name("pid").write_text(str(child.pid))
            print("going to sleep")
            time.sleep(600)
    """,
    "empty": "TITLE = 'No rows'\ndef run(quick):\n    return []\n",
    "wrong": "TITLE = 'Not rows'\ndef run(quick):\n    return [{'name': 'a'}]\n",
    "typo": "TITLE = 'Not Python\n",
}


def _folder(tmp_path: Path, *names: str) -> Path:
    folder = tmp_path / "benches"
    folder.mkdir(exist_ok=True)
    for name in names:
        lines = BODIES[name].strip("\n").splitlines()
        indent = len(lines[0]) - len(lines[0].lstrip())
        text = "\n".join(line[indent:] for line in lines) + "\n"
        (folder / f"bench_{name}.py").write_text(text)
    return folder


def _run(folder: Path, *options: str) -> tuple[int, dict]:
    """Exit status and the JSON report."""
    out = folder / "out"
    status = run.main(["--folder", str(folder), "--out", str(out), *options])
    return status, json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))


def _alive(pid: int) -> bool:
    """Whether a process runs (one that has ended and waits to be collected does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


# --- the harness ---------------------------------------------------------------------------------


def test_a_run_that_meets_its_targets_ends_with_0(tmp_path, capfd):
    folder = _folder(tmp_path, "passing")
    status, made = _run(folder, "--quick", "--threads", "1")
    assert status == 0 and made["ok"] is True and made["quick"] is True and made["threads"] == 1
    (outcome,) = made["outcomes"]
    assert (outcome["name"], outcome["status"], outcome["error"]) == ("passing", "passed", "")
    rows = {r["name"]: r for r in outcome["rows"]}
    assert rows["packed"]["ratio"] == 2.5 and rows["packed"]["ok"] is True
    assert rows["threads"]["value"] == 1  # the pools are pinned in the child
    assert rows["quick"]["value"] == 1
    out, err = capfd.readouterr()
    assert "2.5x" in out and "at least 2.3x" in out and "met" in out and "OK: 1 of 1 targets met." in out
    assert "[1/1] passing: A target that is met" in err and "seen only" not in out
    assert made["machine"] in out and made["versions"] in out and "torch" in made["versions"]
    page = (folder / "out.md").read_text(encoding="utf-8")
    assert "## A target that is met" in page and "|packed|4|ms|2.5x|dense|at least 2.3x|met|" in page
    assert sorted(p.name for p in folder.iterdir() if p.suffix != ".py" and p.is_file()) == ["out.json", "out.md"]


def test_a_missed_target_ends_with_1(tmp_path, capfd):
    status, made = _run(_folder(tmp_path, "passing", "missing"))
    assert status == 1 and made["ok"] is False
    assert [o["status"] for o in made["outcomes"]] == ["missed", "passed"]
    out = capfd.readouterr().out
    assert "MISSED" in out and "NOT OK: 1 of 2 targets met." in out


@pytest.mark.parametrize(
    "name, words",
    [
        ("crashing", ["exit status 1", "so far so good", "RuntimeError: broken on purpose", "bench_crashing.py"]),
        ("dying", ["ended by signal 9", "last words"]),
        ("empty", ["run(quick) must return a list of report.Row with at least one, not []"]),
        ("wrong", ["must return a list of report.Row", "{'name': 'a'}"]),
        ("typo", ["SyntaxError"]),
    ],
)
def test_a_crash_is_reported_and_the_rest_still_runs(tmp_path, capfd, name, words):
    status, made = _run(_folder(tmp_path, name, "passing"))
    by_name = {o["name"]: o for o in made["outcomes"]}
    assert status == 1 and by_name[name]["status"] == "crashed" and by_name["passing"]["status"] == "passed"
    out = capfd.readouterr().out
    for word in words:
        assert word in by_name[name]["error"] and word in out
    assert f"crashed: {name}" in out


def test_a_hang_is_stopped_with_all_its_children(tmp_path, capfd):
    folder = _folder(tmp_path, "hanging", "passing")
    status, made = _run(folder)
    assert status == 1
    hung = made["outcomes"][0]
    assert hung["status"] == "timed out" and 15 <= hung["seconds"] < 600  # its own TIMEOUT, not the end of its sleep
    assert "stopped after 15 s" in hung["error"] and "going to sleep" in hung["error"]
    assert made["outcomes"][1]["status"] == "passed" and "timed out: hanging" in made["verdict"]
    pid = int((folder / "pid").read_text())
    deadline = time.monotonic() + 60
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)


def test_the_command_lines_timeout_wins(tmp_path):
    _, made = _run(_folder(tmp_path, "hanging"), "--timeout", "1.5")
    assert "stopped after 1.5 s" in made["outcomes"][0]["error"]


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_the_benchmark_and_reports_what_is_there(tmp_path, by):
    folder = _folder(tmp_path, "hanging")
    (folder / "bench_after.py").write_text("TITLE = 'after'\n")
    (folder / "bench_hanging.py").rename(folder / "bench_a_hanging.py")
    (folder / "bench_a_hanging.py").write_text((folder / "bench_a_hanging.py").read_text().replace("= 15", "= 300"))
    command = [sys.executable, str(BENCHMARKS / "run.py"), "--folder", str(folder), "--out", str(folder / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (folder / "pid").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(by)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    made = json.loads((folder / "out.json").read_text())
    assert [o["status"] for o in made["outcomes"]] == ["interrupted", "interrupted"]
    assert "interrupted: a_hanging, after" in out and "Traceback" not in err
    pid = int((folder / "pid").read_text())
    deadline = time.monotonic() + 60
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)


def test_listing_runs_nothing(tmp_path, capsys):
    folder = _folder(tmp_path, "passing", "typo")
    (folder / "bench_loud.py").write_text("TITLE = 'Never imported'\nTIMEOUT = 'soon'\nraise SystemExit('imported')\n")
    assert run.main(["--folder", str(folder), "--list"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines() == ["loud     Never imported", "passing  A target that is met", "typo     typo"]
    assert {b.name: b.timeout for b in run.discover(folder)} == {"loud": None, "passing": None, "typo": None}


def test_only_the_named_ones_run(tmp_path):
    status, made = _run(_folder(tmp_path, "passing", "crashing", "hanging"), "--only", "passing")
    assert status == 0 and [o["name"] for o in made["outcomes"]] == ["passing"]


def test_reports_go_to_a_folder_of_their_own(tmp_path, capfd):
    folder = _folder(tmp_path, "passing")
    assert run.main(["--folder", str(folder)]) == 0
    assert sorted(p.suffix for p in (folder / "reports").iterdir()) == [".json", ".md"]
    assert str(folder / "reports") in capfd.readouterr().out


def test_verbose_shows_what_a_benchmark_prints(tmp_path, capfd):
    assert _run(_folder(tmp_path, "passing"), "--verbose")[0] == 0
    assert "seen only with --verbose" in capfd.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        (["--only", "nonsense"], "--only nonsense: no such benchmark. There are: passing"),
        (["--out", "report.pdf"], "report.pdf: the report is written as .md and .json"),
        (["--threads", "0"], "'0' is not a whole number, 1 or more"),
        (["--threads", "two"], "'two' is not a whole number"),
        (["--timeout", "-1"], "'-1' is not a number of seconds above 0"),
        (["--timeout", "nan"], "'nan' is not a number of seconds"),
    ],
)
def test_a_wrong_command_line_ends_with_2(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        run.main(["--folder", str(_folder(tmp_path, "passing")), *options])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_an_empty_or_missing_folder_is_said(tmp_path, capsys):
    for folder, message in ((tmp_path, "there is no bench_*.py in"), (tmp_path / "none", "is not a folder")):
        with pytest.raises(SystemExit) as stop:
            run.main(["--folder", str(folder)])
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_help_says_what_the_exit_status_means(capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(["--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for word in ("--only", "--list", "--quick", "--out", "--threads", "--timeout", "Exit status", "examples:"):
        assert word in out
    assert "--child" not in out


# --- rows and reports ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args, message",
    [
        ({"value": math.nan}, "value = nan is not a finite number"),
        ({"value": "3"}, "value = '3' is not a finite number"),
        ({"value": True}, "value = True"),
        ({"ratio": math.inf}, "ratio = inf"),
        ({"unit": 3}, "unit = 3 is not a string"),
        ({"label": "guessed"}, "label = 'guessed' is not one of measured, simulated, modelled"),
        ({"target": "at least 2x"}, "a target needs ok"),
        ({"ok": True}, "ok needs a target"),
    ],
)
def test_a_row_that_does_not_hold_together_is_refused(args, message):
    with pytest.raises(ValueError, match=f"row 'x': .*{message}"):
        Row(**({"name": "x", "value": 1.0, "unit": "ms"} | args))


def test_numpy_and_torch_numbers_become_plain_ones():
    np = pytest.importorskip("numpy")
    row = Row("x", np.float32(2.5), "ms", "y", np.float64(2), target="at least 1x", ok=np.bool_(True))
    assert type(row.value) is float and type(row.ratio) is float and row.ok is True
    assert Row.from_dict(json.loads(json.dumps(row.__dict__))) == row


@pytest.mark.parametrize(
    "value, text", [(0, "0"), (1234.5, "1,234"), (3.14159, "3.142"), (2e-5, "2.000e-05"), (5e9, "5.000e+09")]
)
def test_numbers_are_short(value, text):
    assert report.number(value) == text


def test_a_report_says_where_a_number_comes_from_and_survives_bars():
    rows = [Row("a|b", 1.0, "ms", label="modelled"), Row("c", 2.0, "ms", "a|b", 123.4)]
    made = report.Report("box", "torch 1", 2, False, "now", [report.Outcome("n", "T", "passed", 1.0, rows)])
    page = made.markdown()
    assert "|a\\|b|1|ms (modelled)|" in page and "123x" in page and "full profile" in page
    assert "no targets in this run" in made.text() and "ms (modelled)" in made.text()
    assert json.loads(made.json())["outcomes"][0]["rows"][0]["label"] == "modelled"


# --- the benchmarks that ship --------------------------------------------------------------------


def test_every_shipped_benchmark_has_a_title():
    benches = run.discover(BENCHMARKS)
    assert "roofline" in [b.name for b in benches]
    for b in benches:
        assert b.title != b.name, f"{b.path.name} has no TITLE"


def test_the_roofline_benchmark_reports_every_figure(monkeypatch):
    from labkit.measure import roofline

    peaks, sizes = {"fp32": 2e11, "int8": 8e11}, {"fp32": 512, "int8": 1024}
    reads = {"numpy.sum": 2e10, "torch.sum": 4e10}
    roof = roofline.Roofline("box", 4e10, peaks, "measured", "2026-01-01", 2, "cpu", reads, sizes)
    asked = {}
    monkeypatch.setattr(roofline, "measure", lambda **settings: asked.update(settings) or roof)
    rows = {r.name: r for r in _load("bench_roofline").run(quick=True)}
    assert asked["refresh"] is True  # measured in this run, not remembered from another
    assert rows["read, torch.sum"].value == 40 and rows["read, numpy.sum"].ratio == 0.5
    assert rows["matmul int8, 1024²"].ratio == 4 and rows["ridge fp32"].value == 5
