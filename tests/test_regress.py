"""labkit regress: tiny notebooks that pass, drift, fail, hang, die or lack something, through real papermill runs."""

import html.parser
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit import _files, regress, report
from labkit.regress import Metric, Report, Result, compare, find, run

KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
# Without the cost of importing torch in every kernel: what record() displays, byte for byte the same output.
RECORD = """\
from IPython.display import display
def record(name, value, rel_tol=0.05, abs_tol=None, label="measured"):
    metric = {"name": name, "value": value, "rel_tol": rel_tol, "abs_tol": abs_tol, "label": label}
    display({"application/vnd.labkit.metrics+json": metric, "text/plain": name}, raw=True)
"""


def notebook(path, *cells, kernel=KERNEL, parameters='PROFILE = "full"', ids=True):
    """Write a notebook: a title, the parameters, record(), then the given code cells."""
    made = [nbformat.v4.new_markdown_cell("# A title")]
    if parameters is not None:
        made.append(nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    made += [nbformat.v4.new_code_cell(source) for source in (RECORD, *cells)]
    made = nbformat.v4.new_notebook(cells=made, metadata={"kernelspec": kernel} if kernel else {})
    if not ids:
        made.nbformat_minor = 4
        for cell in made.cells:
            del cell["id"]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(made, path)
    return path


@pytest.fixture
def go(tmp_path):
    """run() with everything it writes in tmp_path, and no limits that a busy machine could break."""

    def go(*notebooks, **options):
        kept = {"out": tmp_path / "out", "baselines": tmp_path / "baselines", "say": None}
        return run(notebooks, **kept | {"max_seconds": 500, "timeout": 300} | options)

    return go


def baseline(folder, name, **metrics):
    """Write a baseline of measured numbers: name=value or name=(value, rel_tol, abs_tol)."""
    folder.mkdir(exist_ok=True)
    rows = {n: v if isinstance(v, tuple) else (v, 0.05, None) for n, v in metrics.items()}
    kept = {n: {"value": v, "rel_tol": r, "abs_tol": a, "label": "measured"} for n, (v, r, a) in rows.items()}
    (folder / f"{name}.json").write_text(json.dumps(kept))


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


# Real runs


@pytest.mark.notebook
def test_a_notebook_that_agrees(tmp_path, go, monkeypatch):
    monkeypatch.delenv("LABKIT_STATIC", raising=False)
    path = notebook(
        tmp_path / "passing.ipynb",
        "import os, pathlib\nrecord('static', int(os.environ['LABKIT_STATIC']))",
        "record('quick', int(PROFILE == 'quick'))\nrecord('beside', int(pathlib.Path('passing.ipynb').is_file()))",
        "ballast = b'x' * 600_000_000\ndel ballast",
        "record('near', 1.04)",
    )
    baseline(tmp_path / "baselines", "passing", static=1, quick=1, beside=1, near=1.0)
    found = go(path)
    (result,) = found.results
    assert result.problems == []
    assert found.ok and result.verdict == "ok"
    assert [m.verdict for m in result.metrics] == ["ok"] * 4
    assert 0.6e9 < result.peak < 1.2e9, "the kernel's memory counts, also what it gave back"
    assert 0 < result.seconds < 300
    executed = nbformat.read(tmp_path / "out" / "passing.ipynb", as_version=4)
    assert executed.cells[-1].execution_count, "the executed notebook is kept"
    assert 'PROFILE = "full"' in path.read_text().replace("\\", ""), "the notebook itself is as it was"


@pytest.mark.notebook
def test_cpu_seconds_are_those_of_the_kernel_and_what_it_starts(tmp_path, go):
    """One second of work, one of work in a child, one of sleep: what a busy machine adds to the wall is not in them."""
    burn = "import time\nend = time.process_time() + 1\nwhile time.process_time() < end: pass"
    path = notebook(
        tmp_path / "burning.ipynb",
        burn,
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {burn!r} + '\\ntime.sleep(1)'], check=True)",
        "import time; time.sleep(1)",
    )
    (result,) = go(path).results
    assert result.problems == []
    assert 1.9 < result.cpu < (os.cpu_count() or 1) * result.seconds + 0.1
    assert result.busy is None or 0 <= result.busy <= 1
    assert 0 < result.alone <= result.seconds


