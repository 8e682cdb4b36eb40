"""The README says what is there: its table, commands, names, tree, links and example are held against the code."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

import labkit
from labkit import cli

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(not README.exists(), reason="needs a checkout")
TEXT = README.read_text(encoding="utf-8") if README.exists() else ""


def section(title: str) -> str:
    (found,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)
    return found


def code(title: str, language: str = "") -> str:
    return re.findall(rf"^```{language}\n(.*?)^```", section(title), re.M | re.S)[0]


# ---- the table, the commands, the names


def test_the_method_table_is_fresh(capsys):
    (table,) = re.findall(r"<!-- methods: .*? -->\n(.*?)<!-- /methods -->", TEXT, re.S)
    assert cli.main(["methods", "--markdown"]) == 0
    assert table == capsys.readouterr().out, "put the output of `labkit methods --markdown` between the two comments"


def test_the_table_has_every_method_and_every_knob_with_its_default():
    rows = [line for line in section("Methods").splitlines() if line.startswith("| **")]
    assert len(rows) == len(labkit.methods())
    for row, (name, cls) in zip(rows, labkit.methods().items()):
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
        assert cells[0] == f"**{name}**" and cells[1] == cls.kind and len(cells) == 5
        for knob, value in cls().values().items():
            assert f"`{knob}={value!r}`" in cells[3]


def test_a_bar_in_a_cell_does_not_break_the_table():
    class Odd(labkit.RTN):
        """Rounds | to\tnearest."""

    assert "| Rounds \\| to nearest. |" in cli.markdown({"Odd": Odd}).splitlines()[2]


def test_every_command_is_told_and_every_told_command_is_one(monkeypatch, capsys):
    told = set(re.findall(r"labkit ([a-z]+)", " ".join(re.findall(r"`[^`]*`", section("On the command line")))))
    assert told == set(cli._commands())
    listed = re.findall(r"^  ([a-z]+) ", cli.OVERVIEW, re.M)
    assert listed[: len(told)] == list(cli._commands())


def test_the_commands_of_the_readme_are_understood(capsys):
    shown = re.findall(r"^\| `(labkit [^`]*)`", section("On the command line"), re.M)
    assert len(shown) == len(cli._commands())
    for line in shown:
        cli._parse(shlex.split(line)[1:])  # UsageError where a word is not understood


def test_every_public_name_is_told():
    missing = [name for name in labkit.__all__ if not re.search(rf"`labkit\.{name}\b", TEXT)]
    methods = [name for name in labkit.methods() if f"| **{name}** |" in TEXT]
    assert set(missing) <= set(methods), f"the README does not mention {sorted(set(missing) - set(methods))}"


def test_every_told_name_is_public():
    for name in re.findall(r"`labkit\.(\w+)", TEXT):
        assert name in labkit.__all__, f"labkit.{name}"
        getattr(labkit, name)


def test_the_labels_are_those_of_the_code():
    from labkit.record import LABELS

    assert re.findall(r"^- \*\*(\w+)\*\*", section("How to read the numbers"), re.M) == list(LABELS)


# ---- the tree


def tree() -> list[str]:
    """The paths in the tree, folders with a slash at their end."""
    paths, folder = [], ""
    for line in code("What is where").splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
        paths.append(folder + name if line.startswith("  ") else name)
    return paths


def top_level() -> set[str]:
    """What git has at the top, folders with a slash at their end."""
    try:
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git")
    parts = [name.partition("/") for name in done.stdout.split("\0") if name]
    return {head + slash for head, slash, _ in parts}


def test_everything_at_the_top_is_in_the_tree():
    assert top_level() - set(tree()) == set()


def test_every_package_folder_is_in_the_tree():
    folders = {f"labkit/{path.parent.name}/" for path in (ROOT / "labkit").glob("*/__init__.py")}
    assert folders and folders - set(tree()) == set()


def test_the_tree_holds_nothing_that_is_not_there():
    for path in tree():
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path
    for name in re.findall(r"\b\w+\.py\b", code("What is where")):
        assert (ROOT / "labkit" / name).is_file(), name


# ---- links, targets, the example


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert "docs/panel.png" in targets
    for target in targets:
        if not target.startswith("https://"):
            assert (ROOT / target).is_file(), target
    for notebook in re.findall(r"(notebooks(?:%2F|/)[\w.]+\.ipynb)", TEXT):
        assert (ROOT / notebook.replace("%2F", "/")).is_file(), notebook


def test_the_badges_are_those_that_make_links_writes():
    from labkit import links

    (between,) = re.findall(f"{re.escape(links.OPEN)}(.*?){re.escape(links.CLOSE)}", TEXT, re.S)
    assert between == links.badges()


def test_the_commands_without_make_are_those_of_the_makefile():
    """What `make lab` runs and what the README has for PowerShell differ in where .venv's programs are, and in quotes."""
    import yaml

    from labkit import install

    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    lines = code("Start", "powershell").splitlines()
    made, installed, fetched, opened = lines
    assert re.fullmatch(r"py -3\.\d+ -m venv \.venv", made)
    extras = re.search(r"-e '(\.\[[\w,]+\])'", makefile).group(1)
    assert installed == rf'.venv\Scripts\python -m pip install -c constraints.txt -e "{extras}"'
    assert fetched == r".venv\Scripts\labkit fetch" and "$(BIN)/labkit fetch" in makefile
    flags = re.search(r"jupyter-lab \$\$root (.*) \$\(LAB_FLAGS\)", makefile).group(1)
    assert opened == rf".venv\Scripts\jupyter-lab {flags}"
    assert set(extras[2:-1].split(",")) <= install.needed().keys()
    pinned = re.search(r"python=(\S+)", (ROOT / "environment.yml").read_text(encoding="utf-8")).group(1)
    assert made.split()[1] == f"-{pinned}"
    steps = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))["jobs"]["systems"][
        "steps"
    ]
    run = [step["run"] for step in steps if "run" in step]
    assert run[0] == installed.replace(".venv\\Scripts\\", "") and run[1] == "labkit fetch"


