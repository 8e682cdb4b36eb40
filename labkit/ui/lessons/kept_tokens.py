"""Which tokens a cache policy keeps: the text itself, kept tokens bold and evicted ones faded, beside the attention.

    kept = KeptTokens(lm, lm.encode(text))
    kept.mask("H2O", 32)[layer, head]       # bool (tokens,): what the real cache holds after the prompt
    explore(kept.view, slow=kept.unread, **kept.settings())

What is kept is read from the cache after the model has read the prompt, never worked out a second time.
"""

from __future__ import annotations

import html
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from labkit.cache import H2O, CachePolicy, RandomKV, RecentKV, Scissorhands, SnapKV, StreamingLLM, install
from labkit.cache.base import MOST
from labkit.cache.layer import KVLayer
from labkit.measure import needles
from labkit.progress import track
from labkit.ui import heat, need, theme
from labkit.ui.theme import axis, layout
from labkit.ui.worker import Latest

go = need("plotly.graph_objects")

BUDGETS = (16, 24, 32, 48, 64)
LAST = 8  # queries at the end of the prompt whose attention the sentence adds up
ROWS = 48  # queries that the map shows, evenly spaced
DECADES = 3.0  # powers of ten of attention that the map tells apart
HELD = ((0.0, "#e3f1fa"), (0.5, theme.BLUE), (1.0, "#10103a"))
GONE = ((0.0, "#f2f2f2"), (1.0, "#9a9a9a"))

# Settings for a prompt of a hundred tokens; a policy's own defaults are made for thousands.
POLICIES: Mapping[str, Callable[[int], CachePolicy]] = {
    "recent only": lambda budget: RecentKV(budget=budget),
    "random": lambda budget: RandomKV(budget=budget, recent=8),
    "StreamingLLM": lambda budget: StreamingLLM(budget=budget),
    "H2O": lambda budget: H2O(budget=budget),
    "Scissorhands": lambda budget: Scissorhands(budget=budget, window=32, recent=8, drop=0.0),
    "SnapKV": lambda budget: SnapKV(budget=budget, window=8, kernel=5),
}


@dataclass(frozen=True)
class Watch(CachePolicy):
    """Evicts nothing; writes down the attention of each layer, (kv_heads, new, tokens), as policies see it."""

    seen: list = field(default_factory=list, compare=False)

    def scores(self, step) -> torch.Tensor:
        self.seen.append(step.attention()[0])
        return step.position.float()


class KeptTokens:
    """One prompt, ids (1, tokens), under every policy and budget; each setting is read when it is first asked for."""

    def __init__(self, lm, ids: torch.Tensor, policies=POLICIES, budgets=BUDGETS):
        self.lm, self.ids, self.policies = lm, ids.to(lm.device), dict(policies)
        self.tokens = ids.shape[1]
        self.budgets = [b for b in budgets if b < self.tokens]
        self.pieces = pieces(lm, ids[0])
        watch = Watch(budget=MOST)
        _read(lm, watch, self.ids)
        self.attention = torch.stack(watch.seen)  # (layers, kv_heads, query, key), before anything is evicted
        self._known: dict[tuple[str, int], torch.Tensor] = {}
        self._lock = threading.RLock()  # a slider's worker and the notebook's own thread may ask at once
        self._ahead = Ahead(self.mask)

    def settings(self) -> dict:
        """The controls of :meth:`view`, for ``explore``."""
        layers, heads = self.attention.shape[:2]
        return {
            "policy": list(self.policies),
            "budget": self.budgets,
            "layer": list(range(layers)),
            "head": list(range(heads)),
        }

    def unread(self, policy: str, budget: int, **_) -> bool:
        """Whether the prompt has still to be read under this setting."""
        return (policy, budget) not in self._known

    def mask(self, policy: str, budget: int) -> torch.Tensor:
        """Which tokens are in the cache after the prompt, bool (layers, kv_heads, tokens)."""
        with self._lock:
            if self.unread(policy, budget):
                cache = _read(self.lm, self.policies[policy](budget), self.ids)
                self._known[policy, budget] = kept_of(cache, self.tokens)
            return self._known[policy, budget]

    def drawn(self, policy: str, budget: int) -> torch.Tensor:
        """Share of the last queries' attention that falls on kept tokens, (layers, kv_heads)."""
        last = self.attention[:, :, -LAST:]
        return (last * self.mask(policy, budget)[:, :, None]).sum(-1).mean(-1)

    def view(self, policy: str, budget: int, layer: int, head: int):
        """The attention with the kept columns in colour, all layers at once, a sentence, and the text."""
        mask = self.mask(policy, budget)
        rest = [(policy, b) for b in self.budgets] + [(p, budget) for p in self.policies]
        self._ahead.ask([setting for setting in rest if self.unread(*setting)])
        kept = mask[layer, head]
        figures = attention_map(self.attention[layer, head], kept, layer, head), everywhere(mask, layer, head)
        return figures, self._sentence(policy, budget, layer, head), as_html(self.pieces, kept)

    def _sentence(self, policy: str, budget: int, layer: int, head: int) -> str:
        mask = self.mask(policy, budget)
        mine, share = mask[layer, head], self.drawn(policy, budget)
        first = self.attention[layer, head, -LAST:, 0].mean()
        same = int((mask == mine).all(-1).sum()) - 1
        text = (
            f"{policy} keeps {int(mine.sum())} of {self.tokens} tokens in layer {layer}, KV head {head}. They get "
            f"{100 * float(share[layer, head]):.0f} % of the attention of the prompt's last {LAST} queries; over all layers "
            f"and heads {100 * float(share.mean()):.0f} %. "
            f"Token 0 alone gets {100 * float(first):.0f} % here and is {'kept' if mine[0] else 'evicted'}."
        )
        others = mask.shape[0] * mask.shape[1] - 1
        return (
            text + f" Of the {others} other heads of the model {same or 'none'} keep{'s' * (same < 2)} just the same."
        )


