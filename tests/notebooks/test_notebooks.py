"""Every shipped notebook: its form, and a run of it in the quick profile against its baseline and its budget."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from labkit import regress
from labkit.colab import FIRST_CELL

REPO = Path(__file__).resolve().parents[2]
FOLDER = REPO / "notebooks"
STUDENT = sorted(FOLDER.glob("*.ipynb"))
SOLUTIONS = sorted((FOLDER / "solutions").glob("*.ipynb"))
ALL = STUDENT + SOLUTIONS
CHECKED = "nbval-check-output"  # nbval compares this cell's output, so it is the only one that is committed with it
SKIPPED = "nbval-skip"  # nbval leaves out what measures: the check takes seconds and not minutes


def name(path: Path) -> str:
    return str(path.relative_to(FOLDER).with_suffix(""))


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def code(path: Path) -> list:
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


def test_there_are_notebooks_and_each_has_solutions():
    assert STUDENT, f"no notebooks in {FOLDER}"
    assert [p.name for p in SOLUTIONS] == [p.name for p in STUDENT]


@pytest.mark.parametrize("path", ALL, ids=name)
def test_form(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    nbformat.validate(notebook)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"  # else JupyterLab stops and asks for a kernel
    assert "widgets" not in notebook["metadata"]
    assert str(REPO) not in path.read_text(encoding="utf-8")
    ids = [c["id"] for c in notebook["cells"]]
    assert all(re.fullmatch(r"[a-z][a-z0-9-]+", i) for i in ids) and len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            ran = CHECKED in cell["metadata"].get("tags", [])  # nbval wants a number at what it compares
            assert bool(cell["outputs"]) == ran and (cell["execution_count"] is not None) == ran, cell["id"]


@pytest.mark.parametrize("path", ALL, ids=name)
def test_it_starts_with_the_title_the_import_and_the_parameters(path):
    cells = nbformat.read(path, as_version=4).cells
    assert re.match(r"# \d\d · \S", cells[0].source)
    first, second = code(path)[:2]
    assert first.source == FIRST_CELL  # the same lines everywhere
    assert [c.id for c in code(path) if "parameters" in tags(c)] == [second.id]
    values = {}
    for line in ast.parse(second.source).body:  # literals only: whatever derives from them comes in the next cell
        assert isinstance(line, ast.Assign)
        values[line.targets[0].id] = ast.literal_eval(line.value)
    assert values["PROFILE"] == "full" and values["MODEL"] is None


@pytest.mark.parametrize("path", ALL, ids=name)
def test_functions_live_in_the_package(path):
    for cell in code(path):
        body = ast.parse(re.sub(r"(?m)^(\s*)[!%].*$", r"\1pass", cell.source))  # for a shell, or for IPython
        assert not any(isinstance(n, ast.FunctionDef | ast.ClassDef) for n in ast.walk(body)), cell.id
        assert len(cell.source.splitlines()) <= 10, f"{cell.id} is long: put what it does into the package"


@pytest.mark.parametrize("path", STUDENT, ids=name)
def test_a_student_predicts_and_answers_checked_exercises(path):
    text = "\n".join(c.source for c in nbformat.read(path, as_version=4).cells)
    assert "## Predict first" in text and "## Exercises" in text
    asked = re.findall(r"labkit\.check\.(\w+)\(\.\.\.", text)
    assert 2 <= len(asked) <= 4 and len(set(asked)) == len(asked)
    solved = "\n".join(c.source for c in code(FOLDER / "solutions" / path.name))
    assert re.findall(r"labkit\.check\.(\w+)\(", solved) == asked


@pytest.mark.model
@pytest.mark.notebook
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", ALL, ids=name)
def test_it_runs_within_its_budget_and_agrees_with_its_baseline(path, tmp_path, record_property):
    """Unanswered exercises do not raise, so the student's notebook runs as it is; the solutions must all be right."""
    report = regress.run([path], out=tmp_path, say=None)
    result = report.results[0]
    for name in ("seconds", "cpu", "busy", "alone"):  # the budget is held against the last: others may work here
        record_property(name, getattr(result, name))
    record_property("peak_gb", result.peak / 1e9)
    print(f"\n{report}")
    assert report.ok, "\n".join(result.problems)
    assert not result.of("new"), "a number has no baseline: labkit regress --update"
    said = notes(result.executed)
    asked = re.findall(r"labkit\.check\.\w+\(", "\n".join(c.source for c in code(path)))
    assert len(said) == len(asked)
    expected = "Right. " if path in SOLUTIONS else "No answer yet. "
    assert all(s.startswith(expected) for s in said), said
    assert "application/vnd.jupyter.widget-view+json" not in result.executed.read_text(encoding="utf-8")


def notes(executed: Path) -> list[str]:
    """What the exercises said in an executed notebook."""
    cells = [c for c in code(executed) if "labkit.check." in c.source]
    return [o["data"]["text/plain"] for c in cells for o in c.outputs if o.output_type == "execute_result"]


# ------------------------------------------------------------------------------------------------ nbval


def nbval(path: Path, folder: Path) -> subprocess.CompletedProcess:
    """Run nbval on a notebook as CI does: only the tagged outputs are compared."""
    env = os.environ | {"LABKIT_STATIC": "1", "CUDA_VISIBLE_DEVICES": "", "JUPYTER_PREFER_ENV_PATH": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(REPO), *filter(None, [env.get("PYTHONPATH")])])
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--rootdir",
        str(folder),
    ]
    command += ["--nbval-lax", "--nbval-cell-timeout=900", str(path)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=1700)


@pytest.mark.model
@pytest.mark.notebook
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", STUDENT, ids=name)
def test_nbval_finds_the_committed_outputs_again(path, tmp_path):
    assert [c.id for c in code(path) if CHECKED in tags(c)], "no cell is tagged for nbval"
    assert not any({CHECKED, SKIPPED} <= set(tags(c)) for c in code(path))
    run = nbval(path, tmp_path)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]


@pytest.mark.model
@pytest.mark.notebook
@pytest.mark.timeout(1800)
def test_nbval_notices_an_output_that_changed(tmp_path):
    path = STUDENT[0]
    notebook = nbformat.read(path, as_version=4)
    cells = [c for c in notebook.cells if CHECKED in tags(c)]
    last = notebook.cells.index(cells[0])
    notebook.cells = notebook.cells[: last + 1]
    text = cells[0].outputs[0]["data"]["text/plain"]
    cells[0].outputs[0]["data"]["text/plain"] = text.replace("uncompressed", "compressed")
    assert cells[0].outputs[0]["data"]["text/plain"] != text
    changed = tmp_path / "changed.ipynb"
    nbformat.write(notebook, changed)
    run = nbval(changed, tmp_path)
    assert run.returncode == 1 and "1 failed" in run.stdout, run.stdout[-3000:] + run.stderr[-1000:]
