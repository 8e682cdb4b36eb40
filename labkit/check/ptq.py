"""The exercises of notebook 03. Each truth is computed: by the quantizers themselves, or from the model's activations."""

from __future__ import annotations

import torch

from labkit.check.answer import Note, exercise, hint, near, number, right, some_of, whole
from labkit.check.start import _model
from labkit.formats import Integer
from labkit.quantize.gptq import gptq
from labkit.quantize.smoothquant import smoothing
from labkit.walk import Stats, blocks, linears

ACTIVATION, WEIGHT = 64.0, 0.25  # the largest values of exercise 1's channel
OPTIONS = ("rtn", "awq", "hqq", "smoothquant")


@exercise(number("what the channel's weights are multiplied by"))
def smooth_factor(answer) -> Note:
    """By what s does SmoothQuant multiply a channel's weights at α = 0.5, when max|x| = 64 and max|w| = 0.25?"""
    truth = float(smoothing(torch.tensor([ACTIVATION]), [torch.tensor([[WEIGHT]])], 0.5)[0])
    if near(answer, truth, 0.01):
        return right(
            f"Then both reach {ACTIVATION / truth:g}: at α = 0.5 activations and weights share the difficulty evenly, in "
            "every channel."
        )
    if near(answer, 1 / truth, 0.01):
        return hint("That is what the *activations* are multiplied by. The weights get the inverse.")
    if near(answer, truth**2, 0.01):
        return hint("You left out the exponent: both maxima are raised to a power, α and 1 - α.")
    if near(answer, (ACTIVATION * WEIGHT) ** 0.5, 0.01):
        return hint("That is what both maxima become. By what must the weights be multiplied to get there?")
    return hint("s = max|x|^α / max|w|^(1 - α). What are the two powers when α is one half?")


@exercise(some_of(OPTIONS))
def without_correlation(answer) -> Note:
    """Which method does GPTQ become when the layer's inputs are uncorrelated and equally large?"""
    draw = torch.Generator().manual_seed(0)
    weight, form = torch.randn(16, 128, generator=draw), Integer(3, 64)
    same = torch.equal(gptq(weight, Stats(2, gram=torch.eye(128)), form).decode(), form.encode(weight).decode())
    truth = {"rtn"} if same else set()
    if answer == truth:
        return right(
            "Checked just now, code by code: with H = I the inverse has nothing off its diagonal, so no column can make up "
            "for another. All that GPTQ gains it gains from correlated inputs, and it has to know them."
        )
    if "rtn" in answer:
        return hint("One of yours is right, the others are not: it becomes exactly one method.")
    return hint(
        "A column's error is passed on in proportion to a row of the factor of H⁻¹. What is in that row when H = I?"
    )


@exercise(whole("the least number of tokens"))
def least_tokens(answer, lm=None) -> Note:
    """From how many calibration tokens on can the Hessian of this model's down_proj be inverted without damping?"""
    names = dict(linears(blocks(_model(lm).model)[0]))
    name, layer = max(names.items(), key=lambda item: item[1].in_features)
    truth = layer.in_features
    if answer == truth:
        return right(
            f"H = 2XXᵀ is {truth} × {truth}, and each token adds rank one. With fewer tokens than inputs, only the damping "
            "makes it invertible: GPTQ then believes that the directions it has not seen do not matter."
        )
    if answer == truth**2:
        return hint("That is how many numbers H holds. Each token adds a whole matrix x xᵀ. Of which rank?")
    if any(answer == m.in_features for m in names.values()):
        return hint(f"That is the width of other layers' inputs. Which inputs does {name} read?")
    if answer == layer.out_features:
        return hint("That is the number of outputs. Does H belong to the inputs or to the outputs?")
    return hint("What is the shape of H, and by how much can the rank of XXᵀ grow with each token?")


@exercise(number("how many steps"))
def codes_left(answer, outliers=None, block: int | None = None, lm=None) -> Note:
    """How many steps of one int8 scale are left for the median channel of down_proj's input, where its outlier is worst?"""
    kind, block, peak = outlier_input(outliers, block, lm)
    truth = float(127 * peak.median() / peak.max())
    if near(answer, truth, 0.1):
        return right(
            f"Measured: one channel of {kind} in block {block} reaches {float(peak.max()):,.0f}, the median channel "
            f"{float(peak.median()):.2g}. The scale belongs to the first, and {truth:.2g} steps are left for the second: most "
            "channels round to zero."
        )
    if near(answer, 127 / truth, 0.1):
        return hint("That is how many times larger the outlier is. How many of 127 steps does it leave for the others?")
    if near(answer, float(peak.max() / peak.median()), 0.1):
        return hint("That is the ratio of the two. The largest value gets 127 steps; how many does the median get?")
    if near(answer, 2 * truth, 0.1):
        return hint("Twice too many: int8 has 127 steps on either side of zero.")
    return hint(
        "outliers.peak(block, kind) gives each channel's largest |x|. The scale is the largest of them over 127."
    )


def outlier_input(outliers=None, block: int | None = None, lm=None):
    """(kind, block, peak): the widest layer's input, in the block whose largest channel stands out most."""
    if outliers is None:
        from labkit import text
        from labkit.ui.lessons.inputs import Inputs
        from labkit.ui.lessons.outliers import Outliers

        lm = _model(lm)
        calibration = Inputs(lm, text.calibration(lm, 4, 512))
        outliers = Outliers(calibration, calibration)
    kind = max(outliers.kinds, key=lambda k: outliers.seen.weight(0, k).shape[1])
    if block is None:
        peaks = [outliers.peak(b, kind) for b in range(len(outliers.seen.stack))]
        block = max(range(len(peaks)), key=lambda b: float(peaks[b].max() / peaks[b].median()))
    return kind, block, outliers.peak(block, kind)