@pytest.mark.parametrize(
    ("seconds", "cpu", "busy", "cores", "alone"),
    [
        (80, 120, 0.0, 2, 80),
        (95, 120, 0.05, 2, 95),  # quiet: wall seconds count, however little of it was work
        (95, 120, None, 2, 95),  # as they do where nobody can tell
        (320, 150, 0.6, 2, 75),  # busy: its work takes two cores 75 s
        (320, 200, 0.6, 2, 100),
        (320, 150, 0.6, 1, 150),
        (320, 150, 0.6, 16, 75),  # the budget is for two cores, also on more
        (60, 119, 0.2, 2, 59.5),
    ],
)
def test_time_on_a_busy_machine_is_what_its_own_work_explains(monkeypatch, seconds, cpu, busy, cores, alone):
    monkeypatch.setattr(regress, "cores", lambda: cores)
    result = Result("a", seconds=seconds, cpu=cpu, busy=busy)
    assert result.alone == alone
    regress._budget(result, Report("quick", 90, None, Path("out")))
    assert bool(result.over) == (alone > 90)
    if alone > 90 and busy == 0.6:
        assert result.over == [
            f"It took 320 s while others took 60 % of the cores; its {cpu} s of CPU time alone need {alone} s, over the "
            "budget of 90 s."
        ]


@pytest.mark.notebook
def test_a_notebook_that_drifts_and_one_budget_too_small(tmp_path, go):
    path = notebook(tmp_path / "drifting.ipynb", "record('a', 1.06); record('b', 2.0)", "record('c.new', 3)")
    baseline(tmp_path / "baselines", "drifting", a=1.0, b=2.0, gone=4.0)
    before = (tmp_path / "baselines" / "drifting.json").read_bytes()
    found = go(path, max_seconds=0.01, max_gb=0.001)
    (result,) = found.results
    assert not found.ok and result.verdict == "drift"
    assert {m.name: m.verdict for m in result.metrics} == {"a": "drift", "b": "ok", "c.new": "new", "gone": "missing"}
    drift, missing, seconds, memory = result.problems
    assert drift == "a is 1.06, the baseline says 1 ± 0.05 (measured): drift"
    assert missing == "gone is missing, the baseline says 4 ± 0.2 (measured)"
    assert "over the budget of 0.01 s" in seconds and "over the budget of 0.001 GB" in memory
    assert (tmp_path / "baselines" / "drifting.json").read_bytes() == before

    # --update makes this run the baseline, in which nothing drifts; the budgets still fail.
    found = go(path, max_seconds=0.01, update=True)
    assert found.results[0].verdict == "over budget" and not found.ok
    kept = json.loads((tmp_path / "baselines" / "drifting.json").read_text())
    assert {name: base["value"] for name, base in kept.items()} == {"a": 1.06, "b": 2.0, "c.new": 3.0}
    assert found.updated == [tmp_path / "baselines" / "drifting.json"]
    # The full profile has baselines of its own.
    found = go(path, profile="full", update=True)
    assert found.ok and found.updated == [tmp_path / "baselines" / "drifting.full.json"]


@pytest.mark.notebook
def test_a_notebook_that_fails(tmp_path, go):
    path = notebook(
        tmp_path / "failing.ipynb",
        "record('first', 1)",
        "# comment\ndef f():\n    raise ValueError('two\\nlines \\x1b[31m<b>red')\nf()",
        "record('second', 2)",
    )
    good = notebook(tmp_path / "good.ipynb", "record('fine', 1)")
    baseline(tmp_path / "baselines", "failing", first=1, second=2)
    baseline(tmp_path / "baselines", "good", fine=0.5)
    before = (tmp_path / "baselines" / "good.json").read_bytes()
    found = go(good, path, update=True)
    ran, failed = found.results
    assert not found.ok and (ran.verdict, failed.verdict) == ("drift", "error")
    assert failed.error == "Cell 5 of 6 (`# comment`): ValueError: two"
    assert [(m.name, m.verdict) for m in failed.metrics] == [("first", "ok")], "the error says why second is missing"
    assert found.updated == [] and (tmp_path / "baselines" / "good.json").read_bytes() == before
    assert "Cell 5 of 6" in str(found) and "1 not" not in str(found)


