"""Sentences of the notebooks that state an order, a ratio or a share: each is held against what was measured.

A claim is a phrase that stands in a notebook, and a number (or several) that must lie in a range for the phrase to be true. The
numbers come from the shipped rows (``data/results``), from the notebooks' baselines, or are computed here. Who changes a
sentence changes its claim; a row that is measured again and contradicts a sentence fails here by name.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import labkit
from labkit import paths
from labkit.formats import MXFP4, NF4, NVFP4, Affine, Float8, Integer
from labkit.linear.sparse import CSR, NM, Bitmask
from labkit.measure import roofline
from labkit.prune.common import keep_mask
from labkit.reproduce import calibrations, sweeps

REPO = Path(__file__).resolve().parents[1]
NOTEBOOKS = REPO / "notebooks"
TEXTS = ("manual", "prose")
ANY = math.inf

pytestmark = pytest.mark.skipif(not NOTEBOOKS.exists(), reason="needs a checkout")


# ---------------------------------------------------------------------------------------------- evidence


class Evidence:
    """What claims are held against; everything is read or computed once, and only when it is asked for."""

    @functools.cached_property
    def lm(self):
        return labkit.load()

    @functools.cached_property
    def rows(self) -> dict:
        """(method, its knobs, source and draw of its calibration or None) -> a shipped row, later files first."""
        draws, found = calibrations(self.lm), {}
        for name in sweeps():
            file = paths.data() / "results" / f"{name}.jsonl"
            if name.endswith("quick") or not file.exists():
                continue
            for line in file.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                key = row["key"]["method"], row["key"]["knobs"], draws.get(row["key"]["calib"])
                if key not in found or row["measurement"]["latency"]:  # what was timed counts
                    found[key] = row["measurement"]
        return found

    def row(self, method=None, source: str = "mixed") -> dict:
        """The shipped measurement of a method (None: uncompressed) with the first draw of this calibration."""
        if method is None:
            key = "uncompressed", "{}", None
        else:
            key = type(method).__name__, method.key(), (source, 0) if type(method).calibrated else None
        if key not in self.rows:
            pytest.skip(f"{method} on {source} does not ship yet: labkit reproduce measures it")
        return self.rows[key]

    def kl(self, method, source: str = "mixed") -> list[float]:
        """KL on the manual and on the prose."""
        return [self.row(method, source)["quality"][text]["kl"] for text in TEXTS]

    def kl_ratio(self, a, b, source: str = "mixed") -> list[float]:
        """KL of ``a`` over that of ``b``, on each text; below 1, ``a`` is better."""
        return [x / y for x, y in zip(self.kl(a, source), self.kl(b, source))]

    def bits(self, method) -> float:
        return self.row(method)["memory"]["bits_per_weight"]

    def decode(self, method, what: str = "decode_ms") -> float:
        """Of the eager run."""
        return self.row(method)["latency"][what]

    def baseline(self, notebook: str, name: str) -> float:
        """A number that `make regress` compares."""
        (file,) = (REPO / "tests" / "baselines").glob(f"{notebook}_*.json")
        return json.loads(file.read_text(encoding="utf-8"))[name]["value"]

    @functools.cached_property
    def rounding(self):
        from labkit.ui.lessons.rounding import Rounding

        return Rounding(self.lm)

    def error(self, form) -> float:
        """Relative error of all linears rounded to this format."""
        return self.rounding.error(form)

    @functools.cached_property
    def usage(self) -> dict:
        from labkit.ui.lessons import code_usage

        forms = code_usage.FORMS | {"int2": Integer(2, 64)}
        weights = {"model": self.rounding.sample(), "normal": [code_usage.normal()]}
        return {name: code_usage.usage(w, forms) for name, w in weights.items()}

    def shrunk(self, bits: int) -> float:
        """The share of this model's residuals that HQQ shrinks in its first step."""
        from labkit.quantize.hqq import shrunk

        form = Affine(bits, 64)
        left = [shrunk(w - form.encode(w).decode()) != 0 for w in self.rounding.sample()]
        return sum(int(x.sum()) for x in left) / sum(x.numel() for x in left)

    def damage(self, *forms) -> list[list[float]]:
        """KL of the model rounded to each format, on a short window of both texts; computed here."""
        from labkit.ui.lessons import damage

        ids = {text: labkit.text.evaluation(self.lm, 1, 128, text) for text in TEXTS}
        found = damage.damage(self.lm, dict(enumerate(forms)), ids, self.rounding)
        return [[d.kl[text] for text in TEXTS] for d in found]


