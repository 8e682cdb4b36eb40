"""The cache of published models against their weights: from which context on is there more cache than model? Modelled.

explore(ratios, texts=[1, 8, 64], weights=[16, 8, 4], cache=["bf16", "fp8", "int4"])
table()
"""

from __future__ import annotations

import torch

from labkit.cache.sharing import FewerKVHeads, MultiHeadLatentAttention, catalogue, kv_bytes
from labkit.measure import divergence
from labkit.ui import need, plots, words
from labkit.ui.table import Table

go = need("plotly.graph_objects")

# Total parameters in billions, from the papers and model cards that data/attention_shapes.toml names.
PARAMETERS = {
    "GPT-2": 0.124,
    "GPT-3 175B": 175,
    "Llama-2-7B": 6.74,
    "Llama-2-70B": 69.0,
    "Llama-3-8B": 8.03,
    "Llama-3-70B": 70.6,
    "Mistral-7B": 7.24,
    "Gemma-3-27B": 27.4,
    "gpt-oss-20b": 20.9,
    "DeepSeek-V3": 671,
    "SmolLM2-135M": 0.1345,
}
DRAWN = ("Llama-2-7B", "Llama-3-8B", "Llama-3-70B", "Gemma-3-27B", "DeepSeek-V3", "SmolLM2-135M")
FAR = tuple(2**i for i in range(7, 21))  # tokens of a text


def ratio(name: str, tokens: int, texts: int = 1, weights: int = 16, cache: str = "bf16") -> float:
    """Bytes of ``texts`` caches over the bytes of the weights at so many bits."""
    return texts * kv_bytes(catalogue()[name], tokens, cache) / (PARAMETERS[name] * 1e9 * weights / 8)


def crossing(name: str, texts: int = 1, weights: int = 16, cache: str = "bf16") -> int | None:
    """Tokens of each text from which on the caches outweigh the weights; None: never."""
    low, high = 0, 1 << 40
    if ratio(name, high, texts, weights, cache) <= 1:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if ratio(name, middle, texts, weights, cache) > 1 else (middle, high)
    return high


def ratios(texts: int, weights: int, cache: str) -> tuple[go.Figure, str]:
    """Cache over weights against the length of each text, for a few models; above 1 there is more cache than model."""
    series = {n: (FAR, [float(f"{ratio(n, t, texts, weights, cache):.4g}") for t in FAR]) for n in DRAWN}
    title = f"{texts} text{'s' * (texts > 1)}, weights in {weights} bits, cache in {cache} (modelled)"
    figure = plots.lines(series, "tokens of each text", "cache / weights", title, True, True, markers=False, height=400)
    figure.add_trace(
        go.Scatter(x=[FAR[0], FAR[-1]], y=[1, 1], name="as much cache as model", mode="lines", line_dash="dot")
    )
    figure.update_layout(margin_t=100)  # room for two rows of names
    figure.update_traces(line_color="#8c8c8c", selector={"name": "as much cache as model"})
    found = sorted((crossing(n, texts, weights, cache), n) for n in DRAWN)  # all of them grow
    said = ", ".join(f"{name} {tokens:,}" for tokens, name in found)
    return figure, f"Tokens from which on the cache outweighs the weights (modelled): {said}."


def table(tokens: int = 8192) -> Table:
    """Each model's kind of sharing, its bytes for a token at this length in bf16, and the same if no heads were shared."""
    rows = []
    for name, shape in catalogue().items():
        if name not in PARAMETERS:
            continue
        at = crossing(name)
        own, alone = (kv_bytes(s, tokens) for s in (shape, shape.shared(shape.heads)))
        cells = (shape.kind + (f", window {shape.window}" if shape.window else ""), f"{own / tokens / 1024:,.1f}")
        rows.append(
            (name, *cells, f"{alone / own:,.0f}x", words.short(ratio(name, tokens)), f"{at:,}" if at else "never")
        )
    head = ("model", "sharing", "KB a token", "if no head shared", "cache / weights", "outweighs from, tokens")
    return Table(head, tuple(rows), f"bf16 cache of one text of {tokens:,} tokens and bf16 weights (modelled)")


def merged(lm, windows: torch.Tensor, method: FewerKVHeads):
    """The divergence of ``lm`` with fewer KV heads, on windows (windows, length); of a model without such heads, why not."""
    try:
        small = method(lm, progress=False)
    except ValueError as error:
        return str(error)
    return divergence(small, lm, windows)


@torch.no_grad()
def latent_layer(tokens: int = 32) -> Table:
    """A small MLA layer decodes a text both ways: the same output, from the same few numbers per token."""
    torch.manual_seed(0)
    layer = MultiHeadLatentAttention(hidden=256, heads=8, head_dim=32, latent=64, rope=16)
    x, caches, outs = torch.randn(1, tokens, 256), [None, None], ([], [])
    for t in range(tokens):
        for way in (0, 1):
            out, caches[way] = layer(x[:, t : t + 1], caches[way], absorbed=bool(way))
            outs[way].append(out)
    plain, absorbed = (torch.cat(o, 1) for o in outs)
    off = float((plain - absorbed).abs().max() / plain.abs().max())
    rows = [
        ("numbers cached per token", f"{caches[0].shape[-1]}"),
        ("in MHA of the same heads", f"{2 * layer.heads * layer.head_dim}"),
        ("largest difference, plain and absorbed decode", f"{off:.0e} of the largest output"),
    ]
    return Table(("an MLA layer, 8 heads of 32", "measured"), tuple(rows))
