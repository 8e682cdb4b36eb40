"""Where this lab's repository is: the one address that badges, notebooks and Binder links lead to.

Until ``make links REPO=owner/name`` has been run, no page names a repository: whoever owns the name that a page guessed
would run code in every reader's notebook. The command may be run again, with the same address or another. Without make:
``python labkit/links.py owner/name``. Standard library alone, so it works before anything is installed.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

REPOSITORY: str | None = None  # "owner/name" on GitHub; this line is written by `make links`

FIRST = "00_start_here.ipynb"  # the notebook that the badges open
OPEN, CLOSE = "<!-- links: made by `make links` -->\n", "<!-- /links -->\n"  # what stands between them is replaced
OWNER = re.compile(r"[A-Za-z0-9](?:-?[A-Za-z0-9]){0,38}")
NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")


def first_cell(repository: str | None = REPOSITORY) -> str:
    """The first code cell of every notebook: on Colab it installs labkit, elsewhere it only imports it.

    ``str(get_ipython())`` names Colab's shell there. Nothing is left to the system's shell, for each has its own rules.
    """
    if repository is None:
        does = 'raise SystemExit("For Colab: fork this lab, run `make links REPO=owner/name` there, push, open your copy.")'
    else:
        does = f'%pip install -q "labkit-llm[colab] @ git+https://github.com/{repository}"'
    return f'if "google.colab" in str(get_ipython()):\n    {does}\nimport labkit'


def badges(repository: str | None = REPOSITORY) -> str:
    """What stands between the two comments of the README."""
    if repository is None:
        return "To open the lab in Binder or Colab: fork it, then `make links REPO=owner/name`.\n"
    binder = f"https://mybinder.org/v2/gh/{repository}/HEAD?labpath=notebooks%2F{FIRST}"
    colab = f"https://colab.research.google.com/github/{repository}/blob/HEAD/notebooks/{FIRST}"
    return (
        f"[![Open in Binder](https://mybinder.org/badge_logo.svg)]({binder})\n"
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab})\n"
    )


def check(repository: str) -> str:
    """The address, if it can be one on GitHub; else ValueError."""
    owner, slash, name = repository.partition("/")
    good = slash and OWNER.fullmatch(owner) and NAME.fullmatch(name) and name not in (".", "..")
    if not good or name.endswith(".git"):
        raise ValueError(
            f"REPO = {repository!r} is not allowed: it must be owner/name, as in https://github.com/owner/name."
        )
    return repository


def write(root: Path, repository: str) -> list[Path]:
    """Write the address into the checkout at ``root``; returns the files that changed.

    Everything is read before anything is written. Raises ValueError for an address that cannot be one, and for a file
    in which the place of the address is not found.
    """
    check(repository)
    source = root / "labkit" / "links.py"
    line = re.compile(r"^REPOSITORY: str \| None = .*?(?=  #)", re.M)
    changes = {source: _replaced(source, line, f'REPOSITORY: str | None = "{repository}"')}
    readme = root / "README.md"
    between = re.compile(f"(?<={re.escape(OPEN)}).*?(?={re.escape(CLOSE)})", re.S)
    changes[readme] = _replaced(readme, between, badges(repository))
    for path in sorted((root / "notebooks").rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts:
            changes[path] = _with_first_cell(path, first_cell(repository))
    changed = [path for path, text in changes.items() if text != _read(path)]
    for path in changed:
        with path.open("w", encoding="utf-8", newline="\n") as file:
            file.write(changes[path])
    return changed


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _replaced(path: Path, pattern: re.Pattern, by: str) -> str:
    text, count = pattern.subn(lambda _: by, _read(path))
    if count != 1:
        raise ValueError(f"{path} has {count} places for the repository's address; there must be 1.")
    return text


def _with_first_cell(path: Path, source: str) -> str:
    """The notebook's text with another first code cell, all else as it was."""
    text = _read(path)
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    if not cells or cells[0]["source"][-1:] != ["import labkit"]:
        raise ValueError(f"{path}: its first code cell does not end with `import labkit`.")
    lines = source.splitlines(keepends=True)
    old, new = (json.dumps(part, indent=1, ensure_ascii=False) for part in (cells[0]["source"], lines))
    old, new = (f'"source": {part}'.replace("\n", "\n   ") for part in (old, new))  # as nbformat indents a cell
    if text.count(old) != 1:
        raise ValueError(f"{path}: its first code cell is not written as nbformat writes it.")
    return text.replace(old, new)


def main(words: list[str]) -> int:
    """``labkit/links.py owner/name``; exit code 2 for bad input."""
    root = Path(__file__).resolve().parents[1]
    try:
        if len(words) != 1 or not words[0]:
            raise ValueError("Say where the repository is: make links REPO=owner/name")
        if not (root / "pyproject.toml").is_file():
            raise ValueError(f"{root} is no checkout of labkit: run this in one.")
        changed = write(root, words[0])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{words[0]}: {len(changed)} files changed. Commit them and push.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
