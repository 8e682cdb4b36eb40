"""Tests of memory: a needle in a haystack, recall of one pair among many, agreement with the full cache's answer.

    grid(labkit.SnapKV(budget=256)(lm), lengths=(512, 1024), depths=(0.1, 0.5, 0.9), question="after")

A model that reads a whole prompt in one forward computes its next token before anything is evicted, whatever the cache
method. So here the prompt's last token is always a forward of its own: every token of an answer is predicted from what
the cache still holds.
"""

from __future__ import annotations

import copy
import random
import re
from dataclasses import dataclass

import torch

from labkit import bos, text
from labkit.method import brief, check_model

NAMES = ("Oskar", "Miriam", "Tobias", "Leila", "Anton", "Clara", "Yusuf", "Greta", "Pavel", "Nadia")
FOODS = ("rhubarb pie", "lentil soup", "mango ice cream", "smoked salmon", "onion bread", "plum cake", "fried rice")
WORDS = (
    "apple river candle window garden hammer pencil saddle basket mirror bottle ladder button carpet blanket kettle "
    "feather cotton silver copper marble pepper ginger walnut turnip parrot donkey falcon beetle salmon"
)
PAIR_QUESTION = "Question: What is the number of the {0}?\nAnswer: The number of the {0} is"
KINDS = ("number", "food")
QUESTIONS = ("before", "after")


@dataclass(frozen=True)
class Cell:
    """One cell of the grid: ``found`` of ``tried`` needles at this length (tokens) and depth (0: the beginning).

    ``begun``: the share of the answers' tokens that are right before the first wrong one, a mean over the needles. It
    tells a cache that lost part of a needle from one that lost all of it.
    """

    kind: str
    question: str
    length: int
    depth: float
    found: int
    tried: int
    answers: tuple[tuple[str, str], ...]  # (expected, what the model said), one for each needle
    begun: float = 0.0
    label: str = "measured"

    @property
    def recall(self) -> float:
        return self.found / self.tried


@dataclass(frozen=True)
class Needle:
    """A sentence to hide, the words that ask for it, and the words that must follow them."""

    fact: str
    question: str
    answer: str


def needle(kind: str = "number", seed: int = 0) -> Needle:
    """``"number"``: a five-digit number. ``"food"``: somebody's favourite food. The seed picks which."""
    _one_of("kind", kind, KINDS)
    pick = random.Random(f"{kind} {_whole('seed', seed, 0)}")
    if kind == "number":
        number = str(pick.randrange(10_000, 100_000))
        return Needle(f"The secret number is {number}.", "The secret number is", f" {number}")
    name, food = pick.choice(NAMES), pick.choice(FOODS)
    begun = f"{name}'s favourite food is"
    return Needle(f"{begun} {food}.", f"Question: What is {name}'s favourite food?\nAnswer: {begun}", f" {food}")


def prompt(lm, hidden: Needle, length: int, depth: float, haystack="prose", seed: int = 0):
    """Token ids of the haystack with its needle, (1, tokens), and of the question, (1, tokens); together ``length`` tokens.

    The needle stands between two sentences of the haystack, as near to ``depth`` as there is such a place. ``haystack``:
    a corpus or the path of a text file; the seed picks the passage.
    """
    _depth(depth)
    fact, question = _ids(lm, " " + hidden.fact), _ids(lm, "\n\n" + hidden.question)
    first = bos.beginning(lm.tokenizer)  # stands before the haystack, as before every text
    taken = len(first) + len(fact) + len(question)
    room = _whole("length", length, 1) - taken
    if room < 1:
        least = taken + 1
        raise ValueError(f"length = {length} is not allowed: this needle and its question need {least} tokens or more.")
    parts = [_ids(lm, " " + s) for s in _sentences(haystack)]
    if sum(map(len, parts)) < room:
        raise ValueError(f"length = {length} is not allowed: {haystack!r} has {sum(map(len, parts))} tokens.")
    start = random.Random(f"passage {seed}").randrange(len(parts))
    hay, places = [], [0]
    for part in parts[start:] + parts[:start]:
        hay += part
        places.append(len(hay))
        if len(hay) >= room:
            break
    surplus = len(hay) - room  # cut off in front, so that the question follows a whole sentence
    places = [0, *(p - surplus for p in places if p > surplus)]
    at = min(places, key=lambda p: abs(p - depth * room))
    hay = hay[surplus:]
    return torch.tensor([first + hay[:at] + fact + hay[at:]]), torch.tensor([question])


def grid(
    lm,
    lengths=(256, 512, 1024),
    depths=(0.1, 0.5, 0.9),
    kind: str = "number",
    question: str = "before",
    haystack="prose",
    needles: int = 1,
    seed: int = 0,
) -> list[Cell]:
    """Hide a needle at each depth of each length and ask for it; it is found when the greedy answer is exact.

    ``question="before"``: the cache method sees haystack and question (all but its last token) before it evicts anything.
    ``"after"``: it evicts with the haystack alone, then the question comes. ``needles``: tries in each cell, each with
    its own passage and fact.
    """
    check_model(lm, "tokenizer")
    _one_of("question", question, QUESTIONS)
    cells = []
    for length in _several("lengths", lengths):
        for depth in _several("depths", depths):
            answers = []
            for i in range(seed, seed + _whole("needles", needles, 1)):
                hidden = needle(kind, i)
                context, asked = prompt(lm, hidden, length, depth, haystack, i)
                wanted = _ids(lm, hidden.answer)
                said = write(lm, *begin(lm, context, asked, question), len(wanted))
                answers.append((wanted, said))
            found = sum(wanted == said for wanted, said in answers)
            shown = tuple((_words(lm, wanted), _words(lm, said)) for wanted, said in answers)
            begun = sum(map(_begun, answers)) / len(answers)
            cells.append(Cell(kind, question, length, float(depth), found, len(answers), shown, begun))
    return cells


