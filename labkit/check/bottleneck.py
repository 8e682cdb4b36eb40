"""The exercises of notebook 01. Each computes its truth from this machine's measured roofs or from a data sheet."""

from __future__ import annotations

from labkit.check.answer import Note, exercise, hint, near, number, right, whole
from labkit.check.start import _model, stored_bits
from labkit.measure import breakdown, roofline
from labkit.ui.lessons import bottleneck as bench

MOST = 100_000  # sequences at once, where the search for a batch size gives up


@exercise(whole("the smallest batch size"))
def compute_bound_batch(answer, lm=None, roof=None) -> Note:
    """At which batch size does decode of the uncompressed model become compute-bound on this machine?"""
    lm, roof, dtype = _here(lm, roof)
    shape, bits = roofline.Shape.of(lm), bench.full_bits(lm)

    def intensity(batch: int) -> float:
        return roofline.decode_work(shape, batch, bench.CONTEXT, bits, activation_bytes=bits / 8).intensity

    ridge = roof.ridge(dtype)
    if intensity(MOST) < ridge:
        return hint("On this machine no batch is large enough: the KV cache alone keeps it left of the ridge.")
    low, high = 1, MOST
    while low < high:  # intensity only grows with the batch
        middle = (low + high) // 2
        low, high = (low, middle) if intensity(middle) >= ridge else (middle + 1, high)
    here = f"At batch {answer} decode does {intensity(answer):.3g} FLOP per byte"
    if abs(answer - low) <= max(1, 0.15 * low):
        return right(
            f"{here}, and the ridge is at {ridge:.3g}: under these roofs the two meet at batch {low}. From there on a step's "
            "arithmetic takes longer than its reading, and fewer bytes no longer help."
        )
    if near(answer, ridge, 0.15):
        return hint(
            "That is the ridge, in FLOP per byte. How many FLOP per byte does one sequence bring at "
            f"{bits} bits per weight?"
        )
    if 0.5 * low <= answer <= 2 * low:
        return hint(f"{here}. That is near the ridge: go on in the same way, a little {_way(answer, low)}.")
    return hint(f"{here}. Compare that with where the two parts of the roof meet, and go {_way(answer, low)}.")


@exercise(number("tokens per second"))
def tokens_per_second(answer) -> Note:
    """What is the most that a 70B model at 4 bits can decode on one H100, batch 1, in tokens/s (modelled)?"""
    roof = roofline.catalogue()["H100 SXM"]
    truth = 1 / bench.step_seconds(roof, bits=4, batch=1)
    if near(answer, truth, 0.12):
        return right(
            f"Modelled: at most {truth:.0f} tokens/s. Each token waits for every weight: bytes per second over bytes per "
            "token. No arithmetic peak is in it."
        )
    if near(answer, 8 * truth, 0.12) or near(answer, truth / 8, 0.12):
        return hint("Off by eight: are these bits or bytes?")
    if near(answer, truth / 4, 0.12):
        return hint("That is the bound at 16 bits per weight. How many bytes does a weight take at 4 bits?")
    if near(answer, 1 / truth, 0.12):
        return hint("Those are the seconds for one token. Tokens per second are asked for.")
    if answer > 20 * truth:
        return hint("Far too many: did you divide the arithmetic peak? One sequence is far left of the ridge.")
    return hint("How many bytes are 70 billion weights at 4 bits? And how often can the H100 read so many in a second?")


@exercise(number("how many times as fast"))
def most_gain(answer, steps=None) -> Note:
    """What is the most that compression alone can speed up eager decode of the uncompressed model on this machine?"""
    step = _eager(steps)
    truth = step.most_gain
    if near(answer, truth, 0.1):
        return right(
            f"At most {truth:.2g}, with weights of no bytes at all: the framework takes {100 / truth:.0f} % of the step, and "
            "fewer bits do not change that. Amdahl's law. One graph takes away what compression cannot, and then the bytes pay."
        )
    if near(answer, 1 / truth, 0.1):
        return hint("That is the share that stays. How many times as fast is a step of which only that share is left?")
    if near(answer * (step.seconds - step.framework), step.seconds, 0.05):
        return hint("That takes the framework away, as a graph does. What can compression take away, and what not?")
    if near(answer * (step.seconds - step.reading), step.seconds, 0.05):
        return hint("That takes the reading away, and leaves the kernels: they too have less to do with fewer weights.")
    way = "More" if answer < truth else "Less"
    return hint(
        f"{way} than that. Suppose the weights had no bytes at all: which part of the first bar would still be there?"
    )


@exercise(number("how many times as fast"))
def prefill_gain(answer, lm=None, roof=None) -> Note:
    """How many times as fast can 4-bit weights make the prefill of 512 tokens here, if it multiplies as before?"""
    lm, roof, dtype = _here(lm, roof)
    shape, bits = roofline.Shape.of(lm), bench.full_bits(lm)
    before, after = (
        roof.seconds(roofline.prefill_work(shape, 1, 512, b, head_bits=bits, activation_bytes=bits / 8), dtype)
        for b in (bits, stored_bits(4, 64))
    )
    truth = before / after
    if near(answer, truth, 0.1):
        if truth < 1.1:
            return right(
                "Nothing, at best: prefill is under the flat part of the roof, where the bytes do not count. In practice "
                "unpacking the codes even costs time. What helps there is cheaper arithmetic: fewer or smaller products."
            )
        return right(f"At best {truth:.2f}: on this machine 512 tokens are still partly under the slope.")
    if answer < 0.9:
        return hint(
            "That would be slower than before. Unpacking may cost that in practice; the best case is asked for."
        )
    return hint("Where does prefill stand, left or right of the ridge? What happens to its time when the bytes shrink?")


def _here(lm, roof):
    """(model, this machine's roofs, the dtype that the model multiplies in): measured roofs are remembered."""
    lm = _model(lm)
    roof = roofline.measure(device=lm.device.type, progress=False) if roof is None else roof
    return lm, roof, bench.dtype(lm)


def _eager(steps) -> breakdown.Step:
    """The uncompressed model's eager step: the one in the notebook's figure, or measured now."""
    if steps is None:
        lm, roof, dtype = _here(None, None)
        steps = breakdown.decode({dtype: lm}, roof, graphs=())
    return next(s for s in steps if s.way == breakdown.EAGER)


def _way(answer: float, truth: float) -> str:
    return "up" if answer < truth else "down"
