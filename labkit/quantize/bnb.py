"""bitsandbytes through the library itself: NF4 and FP4 as QLoRA uses them, and LLM.int8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from labkit.linear.bnb import BnbLinear, library
from labkit.method import Method, knob
from labkit.walk import walk


@dataclass(frozen=True)
class BitsAndBytes(Method):
    """Round with bitsandbytes and compute with its kernels: NF4, FP4, or LLM.int8, which keeps outlier columns apart.

    On a GPU these kernels are fast; on a CPU they unpack first and are slow, which is shown as it is. ``labkit.RTN`` with
    ``format="nf4"`` is our own NF4: its values are the same to the bit, where rows are a multiple of 64 wide. Otherwise the
    library's blocks run on from one row into the next, and widths at which its kernels are wrong are unpacked by us.
    """

    kind: ClassVar[str] = "quantize"
    paper: ClassVar[str] = "Dettmers et al., LLM.int8(), NeurIPS 2022; Dettmers et al., QLoRA, NeurIPS 2023, section 3"
    lossless: ClassVar[dict] = {"type": "int8"}
    lossless_kl: ClassVar[float] = 3e-2  # activations are rounded to 8 bits too

    type: str = knob("nf4", choices=("nf4", "fp4", "int8"), help="4-bit NormalFloat, 4-bit float, or LLM.int8.")
    double_quant: bool = knob(True, help="4-bit: the scales are themselves stored in 8 bits.")
    threshold: float = knob(
        6.0,
        low=0.0,
        high=1000.0,
        stops=(0.0, 3.0, 6.0, 12.0),
        help="int8: columns with a larger |x| stay in floats; 0 none.",
    )

    def apply(self, lm, calib, progress: bool) -> str | None:
        library()  # says what to install before any work

        def solve(weight, stats, path) -> BnbLinear:
            return BnbLinear.encode(weight, self.type, self.double_quant, self.threshold)

        walk(lm, calib, "none", solve, f"bitsandbytes {self.type}", progress)
        made = [m for m in lm.model.modules() if isinstance(m, BnbLinear)]
        ours = sorted({m.in_features for m in made if not m.library_computes(m.dtype)})
        if not ours:
            return None
        widths = ", ".join(map(str, ours))
        return (
            f"rows of {widths} weights are unpacked by labkit, since bitsandbytes {library().__version__} cannot here"
        )
