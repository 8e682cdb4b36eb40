"""Notebook 02's last view: what rounding to each format does to the model's predictions.

found = damage(lm, QUICK, texts, rounding)  # one Damage for each format; measured
table(found); scatter(found)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from labkit.formats import FP4, MXFP4, MXFP8, NF4, NVFP4, Affine, Float8, Format, Integer
from labkit.linear import exact
from labkit.measure import divergence
from labkit.progress import track
from labkit.quantize.common import rounded
from labkit.ui import need, theme, words
from labkit.ui.table import Table
from labkit.ui.theme import axis, layout
from labkit.walk import blocks, linears, set_weight, weight_of

go = need("plotly.graph_objects")


QUICK: dict[str, Format] = {
    "int4, row": Integer(4),
    "int4, 64": Integer(4, 64),
    "int4, 64, no zero point": Integer(4, 64, symmetric=True),
    "int4, 32": Integer(4, 32),
    "fp4, 64": FP4(64),
    "mxfp4": MXFP4(),
    "nvfp4": NVFP4(),
    "nf4": NF4(),
    "fp8 e4m3": Float8("e4m3"),
    "fp8 e5m2": Float8("e5m2"),
}
FULL = QUICK | {"affine 4, 32": Affine(4, 32), "int4, 16": Integer(4, 16), "mxfp8": MXFP8(), "int8, row": Integer(8)}


@dataclass(frozen=True)
class Damage:
    """One format on the whole model."""

    name: str
    bits: float  # true bits per weight of the linear layers
    error: float  # relative RMS error of the weights
    kl: dict[str, float]  # text -> nats per token
    kl_se: dict[str, float]
    top1: dict[str, float]


def remembering(lm, windows: torch.Tensor, form: Format | None = None):
    """A copy of ``lm`` that has computed its logits on these windows (windows, length), all at once, and hands them out.

    With ``form`` it is the model that ``RTN`` would make: each block's linears are rounded just before the block runs and
    let go right after, so that a second set of weights is never held.
    """
    reader = lm.copy()
    hooks = [hook for block in blocks(reader.model) for hook in _rounded_while_it_runs(block, form)] if form else []
    with exact(), torch.inference_mode():
        logits = reader.model(windows.to(lm.device), use_cache=False).logits
    for hook in hooks:
        hook.remove()
    known = {tuple(ids.tolist()): row[None] for ids, row in zip(windows, logits)}
    reader.model.forward = lambda ids: SimpleNamespace(logits=known[tuple(ids.flatten().tolist())])
    return reader


def _rounded_while_it_runs(block: torch.nn.Module, form: Format) -> tuple:
    """Hooks that put rounded weights into a block and take them out again."""
    own = {module: module.weight for _, module in linears(block)}

    def before(*_):
        for module in own:
            set_weight(module, rounded(weight_of(module).float(), form))

    def after(*_):
        for module, weight in own.items():
            module.weight = weight

    return block.register_forward_pre_hook(before), block.register_forward_hook(after)


def damage(lm, forms: Mapping[str, Format], texts: Mapping[str, torch.Tensor], rounding) -> list[Damage]:
    """KL and top-1 agreement of each format on each text's windows (windows, length), against ``lm``; measured.

    All texts' windows have the same length. ``rounding``: the :class:`labkit.ui.lessons.rounding.Rounding` of the same model,
    which knows true bits and errors.
    """
    windows = torch.cat(list(texts.values()))
    reference, found = remembering(lm, windows), []
    for name, form in track(forms.items(), "formats", show=False):
        small = remembering(lm, windows, form)
        d = {text: divergence(small, reference, ids) for text, ids in texts.items()}
        del small  # before the next one is made
        found.append(
            Damage(
                name,
                rounding.bits(form),
                rounding.error(form),
                {t: x.kl for t, x in d.items()},
                {t: x.kl_se for t, x in d.items()},
                {t: x.top1 for t, x in d.items()},
            )
        )
    return found


def table(found: Sequence[Damage]) -> Table:
    """Bits, weight error, KL and top-1 of each format, fewest bits first."""
    texts = list(found[0].kl)
    head = ["format", "bits per weight", "weight error, %"]
    for text in texts:
        head += [f"KL, {text}", f"top-1, {text}"]
    rows = []
    for d in sorted(found, key=lambda d: d.bits):
        cells = [d.name, f"{d.bits:.3f}", f"{100 * d.error:.2f}"]
        for text in texts:
            cells += [f"{d.kl[text]:.4f} ± {d.kl_se[text]:.4f}", words.percent(d.top1[text])]
        rows.append(tuple(cells))
    return Table(tuple(head), tuple(rows), "every linear layer rounded to nearest; KL in nats per token: measured")


def scatter(found: Sequence[Damage], most: float = 6.0) -> go.Figure:
    """KL against true bits, up to ``most``: a dot for each format and text, named once, at the first text."""
    found = [d for d in found if d.bits <= most]
    data = []
    for i, (text, color) in enumerate(zip(found[0].kl, theme.SERIES)):
        data.append(
            go.Scatter(
                name=words.the(text),
                x=[round(d.bits, 4) for d in found],
                y=[float(f"{d.kl[text]:.4g}") for d in found],
                mode="markers+text" if i == 0 else "markers",
                text=[d.name for d in found] if i == 0 else None,
                textposition="bottom right",
                textfont={"size": 10},
                marker={"color": color, "size": 9},
                hovertext=[f"{d.name}, {text}: {d.bits:.3f} bits, KL {d.kl[text]:.4f}" for d in found],
                hoverinfo="text",
            )
        )
    return go.Figure(
        data,
        layout(
            f"Formats of up to {most:g} bits on the whole model (measured)",
            420,
            xaxis=axis("bits per weight, metadata included"),
            yaxis=axis("KL, nats per token", range=[0, 1.1 * max(y for t in data for y in t.y)]),
        ),
    )
