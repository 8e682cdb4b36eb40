"""Which tokens each policy keeps, against references written from the papers: float64, loops, one token at a time."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny

from labkit.cache import H2O, KIVI, RandomKV, RecentKV, Scissorhands, SnapKV, StreamingLLM, attend
from labkit.cache.attend import Step
from labkit.cache.layer import KVCache
from labkit.cache.snapkv import adaptive, pyramid
from labkit.cache.store import select

HEADS, KV, WIDTH, PROMPT, STEPS = 4, 2, 16, 40, 50
GROUP = HEADS // KV
MODULE = SimpleNamespace(layer_idx=0, num_key_value_groups=GROUP, is_causal=True)


@pytest.fixture(scope="module")
def text():
    """Random queries, keys and values, (heads, tokens, width), whose attention is neither flat nor a single peak."""
    torch.manual_seed(3)
    return [torch.randn(n, PROMPT + STEPS, WIDTH) * f for n, f in ((HEADS, 1.5), (KV, 1.5), (KV, 1.0))]


def kept_by(policy, text, prompt=PROMPT, chunks=None):
    """The cached tokens of each KV head after the prompt and after each later step, and the cache."""
    query, key, value = text
    cache = KVCache((policy,), tiny().model.base_model)
    kept, start = [], 0
    for new in (prompt, *(chunks or [1] * STEPS)):
        part = slice(start, start + new)
        cache.begin(torch.zeros(1, new, dtype=torch.long), None)
        keys, values = cache.update(key[None, :, part], value[None, :, part], 0)
        attend.attend(MODULE, query[None, :, part], keys, values, None, scaling=WIDTH**-0.5, kv=cache)
        kept.append([[p for p in head if p >= 0] for head in cache.layers[0].position[0].tolist()])
        start += new
    return kept, cache


def attention(text, head, at, tokens):
    """What token ``at`` gives to each of ``tokens``, mean over the query heads of a KV head: float64, one by one."""
    query, key, _ = text
    total = dict.fromkeys(tokens, 0.0)
    for h in range(head * GROUP, (head + 1) * GROUP):
        weights = {t: float(query[h, at].double() @ key[head, t].double()) * WIDTH**-0.5 for t in tokens}
        top = max(weights.values())
        weights = {t: torch.tensor(w - top, dtype=torch.float64).exp().item() for t, w in weights.items()}
        for t in tokens:
            total[t] += weights[t] / sum(weights.values()) / GROUP
    return total


def every_step(policy, text, reference):
    """``reference(head)`` yields the kept tokens after the prompt and after each step; all must agree."""
    kept, _ = kept_by(policy, text)
    for head in range(KV):
        for step, expected in enumerate(reference(head)):
            assert kept[step][head] == sorted(expected), f"head {head}, step {step}"
        assert step == STEPS


def evict(kept, score, budget, safe):
    """Drop the lowest score, of equal ones the oldest, until ``budget`` are left; never what is ``safe``."""
    while len(kept) > budget:
        kept.remove(min((t for t in kept if not safe(t)), key=lambda t: (score(t), t)))


@pytest.mark.parametrize("budget", [2, 12, 33, 64])
@pytest.mark.parametrize("recent", [0.0, 0.5, 0.9])
def test_h2o(text, budget, recent):
    newest = int(recent * budget)

    def reference(head):
        kept, drawn = list(range(PROMPT)), dict.fromkeys(range(PROMPT + STEPS), 0.0)
        for at in range(PROMPT):
            for t, weight in attention(text, head, at, range(at + 1)).items():
                drawn[t] += weight
        for now in range(PROMPT - 1, PROMPT + STEPS):
            if now >= PROMPT:
                kept.append(now)
                for t, weight in attention(text, head, now, kept).items():
                    drawn[t] += weight
            evict(kept, drawn.get, budget, lambda t, now=now: t > now - newest)
            yield kept

    every_step(H2O(budget=budget, recent=recent), text, reference)


@pytest.mark.parametrize("window", [1, 16, 64])
@pytest.mark.parametrize(("budget", "drop"), [(20, 0.5), (33, 0.0), (60, 0.5)])
def test_scissorhands(text, window, budget, drop):
    recent = 5

    def reference(head):
        kept, votes = list(range(PROMPT)), []
        for at in range(PROMPT):
            given = attention(text, head, at, range(at + 1))
            votes.append({t for t, weight in given.items() if weight > 1 / len(given)})
        for now in range(PROMPT - 1, PROMPT + STEPS):
            if now >= PROMPT:
                kept.append(now)
                given = attention(text, head, now, kept)
                votes.append({t for t, weight in given.items() if weight > 1 / len(given)})
            if len(kept) > budget:
                count = lambda t: sum(t in v for v in votes[-window:])  # noqa: E731
                evict(kept, count, budget - int(budget * drop), lambda t, now=now: t > now - recent)
            yield kept

    every_step(Scissorhands(budget=budget, window=window, recent=recent, drop=drop), text, reference)


def snap(text, head, window, kernel):
    """SnapKV's pooled votes of the tokens before the window."""
    before = PROMPT - window
    votes = [0.0] * before
    for at in range(before, PROMPT):
        given = attention(text, head, at, range(at + 1))
        votes = [v + given[t] for t, v in enumerate(votes)]
    half = kernel // 2
    return [sum(votes[max(0, t - half) : t + half + 1]) / kernel for t in range(before)]


