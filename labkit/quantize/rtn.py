"""Round to nearest: the baseline that every cleverer quantizer has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from labkit.formats import Integer
from labkit.method import Method, knob
from labkit.walk import walk


@dataclass(frozen=True)
class RTN(Method):
    """Round each weight to the nearest value of its group's integer grid; no calibration.

    The grid spans the group's smallest to largest weight (zero included); the scale is stored in fp16, the zero point
    as an integer of the same width as the codes.
    """

    kind: ClassVar[str] = "quantize"
    paper: ClassVar[str] = (
        "Jacob et al., Integer-Arithmetic-Only Inference, CVPR 2018; the RTN of GPTQ, ICLR 2023, section 4"
    )
    lossless: ClassVar[dict] = {"bits": 8, "group_size": 32}
    lossless_kl: ClassVar[float] = 2e-3

    bits: int = knob(4, low=2, high=8, help="Bits per weight code.")
    group_size: int | None = knob(
        64,
        low=8,
        high=65536,
        stops=(32, 64, 128, None),
        none="per row",
        help="Columns of a row that share a scale. A last group that does not come out even is shorter.",
    )
    symmetric: bool = knob(False, help="Put zero in the middle of the grid, and store no zero point.")

    def apply(self, lm, calib, progress: bool) -> None:
        form = Integer(self.bits, self.group_size, self.symmetric)
        walk(lm, calib, "none", lambda weight, stats: form.encode(weight), f"RTN to {self.bits} bits", progress)