# ---------------------------------------------------------------------------------------------- claims


@dataclass(frozen=True)
class Claim:
    """``phrase`` stands in ``notebook``, and every number of ``measure`` lies between ``low`` and ``high``."""

    notebook: str
    phrase: str
    measure: Callable[[Evidence], float | Sequence[float]]
    low: float
    high: float
    model: bool = True  # whether it needs the model

    def __str__(self) -> str:
        return f"{self.notebook}: {self.phrase[:50]}"


def rtn(bits=4, **knobs):
    return labkit.RTN(bits=bits, **knobs)


def by(format):
    return labkit.RTN(bits=4, format=format)


def smooth(activations, on):
    return labkit.SmoothQuant(activations=activations, smooth=on)


def allocated(how):
    return labkit.Wanda(sparsity=0.7, allocation=how)


def prefill_of(e, method):
    return e.row(method)["latency"]["prefill_ratio"]


def quotients(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x / y for x, y in zip(a, b)]


def normal() -> torch.Tensor:
    return torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))


def held(container, pattern: tuple[int, int] | None = None) -> float:
    """Bits per weight that a container really holds of a matrix with half zeros and 16-bit values."""
    weight = normal()
    return container.from_dense((weight * keep_mask(weight.abs(), 0.5, pattern, "row")).bfloat16()).bits_per_weight


def llm_int8_losses() -> float:
    """How much more the 125M model of the table of notebook 03 loses to plain int8 than the 13B one: ratio of ratios."""
    cells = json.loads((NOTEBOOKS / "03_post_training_quantization.ipynb").read_text(encoding="utf-8"))["cells"]
    (source,) = ("".join(c["source"]) for c in cells if c["id"] == "papers")
    lost = {}
    for size, full, plain in re.findall(r"\| (13B|125M)[^|]*\| ([\d.]+) \| ([\d.]+) \|", source):
        lost[size] = float(plain) / float(full)
    return lost["125M"] / lost["13B"]


def fnuz_over_ocp() -> list[float]:
    """The value of the same bits as E4M3FNUZ over that as OCP's E4M3, for all positive codes that are finite in both."""
    codes = torch.arange(1, 0x7F, dtype=torch.uint8)
    fnuz, ocp = (codes.view(t).double() for t in (torch.float8_e4m3fnuz, torch.float8_e4m3fn))
    return (fnuz / ocp).tolist()