@pytest.mark.parametrize(("window", "kernel"), [(1, 1), (8, 5), (8, 7), (16, 7)])
@pytest.mark.parametrize("budget", [17, 24, 64])
def test_snapkv(text, budget, window, kernel):
    def reference(head):
        pooled, kept = snap(text, head, window, kernel), list(range(PROMPT))
        evict(kept, lambda t: pooled[t], budget, lambda t: t >= PROMPT - window)
        yield kept
        for now in range(PROMPT, PROMPT + STEPS):
            kept.append(now)
            yield kept

    every_step(SnapKV(budget=budget, window=window, kernel=kernel), text, reference)


@pytest.mark.parametrize("budget", [14, 20, 33])
def test_snapkv_adaptive_heads(text, budget):
    """Budgets as in the authors' code, 80 % by the layer's best scores and 20 % even, then each head's own best."""
    window, kernel = 8, 5
    free = budget - window
    pooled = [snap(text, head, window, kernel) for head in range(KV)]
    best = sorted(((v, h) for h, p in enumerate(pooled) for v in p), reverse=True)[: KV * free]
    parts = [0.8 * sum(h == head for _, h in best) + 0.2 * free for head in range(KV)]
    sizes = [math.floor(p + 1e-9) for p in parts]
    for head in sorted(range(KV), key=lambda h: sizes[h] - parts[h])[: KV * free - sum(sizes)]:
        sizes[head] += 1
    chosen = [
        set(sorted(range(len(p)), key=lambda t, p=p: -p[t])[:size]) for p, size in zip(pooled, sizes, strict=True)
    ]
    kept, cache = kept_by(SnapKV(budget=budget, window=window, kernel=kernel, heads="adaptive"), text)
    expected = [sorted(c | set(range(PROMPT - window, PROMPT))) for c in chosen]
    assert kept[0] == expected
    assert kept[-1] == [e + list(range(PROMPT, PROMPT + STEPS)) for e in expected]
    assert sum(map(len, expected)) == KV * budget
    assert cache.layers[0].k.tensors()[0].shape == (
        sum(map(len, expected)) + KV * STEPS,
        WIDTH,
    )  # no empty slot is held


@pytest.mark.parametrize(("sinks", "budget"), [(0, 12), (4, 12), (1, 40), (4, 5), (4, 200)])
def test_streaming(text, sinks, budget):
    def reference(_):
        for tokens in range(PROMPT, PROMPT + STEPS + 1):
            window = list(range(sinks, tokens))[-(budget - sinks) :]
            yield [*range(sinks), *window]

    every_step(StreamingLLM(budget=budget, sinks=sinks), text, reference)
    if sinks == 0:
        every_step(RecentKV(budget=budget), text, reference)


def test_random_is_a_uniform_sample_that_only_forgets(text):
    kept, _ = kept_by(RandomKV(budget=20, recent=4), text)
    for before, after in pairwise(kept):
        for head in range(KV):
            now = max(after[head])
            assert set(after[head]) <= set(before[head]) | {now} and len(after[head]) == 20
            assert set(range(now - 3, now + 1)) <= set(after[head])
    assert kept[-1][0] != kept[-1][1] and kept_by(RandomKV(budget=20, recent=4), text)[0] == kept
    ages = torch.zeros(PROMPT + STEPS)
    for seed in range(60):
        last = kept_by(RandomKV(budget=20, recent=0, seed=seed), text)[0][-1]
        for head in last:
            ages[head] += 1
    early, late = ages[:45].mean() / 120, ages[45:].mean() / 120
    assert abs(early - 20 / 90) < 0.03 and abs(late - 20 / 90) < 0.03  # each token with the same chance, old or new


@pytest.mark.parametrize("policy", [H2O(budget=20), Scissorhands(budget=20, window=16), SnapKV(budget=20, window=8)])
def test_no_influence_of_later_tokens(text, policy):
    """Another ending changes nothing before it; and within the prompt no query gives attention to a later token."""
    other = [t.clone() for t in text]
    for t in other:
        t[:, PROMPT + 10 :] = torch.randn_like(t[:, PROMPT + 10 :])
    assert kept_by(policy, other)[0][:11] == kept_by(policy, text)[0][:11]
    query, key, _ = (t[None, :, :PROMPT] for t in text)
    place = torch.arange(PROMPT).expand(1, KV, PROMPT)
    known = (query, key, place, place[:, 0], torch.tensor([PROMPT]), WIDTH**-0.5, None, True, 20, None, 0, 1)
    given = Step(*known).attention()
    assert given.triu(1).abs().max() == 0 and torch.allclose(given.sum(-1), torch.ones(1, KV, PROMPT))


