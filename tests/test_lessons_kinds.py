"""The views of notebooks 02, 03 and 05 on models with few blocks, other layers, and blocks that are not alike."""

from __future__ import annotations

import pytest
import torch
from odd_models import odd, tokens
from tiny_models import tiny

from labkit import RTN
from labkit.ui.lessons import alone, breakit, int8, rounding
from labkit.ui.lessons import sparsegpt_stepper as sparse
from labkit.ui.lessons.awq_curve import Curves
from labkit.ui.lessons.fits import Fits
from labkit.ui.lessons.gptq_stepper import Stepper
from labkit.ui.lessons.hqq_shrink import Shrinkage
from labkit.ui.lessons.inputs import Inputs
from labkit.ui.lessons.masks import Masks
from labkit.ui.lessons.outliers import Outliers
from labkit.ui.lessons.puzzle import Puzzle
from labkit.walk import blocks

EVERYWHERE = {
    "GPT2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "Lfm2": ("feed_forward.w1", "feed_forward.w3", "feed_forward.w2"),
    "DeepseekV3": tuple(
        f"self_attn.{n}" for n in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    ),
}


@pytest.fixture(params=list(EVERYWHERE))
def family(request):
    return request.param


def made(family: str):
    return tiny(family) if family == "GPT2" else odd(family)


def test_layers_that_are_in_every_block(family):
    assert set(Inputs(made(family), tokens(1)).kinds) == set(EVERYWHERE[family])
    with pytest.raises(ValueError, match="No linear layer is in all blocks of this model"):
        Inputs(odd("Jamba"), tokens(1))


def test_every_view_of_every_layer(family):
    lm = made(family)
    calibration, passage = Inputs(lm, tokens(3, 32)), Inputs(lm, tokens(1, 32))
    masks, outliers, round_ = Masks(calibration), Outliers(calibration, passage), rounding.Rounding(lm)
    gptq, sparsegpt, fits = Stepper(calibration, columns=12), sparse.Stepper(calibration), Fits(calibration, passage)
    for block in range(len(calibration.stack)):
        assert Curves(calibration).view(block, 3) and Shrinkage(calibration).view(block)
        for kind in calibration.kinds:
            assert f"{kind}" in round_.view("int", 4, 16, kind, block, 0, 0)[1]
            for view in (
                masks.view(0.5, "2:4", "Wanda", 0, kind, block),
                outliers.view(0.5, kind, block),
                gptq.view(12, True, 3, kind, block),
                sparsegpt.view(0, 0.5, "unstructured", kind, block),
                fits.view(fits.settings()["tokens"][-1], kind, block),
            ):
                assert len(view[1]) > 40
    assert len(outliers.table().rows) >= 2
    assert 0 <= Puzzle(calibration, block=1, kind=calibration.kinds[-1], count=2).right("Wanda") <= 1
    costs = alone.Alone(calibration, {"manual": tokens(1, 16)}).measure()
    assert [cost.block for cost in costs] == [0, 0, 1, 1] and all(cost.damage["manual"] > 0 for cost in costs)


def test_the_layer_that_is_timed_in_int8(family):
    widest = {"GPT2": "mlp.c_fc", "Lfm2": "feed_forward.w3", "DeepseekV3": "mlp.up_proj"}
    assert int8.widest(blocks(made(family).model)[0]) == widest[family]
    assert int8.widest(blocks(tiny().model)[0]) == "mlp.up_proj"


@pytest.mark.filterwarnings("ignore::labkit.coverage.LeftUncompressed")  # experts
def test_damage_of_more_blocks_than_there_are(family, monkeypatch):
    monkeypatch.setattr(breakit.text, "evaluation", lambda lm, windows, length, name: tokens(windows, length))
    bench, all_of_it = (breakit.Damage(made(family), blocks=n, evaluation=(1, 16)) for n in (8, 2))
    assert bench.blocks == 2 and "2 blocks" in bench.unit
    method = RTN(bits=3, group_size=16)
    assert bench.of(method, None) == all_of_it.of(method, None)


@torch.no_grad()
def test_an_outlier_leaves_the_models_function(family):
    lm, ids = made(family), tokens(2)
    same = breakit.with_outlier(lm, factor=8.0)
    pairs = zip(lm.model.parameters(), same.model.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)
    torch.testing.assert_close(same.model(ids).logits, lm.model(ids).logits, rtol=1e-3, atol=1e-3)
