"""int8 times int8 against fp32 and bf16, timed in turns: one layer at several token counts, and a whole model's prefill."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from labkit.linear import W8A8Linear
from labkit.measure import timing
from labkit.measure.latency import prefill_run
from labkit.ui import words
from labkit.ui.table import Table
from labkit.walk import blocks, linears, weight_of


def layer(lm, kind: str | None = None, block: int = 0, tokens: Sequence[int] = (1, 32, 512), rounds: int = 7) -> Table:
    """A layer's product in fp32, in bf16, and in int8 with activations rounded on the way; the error is in the views.

    ``kind``: the layer's path in the block, by default :func:`widest`.
    """
    module = blocks(lm.model)[block]
    kind = widest(module) if kind is None else kind
    weight = weight_of(module.get_submodule(kind)).detach().float()
    draw = torch.Generator().manual_seed(0)
    packed, half, rows = W8A8Linear(weight), weight.bfloat16(), []
    for count in tokens:
        x = torch.randn(count, weight.shape[1], generator=draw)
        runs = {
            "fp32": _ready(lambda x: nn.functional.linear(x, weight), x),
            "bf16": _ready(lambda x: nn.functional.linear(x, half), x.bfloat16()),
            "int8": _ready(packed, x),
        }
        found = timing.compare(runs, rounds=rounds, warmup=2)
        cells = [f"{1e6 * found.timings[name].median:,.0f}" for name in runs]
        rows.append((f"{count}", *cells, _speed(found, "bf16"), _speed(found, "int8")))
    head = ("tokens", "fp32, µs", "bf16, µs", "int8 × int8, µs", "speed of bf16, fp32 = 1", "speed of int8")
    return Table(head, tuple(rows), f"{kind}, {weight.shape[0]} × {weight.shape[1]}: medians, measured in turns")


def widest(block: nn.Module) -> str:
    """The path of the linear with the most outputs, the last of several: ``mlp.up_proj`` in a Llama."""
    outputs = {name: len(weight_of(module)) for name, module in linears(block)}
    return max(reversed(outputs), key=outputs.get)


def prefill(models: dict, tokens: int = 512, rounds: int = 3) -> Table:
    """Whole models reading a prompt, in turns; the first is the baseline."""
    found = timing.compare({name: prefill_run(lm, tokens) for name, lm in models.items()}, rounds=rounds, warmup=1)
    first = next(iter(models))
    rows = []
    for name in models:
        ms = 1e3 * found.timings[name].median
        rows.append(
            (name, words.short(ms), words.short(1e3 * tokens / ms), "1" if name == first else _speed(found, name))
        )
    return Table(
        ("model", "ms", "tokens/s", f"speed, {first} = 1"),
        tuple(rows),
        f"prefill of {tokens} tokens: measured in turns",
    )


def _ready(product, x: torch.Tensor):
    @torch.inference_mode()
    def run():
        product(x)

    return run


def _speed(found, name: str) -> str:
    low, high = found.spread[name]
    return f"{words.ratio(found.ratio[name])} ({low:.2f} to {high:.2f})"
