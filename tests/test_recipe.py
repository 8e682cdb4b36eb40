"""A Recipe: all its methods are calibrated on the same windows, drawn once from the model that came in."""

from __future__ import annotations

import pytest
import torch

import labkit
from labkit import text
from labkit.method import Recipe

CALIBRATED = {name: cls for name, cls in labkit.methods().items() if cls.calibrated}


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The models that calibration text was drawn from. Another model, or another call, would get other windows."""
    models = []

    def calibration(lm, *args, **kwargs):
        models.append(lm)
        return torch.randint(96, (4, 24), generator=torch.Generator().manual_seed(len(models)))

    monkeypatch.setattr(text, "calibration", calibration)
    return models


@pytest.mark.parametrize("cls", CALIBRATED.values(), ids=CALIBRATED)
def test_every_calibrated_method_gets_the_windows_of_the_model_that_came_in(cls, tiny_lm, drawn, monkeypatch):
    seen, apply = [], cls.apply

    def watched(self, lm, calib, progress):
        seen.append(calib)
        apply(self, lm, calib, progress)

    monkeypatch.setattr(cls, "apply", watched)
    small = Recipe(labkit.RTN(bits=8), cls(), Recipe(cls()))(tiny_lm, progress=False)
    assert drawn == [tiny_lm] and len(seen) == 2 and seen[0] is seen[1]
    assert len(small.history) == 3


def test_a_recipe_is_its_methods_one_after_the_other(tiny_lm, drawn):
    recipe = Recipe(labkit.Wanda(), labkit.GPTQ(bits=4))
    ids = torch.arange(32)[None]
    logits = recipe(tiny_lm, progress=False).model(ids).logits
    calib = torch.randint(96, (4, 24), generator=torch.Generator().manual_seed(1))  # the first draw
    by_hand = recipe.methods[1](recipe.methods[0](tiny_lm, calib, progress=False), calib, progress=False)
    assert torch.equal(logits, by_hand.model(ids).logits)
    given = recipe(tiny_lm, calib, progress=False)
    assert torch.equal(logits, given.model(ids).logits) and drawn == [tiny_lm]


def test_nothing_is_drawn_where_nothing_is_calibrated(tiny_lm, drawn):
    recipe = Recipe(labkit.RTN(bits=4), Recipe(labkit.Magnitude()))
    recipe(tiny_lm, progress=False)
    assert not recipe.calibrated and not drawn
    assert Recipe(labkit.RTN(), Recipe(labkit.Wanda())).calibrated and not Recipe().calibrated


def test_a_recipe_refuses_what_is_no_model_and_what_are_no_windows(tiny_lm):
    with pytest.raises(ValueError, match="A LanguageModel"):
        Recipe(labkit.GPTQ())(tiny_lm.model)
    with pytest.raises(ValueError, match="LongTensor"):
        Recipe(labkit.RTN(), labkit.GPTQ())(tiny_lm, torch.zeros(3))
