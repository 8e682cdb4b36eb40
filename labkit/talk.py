"""Text as it is written: token by token, with the pace, from one graph where there is one and eagerly otherwise."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator

import torch

from labkit import positions
from labkit.generation import Greedy, Settings
from labkit.measure.memory import cache_of


class Talk:
    """An answer under way: iterate over it for pieces of text; then ``tokens`` and ``rate`` (tokens per second).

    The tokens are those of ``lm.generate``: greedy, with the ends and penalties of the model's generation_config.

    >>> for piece in Talk(lm, "The capital of France is"): print(piece, end="")
    """

    def __init__(self, lm, prompt: str, max_new_tokens: int = 64, chat: bool = False):
        """``lm``: a LanguageModel or a CompiledModel. ``chat``: put the prompt into the model's own template for questions."""
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(
                f"max_new_tokens = {max_new_tokens!r} is not allowed: it must be a whole number, 1 or more."
            )
        if chat:
            if not getattr(lm.tokenizer, "chat_template", None):
                raise ValueError(f"{lm.name} has no template for questions: leave chat out.")
            turn = [{"role": "user", "content": prompt}]
            prompt = lm.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        self.model, self.prompt, self.max_new_tokens = lm, prompt, max_new_tokens
        self.settings = lm.settings if hasattr(lm, "settings") else Settings.of(lm.model)
        if self.settings.note:
            warnings.warn(self.settings.note, stacklevel=2)
        self.tokens, self.seconds, self.text = 0, 0.0, ""

    @property
    def rate(self) -> float:
        """Tokens per second, the first one (which waits for the prompt) left out; 0 before the second."""
        return (self.tokens - 1) / self.seconds if self.seconds else 0.0

    def __iter__(self) -> Iterator[str]:
        ids, start = [], 0.0
        for token in self._stream():
            now = time.perf_counter()
            start = start or now
            self.tokens, self.seconds = self.tokens + 1, now - start
            ids.append(token)
            text = self.model.tokenizer.decode(ids, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # half a character: the next token completes it
                piece, self.text = text[len(self.text) :], text
                yield piece

    def _stream(self) -> Iterator[int]:
        if hasattr(self.model, "stream"):
            yield from self.model.stream(self.prompt, self.max_new_tokens)
        else:
            yield from _eager(self.model, self.prompt, self.max_new_tokens, self.settings)


def fastest(lm, kv_bits: int | None = None):
    """``lm`` as one graph where it can be one, else ``lm`` itself. ``kv_bits``: as ``labkit.compile`` has it."""
    from labkit.measure import compiled

    return compiled(lm, kv_bits)[0] or lm


@torch.inference_mode()
def _eager(lm, prompt: str, max_new_tokens: int, settings: Settings) -> Iterator[int]:
    ids = lm.encode(prompt)
    if ids.shape[1] == 0:
        raise ValueError("The prompt is empty: at least one token is needed to continue.")
    greedy = Greedy(settings, ids, max_new_tokens, lm.tokenizer)
    read, how, here = ids, {"use_cache": True, "logits_to_keep": 1}, {}
    for count in range(max_new_tokens):
        out = lm.model(read, **how, **here)
        token = greedy(out.logits[:, -1])
        yield token
        if greedy.over:
            return
        read = ids.new_tensor([[token]])
        if kept := cache_of(out):
            how |= kept
            here = positions.after(lm.model, ids.shape[1] + count, 1)
        else:  # it keeps its state out of sight (RecurrentGemma), so it reads the whole text again
            read = ids = torch.cat([ids, read], 1)
            how["use_cache"] = False
