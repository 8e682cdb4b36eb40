"""Tests of memory: prompts that hide what they say they hide, and models whose memory is known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny

from labkit.cache import H2O, RandomKV, RecentKV, SnapKV, StreamingLLM
from labkit.measure import needles
from labkit.measure.long_text import streaming_perplexity, token_losses

SENTENCE = "The river number {} runs on past the mill and the old bridge. "


class Bytes:
    """A tokenizer with one token per byte."""

    def __call__(self, words, **_):
        return SimpleNamespace(input_ids=list(words.encode()))

    def decode(self, ids, **_):
        return bytes(ids).decode()


class Lookup:
    """Writes what once followed the longest run of tokens that ends the text, as far back as it remembers."""

    config = SimpleNamespace(max_position_embeddings=10**6)

    def __init__(self, memory: int = 10**6):
        self.memory, self.reads = memory, []

    def __call__(self, ids, past_key_values=None, use_cache=True, logits_to_keep=0):
        self.reads.append(ids.shape[1])
        held = [*(past_key_values or []), *ids[0].tolist()]
        text, best = bytes(held), 0
        for size in range(min(40, len(text) - 1), 0, -1):
            at = text.rfind(text[-size:], 0, len(text) - 1)
            if at >= 0:
                best = text[at + size]
                break
        logits = torch.zeros(1, 1, 256)
        logits[0, 0, best] = 1
        return SimpleNamespace(logits=logits, past_key_values=held[-self.memory :])


def scripted(memory: int = 10**6):
    return SimpleNamespace(model=Lookup(memory), tokenizer=Bytes(), device="cpu", history=())


@pytest.fixture(scope="module")
def hay(tmp_path_factory):
    path = tmp_path_factory.mktemp("hay") / "hay.txt"
    path.write_text("".join(SENTENCE.format(i) for i in range(100)))
    return path


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(200, 3000), depth=st.floats(0, 1), seed=st.integers(0, 50), kind=st.sampled_from(needles.KINDS)
)
def test_a_prompt_is_as_long_as_said_and_hides_its_needle_once(hay, length, depth, seed, kind):
    hidden = needles.needle(kind, seed)
    context, asked = needles.prompt(scripted(), hidden, length, depth, hay, seed)
    assert context.shape[1] + asked.shape[1] == length
    words, fact = bytes(context[0].tolist()).decode(), f" {hidden.fact}"
    assert words.count(fact) == 1 and bytes(asked[0].tolist()).decode() == "\n\n" + hidden.question
    at, rest = words.index(fact), words.replace(fact, "")
    assert abs(at - depth * len(rest)) <= len(SENTENCE) and (at == 0 or words[at - 1] == ".")
    whole = " " + hay.read_text().strip()
    assert rest in whole + whole  # the passage is not changed; after its end the text begins again
    asked = hidden.fact.removesuffix(hidden.answer + ".")
    assert asked != hidden.fact and hidden.question.endswith(asked) and hidden.answer not in hidden.question


def test_seeds_draw_other_needles_and_a_seed_draws_the_same():
    for kind in needles.KINDS:
        drawn = {needles.needle(kind, seed) for seed in range(20)}
        assert len(drawn) > 10 and needles.needle(kind, 3) == needles.needle(kind, 3)
    numbers = [needles.needle("number", seed).answer for seed in range(20)]
    assert all(len(n) == 6 and n[1:].isdigit() for n in numbers)


@pytest.mark.parametrize("question", needles.QUESTIONS)
@pytest.mark.parametrize("kind", needles.KINDS)
def test_a_model_that_remembers_all_finds_all(hay, kind, question):
    cells = needles.grid(scripted(), (300, 800), (0.1, 0.5, 0.9), kind, question, hay, needles=2)
    assert [(c.length, c.depth) for c in cells] == [(n, d) for n in (300, 800) for d in (0.1, 0.5, 0.9)]
    assert all(c.found == c.tried == 2 and c.recall == c.begun == 1 for c in cells)
    assert all(expected == said for c in cells for expected, said in c.answers)


@pytest.mark.parametrize("question", needles.QUESTIONS)
def test_a_model_that_forgets_finds_what_is_near(hay, question):
    early, late = needles.grid(scripted(memory=250), (1500,), (0.1, 0.95), "number", question, hay, needles=3)
    assert (early.found, late.found) == (0, 3)
    assert early.begun < 0.5 and late.begun == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=6))
def test_begun_counts_to_the_first_wrong_token(pairs):
    right = 0
    for wanted, said in pairs:
        if wanted != said:
            break
        right += 1
    assert needles._begun(tuple(map(list, zip(*pairs)))) == right / len(pairs)


def test_when_the_question_is_read(hay):
    """Before eviction: with the haystack, all but its last token. After it: in a forward of its own."""
    for question, reads in (("before", [599, 1]), ("after", [600 - 22, 22])):
        lm = scripted()
        needles.grid(lm, (600,), (0.5,), "number", question, hay)
        assert len("\n\nThe secret number is") == 22
        assert lm.model.reads == [*reads, 1, 1, 1, 1, 1]  # the answer has six tokens; the last is not read


@pytest.mark.parametrize("question", needles.QUESTIONS)
def test_key_value_recall(question):
    recall, rows = needles.key_value_recall(scripted(), 20, question=question)
    assert recall == 1 and len(rows) == 20 and all(number == said for _, number, said in rows)
    recall, rows = needles.key_value_recall(scripted(memory=250), 20, question=question)
    found = [number == said for _, number, said in rows]
    assert 0 < recall < 1 and recall == sum(found) / 20 and not any(found[:8]) and found[-1]
    assert len(needles.key_value_recall(scripted(), 20, asked=5, question=question)[1]) == 5


def test_agreement_with_oneself_is_full_and_with_less_memory_what_a_mask_gives():
    lm, prompt, budget, tokens = tiny(), "some words to begin with", 6, 40
    for weight in lm.model.parameters():
        if weight.dim() == 2 and weight.shape != lm.model.get_input_embeddings().weight.shape:
            weight.mul_(8)  # as it is drawn, a tiny model writes by its last token alone
    assert needles.agreement(lm, lm, prompt, tokens) == needles.Agreement(tokens, 1.0, tokens)
    found = needles.agreement(RecentKV(budget=budget)(lm), lm, prompt, tokens)
    start = len(prompt) - 1
    ids = torch.tensor([lm.tokenizer(prompt).input_ids])
    with torch.inference_mode():
        for _ in range(tokens):
            ids = torch.cat([ids, lm.model(ids).logits[:, -1:].argmax(-1)], 1)
        query, key = torch.arange(ids.shape[1])[:, None], torch.arange(ids.shape[1])
        see = (key <= query) & ((query < start) | (key >= query - budget))
        guessed = lm.model(ids, attention_mask=see[None, None]).logits[0, start:-1].argmax(-1)
    same = (guessed == ids[0, start + 1 :]).tolist()
    assert found.share == sum(same) / tokens < 1
    assert found.until == same.index(False)


@pytest.mark.parametrize("family", ["Llama", "OPT", "GPTNeoX"])
def test_token_by_token_is_what_a_mask_gives(family):
    lm, budget = tiny(family), 10
    ids = torch.randint(1, 96, (1, 60), generator=torch.Generator().manual_seed(1))
    query, key = torch.arange(60)[:, None], torch.arange(60)
    see = (key <= query) & (key >= query - budget)
    with torch.inference_mode():
        scores = lm.model(ids, attention_mask=see[None, None], position_ids=key[None]).logits.log_softmax(-1)
        plain = lm.model(ids).logits.log_softmax(-1)
    expected = {name: -s[0, :-1].gather(1, ids[0, 1:, None])[:, 0] for name, s in (("cut", scores), ("full", plain))}
    assert torch.allclose(token_losses(RecentKV(budget=budget)(lm), ids), expected["cut"], atol=1e-4)
    for chunk in (1, 7, 60):
        assert torch.allclose(token_losses(lm, ids, chunk), expected["full"], atol=1e-4)
    assert not torch.allclose(expected["cut"], expected["full"], atol=1e-2)
    assert streaming_perplexity(lm, ids, 16) == pytest.approx(float(expected["full"].double().mean().exp()), rel=1e-4)


def test_a_larger_chunk_lends_tokens_and_a_prompt_is_read_whole():
    lm = tiny()
    ids = torch.randint(1, 96, (1, 64), generator=torch.Generator().manual_seed(2))
    full, small = token_losses(lm, ids, 64), SnapKV(budget=16, window=8)(lm)
    assert torch.allclose(token_losses(RecentKV(budget=8)(lm), ids, 64), full, atol=1e-4)  # nothing was evicted in time
    assert torch.allclose(token_losses(small, ids, 1), full, atol=1e-4)  # acts on a prompt, here of one token
    read = token_losses(small, ids, 1, prompt=32)
    assert torch.allclose(read[:32], full[:32], atol=1e-4) and not torch.allclose(read[32:], full[32:], atol=1e-3)
    for policy in (StreamingLLM(budget=8), H2O(budget=8)):
        losses = token_losses(policy(lm), ids, 4)
        assert losses.shape == (63,) and torch.isfinite(losses).all() and not torch.allclose(losses, full, atol=1e-3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda lm: needles.grid(lm, (256,), (1.5,)), "depth = 1.5"),
        (lambda lm: needles.grid(lm, 256), "lengths = 256"),
        (lambda lm: needles.grid(lm, (20,)), "length = 20 is not allowed: this needle and its question need"),
        (lambda lm: needles.grid(lm, (10**6,)), "length = 1000000 is not allowed: 'prose' has"),
        (lambda lm: needles.grid(lm, kind="song"), "kind = 'song'.*'number', 'food'"),
        (lambda lm: needles.grid(lm, question="never"), "question = 'never'.*'before', 'after'"),
        (lambda lm: needles.grid(lm, needles=0), "needles = 0"),
        (lambda lm: needles.grid(lm, haystack="nowhere"), "There is no text 'nowhere'"),
        (lambda lm: needles.key_value_recall(lm, 1000), "pairs = 1000 is not allowed.*from 1 to"),
        (lambda lm: needles.key_value_recall(lm, 5, asked=0), "asked = 0"),
        (lambda lm: needles.agreement(lm, lm, "a", 5), "prompt = 'a'.*two tokens"),
        (lambda lm: needles.agreement(lm, lm.model, "a b", 5), "A LanguageModel"),
        (lambda lm: streaming_perplexity(lm, torch.ones(1, 9, dtype=torch.long), chunk=0), "chunk = 0.*from 1 to 9"),
        (lambda lm: streaming_perplexity(lm, torch.ones(1, 9, dtype=torch.long), prompt=10), "prompt = 10"),
        (lambda lm: streaming_perplexity(lm, torch.ones(2, 9, dtype=torch.long)), r"\(2, 9\).*one text"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny())


@pytest.mark.model
def test_the_real_model_finds_needles_and_loses_them_with_their_tokens(lm):
    """Whole cache: found, number and food. The newest 64 tokens: lost where the needle is early, found where it is late."""
    assert all(c.recall == 1 for c in needles.grid(lm, (256,), (0.1,), "number", "after"))
    assert all(c.recall == 1 for c in needles.grid(lm, (256,), (0.5,), "food", "before"))
    early, late = needles.grid(RecentKV(budget=64)(lm), (256,), (0.1, 0.9), "number", "before")
    assert (early.recall, late.recall) == (0, 1)


@pytest.mark.model
def test_policies_that_look_at_attention_keep_more_of_a_needle_than_chance(lm):
    """At a quarter of the cache, question known: SnapKV finds whole answers, H2O parts of them, the baselines nothing."""
    policies = {"recent": RecentKV(share=0.25), "random": RandomKV(share=0.25, recent=8), "H2O": H2O(share=0.25)}
    policies["SnapKV"] = SnapKV(share=0.25, window=8)
    found = {
        name: needles.grid(policy(lm), (256,), (0.15, 0.5), "food", "before", needles=3)
        for name, policy in policies.items()
    }
    begun = {name: sum(c.begun for c in cells) for name, cells in found.items()}
    assert begun["recent"] < begun["H2O"] and 2 * begun["random"] < begun["H2O"] < begun["SnapKV"]
    assert all(c.recall > 0.5 for c in found["SnapKV"])
