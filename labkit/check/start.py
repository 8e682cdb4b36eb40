"""The exercises of notebook 00."""

from __future__ import annotations

from dataclasses import fields
from functools import cache

import torch

from labkit.check.answer import Note, exercise, hint, near, number, right, some_of
from labkit.formats import Integer
from labkit.measure import roofline
from labkit.measure.measurement import Latency


@exercise(number("bits per weight"))
def bits_per_weight(answer) -> Note:
    """How many bits per weight does RTN store with 2-bit codes in groups of 32, metadata included?"""
    if near(answer, stored_bits(2, 32), 0.005):
        return right(
            "The codes, a share of an fp16 scale and a share of a zero point: a fine grid of groups costs bits."
        )
    if near(answer, 2, 0.001):
        return hint("These are the codes alone. What else does a group need, so that its codes can be read as weights?")
    if near(answer, stored_bits(2, 32, symmetric=True), 0.005):
        return hint("The codes and the scale are there. Which code stands for zero? That has to be stored as well.")
    if answer > stored_bits(2, 32):
        return hint(
            "Too many: a scale and a zero point are stored once for each group, so each weight pays only a share."
        )
    return hint("Too few: add up what is stored for one group of 32 weights, in bits, and divide by 32.")


@exercise(number("how many times larger the error is"))
def error_per_bit(answer, lm=None) -> Note:
    """By what factor does the mean squared error of the weights grow from 4-bit to 3-bit codes, in groups of 64?"""
    four, three = (rounding_error(_model(lm), bits) for bits in (4, 3))
    truth = three / four
    if near(answer, truth, 0.2):
        return right(
            f"Measured on this model: {truth:.2f}. One bit less makes the steps of the grid about twice as wide, and the "
            "error's square about four times as large; a bit more than that, since 2^b codes have 2^b - 1 steps."
        )
    if near(answer, truth**0.5, 0.15):
        return hint("That is how much wider the steps become. What becomes of the error's *square*?")
    if near(answer, 1 / truth, 0.2):
        return hint("Upside down: the error with 3 bits over the error with 4 bits is asked for.")
    way = "grows more" if answer < truth else "grows less"
    return hint(f"It {way} than that. How wide is a step between two codes at 4 bits, and at 3? Then square the ratio.")


@exercise(number("how many times as fast"))
def most_speed(answer, lm=None) -> Note:
    """If decode did nothing but read weights, how many times as fast would the 4-bit model be (groups of 64)?"""
    lm = _model(lm)
    shape = roofline.Shape.of(lm)
    whole = 8 * lm.model.get_output_embeddings().weight.element_size()  # bits of an uncompressed weight
    read = [roofline.decode_work(shape, 1, 0, b, head_bits=whole).bytes for b in (whole, stored_bits(4, 64))]
    truth = read[0] / read[1]
    if near(answer, truth, 0.08):
        share = roofline.linear_work(1, *shape.head, whole).bytes / read[1]
        return right(
            f"About {truth:.1f}: the output layer keeps its {whole} bits, and is now {100 * share:.0f} % of what is read "
            "for each token. What you do not compress soon rules: Amdahl's law, for bytes."
        )
    if answer >= 0.8 * whole / stored_bits(4, 64):
        return hint(
            "That holds for the linear layers alone. Which large matrix is not among them, and is read for each token?"
        )
    if answer < 1:
        return hint("Above 1 is faster: divide the bytes before by the bytes after.")
    way = "More" if answer < truth else "Less"
    return hint(
        f"{way} than that. Add up the bytes that one token needs, before and after: the linear layers and the output "
        "layer (it is the embedding, used a second time)."
    )


CARRIED = ("perplexity", "kl", "linears", "decode_ms")


@exercise(some_of(CARRIED))
def carries_over(answer) -> Note:
    """Which of the numbers would come out (all but) the same on your neighbour's computer?"""
    timed = {f.name for f in fields(Latency)}
    truth = {name for name in CARRIED if name not in timed}
    if answer == truth:
        return right(
            "Quality and bytes belong to the model, and every machine finds the same. Time belongs to the model *and* "
            "the machine: times from elsewhere tell you nothing until they are measured here."
        )
    if answer - truth:
        return hint("One of yours depends on how fast a machine reads and multiplies. Which?")
    return hint("Those, yes, but there is more: what else depends on nothing but the weights and the text?")


@cache
def stored_bits(bits: int, group_size: int, symmetric: bool = False) -> float:
    """True bits per weight of an integer format, from a matrix that really is encoded; its rows come out even."""
    weight = torch.linspace(-1, 1, 8 * 1024).view(8, 1024)
    return 8 * Integer(bits, group_size, symmetric).encode(weight).nbytes / weight.numel()


def rounding_error(lm, bits: int, group_size: int = 64) -> float:
    """Mean squared error of plain rounding over four of the model's linear layers, from first to last."""
    from labkit.measure.memory import linear_layers

    layers = linear_layers(lm)
    picked = [layers[i * (len(layers) - 1) // 3] for i in range(4)]
    form = Integer(bits, group_size)
    with torch.inference_mode():
        squares = [(form.encode(m.weight).decode() - m.weight).float().square() for m in picked]
    return float(sum(s.sum() for s in squares) / sum(s.numel() for s in squares))


def _model(lm):
    if lm is None:
        import labkit

        return labkit.load()
    return lm
