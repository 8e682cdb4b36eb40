"""Numbers and orders that notebook 00 and the README state in words are held against what is computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from labkit.check.start import stored_bits
from labkit.ui import words

REPO = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (REPO / "notebooks").exists(), reason="needs a checkout")


def prose(name: str) -> str:
    cells = json.loads((REPO / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return " ".join(" ".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown").split())


def test_bits_and_shares_of_notebook_00():
    text, bits = prose("00_start_here"), stored_bits(4, 64)
    assert f"make 4 bits into {bits:.2f}." in text
    assert f"{bits:.2f} bits are {words.percent(bits / 32)} of fp32, and {words.percent(bits / 16)} of 16 bits" in text
    assert f"They cost {stored_bits(4, 32) - bits:.2f} bits more" in text


def test_error_bands_are_nowhere_used_to_compare():
    for text in (prose("00_start_here"), " ".join((REPO / "README.md").read_text(encoding="utf-8").split())):
        assert "smaller than its band" not in text and "window by window" in text
