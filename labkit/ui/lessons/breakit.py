"""What each part of a quantizer is worth: leave it out, starve it or mislead it, and measure.

    bench = Damage(lm, blocks=3, windows=8)     # compresses the first 3 blocks alone; blocks=None: the whole model
    broken = bench.broken(bits=3)               # one Outcome for each switch
    table(broken, bench.unit); bars(broken, bench.unit, group="parts")

Damage is KL to the uncompressed model in nats per token, on two texts; measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from labkit import heap, text
from labkit.fold import folds, head_dim_of
from labkit.linear import exact
from labkit.measure.quality import token_kl
from labkit.method import Method
from labkit.progress import track
from labkit.quantize import AWQGPTQ, GPTQ, RTN, SmoothQuant
from labkit.ui import need, plots, words
from labkit.ui.table import Table
from labkit.walk import Flow, blocks, is_linear, linears
from labkit.walk import blocks as blocks_of

go = need("plotly.graph_objects")

TEXTS = ("manual", "prose")
OUTLIER = 30.0  # times as large as it was
WITH = ", with an outlier"
KL = "KL, nats per token"
AT_ONCE = (
    256  # tokens of evaluation text in one forward pass: short windows together, since each pass reads all weights
)


@dataclass(frozen=True)
class Outcome:
    """One setting and what it did."""

    group: str  # what was changed: "parts", "calibration", "outlier"
    name: str
    damage: dict[str, float]  # text -> KL
    change: dict[str, float]  # text -> damage over that of the group's first


class Damage:
    """Measures methods on a model; with ``blocks``, the first blocks are compressed and the others stay as they are.

    Of a model with fewer blocks than that all are compressed.
    """

    def __init__(
        self,
        lm,
        blocks: int | None = None,
        windows: int = 32,
        length: int = 512,
        evaluation: tuple[int, int] = (2, 512),
    ):
        self.lm, self.windows, self.length = lm, windows, length
        self.blocks = blocks and min(blocks, len(blocks_of(lm.model)))
        self.texts = {name: text.evaluation(lm, *evaluation, name) for name in TEXTS}
        self._expected: dict[tuple, torch.Tensor] = {}  # the uncompressed model's log-probabilities, computed once

    @property
    def unit(self) -> str:
        return KL + (f", with {self.blocks} block{'s' * (self.blocks != 1)} compressed" if self.blocks else "")

    def calibration(self, source: str = "mixed", windows: int | None = None) -> torch.Tensor:
        """Windows of a corpus or a file; "random": tokens drawn evenly from the vocabulary."""
        windows = windows or self.windows
        if source == "random":
            vocabulary = self.lm.model.get_input_embeddings().weight.shape[0]
            return torch.randint(vocabulary, (windows, self.length), generator=torch.Generator().manual_seed(0))
        # Windows of 512 are shipped for every corpus, so that shorter ones are cut and need not be written first.
        longest = max(self.length, 512)
        return text.calibration(self.lm, windows, longest, source=source)[:, : self.length]

    @exact()
    @torch.inference_mode()
    def of(self, method: Method, calib: torch.Tensor, lm=None) -> dict[str, float]:
        """text -> KL of the method, on a model (``lm`` by default) with the same predictions, against the uncompressed one."""
        lm = self.lm if lm is None else lm
        calib = calib if method.calibrated else None
        small = method(lm, calib, progress=False) if self.blocks is None else start_only(method, lm, calib, self.blocks)
        found = {}
        for name, windows in self.texts.items():
            total = 0.0
            for index, ids in enumerate(windows.split(max(1, AT_ONCE // windows.shape[1]))):
                if (name, index) not in self._expected:
                    self._expected[name, index] = _predictions(self.lm, ids)
                expected, mine = self._expected[name, index], _predictions(small, ids)
                total += float(token_kl(expected, mine).mean(1).clamp(min=0).sum())
            found[name] = total / len(windows)
        heap.trim()  # logits over a whole vocabulary were here
        return found

    def methods(self, methods: Mapping[str, Method]) -> list[Outcome]:
        """Each method with the same calibration, against the first."""
        calib = self.calibration()
        return self._outcomes("methods", {name: (m, self.lm, calib) for name, m in methods.items()})

    def broken(self, bits: int = 3) -> list[Outcome]:
        """GPTQ with a part left out or one of AWQ's added, with poor calibration, and methods that meet an outlier."""
        calib, lm = self.calibration(), self.lm
        usual, both = GPTQ(bits=bits), AWQGPTQ(bits=bits)
        parts = {
            "GPTQ": usual,
            "no act-order (the paper's)": replace(usual, act_order=False),
            "no compensation (RTN)": RTN(bits=bits),
            "with AWQ's clipping": replace(both, scale=False),
            "with AWQ's scaling too": both,
        }
        fed = {
            f"{len(calib)} windows, mixed": calib,
            "4 windows": self.calibration(windows=4),
            "1 window": self.calibration(windows=1),
            "Python code alone": self.calibration(argparse.__file__),
            "random tokens": self.calibration("random"),
        }
        odd = with_outlier(lm, count=self.blocks)
        met = {}
        for name, method in {
            f"RTN, {bits} bits": RTN(bits=bits),
            f"GPTQ, {bits} bits": usual,
            f"AWQGPTQ, {bits} bits": both,
            "W8A8": SmoothQuant(smooth=False),
            "SmoothQuant": SmoothQuant(),
        }.items():
            met[name] = (method, lm, calib)
            met[name + WITH] = (method, odd, calib)
        found = self._outcomes("parts", {name: (m, lm, calib) for name, m in parts.items()})
        known = {(parts[o.name], id(lm), id(calib)): o.damage for o in found}  # the intact ones are measured once
        found += self._outcomes("calibration", {name: (usual, lm, c) for name, c in fed.items()}, known)
        return found + self._outcomes("outlier", met, known)

    def _outcomes(self, group: str, settings: Mapping[str, tuple], known: dict | None = None) -> list[Outcome]:
        found, base = [], None
        for name, (method, lm, calib) in track(settings.items(), group, show=False):
            damage = (known or {}).get((method, id(lm), id(calib)))
            damage = damage or self.of(method, calib, lm)
            if base is None or (group == "outlier" and not name.endswith(WITH)):
                base = damage
            found.append(Outcome(group, name, damage, {t: d / max(base[t], 1e-12) for t, d in damage.items()}))
        return found


