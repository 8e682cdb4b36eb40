"""The first cell of every notebook, and labkit.colab.setup(), on a stubbed Colab and elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest
from packaging.requirements import Requirement

from labkit import colab, install, links

# IPython with a %pip that only writes down what it is asked, and on Colab with a shell of Colab's name.
RUN = """
import sys
from IPython.core.interactiveshell import InteractiveShell
where, cell = sys.argv[1:]
class Shell(InteractiveShell):
    pass
if where == "colab":
    Shell.__module__ = "google.colab._shell"
InteractiveShell._instance = shell = Shell.instance()
shell.register_magic_function(lambda line: print("asked:", line), magic_name="pip")
shell.system = shell.system_raw = shell.system_piped = lambda line: print("shell:", line)
result = shell.run_cell(cell)
print("error:", type(result.error_in_exec or result.error_before_exec).__name__, result.error_in_exec)
print("labkit" in shell.user_ns)
"""


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


def run(where: str, cell: str, tmp_path) -> list[str]:
    """What the cell makes IPython say."""
    command = [sys.executable, "-c", RUN, where, cell]
    env = {**os.environ, "IPYTHONDIR": str(tmp_path / "ipython")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("repository", [None, "some-one/their.lab"])
def test_elsewhere_the_first_cell_only_imports(tmp_path, repository):
    """Nothing is asked of a shell: Windows' has no `test`, and `||` would replace the local install."""
    cell = links.first_cell(repository)
    assert "!" not in cell and cell.splitlines()[-1] == "import labkit"
    assert run("jupyter", cell, tmp_path) == ["error: NoneType None", "True"]


def test_on_colab_the_first_cell_installs_from_the_repository(tmp_path):
    asked, error, imported = run("colab", links.first_cell("some-one/their.lab"), tmp_path)
    assert (error, imported) == ("error: NoneType None", "True")
    words = asked.removeprefix("asked: ")
    assert words.startswith('install -q "') and words.endswith('"')
    wanted = Requirement(words.removeprefix("install -q ").strip('"'))
    assert wanted.name == install.DISTRIBUTION and wanted.url == "git+https://github.com/some-one/their.lab"
    assert wanted.extras == {"colab"} and wanted.extras <= install.needed().keys()


def test_on_colab_without_an_address_the_first_cell_says_what_to_do(tmp_path):
    said = run("colab", links.first_cell(None), tmp_path)
    (error,) = [line for line in said if line.startswith("error: ")]
    assert error.startswith("error: SystemExit ") and "fork" in error and "make links REPO=owner/name" in error
    assert said[-1] == "False" and not [line for line in said if line.startswith(("asked", "shell"))]


def test_what_colab_ships_itself_is_not_replaced():
    """Its kernel runs a pinned, older ipykernel, ipywidgets and server: newer ones ask for a restart, or break widgets."""
    from importlib.metadata import requires

    groups = {name: {r.name for r in found} for name, found in install.needed().items()}
    colab_gets = groups["core"] | groups["kernels"] | groups["colab"]
    its_own = {"ipykernel", "ipywidgets", "jupyterlab", "notebook", "jupyter-server", "tornado", "ipython", "papermill"}
    assert not colab_gets & its_own and {"plotly", "anywidget"} <= colab_gets
    needs = [Requirement(text) for text in requires("anywidget")]
    (widgets,) = [r for r in needs if r.name == "ipywidgets" and r.marker is None]
    assert widgets.specifier.contains("7.7.1")  # Colab's
