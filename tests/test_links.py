"""`make links`: the repository's address in badges, notebooks and nowhere else, on a copy of the tree."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from labkit import links

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "notebooks").is_dir(), reason="needs a checkout")
ADDRESS = re.compile(r"(?:github\.com|/gh|/github)/([\w.-]+/[\w.-]+)")


@pytest.fixture
def copy(tmp_path) -> Path:
    """What the command touches and what it must not, in a folder of its own."""
    for name in ("notebooks", "binder"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (tmp_path / "labkit").mkdir()
    for name in ("README.md", "pyproject.toml", "Makefile", "environment.yml", "labkit/links.py", "labkit/colab.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def run(root: Path, *words: str) -> subprocess.CompletedProcess:
    """As a script, without site-packages: it must work before anything is installed."""
    command = [sys.executable, "-S", str(root / "labkit" / "links.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=root.parent)


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def changed(before: dict, after: dict) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def notebooks(root: Path) -> list[Path]:
    return sorted((root / "notebooks").rglob("*.ipynb"))


def test_no_page_names_a_repository_that_was_not_told():
    """In the state that is shipped: the address of labkit, if any, is the one that was written by the command."""
    tracked = [ROOT / "README.md", *notebooks(ROOT), *(ROOT / "labkit").rglob("*.py"), *(ROOT / "binder").iterdir()]
    for path in tracked:
        text = path.read_text(encoding="utf-8")
        assert "labkit-" + "lab/labkit" not in text, path
        if path.suffix != ".py":
            assert set(ADDRESS.findall(text)) <= {links.REPOSITORY}, path
    for path in notebooks(ROOT):
        assert json.loads(path.read_text(encoding="utf-8"))["cells"], path


def test_the_address_goes_into_badges_first_cells_and_nothing_else(copy):
    before = contents(copy)
    done = run(copy, "some-one/their.lab")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    after = contents(copy)
    names = {str(p.relative_to(copy)) for p in notebooks(copy)}
    assert changed(before, after) == names | {"README.md", "labkit/links.py"}
    assert f"{len(names) + 2} files changed" in done.stdout
    readme = (copy / "README.md").read_text(encoding="utf-8")
    assert "https://mybinder.org/v2/gh/some-one/their.lab/HEAD?labpath=notebooks%2F00_start_here.ipynb" in readme
    assert "/github/some-one/their.lab/blob/HEAD/notebooks/00_start_here.ipynb" in readme
    assert set(ADDRESS.findall(readme)) == {"some-one/their.lab"}
    for name in ("README.md", "labkit/links.py"):  # outside of the places the text is as it was
        kept = set(before[name].decode().splitlines()) - set(after[name].decode().splitlines())
        assert len(kept) == 1, kept


def test_one_cell_of_each_notebook_changes_and_it_stays_as_nbformat_writes_it(copy):
    before = {p: nbformat.read(p, as_version=4) for p in notebooks(copy)}
    links.write(copy, "some-one/their.lab")
    for path, old in before.items():
        new = nbformat.read(path, as_version=4)
        nbformat.validate(new)
        assert nbformat.writes(new) == path.read_text(encoding="utf-8").rstrip("\n")
        differ = [(a, b) for a, b in zip(old.cells, new.cells, strict=True) if a != b]
        ((was, now),) = differ
        assert now.source == links.first_cell("some-one/their.lab") and was | {"source": ""} == now | {"source": ""}
        assert old.metadata == new.metadata


def test_it_can_be_run_again_and_changed_again_and_taken_back(copy):
    original = contents(copy)
    assert run(copy, "a/b").returncode == 0
    once = contents(copy)
    again = run(copy, "a/b")
    assert again.returncode == 0 and "0 files changed" in again.stdout and contents(copy) == once
    assert run(copy, "longer-owner/another.name").returncode == 0
    assert b"a/b" not in contents(copy)["README.md"].split(b"<!-- /links -->")[0].split(b"made by")[1]
    assert run(copy, "a/b").returncode == 0 and contents(copy) == once
    assert changed(original, once)


def test_the_copy_imports_with_its_address(copy):
    run(copy, "a/b")
    code = "import runpy; print(runpy.run_path('labkit/links.py')['REPOSITORY'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.stdout.strip() == "a/b", done.stderr


BAD = ["", "labkit", "a/b/c", "/b", "a/", "-a/b", "a-/b", "a--b/c", "a_b/c", "a/b c", "a/..", "a/.", "a/b.git", "a/b\n"]
BAD += ["https://github.com/a/b", "a/b;rm", "a/$(x)", "a" * 40 + "/b", "a/" + "b" * 101, "ä/b"]


@pytest.mark.parametrize("word", BAD)
def test_a_bad_address_is_refused_and_nothing_is_written(copy, word):
    before = contents(copy)
    done = run(copy, word)
    assert done.returncode == 2 and done.stdout == "" and "owner/name" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr
    assert contents(copy) == before


@pytest.mark.parametrize("word", ["a/b", "a-b/c_d.e", "A1/" + "x" * 100, "a" * 39 + "/b"])
def test_a_good_address_is_taken(word):
    assert links.check(word) == word


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("README.md", links.CLOSE, ""),
        ("labkit/links.py", "\nREPOSITORY: str | None =", "\nREPOSITORY ="),
        ("notebooks/07_kv_cache.ipynb", '"import labkit"', '"import labkit as lab"'),
    ],
)
def test_where_a_place_is_missing_it_says_so_and_writes_nothing(copy, name, old, new):
    path = copy / name
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    before = contents(copy)
    done = run(copy, "a/b")
    assert done.returncode == 2 and path.name in done.stderr and contents(copy) == before


def test_make_links(copy):
    if not shutil.which("make"):
        pytest.skip("make is not installed")

    def make(*words):
        command = ["make", "--no-print-directory", "-C", str(copy), "links", f"PYTHON={sys.executable}", *words]
        return subprocess.run(command, capture_output=True, text=True)

    without = make()
    assert without.returncode != 0 and "make links REPO=owner/name" in without.stderr
    assert make("REPO=a/b").returncode == 0
    assert "gh/a/b/" in (copy / "README.md").read_text(encoding="utf-8")
