"""What a text begins with: the token or tokens that a model's own tokenizer puts before every text, if it puts any.

Gemma's and Llama 3's put one BOS, OPT's its </s>, SmolLM2's and Qwen's none. A model that was trained with one reads
nonsense without it, so every text and window here begins with it, once: a chat template may have written it already.
"""

from __future__ import annotations


def beginning(tokenizer) -> list[int]:
    """Ids of the special tokens that a tokenizer puts before a text by itself; [] where it puts none."""
    whole, own = list(tokenizer("a").input_ids), ids_of(tokenizer, "a")
    starts = [i for i in range(len(whole)) if whole[i : i + len(own)] == own]
    return whole[: max(starts, default=0)]


def encode(tokenizer, text: str) -> list[int]:
    """Ids of a text with what its tokenizer puts before it, and nothing after it; [] for an empty text."""
    ids, begin = ids_of(tokenizer, text), beginning(tokenizer)
    return ids if not ids or ids[: len(begin)] == begin else begin + ids


def ids_of(tokenizer, text: str) -> list[int]:
    """Ids of a text alone, as a piece of a longer one has them."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)
