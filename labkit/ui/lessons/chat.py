"""Notebook 00's chat: the same prompt to two models, before and after compression, token by token, with their pace.

    for answer in answers({"32 bits": lm, "4 bits": small}, "What is salt?"): ...   # grows with every token
    Chat(lm, small)                                                                 # the same in a page

The models answer one after the other: at once they would share the cores, and each would slow the other's clock.
"""

from __future__ import annotations

import html
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from labkit.measure.breakdown import release
from labkit.progress import track
from labkit.talk import Talk, fastest
from labkit.ui import need, words
from labkit.ui.base import STYLE, Live, button, part, wrapped
from labkit.ui.table import Table
from labkit.ui.worker import Latest

widgets = need("ipywidgets")

EVERY = 0.1  # seconds between two drawings: a page that is drawn for each token would slow the model that writes
PROMPT = "Why is the sea salty?"
BOX = "border:1px solid rgba(128,128,128,.35);padding:6px 12px;min-height:9em;white-space:pre-wrap"


@dataclass(frozen=True)
class Answer:
    """What one model has written so far."""

    model: str
    text: str
    tokens: int
    rate: float  # tokens per second, measured; 0 before the second token
    done: bool = False

    @property
    def pace(self) -> str:
        if self.rate:
            return f"{self.tokens} tokens, {words.short(self.rate)} tokens/s (measured)"
        return f"{self.tokens} token{'s' * (self.tokens != 1)}"


def answers(models: Mapping, prompt: str, max_new_tokens: int = 64, template: bool | None = None) -> Iterator[Answer]:
    """Let each model (LanguageModel or CompiledModel) answer greedily, in turn; yields its Answer at every piece of text.

    ``template``: put the prompt into the tokenizer's own template for questions; None: where it has one. Progress goes
    through :func:`labkit.progress.track`, which can cancel. ValueError for an empty prompt, or one without room.
    """
    check(prompt)
    for name, lm in models.items():
        talk = Talk(lm, prompt, max_new_tokens, chat=has_template(lm) if template is None else template)
        yield Answer(name, "", 0, 0.0)
        for _ in track(iter(talk), f"{name} writes", show=False, total=max_new_tokens):
            yield Answer(name, talk.text, talk.tokens, talk.rate)
        yield Answer(name, talk.text, talk.tokens, talk.rate, done=True)


def check(prompt) -> None:
    """ValueError for a prompt that says nothing."""
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"prompt = {prompt!r} is not allowed: it must be a text with at least one word.")


def has_template(lm) -> bool:
    """Whether the model's tokenizer has a template for questions."""
    return bool(getattr(lm.tokenizer, "chat_template", None))


def shared(a: str, b: str) -> int:
    """Characters that two texts have in common at their beginning, cut back to whole words."""
    same = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    if all(not text[same : same + 1].strip() for text in (a, b)):  # both words end here
        return same
    return same - len(re.split(r"\s", a[:same])[-1])


def verdict(first: Answer, second: Answer) -> str:
    """Where two answers part, and who is faster; for answers that are done."""
    same = shared(first.text, second.text)
    count = len(first.text[:same].split())
    if first.text == second.text:
        said = "Both wrote the same text."
    elif count == 0:
        said = "The two texts part at the first word."
    else:
        said = f"The two texts part after {count} word{'s' * (count > 1)}: “…{first.text[max(0, same - 40) : same].strip()}”."
    if first.rate and second.rate:
        said += (
            f" {second.model} wrote {words.short(second.rate)} tokens/s, {first.model} {words.short(first.rate)}: "
            f"{words.ratio(second.rate / first.rate)} as fast (measured, one after the other)."
        )
    return said


def table(shown: Mapping[str, Answer]) -> Table:
    """The answers as text."""
    rows = tuple((a.model, a.text.strip(), str(a.tokens), words.short(a.rate)) for a in shown.values())
    return Table(("model", "what it wrote", "tokens", "tokens/s (measured)"), rows)