def key_value_recall(
    lm, pairs: int = 20, asked: int | None = None, question: str = "before", seed: int = 0
) -> tuple[float, list[tuple[str, str, str]]]:
    """A list of words, each with a two-digit number: the share of words whose number the model finds again.

    Hard for a small model, since all pairs are alike: with its whole cache the embedded one found 15 of 48 (12 pairs
    each, four seeds), where guessing finds one in 90. Compare policies with the whole cache, not with 1.

    ``asked``: how many words are asked for, spread over the list, by default all. Gives also (word, number, what the
    model said), in the list's order. With ``question="after"`` the list is read, and evicted from, once for all words.
    """
    check_model(lm, "tokenizer")
    _one_of("question", question, QUESTIONS)
    known = WORDS.split()
    if _whole("pairs", pairs, 1) > len(known):
        raise ValueError(f"pairs = {pairs} is not allowed: it must be a whole number from 1 to {len(known)}.")
    asked = pairs if asked is None else _whole("asked", asked, 1)
    pick = random.Random(f"pairs {_whole('seed', seed, 0)}")
    words = pick.sample(known, pairs)
    numbers = [str(pick.randrange(10, 100)) for _ in words]
    lines = "".join(f"The number of the {w} is {n}.\n" for w, n in zip(words, numbers))
    listed = torch.tensor([bos.encode(lm.tokenizer, lines)])
    listed_cache = _forward(lm, listed)[1] if question == "after" else None
    found = []
    for i in sorted({k * pairs // asked for k in range(min(asked, pairs))}):
        ids, wanted = torch.tensor([_ids(lm, PAIR_QUESTION.format(words[i]))]), _ids(lm, f" {numbers[i]}")
        cache, rest = begin(lm, listed, ids, question) if question == "before" else (copy.deepcopy(listed_cache), ids)
        said = write(lm, cache, rest, len(wanted))
        found.append((words[i], numbers[i], _words(lm, said), wanted == said))
    return sum(f[3] for f in found) / len(found), [f[:3] for f in found]


@dataclass(frozen=True)
class Agreement:
    """How far a model follows the reference's greedy continuation."""

    until: int  # tokens that both write before the first difference
    share: float  # of all tokens, where the model would write the reference's next token after the reference's text
    tokens: int
    label: str = "measured"


def agreement(lm, reference, prompt: str, tokens: int = 64) -> Agreement:
    """Compare with what ``reference`` (say, the same model with its full cache) writes after a prompt, greedily.

    The model reads the reference's text token by token. Up to the first difference that is its own greedy text too.
    """
    check_model(lm, "tokenizer")
    check_model(reference, "tokenizer")
    _whole("tokens", tokens, 1)
    ids = torch.tensor([bos.encode(lm.tokenizer, prompt)])
    if ids.shape[1] < 2:
        raise ValueError(f"prompt = {brief(prompt)} is not allowed: it must have two tokens or more.")
    read, last = ids[:, :-1], ids[:, -1:]
    theirs = write(reference, _forward(reference, read)[1], last, tokens)
    cache, token, same = _forward(lm, read)[1], last, []
    for expected in theirs:
        best, cache = _forward(lm, token, cache)
        same.append(best == expected)
        token = torch.tensor([[expected]])
    until = same.index(False) if False in same else tokens
    return Agreement(until, sum(same) / tokens, tokens)


def begin(lm, context: torch.Tensor, asked: torch.Tensor, question: str):
    """Read the context, and before eviction also the question but its last token: (cache, tokens that are still to read)."""
    if question == "after":
        return _forward(lm, context)[1], asked
    return _forward(lm, torch.cat([context, asked[:, :-1]], 1))[1], asked[:, -1:]


def write(lm, cache, ids: torch.Tensor, tokens: int) -> list[int]:
    """Read these ids (1, new) after what the cache holds, and go on greedily for so many tokens."""
    said = []
    for _ in range(tokens):
        best, cache = _forward(lm, ids, cache)
        said.append(best)
        ids = torch.tensor([[best]])
    return said


@torch.inference_mode()
def _forward(lm, ids: torch.Tensor, cache=None) -> tuple[int, object]:
    """The most likely next token, and the cache."""
    out = lm.model(ids.to(lm.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return int(out.logits[0, -1].argmax()), out.past_key_values


def _begun(answer: tuple[list[int], list[int]]) -> float:
    wanted, said = answer
    return next((i for i, (w, s) in enumerate(zip(wanted, said)) if w != s), len(wanted)) / len(wanted)


def _ids(lm, words: str) -> list[int]:
    return list(lm.tokenizer(words, add_special_tokens=False).input_ids)


def _words(lm, ids: list[int]) -> str:
    return lm.tokenizer.decode(ids).strip()


def _sentences(haystack) -> list[str]:
    return [s for s in re.split(r"(?<=[.!?])\s+", text.raw(haystack)) if s.strip()]


def _one_of(name: str, value, choices: tuple) -> None:
    if value not in choices:
        allowed = ", ".join(map(repr, choices))
        raise ValueError(f"{name} = {brief(value)} is not allowed: it must be one of {allowed}.")


def _whole(name: str, value, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} = {brief(value)} is not allowed: it must be a whole number, {low} or more.")
    return value


def _depth(value) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"depth = {brief(value)} is not allowed: it must be a number from 0 to 1.")


def _several(name: str, values) -> list:
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__") or not (found := list(values)):
        raise ValueError(f"{name} = {brief(values)} is not allowed: it must be a list of one or more numbers.")
    return found