E4M3 = torch.float8_e4m3fnuz, torch.float8_e4m3fn
HALF = labkit.SparseGPT()  # half of the weights are zero
CLAIMS = [
    # 00
    Claim(
        "00",
        "make 4 bits into 4.31",
        lambda e: Integer(4, 64).encode(normal()).bits_per_weight,
        4.31,
        4.315,
        model=False,
    ),
    Claim("00", "linear layers fall to less than a fifth", lambda e: e.bits(rtn()) / e.bits(None), 0, 0.2),
    Claim(
        "00",
        "it is a fifth of all bytes before, and most of them afterwards",
        lambda e: e.lm.model.get_input_embeddings().weight.nbytes / e.lm.nbytes,
        0.18,
        0.22,
    ),
    Claim(
        "00",
        "it is a fifth of all bytes before, and most of them afterwards",
        lambda e: e.lm.model.get_input_embeddings().weight.nbytes / e.row(rtn())["memory"]["weights"],
        0.5,
        1,
    ),
    Claim(
        "00",
        "decode gains far less than that",
        lambda e: e.decode(rtn(), "decode_ratio") / (e.bits(None) / e.bits(rtn())),
        0,
        0.5,
    ),
    Claim("00", "gains nothing or even loses", lambda e: prefill_of(e, rtn()), 0, 1.1),
    Claim(
        "00",
        "nothing is faster than at 4: the kernels know 2, 4 and 8 bits",
        lambda e: e.decode(rtn(3), "decode_ratio") / e.decode(rtn(), "decode_ratio"),
        0,
        1,
    ),
    # 02
    Claim(
        "02",
        'a "4-bit" format has between 4.1 and 4.5 bits',
        lambda e: [e.rounding.bits(f) for f in (Integer(4, 64), Affine(4, 64), MXFP4(), NVFP4(), NF4())],
        4.1,
        4.505,
    ),
    Claim(
        "02",
        "A bit more or less changes the error about twofold",
        lambda e: [e.error(Integer(b, 64)) / e.error(Integer(b + 1, 64)) for b in (3, 4, 5, 6)],
        1.8,
        2.4,
    ),
    Claim(
        "02",
        "With four codes (2 bits) most weights fall onto two of them",
        lambda e: sum(sorted(e.usage["model"]["int2"].shares)[-2:]),
        0.6,
        1,
    ),
    Claim(
        "02",
        "`nf4` and `int` come out close to each other",
        lambda e: e.error(NF4()) / e.error(Integer(4, 64)),
        0.95,
        1.05,
    ),
    Claim(
        "02",
        "from a row to groups of about a hundred, is nearly free",
        lambda e: e.rounding.bits(Integer(4, 96)) - e.rounding.bits(Integer(4)),
        0,
        0.25,
    ),
    Claim("02", "and takes off a lot", lambda e: e.error(Integer(4, 96)) / e.error(Integer(4)), 0, 0.85),
    Claim(
        "02",
        "The last one, from 32 to 16, costs 0.6 bits",
        lambda e: e.rounding.bits(Integer(4, 16)) - e.rounding.bits(Integer(4, 32)),
        0.55,
        0.65,
    ),
    Claim(
        "02",
        "most used code about five times as often as its rarest",
        lambda e: max(e.usage["normal"]["nf4"].shares) / min(e.usage["normal"]["nf4"].shares),
        4.5,
        5.9,
    ),
    Claim(
        "02",
        "On exactly normal weights int4 even has the smaller error",
        lambda e: e.usage["normal"]["int4"].error / e.usage["normal"]["nf4"].error,
        0.97,
        0.9999,
    ),
    Claim(
        "02",
        "on this model's weights nf4 has",
        lambda e: e.usage["model"]["nf4"].error / e.usage["model"]["int4"].error,
        0.97,
        0.9999,
    ),
    Claim(
        "02",
        "The two formats with E2M1 values use their codes most evenly",
        lambda e: [
            u[float_].bits - u[other].bits
            for u in e.usage.values()
            for float_ in ("mxfp4", "nvfp4")
            for other in ("int4", "nf4")
        ],
        0.001,
        1,
    ),
    Claim(
        "02",
        "and mxfp4 errs most",
        lambda e: [u["mxfp4"].error / u[other].error for u in e.usage.values() for other in ("int4", "nf4", "nvfp4")],
        1.001,
        2,
    ),
    Claim("02", "in 30 to 45 % of the blocks", lambda e: [u["mxfp4"].above for u in e.usage.values()], 0.29, 0.46),
    Claim("02", "happens in half of the blocks", lambda e: [u["nvfp4"].above for u in e.usage.values()], 0.45, 0.55),
    Claim("02", "of more than 40 % of the blocks is cut off", lambda e: e.usage["model"]["mxfp4"].above, 0.4, 1),
    Claim(
        "02",
        "The whole row is worst, groups of 32 beat groups of 64",
        lambda e: [
            *e.kl_ratio(rtn(group_size=32), rtn(group_size=64)),
            *e.kl_ratio(rtn(group_size=64), rtn(group_size=None)),
        ],
        0,
        0.99,
    ),
    Claim(
        "02",
        "A zero point is worth its price",
        lambda e: e.error(Integer(4, 64, symmetric=True)) / e.error(Integer(4, 64)),
        1.03,
        1.3,
    ),
    Claim("02", "mxfp4 pays for its scale", lambda e: e.kl_ratio(by("mxfp4"), by("fp4")), 1.05, 3),
    Claim("02", "nvfp4 repairs that", lambda e: e.kl_ratio(by("nvfp4"), by("fp4")), 0, 0.95),
    Claim("02", "for a quarter of a bit", lambda e: e.bits(by("nvfp4")) - e.bits(by("mxfp4")), 0.24, 0.26),
    Claim("02", "nf4 is the best bargain", lambda e: e.kl_ratio(by("nf4"), rtn(group_size=128)), 0, 0.95),
    Claim("02", "nvfp4 and nf4 have the same one", lambda e: e.error(NVFP4()) / e.error(NF4()), 0.97, 1.03),
    Claim("02", "and differ in KL", lambda e: e.kl_ratio(by("nvfp4"), by("nf4")), 0, 0.9),
    Claim("02", "FP8 E4M3 is close to lossless", lambda e: e.kl_ratio(by("fp8_e4m3"), by("nf4")), 0, 0.1),
    Claim("02", "twice the error", lambda e: e.error(Float8("e5m2")) / e.error(Float8("e4m3")), 1.8, 2.2),
    Claim(
        "02",
        "about four times the KL",
        lambda e: quotients(*e.damage(Float8("e5m2"), Float8("e4m3"))),
        2.5,
        6,
    ),
    Claim("02", "it ends at 240 and not at 448", lambda e: [torch.finfo(t).max for t in E4M3], 240, 448, model=False),
    Claim("02", "the same bits mean half of the value", lambda e: fnuz_over_ocp(), 0.5, 0.5, model=False),
    Claim(
        "02",
        "A100: 1,248 TOPS, twice its int8 rate",
        lambda e: 1248 / (roofline.catalogue()["A100 80GB"].peaks["int8"] / 1e12),
        2,
        2,
        model=False,
    ),
    # 03
    Claim(
        "03",
        "at 3 it is a disaster",
        lambda e: [e.row(rtn(3))["quality"][t]["perplexity"] / e.row()["quality"][t]["perplexity"] for t in TEXTS],
        2,
        ANY,
    ),
    Claim("03", "At 4 bits none, or next to none", lambda e: e.shrunk(4), 0, 1e-3),
    Claim("03", "At 2 bits steps are wide, and the shrinkage has something to do", lambda e: e.shrunk(2), 0.02, 1),
    Claim(
        "03",
        'With a scale for every token ("dynamic") that ruins one token',
        lambda e: e.kl_ratio(smooth("static", True), smooth("dynamic", True)),
        10,
        ANY,
    ),
    Claim(
        "03",
        "with static scales ours broke above, smoothed or not",
        lambda e: [k for on in (True, False) for k in e.kl(smooth("static", on))],
        0.3,
        ANY,
    ),
    Claim(
        "03",
        "and they are what SmoothQuant repairs",
        lambda e: e.kl_ratio(smooth("dynamic", True), smooth("dynamic", False)),
        0,
        0.8,
    ),
    Claim("03", "loses more to plain int8 than the 13B one", lambda e: llm_int8_losses(), 1.5, ANY, model=False),
    Claim(
        "03",
        "The order of the methods is what carries over",
        lambda e: [k for b in (3, 4) for k in e.kl_ratio(labkit.AWQ(bits=b), rtn(b))],
        0,
        0.95,
    ),
    Claim(
        "03",
        "so what counts is the error of the *product*",
        lambda e: e.baseline("03", "stepper.gptq_over_rtn"),
        0,
        0.9,
        model=False,
    ),
    # 05
    Claim("05", "Half of the weights gone is 9 of 16 bits, not 8", lambda e: held(Bitmask), 8.9, 9.1, model=False),
    Claim(
        "05", "is *larger* than the dense matrix at half zeros and 16 bits", lambda e: held(CSR), 16.5, 32, model=False
    ),
    Claim("05", "2:4 comes to the same 9 bits", lambda e: held(NM, (2, 4)), 8.9, 9.1, model=False),
    Claim("05", "with 8 or 9 bits plain rounding loses next to nothing", lambda e: e.kl(rtn(8)), 0, 0.005),
    Claim("05", "pruning has to drop four weights of five", lambda e: 1 - (e.bits(rtn()) - 1) / 16, 0.77, 0.82),
    Claim("05", "they take 0.27 of the time", lambda e: e.bits(rtn()) / 16, 0.265, 0.275),
    Claim("05", "of which 2:4 saves less than half", lambda e: 1 - held(NM, (2, 4)) / 16, 0.4, 0.5, model=False),
    Claim("05", "holds half of the bytes", lambda e: e.bits(HALF) / e.bits(None), 0.5, 0.56),
    Claim("05", "is slower than the one it came from", lambda e: e.decode(HALF, "decode_ratio"), 0, 0.9),
    Claim(
        "05",
        'The best of "both" is the slowest',
        lambda e: e.decode(labkit.SparseGPT(bits=4), "decode_ratio") / e.decode(HALF, "decode_ratio"),
        0,
        0.9,
    ),
    Claim("05", "take less than half of the time of either", lambda e: e.decode(rtn()) / e.decode(HALF), 0, 0.5),
    Claim(
        "05",
        "on the manual SparseGPT is ahead of Wanda, whatever it was calibrated on",
        lambda e: [e.kl_ratio(HALF, labkit.Wanda(), s)[0] for s in ("manual", "self", "mixed")],
        0,
        0.99,
    ),
    Claim(
        "05",
        "SparseGPT is clearly the *worse* of the two",
        lambda e: e.kl_ratio(HALF, labkit.Wanda(), "manual")[1],
        1.05,
        2,
    ),
    Claim(
        "05", "itself writes, it is the better one", lambda e: e.kl_ratio(HALF, labkit.Wanda(), "self")[1], 0.5, 0.99
    ),
    Claim("05", "leaves them so close on the essays", lambda e: e.kl_ratio(HALF, labkit.Wanda())[1], 0.93, 1.07),
    Claim(
        "05",
        "on the manual the order of the methods carries over",
        lambda e: [
            e.kl_ratio(a(pattern=p), b(pattern=p))[0]
            for p in ("unstructured", "2:4")
            for a, b in ((labkit.SparseGPT, labkit.Wanda), (labkit.Wanda, labkit.Magnitude))
        ],
        0,
        0.95,
    ),
    Claim(
        "05",
        "that alone can halve the error of the output",
        lambda e: e.baseline("05", "masks.wanda_over_magnitude"),
        0,
        0.55,
        model=False,
    ),
    Claim(
        "05",
        "and nearly always the best one",
        lambda e: e.baseline("05", "puzzle.wanda_finds_the_best"),
        0.85,
        1,
        model=False,
    ),
    Claim(
        "05",
        "much of the lead over magnitude is gone",
        lambda e: (e.baseline("05", "break.blind_to_64") - 1) / (e.baseline("05", "break.magnitude_over_wanda") - 1),
        0.4,
        1,
        model=False,
    ),
    Claim(
        "05",
        "give more zeros to the blocks that bear them",
        lambda e: e.kl_ratio(allocated("sensitivity"), allocated("uniform")),
        0,
        0.95,
    ),
    Claim(
        "05",
        "at 70 % zeros the second gains more",
        lambda e: e.kl_ratio(allocated("sensitivity"), allocated("owl")),
        0,
        0.99,
    ),
    # 07
    Claim(
        "07",
        "this model has 9 query heads and 3 KV heads",
        lambda e: e.lm.model.config.num_attention_heads / e.lm.model.config.num_key_value_heads,
        3,
        3,
    ),
    Claim(
        "07",
        "in each layer, a few hundred numbers",
        lambda e: 2 * e.lm.model.config.num_key_value_heads * e.lm.model.config.head_dim,
        200,
        600,
    ),
    Claim("07", '"2 bits" are 3', lambda e: Affine(2, 32).encode(normal()).bits_per_weight, 3, 3, model=False),
    Claim(
        "07",
        "KL is several times as large, for no fewer bytes",
        lambda e: e.baseline("07", "kivi.kl_per_token_over_per_channel"),
        2,
        20,
        model=False,
    ),
    Claim(
        "07",
        "**One does as well as four**",
        lambda e: e.baseline("07", "sinks.perplexity_one_over_four"),
        0.95,
        1.05,
        model=False,
    ),
    Claim(
        "07",
        "recent-only loses it",
        lambda e: e.baseline("07", "sinks.perplexity_none_over_one"),
        1.5,
        ANY,
        model=False,
    ),
]