@pytest.mark.notebook
def test_a_cell_that_hangs_is_stopped(tmp_path, go):
    path = notebook(
        tmp_path / "hanging.ipynb", "import time\nrecord('first', 1)", "time.sleep(600)", "record('second', 2)"
    )
    start = time.monotonic()
    (result,) = go(path, cell_timeout=3).results
    assert time.monotonic() - start < 120
    assert (result.verdict, result.timed_out) == ("timeout", True)
    assert result.error == "Cell 5 of 6 (`time.sleep(600)`) took longer than the 3 seconds that a cell may take."


@pytest.mark.notebook
def test_a_notebook_that_will_not_end_is_killed_with_all_it_started(tmp_path, go, monkeypatch):
    # A kernel that ignores interrupts, and a child of its own: nothing of it may live on.
    stubborn = """\
import os, pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path("pids").write_text(f"{os.getpid()} {child.pid}")
time.sleep(600)
"""
    path = notebook(tmp_path / "stubborn.ipynb", "record('first', 1)", stubborn)
    watch = regress._watch

    def until_it_hangs(process, tree, deadline):  # and no longer: the deadline comes soon after the cell has begun
        while not (tmp_path / "pids").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        return watch(process, tree, time.monotonic() + 1)

    monkeypatch.setattr(regress, "_watch", until_it_hangs)
    (result,) = go(path, timeout=200, cell_timeout=500).results
    assert result.verdict == "timeout"
    assert result.error.startswith(
        "Cell 5 of 5 (`import os, pathlib, signal, subprocess, sys, time`) was still running"
    )
    assert result.error.endswith("when the notebook's 200 seconds were over.")
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, pids))


@pytest.mark.notebook
def test_a_kernel_that_dies(tmp_path, go):
    path = notebook(tmp_path / "dying.ipynb", "import os; os._exit(9)", "1", ids=False)
    (result,) = go(path).results
    assert result.verdict == "error"
    assert result.error.startswith("Cell 4 of 5 (`import os; os._exit(9)`) ended its kernel")


@pytest.mark.notebook
def test_a_notebook_that_leaves_early_has_not_run(tmp_path, go):
    path = notebook(tmp_path / "leaving.ipynb", "import sys; sys.exit(0)", "record('never', 1)", "2")
    (result,) = go(path).results
    assert result.verdict == "error"
    assert result.error == "Cell 4 of 6 (`import sys; sys.exit(0)`) ended the notebook early; 2 cells never ran."


@pytest.mark.notebook
def test_a_number_recorded_twice_is_an_error(tmp_path, go):
    path = notebook(tmp_path / "twice.ipynb", "record('a', 1); record('a', 2)")
    (result,) = go(path).results
    assert result.verdict == "error" and "records a twice" in result.error


@pytest.mark.notebook
@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_an_interrupt_leaves_what_is_finished(tmp_path):
    first = notebook(tmp_path / "first.ipynb", "record('a', 1)")
    second = notebook(
        tmp_path / "second.ipynb",
        "import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(600)",
    )
    code = f"import sys; from labkit.cli import main; sys.exit(main({['regress', str(first), str(second)]} + sys.argv[1:]))"
    arguments = ["--out", str(tmp_path / "out"), "--baselines", str(tmp_path / "baselines")]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 200
        while not (tmp_path / "pid").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.2)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "labkit: interrupted" in err and "Traceback" not in err
    suites = ElementTree.parse(tmp_path / "out" / "junit.xml").findall("testsuite")
    assert [s.get("name") for s in suites] == ["first"]
    assert "1 did not get to run" in (tmp_path / "out" / "report.html").read_text()
    assert (tmp_path / "out" / "first.ipynb").is_file()
    kernel = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 20
    while alive(kernel) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(kernel), "the kernel of the notebook in flight is gone"


