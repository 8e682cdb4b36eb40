"""Greedy text under a model's own generation_config: where it ends, and what changes the scores that it is chosen from.

``LanguageModel.generate`` leaves all that to transformers. Who writes token by token (Talk, the compiled models) takes it
from here, with transformers' own processors in transformers' own order, so that all three write the same tokens.
Settings for sampling play no part in a greedy answer; those that would make it another kind of answer are named.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from labkit.method import brief

# What changes which tokens a greedy answer has, besides its ends -> the value that changes nothing.
APPLIED = {
    "sequence_bias": None,
    "repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": False,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "stop_strings": None,
}
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
    def applied(self) -> dict:
        """The settings that greedy answers here follow, besides the ends: name -> value."""
        return self._set(APPLIED)

    @property
    def unapplied(self) -> dict:
        """The settings that no greedy answer here follows: name -> value."""
        return self._set(UNAPPLIED)

    @property
    def note(self) -> str | None:
        """What the generation_config asks for and is not done, in a sentence."""
        if not self.unapplied:
            return None
        return f"Answers here are greedy: the model's generation_config also sets {told(self.unapplied)}, not applied."

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

        asked, ends, found = self.applied, sorted(self.ends), t.LogitsProcessorList()
        if "sequence_bias" in asked:
            found.append(t.SequenceBiasLogitsProcessor(asked["sequence_bias"]))
        if "repetition_penalty" in asked:
            found.append(t.RepetitionPenaltyLogitsProcessor(float(asked["repetition_penalty"])))
        if "no_repeat_ngram_size" in asked:
            found.append(t.NoRepeatNGramLogitsProcessor(asked["no_repeat_ngram_size"]))
        if "bad_words_ids" in asked:
            found.append(t.NoBadWordsLogitsProcessor(asked["bad_words_ids"], ends or None))
        least = (
            asked.get("min_length", 0) if self._get("min_new_tokens") is None else prompt + self._get("min_new_tokens")
        )
        if least and ends:
            found.append(t.MinLengthLogitsProcessor(least, ends, device))
        if "forced_bos_token_id" in asked:
            found.append(t.ForcedBOSTokenLogitsProcessor(asked["forced_bos_token_id"]))
        if "forced_eos_token_id" in asked:
            found.append(t.ForcedEOSTokenLogitsProcessor(prompt + max_new_tokens, asked["forced_eos_token_id"], device))
        if "remove_invalid_values" in asked:
            found.append(t.InfNanRemoveLogitsProcessor())
        if "exponential_decay_length_penalty" in asked and ends:
            found.append(t.ExponentialDecayLengthPenalty(asked["exponential_decay_length_penalty"], ends, prompt))
        if "suppress_tokens" in asked:
            found.append(t.SuppressTokensLogitsProcessor(asked["suppress_tokens"], device))
        if "begin_suppress_tokens" in asked:
            begin = prompt + (prompt == 1 and "forced_bos_token_id" in asked)
            found.append(t.SuppressTokensAtBeginLogitsProcessor(asked["begin_suppress_tokens"], begin, device))
        return found

    def _set(self, neutral: dict) -> dict:
        found = {name: self._get(name) for name in neutral}
        return {name: value for name, value in found.items() if value not in (None, [], neutral[name])}

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


def told(settings: dict) -> str:
    """Settings in words, long values cut short."""
    return ", ".join(f"{name} = {brief(value)}" for name, value in settings.items())


def _listed(value) -> list:
    """A setting that is one value, several, or nothing (a tensor of them too), as a list."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple, set)) else [value]