def test_the_make_targets_and_variables_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z]+)", TEXT, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for variable in re.findall(r"\b([A-Z]+_[A-Z]+)=", TEXT):
        assert f"$({variable})" in makefile, variable


@pytest.fixture
def example():
    """The class of the section on adding a method, as it is printed there."""
    import sys
    import types

    module = types.ModuleType("readme_example")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(code("Add a method", "python"), "README.md", "exec"), module.__dict__)
    yield next(c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__)
    del sys.modules[module.__name__]


def test_the_example_is_a_method_that_keeps_the_contract(example, tiny_lm):
    before = {name: t.clone() for name, t in tiny_lm.model.state_dict().items()}
    made = example()
    small = made(tiny_lm, progress=False)
    assert all(torch.equal(t, before[name]) for name, t in tiny_lm.model.state_dict().items())
    assert small.history == (repr(made),) and small.nbytes < tiny_lm.nbytes
    ids = torch.arange(2 * 48).view(2, 48) % 96
    assert torch.isfinite(small.model(ids).logits).all()
    same = example(**example.lossless)(tiny_lm, progress=False)
    assert labkit.divergence(same, tiny_lm, ids).kl <= example.lossless_kl
    assert labkit.divergence(small, tiny_lm, ids).kl > 10 * labkit.divergence(same, tiny_lm, ids).kl
    for name in example.knobs():
        with pytest.raises(ValueError, match=f"{example.__name__}.{name} = .*must be"):
            example(**{name: "nonsense"})
    assert example.paper and example.kind and example.summary()


def test_the_example_really_clips(example, tiny_lm):
    """With outliers in a row, clipping rounds all the others better than plain rounding does."""
    layer = "model.layers.0.mlp.up_proj"
    weight = tiny_lm.model.get_submodule(layer).weight.detach().clone()
    weight[:, 0] = 30 * weight.abs().mean()
    tiny_lm.model.get_submodule(layer).weight = torch.nn.Parameter(weight, requires_grad=False)

    def error(method) -> float:
        rounded = method(tiny_lm, progress=False).model.get_submodule(layer).weight
        return (rounded - weight)[:, 1:].norm().item()

    assert error(example(bits=4, keep=0.98)) < 0.5 * error(labkit.RTN(bits=4))


@pytest.mark.model
def test_the_example_on_the_real_model(example, lm):
    ids = labkit.text.evaluation(lm, windows=1, length=128)
    same = example(**example.lossless)(lm, progress=False)
    assert labkit.divergence(same, lm, ids).kl <= example.lossless_kl


def test_the_start_in_python_is_only_what_exists():
    names = re.findall(r"labkit\.(\w+)", code("Start", "python"))
    assert names == ["load", "RTN", "measure"]
    compile(code("Start", "python"), "README.md", "exec")