# Notebooks that are not even started


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda p: notebook(p, "1", kernel=None), "odd.ipynb has no kernelspec in its metadata"),
        (lambda p: notebook(p, "1", parameters=None), "odd.ipynb has no cell tagged 'parameters'"),
        (lambda p: p.write_text("{"), "odd.ipynb is not a Jupyter notebook"),
        (lambda p: p.write_text("[]"), "odd.ipynb is not a Jupyter notebook"),
        (lambda p: p.write_text('{"cells": [1], "metadata": {}}'), "odd.ipynb is not a Jupyter notebook"),
        (lambda p: p.write_bytes(b"\xff\xfe\x00"), "odd.ipynb is not a Jupyter notebook"),
    ],
)
def test_what_cannot_run_is_said_without_running_it(tmp_path, go, make, says):
    make(tmp_path / "odd.ipynb")
    old = tmp_path / "out" / "odd.ipynb"
    old.parent.mkdir()
    old.write_text("an older run")
    found = go(tmp_path / "odd.ipynb")
    (result,) = found.results
    assert result.error.startswith(says) and not found.ok
    assert not old.exists(), "an older run must not pass for this one"


def test_a_missing_file_a_bad_profile_and_a_damaged_baseline_are_refused_first(tmp_path, go):
    path = notebook(tmp_path / "a.ipynb")
    with pytest.raises(ValueError, match="There is no notebook '.*none.ipynb'"):
        go(path, tmp_path / "none.ipynb")
    with pytest.raises(ValueError, match="profile = 'slow' is not allowed: it must be one of quick, full"):
        go(path, profile="slow")
    (tmp_path / "baselines").mkdir()
    for text in ("{", "[]", '{"a": 1}', '{"a": {"value": "x", "rel_tol": 1, "abs_tol": null, "label": "measured"}}'):
        (tmp_path / "baselines" / "a.json").write_text(text)
        with pytest.raises(
            ValueError, match="a.json is not a baseline .*: restore it, or remove it and run with --update"
        ):
            go(path)
    assert not list((tmp_path / "out").glob("*.ipynb")), "nothing was run"


def test_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("00_start", "01_find", "01_more", "solutions/00_start"):
        notebook(tmp_path / "notebooks" / f"{name}.ipynb")
    folder = Path("notebooks")
    assert find() == [folder / "00_start.ipynb", folder / "01_find.ipynb", folder / "01_more.ipynb"]
    assert find(["01_m", "00", "00_start.ipynb"]) == [folder / "01_more.ipynb", folder / "00_start.ipynb"]
    solution = folder / "solutions" / "00_start.ipynb"
    assert find([solution]) == [solution]
    assert regress._names([solution, folder / "00_start.ipynb"]) == ["solutions-00_start", "notebooks-00_start"]
    assert regress._names([solution]) == ["solutions-00_start"]
    with pytest.raises(ValueError, match="Several notebooks fit '01': there are 01_find, 01_more"):
        find(["01"])
    with pytest.raises(ValueError, match="There is no notebook '07': there are 00_start, 01_find, 01_more"):
        find(["07"])


# The verdicts, against a definition written down apart

numbers = st.floats(-1e6, 1e6)


@given(value=numbers, base=numbers, rel=st.floats(1e-6, 2), slack=st.none() | st.floats(1e-6, 1e3))
def test_a_number_agrees_within_either_tolerance(value, base, rel, slack):
    now = {"a": {"value": value, "rel_tol": 9.0, "abs_tol": 9.0, "label": "measured"}}
    was = {"a": {"value": base, "rel_tol": rel, "abs_tol": slack, "label": "measured"}}
    (metric,) = compare(now, was)
    near = math.isclose(value, base, rel_tol=0, abs_tol=rel * abs(base))
    near = near or (slack is not None and abs(value - base) <= slack)
    assert metric.verdict == ("ok" if near else "drift")


def test_a_changed_label_is_drift():
    row = {"value": 1.0, "rel_tol": 0.1, "abs_tol": None}
    (metric,) = compare({"a": row | {"label": "modelled"}}, {"a": row | {"label": "measured"}})
    assert metric.verdict == "drift"
    assert metric.text == "a is 1, the baseline says 1 ± 0.1 (was measured, now modelled): drift"


# The pages


def example(out) -> Report:
    good = Result("00_a", 41.0, int(1.2e9), [Metric("x", "ok", 1.0, 1.0, 0.1, "measured")])
    bad = Result(
        "01_b",
        130.0,
        int(2.5e9),
        [Metric("y", "drift", 2.0, 1.0, 0.1, "measured"), Metric("z", "new", 2.0, None, None, "modelled")],
        over=["It took 130 s, over the budget of 90 s."],
        executed=out / "01_b.ipynb",
    )
    broken = Result("02_<c>", 3.0, 0, error="Cell 1 of 2 (`\x1b]<script>\x00\ud800`): Error: a & b \x0b")
    return Report("quick", 90.0, 2.0, out, "a machine", "versions", [good, bad, broken], planned=4)


