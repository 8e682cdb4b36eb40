"""A tenth of the zoo, another one each day: no cell is wrong, and docs/families.md says what is found.

LABKIT_ZOO=all takes every family (`make zoo` does, and writes the page), LABKIT_ZOO=3 the fourth tenth.
"""

from __future__ import annotations

import datetime
import os

import pytest
from zoo import cells, table
from zoo.families import FAMILIES

TENTHS = 10


def today() -> list[str]:
    asked = os.environ.get("LABKIT_ZOO") or str(datetime.date.today().toordinal() % TENTHS)
    return list(FAMILIES) if asked == "all" else list(FAMILIES)[int(asked) :: TENTHS]


@pytest.mark.skipif(not table.FILE.exists(), reason="needs a checkout")
@pytest.mark.parametrize("family", today())
def test_a_family_is_treated_right_or_refused(family):
    row = cells.row(family)
    assert not {name: answer for name, answer in row.items() if answer.startswith(cells.WRONG)}
    page = table.FILE.read_text(encoding="utf-8")
    (written,) = (line for line in page.splitlines() if line.startswith(f"| {family} |"))
    notes = [line.split(". ", 1)[1] for line in page.splitlines() if line[:1].isdigit()]
    assert table.line(family, row, notes) == written, "make zoo writes the page anew"


def test_the_page_has_every_family():
    page = table.FILE.read_text(encoding="utf-8")
    assert all(page.count(f"| {family} |") == 1 for family in FAMILIES) and len(FAMILIES) >= 40


@pytest.mark.parametrize("fault", [{"AWQ": "wrong: it is"}, {}])
def test_a_row_is_summed_up(fault):
    row = dict.fromkeys([*cells.WEIGHTS, *cells.CACHE, "engine", "export"], cells.YES) | fault
    row |= {"H2O": "H2O(budget=12) cannot do this.", "SnapKV": "SnapKV(budget=12) cannot do this."}
    notes: list[str] = []
    line = table.line("Llama", row, notes)
    number = notes.index("It cannot do this.") + 1
    assert line.endswith(f"| yes; H2O, SnapKV: no [{number}] | yes | yes |") and ("AWQ" in line) == bool(fault)


@pytest.mark.filterwarnings("ignore:After RTN")
def test_a_silent_fault_shows(monkeypatch):
    """The checks themselves: a method that spoils a row, or a cache that forgets, is found out."""
    import torch

    import labkit

    def spoil(self, lm, calib, progress):
        weight = lm.model.model.layers[1].mlp.down_proj.weight
        lm.model.model.layers[1].mlp.down_proj.weight = torch.nn.Parameter(weight.roll(1, 0), requires_grad=False)

    monkeypatch.setattr(labkit.RTN, "apply", spoil)
    with pytest.raises(AssertionError, match="lossless"):
        cells.weights("Llama", labkit.RTN)
    monkeypatch.setattr(labkit.RecentKV, "scores", lambda self, step: torch.rand(step.keys.shape[:3]))
    assert cells.cache("Llama", labkit.RecentKV) == cells.YES  # other tokens, and attended to as they are kept
    monkeypatch.setattr(cells, "window", lambda config: 3)
    with pytest.raises(AssertionError, match="keeps"):
        cells.cache("Llama", labkit.RecentKV)