def needle_prompt(lm, length: int = 96, depth: float = 0.3) -> torch.Tensor:
    """A prompt, ids (1, length): prose that hides a secret number, and the question for it."""
    return torch.cat(needles.prompt(lm, needles.needle(), length, depth), 1)


class Ahead:
    """Works out in the background what is likely to be asked for next; a newer wish replaces the older ones."""

    def __init__(self, compute: Callable):
        self.compute = compute
        self.worker = Latest(wait=0.5, exclusive=False)

    def ask(self, settings: list[tuple]) -> None:
        """Compute these settings, unless the page is a static one, where nobody will move a slider."""
        if settings and os.environ.get("LABKIT_STATIC", "") in ("", "0"):
            self.worker.submit(lambda: self._run(settings), lambda _: None, lambda _: None)

    def _run(self, settings: list[tuple]) -> None:
        for setting in track(settings, "reading ahead", show=False):
            self.compute(*setting)


def under(lm, method):
    """A copy of ``lm`` under a cache method; its tensors are those of ``lm``."""
    small = lm.copy()
    install(small.model, method)
    return small


@torch.inference_mode()
def _read(lm, policy: CachePolicy, ids: torch.Tensor):
    """The cache after the prompt ids (1, tokens)."""
    return under(lm, policy).model(ids, use_cache=True, logits_to_keep=1).past_key_values


def kept_of(cache, tokens: int) -> torch.Tensor:
    """Which of a text's first ``tokens`` tokens a cache holds, bool (layers that have keys, kv_heads, tokens)."""
    kept = []
    for layer in (x for x in cache.layers if isinstance(x, KVLayer)):
        place = layer.position[0].long()
        there = torch.zeros(len(place), tokens + 1, dtype=torch.bool, device=place.device)
        kept.append(there.scatter(1, place.where(place >= 0, torch.tensor(tokens)), True)[:, :tokens])
    return torch.stack(kept).cpu()


def pieces(lm, ids: torch.Tensor) -> list[str]:
    """The text of each token of ids (tokens,)."""
    return [lm.tokenizer.decode([int(i)]) for i in ids]


def as_html(pieces: list[str], kept, evicted=(), newest: int | None = None) -> str:
    """The text: kept tokens bold, others faded, those in ``evicted`` struck out, the ``newest`` underlined."""
    out = []
    for place, piece in enumerate(pieces):
        shown = html.escape(piece).replace("\n", "<br>")
        if kept[place]:
            out.append(f"<b><u>{shown}</u></b>" if place == newest else f"<b>{shown}</b>")
        elif place in evicted:
            out.append(f"<s style='color:{theme.VERMILION}'>{shown}</s>")
        else:
            out.append(f"<span style='opacity:0.4'>{shown}</span>")
    style = "max-width:60em;line-height:1.6;border:1px solid rgba(128,128,128,.35);padding:6px 12px;margin:4px 0"
    return f"<div class='labkit-text' style='{style}'>{''.join(out)}</div>"


def attention_map(attention: torch.Tensor, kept: torch.Tensor, layer: int, head: int) -> go.Figure:
    """Attention (query, key) as powers of ten; the columns of evicted tokens in grey."""
    tokens = len(kept)
    step = max(1, -(-tokens // ROWS))
    queries = list(range(tokens - 1, -1, -step))[::-1]
    z = attention[queries].clamp(min=1e-30).log10().clamp(min=-DECADES)
    future = torch.arange(tokens) > torch.tensor(queries)[:, None]
    maps = []
    for mine, colors in ((kept, HELD), (~kept, GONE)):
        cells = z.masked_fill(future | ~mine, torch.nan).tolist()
        hover = "key %{x}, query %{y}: 10^%{z:.1f}<extra></extra>"
        trace = heat.heat(cells, -DECADES, 0.0, colors, "power of ten", hover, bar=colors is HELD)
        trace.y = queries
        maps.append(trace)
    title = f"Attention, layer {layer}, KV head {head}: kept columns in blue"
    return go.Figure(
        maps,
        layout(
            title,
            380,
            xaxis=axis("key (token looked at)", range=[-0.5, tokens - 0.5], showgrid=False),
            yaxis=axis("query (token that looks), first at the top", range=[tokens - 0.5, -0.5], showgrid=False),
        ),
    )


def everywhere(mask: torch.Tensor, layer: int, head: int) -> go.Figure:
    """What every head of every layer keeps; a line marks the head that the other figure shows."""
    layers, heads, tokens = mask.shape
    rows = mask.flatten(0, 1).float().masked_fill(~mask.flatten(0, 1), torch.nan).tolist()
    hover = "token %{x}, layer and head %{y}<extra></extra>"
    here = layer * heads + head
    line = heat.mark([-0.5, tokens - 0.5], [here] * 2, width=2)
    return go.Figure(
        [heat.heat(rows, 0.0, 1.0, ((0.0, theme.BLUE), (1.0, theme.BLUE)), hover=hover, bar=False), line],
        layout(
            f"Kept, all {layers} layers × {heads} KV heads",
            380,
            xaxis=axis("token", range=[-0.5, tokens - 0.5], showgrid=False),
            yaxis=axis("layer × heads + head, 0 at the top", range=[layers * heads - 0.5, -0.5], showgrid=False),
        ),
    )
