"""The first cell of every notebook, and labkit.colab.setup(), on a stubbed Colab and elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest

from labkit import colab

IPYTHON = "from IPython.core.interactiveshell import InteractiveShell as Shell\nimport sys\n"
RUN = (
    IPYTHON
    + "result = Shell.instance().run_cell(sys.argv[1])\nresult.raise_error()\nprint('labkit' in Shell.instance().user_ns)"
)


@pytest.fixture(autouse=True)
def fresh():
    """setup() remembers that it was called."""
    colab.setup.cache_clear()
    yield
    colab.setup.cache_clear()


@pytest.fixture
def google(monkeypatch):
    """A google.colab that counts how often the widget manager was switched on."""
    calls = []
    output = types.ModuleType("google.colab.output")
    output.enable_custom_widget_manager = lambda: calls.append("on")
    package, module = types.ModuleType("google"), types.ModuleType("google.colab")
    package.colab, module.output = module, output
    for name, stub in {"google": package, "google.colab": module, "google.colab.output": output}.items():
        monkeypatch.setitem(sys.modules, name, stub)
    return calls


def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab.output", None)  # an import of it would raise
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    assert colab.setup() is False and not colab.here()


def test_on_colab_the_widget_manager_is_switched_on_once(google):
    assert colab.here()
    assert colab.setup() is True and colab.setup() is True
    assert google == ["on"]


@pytest.fixture
def run_first_cell(tmp_path):
    """Run the cell in IPython, with a ``pip`` on the PATH that only writes down what it was asked."""
    pip = tmp_path / "pip"
    pip.write_text(f'#!/bin/sh\nfor word in "$@"; do echo "$word" >> "{tmp_path}/asked"; done\n')
    pip.chmod(0o755)

    def run(**settings):
        env = {k: v for k, v in os.environ.items() if k != "COLAB_RELEASE_TAG"} | settings
        env |= {"PATH": f"{tmp_path}:{env['PATH']}", "IPYTHONDIR": str(tmp_path / "ipython")}
        command = [sys.executable, "-c", RUN, colab.FIRST_CELL]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        asked = tmp_path / "asked"
        return done.stdout.split(), asked.read_text().splitlines() if asked.exists() else None

    return run


@pytest.mark.skipif(os.name == "nt", reason="the line for Colab's shell")
def test_the_first_cell(run_first_cell):
    assert len(colab.FIRST_CELL.splitlines()) == 2
    assert run_first_cell() == (["True"], None)
    said, asked = run_first_cell(COLAB_RELEASE_TAG="release-colab-x")
    assert said == ["True"] and asked[:2] == ["install", "-q"]
    from packaging.requirements import Requirement

    wanted = Requirement(asked[2])  # one word: the shell kept the quotes
    assert wanted.name == "labkit" and wanted.url.startswith("git+https://") and len(asked) == 3
    from labkit import doctor

    assert wanted.extras <= doctor.needed().keys()  # an extra that pyproject.toml has
