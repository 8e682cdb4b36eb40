"""Decoding under a cache policy, step by step: what is in the cache, what was just evicted, and what that changes.

    steps = CacheSteps(lm, ids, new=24)
    run = steps.run("H2O", 32)              # Run: the cache and the predictions after every token
    explore(steps.view, slow=steps.unread, **steps.settings())

The full model continues the prompt greedily; a model under a policy then reads the very same tokens, so that at each
step the two say what comes next after the same text.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from labkit.measure.quality import token_kl
from labkit.progress import track
from labkit.ui import heat, need, theme, words
from labkit.ui.lessons.kept_tokens import BUDGETS, POLICIES, Ahead, as_html, kept_of, pieces, under
from labkit.ui.theme import axis, layout

go = need("plotly.graph_objects")


@dataclass(frozen=True)
class Run:
    """One policy and budget. Index 0 is after the prompt, index s after s more tokens."""

    kept: list[torch.Tensor]  # bool (layers, kv_heads, prompt + s): the tokens in the cache
    top: list[int]  # the most likely next token
    kl: list[float]  # to the full model's prediction, nats

    def evicted(self, step: int, layer: int, head: int) -> list[int]:
        """Tokens that left the cache of one head at this step."""
        now = self.kept[step][layer, head]
        if step == 0:
            return (~now).nonzero().flatten().tolist()
        before = self.kept[step - 1][layer, head]
        return (before & ~now[: len(before)]).nonzero().flatten().tolist()


class CacheSteps:
    """A prompt, ids (1, tokens), its greedy continuation of ``new`` tokens, and policies that read both."""

    def __init__(self, lm, ids: torch.Tensor, new: int = 24, policies=POLICIES, budgets=BUDGETS):
        self.lm, self.prompt, self.new, self.policies = lm, ids.shape[1], new, dict(policies)
        self.budgets = [b for b in budgets if b < self.prompt]
        ids, found = ids.to(lm.device), []
        for out in track(self._outputs(lm, ids, new), "decoding", show=False, total=new + 1):
            found.append(_predicted(out))
            ids = torch.cat([ids, found[-1].argmax(-1)[None, None]], 1)
        self.ids, self.full = ids[:, :-1], torch.stack(found)  # full: log-probabilities, (new + 1, vocabulary)
        self.pieces = pieces(lm, self.ids[0])
        self._known: dict[tuple[str, int], Run] = {}
        self._lock = threading.RLock()  # a slider's worker and the notebook's own thread may ask at once
        self._ahead = Ahead(self.run)

    @staticmethod
    @torch.inference_mode()
    def _outputs(lm, ids: torch.Tensor, new: int, given: torch.Tensor | None = None):
        """The model's outputs for the prompt and for each of ``new`` tokens: its own greedy ones, or those ``given``."""
        out = lm.model(ids, use_cache=True, logits_to_keep=1)
        yield out
        for step in range(new):
            token = out.logits[:, -1:].argmax(-1) if given is None else given[:, step : step + 1]
            out = lm.model(token, past_key_values=out.past_key_values, use_cache=True)
            yield out

    def settings(self) -> dict:
        """The controls of :meth:`view`, for ``explore``."""
        config = self.lm.model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return {
            "step": list(range(self.new + 1)),
            "budget": self.budgets,
            "policy": list(self.policies),
            "layer": list(range(config.num_hidden_layers)),
            "head": list(range(heads)),
        }

    def unread(self, policy: str, budget: int, **_) -> bool:
        """Whether the text has still to be read under this setting."""
        return (policy, budget) not in self._known

    def run(self, policy: str, budget: int) -> Run:
        """Read prompt and continuation under a policy, one token at a time."""
        with self._lock:
            if self.unread(policy, budget):
                small = under(self.lm, self.policies[policy](budget))
                prompt, rest = self.ids[:, : self.prompt], self.ids[:, self.prompt :]
                run = Run([], [], [])
                outputs = self._outputs(small, prompt, self.new, rest)
                for step, out in enumerate(track(outputs, "decoding", show=False, total=self.new + 1)):
                    mine, full = _predicted(out), self.full[step]
                    run.kept.append(kept_of(out.past_key_values, self.prompt + step))
                    run.top.append(int(mine.argmax()))
                    run.kl.append(float(token_kl(full, mine).clamp(min=0)))
                self._known[policy, budget] = run
            return self._known[policy, budget]

    def view(self, step: int, budget: int, policy: str, layer: int, head: int):
        """The divergence over the steps, the cache of one head over the steps, both in words, and the text."""
        run = self.run(policy, budget)
        rest = [(policy, b) for b in self.budgets] + [(p, budget) for p in self.policies]
        self._ahead.ask([setting for setting in rest if self.unread(*setting)])
        kept = run.kept[step][layer, head]
        gone = run.evicted(step, layer, head) if step else []
        shown = as_html(self.pieces[: len(kept)], kept, set(gone), len(kept) - 1 if step else None)
        figures = divergence(run, step), timeline(run, step, layer, head)
        return figures, self._sentence(run, step, budget, policy, layer, head), shown

    def _sentence(self, run: Run, step: int, budget: int, policy: str, layer: int, head: int) -> str:
        full, mine = (repr(self.lm.tokenizer.decode([i])) for i in (int(self.full[step].argmax()), run.top[step]))
        held = int(run.kept[step][layer, head].sum())
        text = f"{policy}, budget {budget}. "
        if step == 0:
            text += (
                f"The prompt is read: {held} of {self.prompt} tokens stay in layer {layer}, KV head {head}. What comes next "
                "was computed before anything was evicted, so both models agree. "
            )
        else:
            gone = run.evicted(step, layer, head)
            names = ", ".join(f"{self.pieces[i]!r} ({i})" for i in gone[:3])
            more = f" and {len(gone) - 3} more" if len(gone) > 3 else ""
            text += (
                f"Step {step} reads {self.pieces[self.prompt + step - 1]!r}: {held} of {self.prompt + step} tokens are in "
                f"layer {layer}, KV head {head}; evicted just now: {names or 'nothing'}{more}. "
            )
        mean = sum(run.kl) / len(run.kl)
        return text + (
            f"Next the full cache says {full}, this one {mine}: KL {words.short(run.kl[step])} nats at this step, "
            f"{words.short(mean)} on average over {len(run.kl)} steps (measured)."
        )