@functools.cache
def prose(number: str) -> str:
    """The markdown of a notebook in one line, with single spaces."""
    (file,) = NOTEBOOKS.glob(f"{number}_*.ipynb")
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    return " ".join(" ".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown").split())


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return Evidence()


@pytest.mark.parametrize("claim", CLAIMS, ids=str)
def test_the_sentence_stands_in_the_notebook(claim):
    assert claim.phrase in prose(claim.notebook), (
        f"notebook {claim.notebook} no longer says {claim.phrase!r}: change the claim too"
    )


def holds(claim: Claim, evidence: Evidence) -> None:
    found = claim.measure(evidence)
    numbers = [found] if isinstance(found, (int, float)) else list(found)
    assert numbers, claim
    wrong = [x for x in numbers if not claim.low <= x <= claim.high]
    told = ", ".join(f"{x:.4g}" for x in wrong)
    assert not wrong, f"{claim.phrase!r} asks for {claim.low} to {claim.high}; found {told}"


@pytest.mark.parametrize("claim", [c for c in CLAIMS if not c.model], ids=str)
def test_the_claim_holds(claim, evidence):
    holds(claim, evidence)


@pytest.mark.model
@pytest.mark.parametrize("claim", [c for c in CLAIMS if c.model], ids=str)
def test_the_claim_holds_for_the_model(claim, evidence):
    holds(claim, evidence)


def test_a_claim_that_is_false_fails_by_name(evidence):
    with pytest.raises(AssertionError, match="'one is two' asks for 2 to 2; found 1"):
        holds(Claim("00", "one is two", lambda e: 1, 2, 2), evidence)
