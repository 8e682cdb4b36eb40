"""Greedy text under a model's own generation_config: where it ends, and what changes the scores that it is chosen from.

``LanguageModel.generate`` leaves all that to transformers. Who writes token by token (Talk, the compiled models) takes it
from here, with transformers' own processors in transformers' own order, so that all three write the same tokens.
Settings for sampling play no part in a greedy answer; those that would make it another kind of answer are named.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

# What would not be a greedy answer any more, or not the same one twice -> the value that leaves it one.
UNAPPLIED = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "penalty_alpha": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "guidance_scale": None,
    "watermarking_config": None,
    "token_healing": False,
    "max_time": None,
}


@dataclass(frozen=True)
class Settings:
    """A model's generation_config as it was when it was asked for: edits that come later are not seen."""

    config: object | None  # transformers' GenerationConfig; None for a model that has none
    ends: frozenset[int] = frozenset()  # tokens after which an answer is over

    @classmethod
    def of(cls, model) -> Settings:
        """The settings of a transformers model."""
        config = copy.deepcopy(getattr(model, "generation_config", None))
        return cls(config, frozenset(_listed(getattr(config, "eos_token_id", None))))

    @property
    def unapplied(self) -> tuple[str, ...]:
        """Names of the settings that no greedy answer here follows."""
        return tuple(name for name, neutral in UNAPPLIED.items() if self._get(name) not in (None, neutral))

    @property
    def note(self) -> str | None:
        """What the generation_config asks for and is not done, in a sentence."""
        if not self.unapplied:
            return None
        said = ", ".join(f"{name} = {self._get(name)}" for name in self.unapplied)
        return f"Answers here are greedy: {said} of the model's generation_config {_is(self.unapplied)} not applied."

    @property
    def neutral(self) -> dict:
        """What transformers' ``generate`` is given besides, so that it leaves out the same settings."""
        return {name: UNAPPLIED[name] for name in self.unapplied}

    @property
    def stop_strings(self) -> list[str]:
        return _listed(self._get("stop_strings"))

    def processors(self, prompt: int, max_new_tokens: int, device=None):
        """What changes the scores (1, vocabulary) of each next token after a prompt of so many: a LogitsProcessorList."""
        import transformers as t

        get, ends, found = self._get, sorted(self.ends), t.LogitsProcessorList()
        if get("sequence_bias"):
            found.append(t.SequenceBiasLogitsProcessor(get("sequence_bias")))
        if get("repetition_penalty") not in (None, 1):
            found.append(t.RepetitionPenaltyLogitsProcessor(float(get("repetition_penalty"))))
        if get("no_repeat_ngram_size"):
            found.append(t.NoRepeatNGramLogitsProcessor(get("no_repeat_ngram_size")))
        if get("bad_words_ids"):
            found.append(t.NoBadWordsLogitsProcessor(get("bad_words_ids"), ends or None))
        least = get("min_length") if get("min_new_tokens") is None else prompt + get("min_new_tokens")
        if least and ends:
            found.append(t.MinLengthLogitsProcessor(least, ends, device=device))
        if get("forced_bos_token_id") is not None:
            found.append(t.ForcedBOSTokenLogitsProcessor(get("forced_bos_token_id")))
        if get("forced_eos_token_id") is not None:
            found.append(t.ForcedEOSTokenLogitsProcessor(prompt + max_new_tokens, get("forced_eos_token_id"), device))
        if get("remove_invalid_values"):
            found.append(t.InfNanRemoveLogitsProcessor())
        if get("exponential_decay_length_penalty") is not None and ends:
            found.append(t.ExponentialDecayLengthPenalty(get("exponential_decay_length_penalty"), ends, prompt))
        if get("suppress_tokens"):
            found.append(t.SuppressTokensLogitsProcessor(get("suppress_tokens"), device))
        if get("begin_suppress_tokens"):
            begin = prompt + (prompt == 1 and get("forced_bos_token_id") is not None)
            found.append(t.SuppressTokensAtBeginLogitsProcessor(get("begin_suppress_tokens"), begin, device))
        return found

    def _get(self, name: str):
        return getattr(self.config, name, None)


class Greedy:
    """The greedy choice of one text's tokens, one after the other, and whether the text is over.

    >>> greedy = Greedy(settings, ids, max_new_tokens, tokenizer)
    >>> token = greedy(logits); greedy.over
    """

    def __init__(self, settings: Settings, ids: torch.Tensor, max_new_tokens: int, tokenizer=None):
        """``ids``: the prompt, LongTensor (1, tokens), on the device of the logits. ``tokenizer``: for stop strings."""
        self.ends, self.over = settings.ends, False
        self.processors = settings.processors(ids.shape[1], max_new_tokens, ids.device)
        self.stop = None
        if settings.stop_strings:
            from transformers import StopStringCriteria

            self.stop = StopStringCriteria(tokenizer, settings.stop_strings)
        self.ids = ids if self.processors or self.stop else None  # else nothing looks back

    def __call__(self, logits: torch.Tensor) -> int:
        """The next token after logits (1, vocabulary), which stay as they are."""
        if self.ids is None:
            token = int(logits.argmax())
            self.over = token in self.ends
            return token
        scores = self.processors(self.ids, logits.to(torch.float32, copy=True))
        token = int(scores.argmax())
        self.ids = torch.cat([self.ids, self.ids.new_tensor([[token]])], 1)
        self.over = token in self.ends or (self.stop is not None and bool(self.stop(self.ids, scores).all()))
        return token


def _listed(value) -> list:
    """A setting that is one value, several, or nothing (a tensor of them too), as a list."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple, set)) else [value]


def _is(names) -> str:
    return "are" if len(names) > 1 else "is"