def _predicted(out) -> torch.Tensor:
    """Log-probabilities of the next token, fp32 (vocabulary,)."""
    return out.logits[0, -1].float().log_softmax(-1)


def divergence(run: Run, step: int) -> go.Figure:
    """KL to the full cache after each token, the shown step marked."""
    y = [float(f"{v:.4g}") for v in run.kl]
    return go.Figure(
        [
            go.Scatter(
                x=list(range(len(y))), y=y, mode="lines", line={"color": theme.BLUE, "width": 2}, showlegend=False
            ),
            go.Scatter(
                x=[step], y=[y[step]], mode="markers", marker={"color": theme.ORANGE, "size": 10}, showlegend=False
            ),
        ],
        layout(
            "KL to the full cache (measured)",
            340,
            xaxis=axis("step"),
            yaxis=axis("nats", range=[0, 1.1 * max(*y, 1e-3)]),
        ),
    )


def timeline(run: Run, step: int, layer: int, head: int) -> go.Figure:
    """The tokens in one head's cache, a row for each step."""
    tokens = run.kept[-1].shape[-1]
    rows = []
    for kept in run.kept:
        there = kept[layer, head].tolist()
        rows.append([1.0 if k else None for k in there] + [None] * (tokens - len(there)))
    hover = "token %{x} is in the cache at step %{y}<extra></extra>"
    line = heat.mark([-0.5, tokens - 0.5], [step] * 2, width=2)
    return go.Figure(
        [heat.heat(rows, 0.0, 1.0, ((0.0, theme.BLUE), (1.0, theme.BLUE)), hover=hover, bar=False), line],
        layout(
            f"In the cache, layer {layer}, KV head {head}",
            340,
            xaxis=axis("token", range=[-0.5, tokens - 0.5], showgrid=False),
            yaxis=axis("step, 0 at the top", range=[len(rows) - 0.5, -0.5], showgrid=False),
        ),
    )
