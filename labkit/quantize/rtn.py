"""Round to nearest: the baseline that every cleverer quantizer has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from labkit.method import Method
from labkit.quantize.common import BITS, FORMAT, GROUP_SIZE, SYMMETRIC, format_of
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

    bits: int = BITS
    group_size: int | None = GROUP_SIZE
    symmetric: bool = SYMMETRIC
    format: str = FORMAT

    def apply(self, lm, calib, progress: bool) -> None:
        form = format_of(self)
        walk(lm, calib, "none", lambda weight, stats, path: form.encode(weight), f"RTN to {form.bits} bits", progress)
