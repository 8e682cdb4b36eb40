"""What lies in ``data/`` and must be the same on every machine: its texts, and what was computed once for all.

    text("manual")        # the Python manual of one release, whatever Python runs here
    intact("manual")      # whether the file is still the one that was shipped

``data/manifest.toml`` lists it under ``[shipped]``. Only the standard library is needed here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from labkit import paths
from labkit.assets import manifest


@dataclass(frozen=True)
class Shipped:
    """One table of the manifest's ``[shipped]``."""

    name: str
    files: str  # a pattern below data/
    source: str
    licence: str  # SPDX
    sha256: str  # of the files in the order of their names, with the line ends of Unix
    note: str
    version: str = ""  # of the source
    licence_file: str = ""  # below data/, where the licence asks to go along
    tokens: int = 0  # of a text, for the embedded model's tokenizer
    ids: str = ""  # text.fingerprint of those

    @property
    def paths(self) -> list[Path]:
        """The files, in the order of their names."""
        return sorted(paths.data().glob(self.files))


def shipped() -> dict[str, Shipped]:
    """Everything under ``[shipped]``, by name."""
    return {name: Shipped(name=name, **table) for name, table in manifest().get("shipped", {}).items()}


def intact(name: str) -> bool:
    """Whether the files are those that the manifest speaks of, by reading all of them."""
    what = shipped()[name]
    digest = hashlib.sha256()
    for path in what.paths:
        content = path.read_bytes()
        digest.update(content if path.suffix == ".safetensors" else content.replace(b"\r\n", b"\n"))
    return digest.hexdigest() == what.sha256


def text(name: str) -> str:
    """A text that ships, with ``\\n`` at the end of its lines, whatever a checkout on Windows has made of them.

    The essays of "prose" are joined by blank lines.
    """
    contents = [path.read_text(encoding="utf-8") for path in shipped()[name].paths]  # reads \r\n as \n
    if not contents:
        raise FileNotFoundError(
            f"The text {name!r} is missing from {paths.data()}: it ships with labkit, so get that again."
        )
    return contents[0] if len(contents) == 1 else "\n\n".join(content.strip() for content in contents)