def _predictions(lm, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of each next token: (windows, tokens) -> (windows, tokens - 1, vocabulary)."""
    return lm.model(ids.to(lm.device)).logits[:, :-1].float().log_softmax(-1)


def start_only(method: Method, lm, calib, count: int):
    """``lm`` with the method applied to its first ``count`` blocks. Tensors are shared with ``lm``."""
    start, whole = lm.copy(), lm.copy()
    stack = blocks(start.model)
    if not 1 <= count <= len(stack):
        raise ValueError(f"blocks = {count} is not allowed: it must be a whole number from 1 to {len(stack)}.")
    del stack[count:]
    start.model.config.num_hidden_layers = count
    done = blocks(method(start, calib, progress=False).model)
    for index in range(count):
        blocks(whole.model)[index] = done[index]
    return whole


@torch.no_grad()
def with_outlier(lm, factor: float = OUTLIER, count: int | None = None):
    """The same function with one outlier in each norm's output: the channel with the largest gain, ``factor`` times larger.

    The linears that read it have that column divided by as much, so the model's predictions stay what they were. ``count``:
    only in the first blocks. Blocks with other linears than the first one's are left as they are.
    """
    odd = lm.copy()
    stack = blocks(odd.model)
    vocabulary = lm.model.get_input_embeddings().weight.shape[0]
    flow = Flow(odd.model, stack, torch.arange(32, device=lm.device)[None] * 7 % vocabulary)
    found = folds(stack[0], lambda block: flow.run(0, flow.hidden[0], block), head_dim_of(lm))
    alike = dict(linears(stack[0])).keys()
    for block in stack[:count]:
        if dict(linears(block)).keys() != alike:  # of another kind, where other places fold
            continue
        for fold in found:
            source = block.get_submodule(fold.source)
            if not is_linear(source):
                factors = torch.ones_like(source.weight, dtype=torch.float32)
                factors[(source.weight + fold.offset).abs().argmax()] = 1 / factor
                fold.apply(block, factors)
    return odd


def table(found: Sequence[Outcome], unit: str) -> Table:
    """Damage on each text, and as a multiple of the first in its group."""
    texts = list(found[0].damage)
    rows = []
    for o in found:
        cells = [o.group, o.name, *(words.short(o.damage[t]) for t in texts)]
        rows.append((*cells, *(words.ratio(o.change[t]) for t in texts)))
    head = ("group", "setting", *texts, *(f"{t}, first = 1" for t in texts))
    return Table(head, tuple(rows), f"{unit}: measured")


def bars(found: Sequence[Outcome], unit: str, group: str) -> go.Figure:
    """One group's settings as bars, one for each text; the outlier group has its pairs side by side."""
    shown, what = [o for o in found if o.group == group], WITH if group == "outlier" else ""
    series: dict[str, dict[str, float]] = {}
    for o in shown:
        for name, damage in o.damage.items():
            label = f"{words.the(name)}{what}" if what and o.name.endswith(what) else words.the(name)
            series.setdefault(label, {})[o.name.removesuffix(what)] = float(f"{damage:.4g}")
    title = f"{group.capitalize()}{unit.removeprefix(KL)} (measured)"
    return plots.bars(series, KL, title, log=group == "outlier", height=340)
