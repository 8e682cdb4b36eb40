"""What labkit needs, and the command that installs it. Standard library and packaging alone, for ``labkit doctor``.

The import is ``labkit``, the distribution is not: PyPI's ``labkit`` is another project. No message says to
get it from PyPI by name. A checkout is installed from its folder; elsewhere what is missing is named itself.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

DISTRIBUTION = "labkit-llm"


def version() -> str:
    """labkit's version: what a checkout says now, else what was installed."""
    if (project := _project()) is not None:
        return project["version"]
    return installed(DISTRIBUTION) or "(not installed)"


def installed(name: str) -> str | None:
    """The version of an installed distribution; None where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing(package: str, extra: str) -> ImportError:
    """The error for an optional package that is not there; it says what to run."""
    return ImportError(f"This needs {package}, which is not installed: {extra_command(extra, package)}")


def extra_command(extra: str, package: str | None = None) -> str:
    """The pip command for an extra; where labkit is no checkout, for the packages behind it, or for ``package`` alone."""
    if _project() is not None:
        return f'{_pip()} -e "{_root().as_posix()}[{extra}]"'
    listed = [r for r in needed().get(extra, []) if package in (None, r.name)]
    return command(listed) if listed else f"{_pip()} {package}"


def command(requirements: list, *flags: str) -> str:
    """The pip command for these requirements, for this Python."""
    return " ".join([_pip(), *flags, *(f'"{r.name}{r.specifier}"' for r in requirements)])


def needed() -> dict[str, list]:
    """The requirements that this Python has to meet, by group: "core", then each extra."""
    from packaging.requirements import Requirement

    found: dict[str, list] = {"core": []}
    for group, text in declared()[1]:
        requirement = Requirement(text)
        marker = requirement.marker
        if requirement.name != DISTRIBUTION and (marker is None or marker.evaluate({"extra": group})):
            found.setdefault(group, []).append(requirement)
    return found


def declared() -> tuple[str, list[tuple[str, str]]]:
    """What labkit says it needs: the Python, and each requirement with its group."""
    if (project := _project()) is not None:
        groups = {"core": project["dependencies"], **project["optional-dependencies"]}
        return project["requires-python"], [(group, text) for group, lines in groups.items() for text in lines]
    about = importlib.metadata.metadata(DISTRIBUTION)
    groups = [(re.search(r"extra == ['\"](\w+)['\"]", text), text) for text in about.get_all("Requires-Dist") or ()]
    return about["Requires-Python"], [(found[1] if found else "core", text) for found, text in groups]


def _pip() -> str:
    return f"{Path(sys.executable).as_posix()} -m pip install"


def _root() -> Path:
    return Path(__file__).resolve().parents[1]


def _project() -> dict | None:
    """The [project] table of the checkout that this file lies in; None where labkit is installed without one."""
    here = _root() / "pyproject.toml"
    if not here.is_file():
        return None
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    project = tomllib.loads(here.read_text(encoding="utf-8")).get("project", {})
    return project if project.get("name") == DISTRIBUTION else None  # a site-packages folder inside another project
