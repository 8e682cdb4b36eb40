"""What people install is what we say: four lists of dependencies that agree, and make targets that explain it."""

import configparser
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
CONDA = {"pytorch-cpu": "torch", "python-xxhash": "xxhash"}  # conda-forge's names that differ from PyPI's

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs a checkout")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def project() -> dict:
    return tomllib.loads(read("pyproject.toml"))["project"]


def requirements(python="3.11") -> dict[str, Requirement]:
    """Every dependency of pyproject.toml, extras included, that this Python gets."""
    groups = [project()["dependencies"], *project()["optional-dependencies"].values()]
    found = [Requirement(line) for group in groups for line in group]
    found = [r for r in found if r.marker is None or r.marker.evaluate({"python_version": python})]
    return {canonicalize_name(r.name): r for r in found if r.name != project()["name"]}


def pins() -> dict[str, str]:
    lines = [line for line in read("constraints.txt").splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def environment(name="environment.yml") -> list[str]:
    """The packages of an environment file, as PyPI would name them."""
    packages = yaml.safe_load(read(name))["dependencies"]
    (from_pip,) = [entry["pip"] for entry in packages if isinstance(entry, dict)]
    return [entry for entry in packages if isinstance(entry, str)] + from_pip


def tracked() -> list[Path]:
    """The repository's text files: what git has or would add, or every file where there is no git."""
    try:
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
        found = [ROOT / name for name in names if name]
    except (OSError, subprocess.CalledProcessError):
        hidden = re.compile(r"(^|/)(\.(?!ci/|github/)|__pycache__/)")
        found = [path for path in ROOT.rglob("*") if not hidden.search(path.relative_to(ROOT).as_posix())]
    binary = {".png", ".jpg", ".gif", ".ico", ".gz", ".npz", ".safetensors", ".gguf", ".sqlite"}
    return [path for path in found if path.is_file() and path.suffix not in binary]


# The four lists of dependencies agree


def test_lower_bounds_only():
    for requirement in requirements().values():
        assert [s.operator for s in requirement.specifier] == [">="], f"{requirement}: one lower bound, nothing else"


def test_every_dependency_is_pinned_above_its_lower_bound():
    for name, requirement in requirements().items():
        assert name in pins(), f"{name} is in pyproject.toml but not in constraints.txt"
        assert requirement.specifier.contains(pins()[name], prereleases=True), f"{name}: {pins()[name]} is too old"


def test_the_pins_are_plain_sorted_and_portable():
    lines = [line for line in read("constraints.txt").splitlines() if not line.startswith("#")]
    assert lines == sorted(lines, key=str.lower)
    for line in lines:
        name, version = line.split("==")
        assert re.fullmatch(r"[A-Za-z0-9._-]+", name), line
        assert Version(version).local is None, f"{line}: other machines have no build with this local tag"
    assert project()["name"] not in pins()
    assert len(pins()) == len(lines), "a package is pinned twice"


def test_the_pins_are_closed_under_dependency():
    """Whatever a pinned and installed package needs here is pinned too, so that nothing floats."""
    from importlib.metadata import PackageNotFoundError, distribution

    for name in pins():
        try:
            needs = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        for need in map(Requirement, needs):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                assert canonicalize_name(need.name) in pins(), f"{name} needs {need.name}, which is not pinned"


def test_both_environment_files_have_the_same_packages():
    assert environment("binder/environment.yml") == environment("environment.yml")
    first, second = (yaml.safe_load(read(name)) for name in ("environment.yml", "binder/environment.yml"))
    assert first == second


def test_every_dependency_is_in_the_conda_environment():
    bounds = {}
    for line in environment():
        requirement = (
            Requirement(line) if "=" not in line.replace(">=", "") else Requirement(line.replace("=", "==", 1))
        )
        name = canonicalize_name(requirement.name)
        bounds[CONDA.get(name, name)] = str(requirement.specifier)
    for name, requirement in requirements().items():
        assert bounds.get(name) == str(requirement.specifier), f"{name}: environment.yml has {bounds.get(name)}"
    extra = set(bounds) - set(requirements()) - {"python", "pip"}
    assert not extra, f"{extra} is in environment.yml but not in pyproject.toml"


def test_conda_takes_the_python_that_the_pins_are_for():
    (python,) = [entry for entry in environment() if entry.startswith("python=")]
    assert python == "python=3.11"
    assert Version("3.11") in Requirement("x" + project()["requires-python"]).specifier


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this tree, built without a network by the backend itself."""
    hatchling = pytest.importorskip("hatchling.build", reason="hatchling is not installed")
    where = tmp_path_factory.mktemp("wheel")
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        name = hatchling.build_wheel(str(where))
    finally:
        os.chdir(before)
    return zipfile.ZipFile(where / name)


def test_the_wheel_holds_the_package_and_its_data(wheel):
    names = set(wheel.namelist())
    for path in tracked():
        relative = path.relative_to(ROOT).as_posix()
        if relative.startswith("data/"):
            assert f"labkit/{relative}" in names
        elif relative.startswith("labkit/"):
            assert relative in names
    assert {name.split("/")[0] for name in names} == {"labkit", "labkit_llm-0.1.0.dist-info"}


def test_the_wheel_has_the_command_and_the_license(wheel):
    scripts = configparser.ConfigParser()
    scripts.read_string(wheel.read("labkit_llm-0.1.0.dist-info/entry_points.txt").decode())
    assert scripts["console_scripts"]["labkit"] == "labkit.cli:main"
    assert "Apache License" in wheel.read("labkit_llm-0.1.0.dist-info/licenses/LICENSE").decode()


def test_the_wheel_has_the_texts_and_the_licence_of_the_manual(wheel):
    shipped = tomllib.loads(read("data/manifest.toml"))["shipped"]
    for table in shipped.values():
        names = [name for name in wheel.namelist() if fnmatch(name, f"labkit/data/{table['files']}")]
        content = b"".join(wheel.read(name) for name in sorted(names))
        assert hashlib.sha256(content).hexdigest() == table["sha256"]
    licence = shipped["manual"]["licence_file"]
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in wheel.read(f"labkit/data/{licence}").decode()
    metadata = wheel.read("labkit_llm-0.1.0.dist-info/METADATA").decode()
    assert f"License-Expression: {project()['license']}" in metadata
    assert f"License-File: data/{licence}" in metadata and shipped["manual"]["licence"] in project()["license"]


def test_data_is_found_in_the_installed_wheel(wheel, tmp_path):
    wheel.extractall(tmp_path)
    code = "import sys, types; p = types.ModuleType('labkit'); p.__path__ = ['labkit']; sys.modules['labkit'] = p; "
    code += "from labkit import assets, paths; print(paths.data()); print(*assets.assets())"
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    where, names = out.splitlines()
    assert (tmp_path / where).resolve() == (tmp_path / "labkit" / "data").resolve()
    assert names.split()


# Binder, CI and make


@pytest.mark.parametrize("name", [".ci/run", "binder/postBuild"])
def test_scripts_stop_at_the_first_error(name):
    assert os.access(ROOT / name, os.X_OK), f"{name} is not executable"
    lines = read(name).splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert any(re.match(r"set -e", line) for line in lines)
    subprocess.run(["bash", "-n", str(ROOT / name)], check=True)


def test_binder_installs_labkit_and_its_assets():
    lines = read("binder/postBuild").splitlines()
    assert "pip install --no-deps -e ." in lines
    assert "labkit fetch" in lines


def test_ci_runs_make_test():
    assert re.search(r"^exec make test$", read(".ci/run"), re.M)
    steps = yaml.safe_load(read(".github/workflows/test.yml"))["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == ["bash .ci/run"]


def workflow(name: str) -> dict:
    return yaml.safe_load(read(f".github/workflows/{name}.yml"))["jobs"]


def commands(job: dict) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


def test_there_is_a_job_for_each_system_and_each_python():
    jobs = workflow("test")
    assert jobs["systems"]["strategy"]["matrix"]["os"] == ["windows-latest", "macos-latest"]
    assert not any(re.search(r"\bmake\b|\.ci/run", line) for line in commands(jobs["systems"]))
    pythons = {"3.11", *jobs["pythons"]["strategy"]["matrix"]["python"]}  # 3.11 has the pinned versions
    assert pythons == {f"3.{minor}" for minor in range(10, 15)}
    assert Version(min(pythons, key=Version)) in Requirement("x" + project()["requires-python"]).specifier
    assert "constraints.txt" not in " ".join(commands(jobs["pythons"]))


def test_there_is_a_job_for_the_lower_bounds():
    (install,) = [line for line in commands(workflow("test")["lowest"]) if "--resolution" in line]
    assert "--resolution lowest-direct" in install and '-e ".[lab,test]"' in install
    assert "constraints.txt" not in install


@pytest.mark.parametrize("job", ["systems", "pythons", "lowest"])
def test_what_the_jobs_select_exists(job):
    (line,) = [line for line in commands(workflow("test")[job]) if "pytest" in line]
    marks = set(re.findall(r"not (\w+)", line))
    known = {
        text.partition(":")[0]
        for text in tomllib.loads(read("pyproject.toml"))["tool"]["pytest"]["ini_options"]["markers"]
    }
    assert marks == {"model", "notebook", "browser"} and marks <= known


def test_the_pins_suit_every_python_that_make_accepts():
    """Also Debian's 3.11.2: no pinned package that is installed here asks for a later patch release."""
    from importlib.metadata import PackageNotFoundError, metadata

    for name, pinned in pins().items():
        try:
            found = metadata(name)
        except PackageNotFoundError:
            continue
        if found["Version"] == pinned and found["Requires-Python"]:
            assert Requirement(f"x{found['Requires-Python']}").specifier.contains("3.11.0"), f"{name}=={pinned}"


def test_the_distribution_has_a_name_of_its_own():
    """PyPI's labkit is another project; nothing but the import has its name."""
    from labkit.install import DISTRIBUTION

    assert project()["name"] == DISTRIBUTION != "labkit"
    groups = [project()["dependencies"], *project()["optional-dependencies"].values()]
    assert "labkit" not in {Requirement(line).name for group in groups for line in group}


def test_the_weekly_run_is_unpinned():
    (job,) = yaml.safe_load(read(".github/workflows/weekly.yml"))["jobs"].values()
    assert job["env"]["CONSTRAINTS"] == ""
    assert "make regress" in [step.get("run") for step in job["steps"]]
    plan = make("-n", "setup", CONSTRAINTS="", PYTHON=sys.executable).stdout
    assert "pip install" in plan
    assert "-c constraints.txt" not in plan
    assert "-c constraints.txt" in make("-n", "setup", "-W", "pyproject.toml").stdout


VARIABLES = set(re.findall(r"\b([A-Z]+_FLAGS|PYTHON|CONSTRAINTS|TORCH_INDEX)\b", read("Makefile")))


def make(*arguments, **variables) -> subprocess.CompletedProcess:
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    # Not what an outer make has put there: its flags, and variables given on its command line.
    outer = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", *VARIABLES}
    clean = {key: value for key, value in os.environ.items() if key not in outer}
    return subprocess.run(
        ["make", "--no-print-directory", *arguments], cwd=ROOT, env=clean | variables, capture_output=True, text=True
    )


def test_make_alone_prints_every_target():
    shown = make().stdout
    phony = re.search(r"^\.PHONY: (.*)$", read("Makefile"), re.M).group(1).split()
    for target in phony:
        if target != "browser":  # a step of test
            assert re.search(rf"^  {target} +\S", shown, re.M), f"make help does not tell of {target}"
    for variable in VARIABLES:
        assert variable in shown, f"make help does not tell of {variable}"
    assert {"lab", "test", "regress", "bench", "lint", "format", "clean", "help"} <= set(phony)


def test_make_test_checks_the_style_first():
    plan = make("-n", "test", "-W", "pyproject.toml").stdout
    order = ["pip install", "ruff check", "ruff format --check", "labkit fetch", "-m pytest"]
    assert [plan.index(step) for step in order] == sorted(plan.index(step) for step in order)


def test_make_lab_opens_the_first_notebook_without_a_question():
    plan = make("-n", "lab", LAB_FLAGS="--no-browser --port 8899").stdout
    assert re.search(r"jupyter-lab .*/lab/tree/notebooks/00_start_here\.ipynb --no-browser --port 8899", plan)
    settings = json.loads(read("binder/overrides.json"))["@jupyterlab/apputils-extension:notification"]
    assert settings["fetchNews"] == "false"


def test_an_old_python_is_refused_in_words(tmp_path):
    code = re.search(r"^define CHECK_PYTHON\n(.*?)^endef", read("Makefile"), re.M | re.S).group(1)
    old = "import sys; sys.version_info = (3, 9, 18, 'final', 0)\n"
    for pinned, message in (
        ("constraints.txt", "The pinned versions need Python 3.11"),
        ("", "labkit needs Python 3.10"),
    ):
        script = old + code.replace("$(CONSTRAINTS)", pinned)
        ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert ran.returncode == 1
        assert ran.stderr.startswith(f"{message} or newer, but {sys.executable} is 3.9.")
        assert "make PYTHON=" in ran.stderr
        now = subprocess.run([sys.executable, "-c", code.replace("$(CONSTRAINTS)", "")], capture_output=True, text=True)
        assert now.returncode == 0, now.stderr


def test_no_python_is_said_in_words(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    ran = make("-C", str(tmp_path), "setup", "PYTHON=")
    assert ran.returncode != 0
    assert "No python3 was found. Install Python 3.11" in ran.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.fixture
def tools(tmp_path):
    """A PATH on which only make, a shell and what a test adds are found, for an ordinary user without sudo."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("make", "sh", "env", "true"):
        (folder / name).symlink_to(shutil.which(name))

    def add(name, script):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    add("id", "echo 1000")
    return folder, add


@pytest.mark.parametrize("ci", ["true", ""])
def test_without_chromium_ci_fails_and_others_go_on(tools, ci):
    ran = make("browser", PATH=str(tools[0]), CI=ci)
    assert (ran.returncode != 0) == (ci == "true")
    assert "No Chromium for the browser tests: it can be installed only with apt-get" in ran.stderr
    assert ("The browser tests will be skipped." in ran.stderr) == (ci == "")


@pytest.mark.parametrize("user", ["root", "sudo"])
def test_chromium_is_installed_where_that_is_allowed(tools, tmp_path, user):
    folder, add = tools
    add("apt-get", f'echo "$DEBIAN_FRONTEND apt-get $*" >> {tmp_path}/calls')
    add("id", "echo 0") if user == "root" else add("sudo", 'shift; exec "$@"')
    ran = make("browser", PATH=str(folder), CI="true")
    assert ran.returncode == 0, ran.stderr
    update, install = (tmp_path / "calls").read_text().splitlines()
    assert update.endswith("apt-get update -q")
    assert install.startswith("noninteractive apt-get install") and install.endswith(" chromium")


def test_an_apt_get_that_fails_is_told(tools):
    folder, add = tools
    add("apt-get", "echo E: no such package >&2; exit 100")
    add("id", "echo 0")
    ran = make("browser", PATH=str(folder), CI="true")
    assert ran.returncode != 0
    assert "apt-get could not install it. Install chromium or google-chrome yourself" in ran.stderr


@pytest.mark.parametrize("name", ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"])
def test_a_chromium_that_is_there_is_enough(tools, name):
    tools[1](name, "exit 1")
    ran = make("browser", PATH=str(tools[0]), CI="true")
    assert (ran.returncode, ran.stderr) == (0, "")


def test_the_license_is_the_whole_apache_2():
    text = read("LICENSE")
    assert project()["license"].split(" AND ")[0] == "Apache-2.0"
    for part in ("Version 2.0, January 2004", "9. Accepting Warranty", "END OF TERMS AND CONDITIONS", "APPENDIX"):
        assert part in text


def test_no_machine_path_is_in_the_tree():
    folders = ["ro" + "ot", "wo" + "rk", r"home/(?!jovyan)\w+", "Us" + r"ers/\w+"]
    private = re.compile(rf"(?<![\w/.$-])/({'|'.join(folders)})/")
    assert private.search("cd /" + "root/x") and not private.search("https://example.org/home/page/")
    for path in tracked():
        for number, line in enumerate(io.StringIO(path.read_text(encoding="utf-8", errors="replace")), 1):
            assert not private.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()[:200]}"