class Chat(Live):
    """A prompt, Go and Stop, and two columns that fill token by token. ``.answers`` is what they show.

    ``before``, ``after``: LanguageModels; each runs as one graph where it can be one, built at the first Go. ``names``:
    what the columns are called. ``.static()`` displays both texts in a table, and so does LABKIT_STATIC=1.
    """

    def __init__(
        self,
        before,
        after,
        prompt: str = PROMPT,
        max_new_tokens: int = 64,
        names=("before", "after"),
        graph: bool = True,
    ):
        super().__init__(Latest(wait=0.0))
        if len(set(names)) != 2:
            raise ValueError(f"names = {names!r} is not allowed: it must be two different names.")
        self.models = dict(zip(names, (before, after)))
        self.max_new_tokens, self.graph = max_new_tokens, graph
        self.answers: dict[str, Answer] = {}
        self._graphs: dict = {}
        self._drawn = 0.0
        box = widgets.Text(value=prompt, description="prompt", layout=widgets.Layout(width="min(100%, 46em)"))
        box.on_msg(lambda _, content, __: self.go() if content.get("event") == "submit" else None)  # Enter
        asks = has_template(before)
        template = widgets.Checkbox(value=asks, description="as a question", disabled=not asks, indent=False)
        self.controls = {"prompt": box, "template": template}
        self.go_button = button("Go", "Both models answer, one after the other", self.go, "play")
        self.cancel_button.description, self.cancel_button.tooltip = "Stop", "Stop writing; what is written stays"
        self.columns = {name: part("column") for name in self.models}
        for column in self.columns.values():
            column.layout = widgets.Layout(flex="1 1 300px", min_width="280px")
        self.children = (
            widgets.HTML(STYLE),
            wrapped(box, self.go_button, template),
            wrapped(self.working),
            wrapped(*self.columns.values()),
            self.sentence,
        )
        self._draw()

    def go(self) -> None:
        """Let both models answer what stands in the box. A Go while they write begins anew."""
        self._work(True)
        self.sentence.value = ""
        self.worker.submit(self._write, lambda _: self._finished(), self._failed, self._progress)

    def cancel(self) -> None:
        """Stop at the next token; what is written stays."""
        super().cancel()
        self._draw()
        self._say("Stopped.", kind="error")

    def _write(self) -> None:
        prompt, template = self.controls["prompt"].value, self.controls["template"].value
        self.answers, self.error = {}, None
        self._draw()
        check(prompt)  # before a graph is built for it
        for name in self.models:
            for answer in answers({name: self._runner(name)}, prompt, self.max_new_tokens, template):
                self.answers[name] = answer
                if answer.done or time.monotonic() - self._drawn >= EVERY:
                    self._draw()

    def _runner(self, name: str):
        """The model as it runs fastest. A page without scripts has no second Go, and does not keep it."""
        if not self.graph:
            return self.models[name]
        if name not in self._graphs:
            for _ in track([name], f"building the graph of {name}", show=False):
                release(*self.models.values())
                self._graphs[name] = fastest(self.models[name])
        return self._graphs.pop(name) if self.is_static else self._graphs[name]

    def _finished(self) -> None:
        with self._drawing:
            self._work(False)
            self._draw()
            self._say(verdict(*self.answers.values()))

    def _draw(self) -> None:
        """Fill the columns. When both have finished, what differs is underlined."""
        self._drawn = time.monotonic()
        texts = [a.text for a in self.answers.values()]
        done = len(texts) == 2 and all(a.done for a in self.answers.values())
        same = shared(*texts) if done else None
        for name, column in self.columns.items():
            answer = self.answers.get(name, Answer(name, "", 0, 0.0))
            head, tail = answer.text[:same], "" if same is None else answer.text[same:]
            text = html.escape(head) + (f"<u>{html.escape(tail)}</u>" if tail else "")
            column.value = f"<b>{html.escape(name)}</b><div style='{BOX}'>{text}</div>{words.small(answer.pace)}"

    def static(self) -> None:
        """Display both texts in a table; they are written now if they have not been yet."""
        from IPython.display import display

        self.worker.join()
        if not all(name in self.answers and self.answers[name].done for name in self.models):
            self._write()
        prompt = self.controls["prompt"].value
        said, made = verdict(*self.answers.values()), table(self.answers)
        page = f"<p><b>{html.escape(prompt)}</b></p>{made._repr_html_()}<p>{html.escape(said)}</p>"
        display({"text/html": page, "text/plain": f"{prompt}\n{made}\n{said}"}, raw=True)
