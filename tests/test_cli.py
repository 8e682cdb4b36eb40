"""The command line's own words: what it refuses, before any work and in one line. Fuzzed in test_bad_input."""

from __future__ import annotations

import json

import pytest

import labkit
from labkit import cli


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """``run(words) -> (exit code, stdout, stderr)`` in an empty folder; loading a model is an error here."""

    def load(name=None):
        raise AssertionError("the model was loaded before the words were checked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(labkit, "load", load)

    def call(*words):
        code = cli.main(list(words))
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_the_methods_in_three_forms(run):
    names = list(labkit.methods())
    code, out, _ = run("methods")
    assert code == 0 and all(f"\n{name} " in out for name in names)
    code, out, _ = run("methods", "--json")
    assert code == 0 and list(json.loads(out)) == names
    code, out, _ = run("methods", "--markdown")
    assert code == 0 and [line.split("**")[1] for line in out.splitlines()[2:]] == names
    code, out, err = run("methods", "--json", "--markdown")
    assert (code, out) == (2, "") and "`labkit methods --help`" in err and err.count("\n") == 1


@pytest.mark.parametrize("bad", ["file/below", "a\0b", "x" * 5000], ids=["below a file", "a null byte", "too long"])
@pytest.mark.parametrize("words", [["compress", "rtn", "--out"], ["sweep", "rtn", "--export"], ["regress"]])
def test_an_impossible_path_is_refused_before_the_work(run, tmp_path, words, bad):
    (tmp_path / "file").write_text("in the way")
    code, out, err = run(*words, bad)
    assert (code, out) == (2, "") and err.count("\n") == 1 and len(err) < 600
    assert "cannot be a path here" in err and (words[-1] if words[-1].startswith("--") else "NOTEBOOK") in err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_is_in_use_is_refused_before_the_work(run, tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "file").write_text("mine")
    code, _, err = run("compress", "rtn", "--out", "small")
    assert code == 2 and "not an empty folder" in err


def test_a_pasted_text_is_shortened(run):
    code, _, err = run("show", "word " * 2000)
    assert code == 2 and len(err) < 600 and " … " in err and err.endswith(f"lists all {len(labkit.methods())}.\n")


def test_undecodable_bytes_are_shown_not_stumbled_over(run):
    code, _, err = run("measure\udcff")
    assert code == 2 and "\\udcff" in err
    code, _, err = run("show", "\ud800")
    assert code == 2 and "\\ud800" in err
