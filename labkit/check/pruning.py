"""The exercises of notebook 05. Each truth is computed: from containers that are really filled, or by the pruners' own code."""

from __future__ import annotations

import math

import torch

from labkit.check.answer import Note, exercise, hint, near, number, right, some_of, whole
from labkit.check.start import stored_bits
from labkit.linear.sparse import Bitmask
from labkit.prune.common import nm_mask

WEIGHTS = {"a": (0.9, 0.1), "b": (-0.5, 0.5), "c": (0.1, 4.0), "d": (-0.2, 1.0)}  # name -> weight, ‖x‖
KEPT, OF = 4, 8


@exercise(number("bits per weight"))
def bitmask_bits(answer) -> Note:
    """How many bits per weight does a bitmask take at 50 % zeros, with 16-bit values?"""
    truth = bitmask(0.5)
    if near(answer, truth, 0.005):
        return right(
            f"Checked just now on a matrix that was really stored: {truth:g}. Half of 16 bits, and a bit for every position. "
            "Half of the weights are gone, and 44 % of the bytes."
        )
    if near(answer, truth - 1, 0.005):
        return hint("Those are the values alone. How does one know afterwards where they belong?")
    if near(answer, truth - 0.5, 0.005):
        return hint("The mask says of every weight whether it is there, also of those that are not.")
    if near(answer, 16 * 0.5 + 16, 0.005) or near(answer, 17, 0.005):
        return hint(
            "A position takes one bit, and half of the values are not stored. Which part did you count in full?"
        )
    return hint("Add up two things: the values that are left, per weight of the dense matrix, and the mask.")


@exercise(whole("how many masks"))
def masks_of_a_group(answer) -> Note:
    """How many masks of a 4:8 group keep exactly four?"""
    truth = math.comb(OF, KEPT)
    pairs = math.comb(OF // 2, KEPT // 2) ** 2
    if answer == truth:
        return right(
            f"{truth}, and two groups of 2:4 on the same eight weights have {pairs}: all of these are among the {truth}. "
            "4:8 can never do worse than 2:4 by its own score; what it lacks is a chip that multiplies it."
        )
    if answer == pairs:
        return hint("That is what 2:4 allows on eight weights. 4:8 also allows one and three, or none and four.")
    if answer == 2**OF:
        return hint("That counts masks with any number of kept weights. Exactly four are kept.")
    if answer == math.comb(OF // 2, KEPT // 2):
        return hint("That is for one group of 2:4. Here four of eight stay.")
    if answer == math.perm(OF, KEPT):
        return hint("You counted in which order they are chosen. A mask does not know the order.")
    return hint("In how many ways can four of eight be chosen?")


@exercise(some_of(WEIGHTS))
def wanda_keeps(answer) -> Note:
    """Which two of the four weights does Wanda keep under 2:4?"""
    scores = torch.tensor([[abs(w) * norm for w, norm in WEIGHTS.values()]])
    largest = torch.tensor([[abs(w) for w, _ in WEIGHTS.values()]])
    wanda, magnitude = (_kept(s) for s in (scores, largest))
    if answer == wanda:
        told = ", ".join(f"{name} {s:.2g}" for name, s in zip(WEIGHTS, scores[0].tolist()))
        return right(f"The scores |w|·‖x‖: {told}. The smallest weight stays, since its input is the largest.")
    if answer == magnitude:
        return hint("Those are the two largest weights: magnitude's choice. What are their inputs like?")
    if len(answer) != 2:
        return hint("2:4 keeps exactly two.")
    if answer == set(WEIGHTS) - wanda:
        return hint("Those are the two that it drops.")
    return hint("Multiply each weight's size by the norm of its input. Signs do not count.")


@exercise(number("the share of zeros, between 0 and 1"))
def beats_4_bits(answer) -> Note:
    """From which share of zeros on does a bitmask with 16-bit values take fewer bytes than 4-bit codes in groups of 64?"""
    four = stored_bits(4, 64)
    low, high = 0.0, 1.0
    for _ in range(30):  # fewer zeros never take fewer bytes
        middle = (low + high) / 2
        low, high = (low, middle) if bitmask(middle) < four else (middle, high)
    if near(answer, high, 0.01):
        return right(
            f"4-bit codes and their scales take {four:.4g} bits per weight: about {100 * high:.0f} % of the weights must go "
            "for a tie. Look above at what pruning does to this model there."
        )
    if near(answer, 100 * high, 0.01):
        return hint("Right, in per cent. Give it as a share between 0 and 1.")
    if near(answer, 0.75, 0.005):
        return hint("Close: 16 bits times a quarter is 4. What does the mask take?")
    if near(answer, 1 - (4 - 1) / 16, 0.003):
        return hint(
            "Nearly: the codes have scales and zero points beside them. How many bits per weight is that in all?"
        )
    if near(answer, 1 - high, 0.02):
        return hint("That is the share that is kept.")
    return hint(
        "Bits per weight of the bitmask: 1 + 16 · kept. Set it equal to what the 4-bit codes take, scales included."
    )


def bitmask(sparsity: float) -> float:
    """Bits per weight of a stored bitmask with that share of zeros and 16-bit values, on a matrix of 256 × 256."""
    weight = torch.ones(256 * 256, dtype=torch.bfloat16)
    weight[: round(sparsity * len(weight))] = 0
    return Bitmask.from_dense(weight.view(256, 256)).bits_per_weight


def _kept(scores: torch.Tensor) -> frozenset[str]:
    return frozenset(name for name, kept in zip(WEIGHTS, nm_mask(scores, 2, 4)[0].tolist()) if kept)
