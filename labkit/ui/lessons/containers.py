"""What zeros save: the bytes of every container for one layer, and the time of a product against the share of zeros.

sizes(weight)                                # a layer's weight (out, in), pruned by magnitude: bytes, measured
rows = times((576, 1536), sparsities=(0, 0.5, 0.9))
curve(rows)                                  # speed against a dense product, and from where on zeros pay
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from labkit.formats import Integer
from labkit.linear.sparse import CSR, NM, Bitmask, Dense, SparseQuantized
from labkit.measure import sparse_speed
from labkit.prune.common import keep_mask
from labkit.ui import need, plots, theme, words
from labkit.ui.table import Table

go = need("plotly.graph_objects")

COLORS = {"dense": theme.GREY, "csr": theme.VERMILION, "bitmask": theme.ORANGE, "N:M": theme.SKY, "4-bit": theme.BLUE}
CALLED = {"dense": "dense, zeros and all", "csr": "CSR", "bitmask": "bitmask", "N:M": "N:M", "4-bit": "4-bit, no zeros"}


@torch.no_grad()
def sizes(weight: torch.Tensor, sparsity: float = 0.5) -> Table:
    """Each container of a weight (out, in) pruned by magnitude, unstructured and 2:4, with 32- and 16-bit values."""
    pruned = weight * keep_mask(weight.abs(), sparsity, None, "matrix")
    grouped, four = weight * keep_mask(weight.abs(), 0.5, (2, 4), "row"), Integer(4, 64)
    share, rows = words.percent(sparsity), []
    plain = (("dense", Dense, pruned), ("CSR", CSR, pruned), ("bitmask", Bitmask, pruned), ("2:4", NM, grouped))
    for name, container, values in plain:
        cells = []
        for dtype in (torch.float32, torch.bfloat16):
            held = container.from_dense(values.to(dtype))
            cells += [f"{held.nbytes:,}", f"{held.bits_per_weight:.2f}"]
        what = "2:4, values and places" if name == "2:4" else f"{name}, {share} zeros"
        rows.append((what, *cells))
    packed = four.encode(weight)
    for name, held in (
        ("4-bit, no zeros", packed),
        (f"4-bit and a bitmask, {share} zeros", SparseQuantized.from_dense(pruned, four)),
        ("4-bit and 2:4", SparseQuantized.from_dense(grouped, four, (2, 4))),
    ):
        rows.append((name, *2 * (f"{held.nbytes:,}", f"{held.bits_per_weight:.2f}")))
    head = ("container", "bytes, 32-bit values", "bits per weight", "bytes, 16-bit values", "bits per weight")
    return Table(head, tuple(rows), f"A layer of {weight.shape[0]} × {weight.shape[1]}: stored tensors, measured")


def times(shape: tuple[int, int], sparsities: Sequence[float] = (0, 0.5, 0.9, 0.99), **more) -> list:
    """``sparse_speed.time_against_sparsity`` on this machine."""
    return sparse_speed.time_against_sparsity(shape, sparsities=sparsities, **more)


def curve(rows: Sequence) -> tuple[go.Figure, str]:
    """How many times as fast as dense each container is, over the share of zeros; and where it begins to pay."""
    names = list(dict.fromkeys(r.name for r in rows))
    series = {}
    for name in names:
        mine = sorted((r for r in rows if r.name == name), key=lambda r: r.sparsity)
        series[CALLED.get(name, name)] = ([100 * r.sparsity for r in mine], [float(f"{r.ratio:.4g}") for r in mine])
    colors = [COLORS.get(name, theme.PURPLE) for name in names]
    figure = plots.lines(
        series,
        "% of the weights that are zero",
        "times as fast as dense",
        "One product, against the share of zeros (measured)",
        logy=True,
        colors=colors,
    )
    told = []
    for name in names:
        if name in ("dense", "4-bit"):
            continue
        at = sparse_speed.crossover(list(rows), name)
        where = (
            "beats dense at no sparsity that was tried"
            if at is None
            else f"beats dense from {words.percent(at)} zeros on"
        )
        told.append(f"{CALLED.get(name, name)} {where}")
    four = [r.ratio for r in rows if r.name == "4-bit"]
    if four:
        told.append(f"4-bit codes, with no zero at all, are {words.ratio(sum(four) / len(four))} as fast as dense")
    return figure, words.sentence("; ".join(told))
