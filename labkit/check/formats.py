"""The exercises of notebook 02. Each computes its truth from the formats themselves, or by rounding the model's weights."""

from __future__ import annotations

import math

import torch

from labkit.check.answer import Note, exercise, hint, near, number, right, some_of, whole
from labkit.check.start import _model
from labkit.formats import FP4, MXFP4, NF4, NVFP4, Float8, Integer
from labkit.ui.lessons.rounding import SIZES, Rounding

LARGE = torch.linspace(-1, 1, 512 * 1024).view(512, 1024)  # a matrix so large that the scale per tensor weighs nothing


@exercise(number("bits per weight"))
def block_price(answer) -> Note:
    """How many bits per weight does NVFP4 cost more than MXFP4, on a large matrix?"""
    nvfp4, mxfp4 = (form.encode(LARGE).bits_per_weight for form in (NVFP4(), MXFP4()))
    truth = nvfp4 - mxfp4
    if near(answer, truth, 0.01):
        return right(
            f"{nvfp4:.2f} against {mxfp4:.2f}: a byte for every 16 weights, or for every 32. The scale of the whole tensor is "
            "shared by so many weights that it costs nothing."
        )
    if near(answer, nvfp4, 0.01) or near(answer, mxfp4, 0.01):
        return hint("That is what one of the two costs. The difference is asked for.")
    if near(answer, 8 * truth, 0.01) or near(answer, truth / 8, 0.01):
        return hint("Off by eight: are these bits or bytes?")
    if near(answer, -truth, 0.01):
        return hint("The other way round: which of the two has the shorter blocks?")
    return hint("Both have 4-bit codes and one 8-bit scale per block. How many weights share such a scale in each?")


FORMS = {"int4": Integer(4, 64, symmetric=True), "fp4": FP4(64), "nf4": NF4()}


@exercise(some_of(FORMS))
def widest_step(answer) -> Note:
    """Which of the formats has the widest step just below its largest value, as a share of that value?"""
    steps = {name: float(1 - v[-2] / v[-1]) for name, v in ((n, f.levels()) for n, f in FORMS.items())}
    truth = max(steps, key=steps.get)
    if answer == {truth}:
        told = ", ".join(f"{name} {100 * s:.0f} %" for name, s in steps.items())
        return right(
            f"The last step: {told} of the largest value. The few large weights of a group lie there: "
            "a grid that is coarse for them and fine near zero suits weights that are bell-shaped."
        )
    if len(answer) > 1:
        return hint("One of them is wider than the others: name that one.")
    return hint(
        "Look at the right end of the combs: how far are the last two teeth apart, next to the length of the comb?"
    )


@exercise(number("powers of two"))
def wider_range(answer) -> Note:
    """By how many powers of two is the range of E5M2, largest over smallest positive value, wider than E4M3's?"""
    spans = []
    for variant in ("e5m2", "e4m3"):
        v = Float8(variant).levels()
        spans.append(math.log2(float(v[-1]) / float(v[v > 0][0])))
    truth = spans[0] - spans[1]
    if near(answer, truth, 0.02):
        return right(
            f"{spans[0]:.1f} against {spans[1]:.1f} powers of two. The price is a bit of mantissa: "
            "steps twice as wide. Weights with a scale do not need the range; Micikevicius et al. (2022) keep it for gradients."
        )
    if any(near(answer, s, 0.02) for s in spans):
        return hint("That is the range of one of them. Subtract the other's.")
    if near(answer, 2**truth, 0.1):
        return hint("That is the factor. How many powers of two is it?")
    if near(answer, math.log2(57344 / 448), 0.02):
        return hint(
            "That is how much farther it goes up. It also goes farther down, where subnormal numbers count too."
        )
    return hint("Largest value over smallest positive one, for each; the anatomy table has both as log₂.")


@exercise(whole("a group size"))
def group_worth(answer, lm=None) -> Note:
    """Which is the largest 3-bit group size at which 3 bits are better than half way from 3 to 4 bits per row?"""
    rounding = Rounding(_model(lm))
    low, high = (rounding.error(Integer(b)) for b in (3, 4))
    middle = (low + high) / 2
    if answer not in SIZES:
        return hint(f"Choose one of the group sizes in the figure: {', '.join(str(s) for s in SIZES if s)}.")
    errors = {size: rounding.error(Integer(3, size)) for size in SIZES if size}
    truth = max((size for size, e in errors.items() if e < middle), default=None)
    if truth is None:
        return hint("On this model no group is small enough for that.")
    said = (
        f"3 bits in groups of {answer} have an error of {100 * errors[answer]:.1f} %, half way is {100 * middle:.1f} %"
    )
    if answer == truth:
        extra = rounding.bits(Integer(3, answer)) - rounding.bits(Integer(3))
        return right(
            f"{said}: for {extra:.2f} more bits per weight, groups take off more than half of what a whole bit takes off. "
            "That is a bargain. Each halving of the groups doubles their price, and takes off less."
        )
    return hint(f"{said}. " + ("Smaller groups." if answer > truth else "It is enough; is a larger group, too?"))
