"""Notebook 03's view of HQQ's shrinkage: what it says is what brute force finds in the weights."""

from __future__ import annotations

import pytest
import torch

from labkit.formats import Affine
from labkit.quantize.hqq import BETA, P, hqq
from labkit.ui.lessons import hqq_shrink
from labkit.ui.lessons.hqq_shrink import Shrinkage
from labkit.ui.lessons.inputs import Inputs


@pytest.fixture
def shrinkage(tiny_lm) -> Shrinkage:
    return Shrinkage(Inputs(tiny_lm, torch.arange(24).view(1, 24)))


def test_the_share_is_of_residuals_above_the_threshold(shrinkage, monkeypatch):
    monkeypatch.setattr(hqq_shrink, "ROWS", 10_000)  # all rows
    for bits, beta in ((2, 10.0), (2, 300.0), (4, 3000.0)):
        above = count = 0
        for kind in shrinkage.inputs.kinds:
            weight, form = shrinkage.inputs.weight(1, kind), Affine(bits, hqq_shrink.GROUP)
            left = (weight - form.encode(weight).decode()).abs().double()
            above, count = above + int((left > beta ** (-1 / (2 - P))).sum()), count + left.numel()
        assert shrinkage.share(1, bits, beta) == pytest.approx(above / count, abs=2e-3)
    assert shrinkage.share(1, 2, 300.0) > 0.1  # so the comparison is not one of zeros


def test_more_beta_shrinks_more_and_the_view_says_what_it_draws(shrinkage):
    figure, told = shrinkage.view(0)
    assert len(figure.data) == 3
    for line in figure.data:
        assert list(line.y) == sorted(line.y) and line.y[-1] > 50
    at = hqq_shrink.BETAS.index(BETA)
    for line, bits in zip(figure.data, hqq_shrink.BITS):
        assert f"{line.y[at]:.2g} % at {bits} bits" in told
    assert "above 0.170" in told


def test_without_the_shrinkage_hqq_is_least_squares_and_hardly_differs_on_small_weights():
    weight, form = 0.05 * torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), Affine(3, 64)
    assert torch.equal(hqq(weight, form, beta=0).decode(), hqq(weight, form).decode())
    weight, form = 40 * weight, Affine(2, 64)
    assert not torch.equal(hqq(weight, form, beta=0).decode(), hqq(weight, form).decode())
