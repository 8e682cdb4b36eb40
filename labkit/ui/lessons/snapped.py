"""Notebook 02's detective story: weights that lie on a 4-bit grid already, and the rescaling that takes them off it.

    case = Case(labkit.load())
    case.line_up("attn_output", 0)      # every 4-bit format on the weights as the file has them, and as the lab loads them
    explore(case.clue, group_size=[16, 32, 64], ...)
    case.verdict(windows).table         # the same function, and what rounding does to either

The embedded model comes from a GGUF file of 4-bit blocks (Q4_1: 32 codes, an fp16 scale, an fp16 minimum). Its weights are
read straight from there; :func:`labkit.embedded.unsnap` is what has happened to those in ``lm``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from labkit import assets, embedded
from labkit.formats import Affine, Format
from labkit.measure.quality import perplexity, quality
from labkit.quantize.common import rounded
from labkit.ui import plots, words
from labkit.ui.lessons.damage import remembering
from labkit.ui.table import Table
from labkit.walk import blocks, is_linear, set_weight

NAMES = {  # as transformers calls them: as GGUF does
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
SAME_GRID = Affine(4, 32)


class Case:
    """The embedded model ``lm`` beside the file that it came from."""

    def __init__(self, lm):
        if lm.name != embedded.NAME or lm.history:
            raise ValueError(f"{lm!r} did not come from the embedded file: Case takes labkit.load() as it is.")
        self.lm = lm
        self.kinds = tuple(k for k in NAMES if "proj" in k)
        self.in_file = functools.lru_cache(8)(self._in_file)

    @functools.cached_property
    def _tensors(self) -> dict:
        from gguf import GGUFReader

        return {t.name: t for t in GGUFReader(assets.fetch(embedded.ASSET)).tensors}

    def _in_file(self, kind: str, block: int) -> torch.Tensor:
        """A weight as the file has it, fp32 (out, in), its rows in transformers' order."""
        from gguf.quants import dequantize

        stored = self._tensors[f"blk.{block}.{NAMES[kind]}.weight"]
        weight = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy()).float()
        config = self.lm.model.config
        heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
        if (
            kind in heads
        ):  # llama.cpp's rotary embedding pairs neighbouring rows, transformers' the two halves of a head
            weight = weight.view(heads[kind], -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        return weight

    def as_loaded(self, kind: str, block: int) -> torch.Tensor:
        """The same weight as ``labkit.load()`` gives it, un-snapped."""
        return blocks(self.lm.model)[block].get_submodule(kind).weight.float().cpu()

    def type_of(self, kind: str, block: int) -> str:
        """GGUF's name for how the file stores a weight: "Q4_1"."""
        return self._tensors[f"blk.{block}.{NAMES[kind]}.weight"].tensor_type.name

    def error(self, form: Format, kind: str, block: int, file: bool) -> float:
        """‖w - ŵ‖ / ‖w‖ of one weight, as in the file or as loaded."""
        weight = (self.in_file if file else self.as_loaded)(kind, block)
        return float((weight - rounded(weight, form)).norm() / weight.norm())

    def line_up(
        self, forms: Mapping[str, Format], kind: str = "mlp.down_proj", block: int = 0, file: bool = True
    ) -> Table:
        """The rounding error of one weight in each format (measured)."""
        rows = [(name, f"{self.error(f, kind, block, file):.2g}") for name, f in forms.items()]
        where = "as the file has them" if file else "as labkit.load() gives them"
        return Table(
            ("format", "relative RMS error"), tuple(rows), f"{kind} of block {block}, weights {where}: measured"
        )

    def clue(self, weights: str, group_size: int, kind: str = "mlp.down_proj", block: int = 0):
        """Where weights lie between two codes, if each group's smallest and largest were the first and the last of 16.

        ``weights``: "in the file" or "as loaded". Figure and sentence.
        """
        weight = {"in the file": self.in_file, "as loaded": self.as_loaded}[weights](kind, block)
        off = residues(weight, group_size)
        figure = plots.histogram(
            {weights: off.tolist()},
            "steps away from the nearest code",
            f"{kind} of block {block}, groups of {group_size} (measured)",
            bins=torch.linspace(-0.5, 0.5, 42).tolist(),
        )
        share = float((off.abs() < 0.012).float().mean())
        return (
            figure,
            f"{words.percent(share)} of the weights are within 0.012 steps of a code; by chance it would be 2 %.",
        )

    def swapped(self, count: int):
        """The model with its first ``count`` blocks from the file. The rescaling stays inside a block, so they fit."""
        mixed = self.lm.copy()
        for i in range(count):
            block = blocks(mixed.model)[i]
            for kind in NAMES:
                module = block.get_submodule(kind)
                weight = self._in_file(kind, i).to(module.weight)
                if is_linear(module):
                    set_weight(module, weight)
                else:
                    module.weight = nn.Parameter(weight, requires_grad=False)
        return mixed

    def verdict(self, windows: torch.Tensor, count: int = 4) -> Verdict:
        """What ``SAME_GRID`` does to ``count`` blocks, as they are in the file and as loaded, on windows of text."""
        return Verdict(count, self._tried(self.swapped(count), windows, count), self._tried(self.lm, windows, count))

    def _tried(self, lm, windows: torch.Tensor, count: int) -> Tried:
        small = lm.copy()
        for block in list(blocks(small.model))[:count]:
            for module in block.modules():
                if is_linear(module):
                    set_weight(module, rounded(module.weight.float(), SAME_GRID).to(module.weight.dtype))
        reference = remembering(lm, windows)
        after = quality(small, windows, reference, progress=False)
        return Tried(perplexity(reference, windows), after.perplexity, after.kl)


@dataclass(frozen=True)
class Tried:
    """A model on some windows, before and after some of its blocks were rounded."""

    before: float  # perplexity
    after: float
    kl: float  # nats per token, of the rounded one from the other


@dataclass(frozen=True)
class Verdict:
    """The same blocks from the file and as loaded."""

    count: int
    file: Tried
    loaded: Tried

    @property
    def table(self) -> Table:
        rows = [
            (name, f"{t.before:.4f}", f"{t.after:.4f}", f"{t.kl:.2g}")
            for name, t in {"in the file": self.file, "as loaded": self.loaded}.items()
        ]
        head = (f"weights of the first {self.count} blocks", "perplexity", "after affine, 4 bits, 32", "KL of that")
        return Table(head, tuple(rows), "measured")


def residues(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """(w - minimum) / scale less the nearest whole number, for scale = (maximum - minimum) / 15 of each group; flat."""
    groups = Affine(4, group_size).groups(weight.float())
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    steps = (groups - low) / ((high - low) / 15).clamp(min=1e-12)
    inside = (groups > low) & (groups < high)  # the ends are whole numbers by construction
    return (steps - steps.round())[inside]
