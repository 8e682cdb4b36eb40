"""Notebook 02: how often each code of a format is used, by this model's weights and by exactly normal ones.

found = usage(rounding.sample())          # the model's rows; usage([normal()]) for N(0, 1)
table({"this model": found}); bars({"this model": found}, "nf4")
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from labkit.formats import MXFP4, NF4, NVFP4, Format, Integer
from labkit.ui import need, plots
from labkit.ui.table import Table

go = need("plotly.graph_objects")

FORMS: dict[str, Format] = {"int4": Integer(4, 64), "nf4": NF4(double_quant=False), "mxfp4": MXFP4(), "nvfp4": NVFP4()}


@dataclass(frozen=True)
class Usage:
    """One format on some weights."""

    values: tuple[float, ...]  # what each code stands for, before its scale (for int4: the code less 8)
    shares: tuple[float, ...]  # of the weights that have this code; sum 1
    above: (
        float | None
    )  # share of groups whose largest weight lies beyond the last value; None: a zero point moves the ends
    error: float  # ‖w - ŵ‖ / ‖w‖

    @property
    def bits(self) -> float:
        """Information in a code, in bits: as many as the code has when all are used equally often."""
        p = torch.tensor(self.shares, dtype=torch.float64)
        return float(-(p * p.clamp(min=1e-300).log2()).sum())


def normal(rows: int = 1024, columns: int = 1024) -> torch.Tensor:
    """Weights drawn from N(0, 1), always the same: (rows, columns)."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def usage(weights: Iterable[torch.Tensor], forms: Mapping[str, Format] = FORMS) -> dict[str, Usage]:
    """Each format fitted to matrices (out, in): which codes are used how often, and what rounding costs; measured."""
    weights, found = list(weights), {}
    for name, form in forms.items():
        counts = torch.zeros(1 << form.bits, dtype=torch.int64)
        lost = total = 0.0
        high = groups_seen = 0
        for weight in weights:
            groups = form.groups(weight)
            params = form.fit(groups)
            codes = form.quantize(groups, params)
            counts += torch.bincount(codes.flatten().int(), minlength=len(counts))
            lost += float((groups - form.dequantize(codes, params)).square().sum())
            total += float(weight.square().sum())
            top = form.dequantize(torch.arange(len(counts)).to(torch.uint8).view(1, 1, -1), params).abs().amax(-1)
            high += int((groups.abs().amax(-1) > top * (1 + 1e-3)).sum())  # scales in fp16 are off by less
            groups_seen += top.numel()
        values = form.dequantize(torch.arange(len(counts)).to(torch.uint8).view(1, 1, -1), _unit(form)).flatten()
        order = values.argsort(stable=True)
        shares = counts[order].double() / counts.sum()
        found[name] = Usage(
            tuple(values[order].tolist()),
            tuple(shares.tolist()),
            None if isinstance(form, Integer) else high / groups_seen,
            (lost / total) ** 0.5,
        )
    return found


def _unit(form: Format) -> tuple[torch.Tensor, ...]:
    """Parameters under which a format's values are those of its own table."""
    if isinstance(form, Integer):
        return torch.ones(1, 1), torch.full((1, 1), float(1 << (form.bits - 1)))
    return (torch.ones(1, 1), torch.ones(())) if isinstance(form, NVFP4) else (torch.ones(1, 1),)


def table(found: Mapping[str, Mapping[str, Usage]]) -> Table:
    """What the codes are used for, in one row for each kind of weights and format. ``found``: weights -> usage."""
    rows = [
        (
            f"{name}, {weights}",
            f"{100 * min(u.shares):.1f} %",
            f"{100 * max(u.shares):.1f} %",
            f"{u.bits:.2f}",
            "" if u.above is None else f"{100 * u.above:.0f} %",
            f"{100 * u.error:.2f} %",
        )
        for weights, by in found.items()
        for name, u in by.items()
    ]
    head = (
        "format, weights",
        "rarest code",
        "most used code",
        "bits of information",
        "groups whose largest saturates",
        "error",
    )
    return Table(head, tuple(rows), "how often each of the sixteen codes is used: measured")


def bars(found: Mapping[str, Mapping[str, Usage]], name: str = "nf4") -> go.Figure:
    """One format's codes, from the lowest value to the highest: how often each is used, by each kind of weights."""
    series = {
        weights: {f"{v:.3g}": round(100 * s, 3) for v, s in zip(by[name].values, by[name].shares)}
        for weights, by in found.items()
    }
    return plots.bars(
        series, "share of the weights, %", f"Codes of {name} (measured); evenly used they would be at 6.25 %"
    )
