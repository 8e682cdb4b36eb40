"""What a model reads when it is measured, and which of its tokens are scored.

Methods for the KV cache change nothing while a prompt is read at once: its attention is over before anything is evicted or
rounded. So a model under them reads a prompt that is not scored, then a few tokens at a time, which are. Texts are longer
then, since the prompt must be longer than what the method keeps; and what it is compared with is scored on the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from labkit import cache, text
from labkit.method import brief

USUAL = 8, 512  # windows, and tokens in each
LONG = 4, 1024  # the same under methods for the KV cache: as many tokens in all


@dataclass(frozen=True)
class Reading:
    """``windows`` of ``length`` tokens, of which those after the first ``prompt`` are scored (0: all but the very first)."""

    windows: int
    length: int
    prompt: int = 0

    def __post_init__(self):
        allowed = isinstance(self.prompt, int) and not isinstance(self.prompt, bool)
        if not allowed or not 0 <= self.prompt <= self.length - 2:
            raise ValueError(
                f"prompt = {brief(self.prompt)} is not allowed: it must be a whole number from 0 to {self.length - 2}, "
                f"so that windows of {self.length} tokens leave some to be scored."
            )

    @classmethod
    def of(cls, lm, method=None, windows: int | None = None, length: int | None = None, prompt: int | None = None):
        """How ``method`` on ``lm``, or ``lm`` as it is, is read; what is None is chosen.

        Without methods for the cache: 8 windows of 512 tokens, all scored. With them: 4 of 1,024, of which the second
        half is scored.
        """
        cached = bool(cache.methods_of(lm.model)) or acts_on_cache(method)
        usual = LONG if cached else USUAL
        room = getattr(lm.model.config, "max_position_embeddings", None) or usual[1]
        windows = usual[0] if windows is None else windows
        length = min(usual[1], room) if length is None else length
        text.check_size(windows, length)
        prompt = (length // 2 if cached else 0) if prompt is None else prompt
        return cls(windows, length, prompt)

    def ids(self, lm, source: str):
        """The windows of a text, LongTensor (windows, length)."""
        return text.evaluation(lm, self.windows, self.length, source)

    def fingerprint(self, ids) -> str:
        """A hash of the windows and of where scoring begins: numbers with equal ones are of the same tokens."""
        return text.fingerprint(ids) + (f"/{self.prompt}" if self.prompt else "")


def acts_on_cache(method) -> bool:
    """Whether a method, or a part of a Recipe, acts on the KV cache while a text is read."""
    return isinstance(method, cache.CacheMethod) or any(map(acts_on_cache, getattr(method, "methods", ())))