class Outline(html.parser.HTMLParser):
    """Collects what a page would load or run, its text, and whether its tags nest."""

    def __init__(self):
        super().__init__()
        self.loads, self.text, self.open, self.rects = [], [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.loads += [attrs[a] for a in ("src", "href", "srcset", "data") if a in attrs]
        assert tag not in ("script", "iframe", "img", "object", "embed")
        assert not any(name.startswith("on") for name in attrs)
        if tag == "rect":
            self.rects.append(attrs)
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_needs_nothing_else_and_escapes_everything(tmp_path):
    found = example(tmp_path)
    outline = Outline()
    outline.feed(report.page(found))
    assert outline.open == []
    assert all(load.startswith("#") or load == "01_b.ipynb" for load in outline.loads)
    assert "@import" not in report.STYLE and "url(" not in report.STYLE
    text = "".join(outline.text)
    assert "y is 2, the baseline says 1 ± 0.1 (measured): drift" in text
    assert "3 notebooks ran in profile 'quick': 1 fine, 2 not (01_b, 02_<c>); 1 did not get to run." in text
    assert "Error: a & b" in text
    seconds = [float(r["width"]) for r in outline.rects if "fill" in r["class"]][::2]
    assert seconds[0] / seconds[1] == pytest.approx(41 / 130, rel=0.02), "bars are to scale"
    assert [r["class"] for r in outline.rects if "fill" in r["class"]][2:4] == ["fill over"] * 2


def test_junit_is_what_ci_systems_read(tmp_path):
    report.write(example(tmp_path))
    root = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert (root.tag, root.get("tests"), root.get("failures"), root.get("errors")) == ("testsuites", "9", "2", "1")
    cases = {
        (s.get("name"), c.get("name")): [e.tag for e in c if e.tag != "system-out"]
        for s in root
        for c in s.iter("testcase")
    }
    assert cases == {
        ("00_a", "runs"): [],
        ("00_a", "x"): [],
        ("00_a", "budget of time and memory"): [],
        ("01_b", "runs"): [],
        ("01_b", "y"): ["failure"],
        ("01_b", "z"): [],
        ("01_b", "budget of time and memory"): ["failure"],
        ("02_<c>", "runs"): ["error"],
        ("02_<c>", "budget of time and memory"): [],
    }
    assert root.find(".//error").get("message") == "Cell 1 of 2 (`]<script>`): Error: a & b "
    assert not list(tmp_path.glob(".*.part"))


@given(st.text())
def test_no_text_breaks_the_files(text):
    found = Report("quick", 90.0, None, Path("out"), text, text, [Result(f"n{text}", error=text or "x")], planned=1)
    ElementTree.fromstring(report.junit(found))
    outline = Outline()
    outline.feed(report.page(found))
    assert outline.open == []
    report.page(found).encode()
    str(found).encode()


def test_the_table_says_what_is_wrong(tmp_path):
    lines = str(example(tmp_path)).splitlines()
    assert lines[0].split() == ["notebook", "verdict", "seconds", "peak", "GB", "numbers"]
    assert lines[1].split() == ["00_a", "ok", "41.0", "1.20", "1", "ok"]
    assert "    It took 130 s, over the budget of 90 s." in lines
    new = Report(
        "quick",
        90.0,
        2.0,
        tmp_path,
        results=[Result("a", metrics=[Metric("z", "new", 2.0, None, None, "m")])],
        planned=1,
    )
    assert "nothing failed, and 1 number is new (`labkit regress --update` keeps them)." in str(new)
    assert "every number agrees with its baseline." in str(
        Report("quick", 1, 1, tmp_path, results=[Result("a")], planned=1)
    )
    assert Report("quick", 1, 1, tmp_path, planned=1).ok is False


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "kept.json"
    target.write_text("before")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        _files.write_text(target, "after")
    assert target.read_text() == "before" and list(tmp_path.iterdir()) == [target]