@pytest.mark.parametrize("policy", [H2O(budget=20), Scissorhands(budget=20, window=16)])
def test_accumulated_attention_in_small_pieces_is_the_same(text, policy, monkeypatch):
    whole = kept_by(policy, text)[0]
    monkeypatch.setattr(attend, "ENTRIES", 7 * HEADS * PROMPT)  # seven rows of the prompt's attention at a time
    assert kept_by(policy, text)[0] == whole


def test_several_new_tokens_at_once(text):
    """A question after the prompt: its tokens see the kept ones and each other, never later ones."""
    kept, cache = kept_by(RecentKV(budget=20), text, chunks=[6, 1, 5])
    assert kept[1][0] == list(range(26, 46)) and kept[3][0] == list(range(32, 52))
    query, key, value = (t[:, 46:47] for t in text)
    assert cache.layers[0].keys.shape[2] == 20 and query.shape[1] == key.shape[1] == value.shape[1] == 1


def test_share_of_the_prompt(text):
    kept, _ = kept_by(H2O(share=0.25), text)
    assert {len(head) for step in kept for head in step} == {10}
    kept, _ = kept_by(SnapKV(share=0.01, window=8), text)  # never less than what its window needs
    assert len(kept[0][0]) == 9


def test_pyramid_falls_evenly_and_keeps_the_total():
    for tokens, depth in ((224, 30), (10, 5), (1, 3), (7, 1)):
        parts = [pyramid(tokens, layer, depth) for layer in range(depth)]
        assert sum(parts) == tokens * depth and parts == sorted(parts, reverse=True)
    parts = [pyramid(224, layer, 30) for layer in range(30)]
    assert parts[-1] == pytest.approx(224 / 20, abs=1) and parts[0] == pytest.approx(2 * 224 - 224 / 20, abs=1)
    steps = [a - b for a, b in pairwise(parts)]
    assert max(steps) - min(steps) <= 2
    assert pyramid(torch.tensor([[10], [20]]), 0, 5).tolist() == [[pyramid(10, 0, 5)], [pyramid(20, 0, 5)]]


def test_adaptive_of_a_short_text_is_what_it_has():
    scores = torch.rand(1, 2, 6)
    scores[..., 4:] = torch.inf  # the window
    assert adaptive(scores, 10).tolist() == [[4, 4]]


@given(st.integers(1, 6), st.integers(0, 30), st.integers(30, 60), st.integers(0, 10**6))
def test_adaptive_budgets_add_up_and_differ_by_less_than_the_best_scores_do(heads, tokens, there, seed):
    """The sum is the uniform one; no head is below a fifth of it; each lies between its count of the best and the mean."""
    scores = torch.rand(1, heads, there, generator=torch.Generator().manual_seed(seed))
    sizes = adaptive(scores, tokens)[0]
    best = scores.flatten().argsort(descending=True)[: heads * tokens] // there
    count = torch.bincount(best, minlength=heads)
    assert sizes.sum() == heads * tokens
    assert (sizes >= math.floor(0.2 * tokens)).all()
    assert (sizes - (0.8 * count + 0.2 * tokens)).abs().max() < 1


def test_equal_scores_keep_the_newer():
    scores = torch.zeros(1, 1, 9)
    assert select(scores, 8).tolist() == [[[1, 2, 3, 4, 5, 6, 7, 8]]]
    assert select(scores, 4).tolist() == [[[5, 6, 7, 8]]]
    scores[..., 2] = 1
    assert select(scores, 4).tolist() == [[[2, 6, 7, 8]]]


@pytest.mark.parametrize(("prompt", "chunks"), [(PROMPT, [1] * STEPS), (10, [1] * 60), (30, [14, 1, 1, 13, 20])])
@pytest.mark.parametrize("residual", [0, 8])
def test_rounded_cache_protects_its_newest(text, prompt, chunks, residual):
    """Under KIVI the tokens that are still in full precision are not evicted, whatever their scores."""
    query, key, value = text
    cache = KVCache(
        (H2O(budget=20, recent=0.0), KIVI(bits=8, keys="token", residual=residual)), tiny().model.base_model
    )
    start = 0
    for new in (prompt, *chunks):
        part = slice(start, start + new)
        cache.begin(torch.zeros(1, new, dtype=torch.long), None)
        keys, values = cache.update(key[None, :, part], value[None, :, part], 0)
        attend.attend(MODULE, query[None, :, part], keys, values, None, scaling=WIDTH**-0.5, kv=cache)
        start, layer = start + new, cache.layers[0]
        assert layer.tokens == min(start, 20) and layer.k.new.shape[2] == min(start, residual)
        for head, kept in enumerate(layer.position[0].tolist()):
            first = (
                max(prompt, start - residual) if prompt > 20 else start - residual
            )  # what the prompt evicted is gone
            assert set(range(max(first, 0), start)) <= set(kept)
            assert torch.allclose(layer.keys[0, head], key[head, kept], atol=0.05)  # each slot has its own token's key
