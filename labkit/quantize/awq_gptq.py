"""AWQ and GPTQ together: scale and clip as AWQ does, then round as GPTQ does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from labkit.fold import Places
from labkit.method import both, knob
from labkit.quantize.awq import WINDOWS, scaling
from labkit.quantize.common import format_of
from labkit.quantize.gptq import GPTQ, compress


@dataclass(frozen=True)
class AWQGPTQ(GPTQ):
    """AWQ's scaling and clipping, then GPTQ's rounding: less damage than either, in the time that both take together.

    The two do not overlap. AWQ chooses the grid: which columns it is finer for, and how far each group's reaches. GPTQ
    chooses where on the grid each weight goes. The paper below combines the two, and SmoothQuant, in other formats.
    With ``compensate=False`` it is AWQ (with q and k clipped as well), with ``scale=False, clip=False`` it is GPTQ.
    """

    paper: ClassVar[str] = (
        "AWQ, MLSys 2024, then GPTQ, ICLR 2023; the pair: Sharify et al., Post Training Quantization of Large Language "
        "Models with Microscaling Formats, PMLR 262, 2024"
    )

    scale: bool = knob(True, help="Off: no scaling, GPTQ with clipping alone.")
    clip: bool = knob(
        True, help="Off: each grid spans the whole range of its group, as in GPTQ. Counts with act_order alone."
    )

    def apply(self, lm, calib, progress: bool) -> str | None:
        places = Places()
        prepare = scaling(lm, format_of(self), WINDOWS, places) if self.scale else None
        return both(compress(self, lm, calib, progress, prepare, self.clip), places.said())
