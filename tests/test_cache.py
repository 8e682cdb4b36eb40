"""Models under cache policies: what they write, the positions they see, the bytes they hold, batches, beams, bad input."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny

import labkit
from labkit.cache import H2O, KIVI, RandomKV, RecentKV, Scissorhands, SnapKV, StreamingLLM, methods_of, read
from labkit.cache import layer as layers
from labkit.cache.layer import KVCache
from labkit.cache.rotary import cos_sin
from labkit.measure import latency, memory
from labkit.method import Recipe
from labkit.quantize import RTN
from labkit.talk import Talk

FAMILIES = ("Llama", "Qwen2", "Mistral", "Gemma", "GPTNeoX", "OPT")
SMALL = (
    RecentKV(budget=16),
    StreamingLLM(budget=16),
    H2O(budget=16),
    Scissorhands(budget=16, window=8),
    Scissorhands(budget=16, window=8, drop=0.0),
    SnapKV(budget=16, window=8),
    SnapKV(budget=16, window=8, layers="pyramid"),
    SnapKV(budget=16, window=8, heads="adaptive"),
    SnapKV(share=0.5, window=8, layers="pyramid", heads="adaptive"),
    H2O(share=0.5),
    RandomKV(budget=16, recent=4),
)
NEW = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def prompt(tokens=40, rows=1, seed=0):
    return torch.randint(1, 96, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def write(lm, ids, mask=None, **more):
    """Tokens that are generated, and the logits they were chosen from, (rows, new, vocabulary)."""
    mask = torch.ones_like(ids) if mask is None else mask
    out = lm.model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **NEW, **more)
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1), out.past_key_values


def steps(lm, ids, prompt):
    """Logits of every token after the prompt when they are read one by one, (rows, tokens - prompt, vocabulary)."""
    with torch.inference_mode():
        out = lm.model(ids[:, :prompt], use_cache=True)
        found = []
        for t in range(prompt, ids.shape[1]):
            out = lm.model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits[:, -1])
    return torch.stack(found, 1), out.past_key_values


@pytest.mark.parametrize("family", FAMILIES)
def test_full_budget_is_no_policy(family):
    lm, ids = tiny(family), prompt(rows=2)
    plain = write(lm, ids)
    for policy in (*(type(p) for p in SMALL[:3]), Scissorhands, SnapKV, RandomKV):
        tokens, logits, cache = write(policy()(lm), ids)  # 256 tokens: more than there are
        assert torch.equal(tokens, plain[0]) and torch.equal(logits, plain[1]), policy
        assert torch.equal(cache.layers[1].keys, plain[2].layers[1].keys) and type(cache) is KVCache


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", SMALL, ids=repr)
def test_batch_is_each_row_alone(family, policy):
    small, ids = policy(tiny(family)), prompt(rows=3)
    mask = torch.ones_like(ids)
    mask[0, :13] = mask[1, :29] = 0  # 27 tokens; 11, fewer than the budget; 40
    tokens, logits, cache = write(small, ids, mask)
    assert not cache.layers[0].whole
    for row in range(3):
        alone = write(small, ids[row : row + 1, mask[row].bool()])
        assert torch.equal(tokens[row], alone[0][0])
        assert torch.allclose(logits[row], alone[1][0], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_true_positions_after_eviction(family):
    """Token by token with the newest 10 kept, against one plain forward whose mask hides the evicted tokens."""
    lm, ids, budget, start = tiny(family), prompt(50), 10, 30
    found, _ = steps(RecentKV(budget=budget)(lm), ids, start)
    query, key = torch.arange(50)[:, None], torch.arange(50)
    see = (key <= query) & ((query < start) | (key >= query - budget))
    with torch.inference_mode():
        expected = lm.model(ids, attention_mask=see[None, None], position_ids=key[None]).logits[:, start:]
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Mistral", "Gemma", "GPTNeoX", "Phi"])
def test_streaming_reads_a_short_text(family, monkeypatch):
    """With one layer, keys depend on nothing but token and position: as if the kept tokens alone were the text."""
    lm, ids, sinks, budget, start = tiny(family), prompt(60), 3, 12, 30
    stack = lm.model.base_model.layers
    del stack[1:]
    lm.model.config.num_hidden_layers = 1
    if getattr(lm.model.config, "layer_types", None):
        lm.model.config.layer_types = lm.model.config.layer_types[:1]
    turns = []
    monkeypatch.setattr(layers, "cos_sin", lambda by, angles: turns.append(int(by.max())) or cos_sin(by, angles))
    found, cache = steps(StreamingLLM(budget=budget, sinks=sinks)(lm), ids, start)
    for step, t in enumerate(range(start, 60)):
        short = torch.cat([ids[:, :sinks], ids[:, t - (budget - sinks) : t + 1]], 1)
        with torch.inference_mode():
            assert torch.allclose(found[:, step], lm.model(short).logits[:, -1], atol=1e-4)
    assert cache.get_seq_length() == 60
    assert 59 - turns[-1] == budget  # the last query is no further from the first token than the budget


def test_rotary_that_depends_on_the_length_is_refused():
    lm = tiny()
    lm.model.base_model.rotary_emb.rope_type = "dynamic"
    with pytest.raises(ValueError, match="StreamingLLM .*LlamaForCausalLM.*dynamic.*cannot be moved"):
        StreamingLLM(budget=16)(lm)
    H2O(budget=16)(lm)  # keys keep their places


def test_sliding_window_of_the_model_still_holds():
    """Mistral with a window of 12: tokens out of it are neither seen nor kept, whatever their scores."""
    lm = tiny("Mistral")
    lm.model.config.sliding_window = 12
    ids = prompt(50)
    assert torch.equal(write(H2O(budget=100)(lm), ids)[0], write(lm, ids)[0])
    query, key = torch.arange(50)[:, None], torch.arange(50)
    see = (key <= query) & (key > query - 12) & ((query < 30) | (key >= query - 8))
    with torch.inference_mode():
        expected = lm.model(ids, attention_mask=see[None, None]).logits[:, 30:]
    assert torch.allclose(steps(RecentKV(budget=8)(lm), ids, 30)[0], expected, atol=1e-4)
    _, cache = steps(H2O(budget=20)(lm), ids, 30)
    position = cache.layers[0].position
    assert int(position[position >= 0].min()) == 50 - 12 + 1


@pytest.mark.parametrize("policy", SMALL, ids=repr)
def test_generate_twice_and_every_way(policy):
    lm, ids = tiny(), prompt()
    small = policy(lm)
    first, second = write(small, ids), write(small, ids)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    text = "what one way of running writes, the others write as well"
    own = small.model.generate(small.encode(text), max_new_tokens=12, do_sample=False)
    expected = small.tokenizer.decode(own[0, len(text) :])
    assert small.generate(text, 12) == expected
    assert "".join(Talk(small, text, 12)) == expected


@pytest.mark.parametrize("policy", SMALL, ids=repr)
def test_plain_forwards_are_untouched(policy):
    lm, ids = tiny(), prompt(rows=2)
    small = policy(lm)
    with torch.inference_mode():
        for cached in (False, True, None):
            assert torch.equal(small.model(ids, use_cache=cached).logits, lm.model(ids, use_cache=cached).logits)
    assert small.model(ids, use_cache=False).past_key_values is None
    assert methods_of(lm.model) == () and methods_of(small.model) == (policy,)
    assert type(lm.model(ids).past_key_values) is not KVCache  # the model that was compressed is as it was


def test_tensors_shrink_and_bytes_are_counted():
    lm, ids = tiny(), prompt(100)  # 2 layers, 2 KV heads of 16 channels, fp32: 512 bytes a token
    full = lm.model(ids).past_key_values
    assert memory.cache_bytes(full) == 100 * 512 and memory.kv_per_token(lm) == 512
    beside = {RecentKV: 4, StreamingLLM: 4, H2O: 8, RandomKV: 8, Scissorhands: 4 + 8, SnapKV: 4}
    for policy in (*SMALL[:4], SMALL[5], SMALL[-1]):
        _, cache = steps(policy(lm), ids, 90)
        for layer in cache.layers:
            tokens = layer.keys.shape[2]
            assert tokens == layer.values.shape[2] <= (26 if isinstance(policy, SnapKV) else 16)
            spare = layer.k.spare is not None  # where the next token will go
            assert spare == isinstance(policy, (RecentKV, StreamingLLM, H2O, RandomKV))  # the others free many at once
            assert layer.k.x.untyped_storage().nbytes() == 2 * (tokens + spare) * 16 * 4
        held = sum(2 * (layer.keys.shape[2] + spare) for layer in cache.layers)  # tokens of all heads
        assert memory.cache_bytes(cache) == held * (2 * 16 * 4 + beside[type(policy)])
    assert memory.kv_per_token(RecentKV(budget=64)(lm)) == 0  # it no longer grows


def test_a_cache_from_inference_mode_goes_on_outside():
    """Tensors made in inference mode may not be changed in place outside of it, nor any while gradients are kept."""
    lm, ids = tiny(), prompt(40)
    small = H2O(budget=16)(lm)
    expected = steps(small, ids, 30)[0]
    with torch.inference_mode():
        cache = small.model(ids[:, :30]).past_key_values
        rows = [small.model(ids[:, t : t + 1], past_key_values=cache).logits[:, -1] for t in range(30, 33)]
    with torch.no_grad():
        rows += [small.model(ids[:, t : t + 1], past_key_values=cache).logits[:, -1] for t in range(33, 36)]
    rows += [small.model(ids[:, t : t + 1], past_key_values=cache).logits[:, -1].detach() for t in range(36, 40)]
    assert torch.allclose(torch.stack(rows, 1), expected, atol=1e-5)


def test_uneven_heads_hold_what_they_keep():
    lm, ids = tiny(), prompt(60)
    cache = SnapKV(budget=20, window=8, heads="adaptive")(lm).model(ids).past_key_values
    for layer in cache.layers:
        counts = (layer.position >= 0).sum(-1)[0]
        assert int(counts.sum()) == 40 and layer.k.x.shape == (40, 16)


def test_pyramid_holds_less_in_later_layers():
    cache = SnapKV(budget=20, window=8, layers="pyramid")(tiny()).model(prompt(60)).past_key_values
    assert [layer.keys.shape[2] for layer in cache.layers] == [8 + 23, 8 + 1]


@pytest.mark.parametrize(
    "policy", [*SMALL, KIVI(residual=8, group_size=8), Recipe(SMALL[5], KIVI(residual=32))], ids=repr
)
def test_beams_move_with_their_texts(policy):
    small, ids = policy(tiny()), prompt(rows=2)
    with torch.inference_mode():
        cache = small.model(ids, use_cache=True).past_key_values
        token = prompt(1, rows=2, seed=1)
        for swap in ([1, 0], [0, 0]):
            again = small.model(ids, use_cache=True).past_key_values
            again.reorder_cache(torch.tensor(swap))
            moved = small.model(token[swap], past_key_values=again).logits
            assert torch.allclose(moved, small.model(token, past_key_values=_copy(cache)).logits[swap], atol=1e-5)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    assert small.model.generate(ids, attention_mask=mask, num_beams=3, **NEW).shape == (2, 52)


def _copy(cache):
    import copy

    return copy.deepcopy(cache)


@pytest.mark.parametrize("policy", [*SMALL, Recipe(SMALL[5], KIVI(residual=32))], ids=repr)
def test_sixteen_bit_models(policy):
    lm, ids = tiny(), prompt(rows=2)
    lm.model.to(torch.bfloat16)
    _, logits, cache = write(policy(lm), ids)
    assert logits.isfinite().all() and cache.layers[0].keys.dtype == torch.bfloat16
    full = type(policy)() if not isinstance(policy, Recipe) else Recipe(SnapKV(), KIVI())
    assert torch.equal(write(full(lm), ids)[1], write(lm, ids)[1])


def test_beam_search_with_a_full_budget_is_no_policy():
    lm, ids = tiny(), prompt(rows=2)
    plain = lm.model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=3, **NEW)
    for policy in (H2O(), StreamingLLM(), Recipe(SnapKV(), KIVI())):
        assert torch.equal(
            policy(lm).model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=3, **NEW), plain
        )


def test_evict_before_the_question_is_known():
    """Context first, question later as one chunk: the same as the question's tokens one by one where nothing more goes."""
    small, ids = SnapKV(budget=16, window=8)(tiny()), prompt(50)
    one_by_one, _ = steps(small, ids, 40)
    with torch.inference_mode():
        cache = small.model(ids[:, :40]).past_key_values
        chunk = small.model(ids[:, 40:], past_key_values=cache).logits
    assert torch.allclose(chunk, one_by_one, atol=1e-4)


@pytest.mark.parametrize("policy", [*SMALL, KIVI(residual=8, group_size=8)], ids=repr)
def test_a_second_turn_goes_on_with_the_first_ones_cache(policy):
    small, ids = policy(tiny()), prompt()
    tokens, _, cache = write(small, ids)
    turn = torch.cat([ids, tokens, prompt(7, seed=1)], 1)
    seen = cache.get_seq_length()
    assert seen == ids.shape[1] + tokens.shape[1] - 1  # the last token was written, not yet read
    with torch.inference_mode():
        expected = small.model(turn[:, seen:], past_key_values=_copy(cache)).logits[:, -1]
    assert torch.allclose(write(small, turn, past_key_values=cache)[1][:, 0], expected, atol=1e-5)


def test_reading_shows_what_one_forward_hides():
    lm, ids = tiny(), prompt(50)
    small = RecentKV(budget=10)(lm)
    plain = lm.model(ids).logits
    for step in (1, 7, 20):
        assert torch.allclose(read(lm, ids, 30, step), plain, atol=1e-5)
        assert torch.equal(small.model(ids).logits, plain)
        found = read(small, ids, 30, step)
        assert torch.allclose(found[:, :30], plain[:, :30], atol=1e-5)
        assert (found[:, 30:] - plain[:, 30:]).abs().max() > 0.01
    assert torch.equal(read(small, ids, 30)[:, 30:], steps(small, ids, 30)[0])
    assert read(small, ids, 50).shape == (1, 50, 96)
    for bad in ({"prompt": 0}, {"prompt": 51}, {"prompt": 5, "step": 0}, {"prompt": True}):
        with pytest.raises(ValueError, match="must be a whole number from 1 to 50"):
            read(small, ids, **bad)


def test_measured_through_the_cache():
    """labkit.measure must not say that a policy costs nothing, nor trip over a cache that cannot be cut back."""
    lm, ids = tiny(), prompt(60, rows=2)
    small = RecentKV(budget=10)(lm)
    found = labkit.divergence(small, lm, ids)
    mine, theirs = (torch.cat([read(m, row[None], 30, 16) for row in ids]).log_softmax(-1) for m in (small, lm))
    kl = (theirs.exp() * (theirs - mine)).sum(-1)[:, 30:-1].mean()  # the prompt is read before anything is evicted
    assert found.kl == pytest.approx(float(kl), rel=1e-3) and found.kl > 1e-4
    run = latency.decode_run(small, 16, 4)
    for _ in range(2):
        run()
    assert latency.decode_run(small, 1, 1)() is None


def test_a_cache_that_forgot_cannot_go_back():
    small = RecentKV(budget=16)(tiny())
    cache = small.model(prompt(40)).past_key_values
    with pytest.raises(ValueError, match="evicted"):
        cache.crop(-2)
    cache = small.model(prompt(12)).past_key_values
    cache.crop(-2)
    assert cache.get_seq_length() == 10 and cache.layers[0].keys.shape[2] == 10


def test_foreign_caches_masks_and_attention_are_refused():
    lm, ids = tiny(), prompt()
    small = RecentKV(budget=16)(lm)
    with pytest.raises(ValueError, match="not made under RecentKV"):
        small.model(ids[:, :1], past_key_values=lm.model(ids).past_key_values)
    with pytest.raises(ValueError, match="not made under"):
        small.model(ids[:, :1], past_key_values=H2O(budget=16)(lm).model(ids).past_key_values)
    with pytest.raises(ValueError, match=r"attention_mask of shape"):
        small.model(ids, attention_mask=torch.ones(1, 1, 40, 40))
    eager = lm.copy()
    eager.model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="'eager'.*'sdpa'"):
        RecentKV(budget=16)(eager)
    eager.model.set_attn_implementation("sdpa")  # as it says
    assert torch.equal(write(RecentKV(budget=16)(eager), ids)[1], write(small, ids)[1])
    cache = small.model(ids).past_key_values
    with pytest.raises(RuntimeError, match="attention implementation"):
        lm.model(ids[:, :1], past_key_values=cache)
        lm.model(ids[:, :1], past_key_values=cache)


BAD = [
    (lambda: RecentKV(budget=0), "RecentKV.budget = 0 "),
    (lambda: RecentKV(budget=-3), "RecentKV.budget = -3 "),
    (lambda: StreamingLLM(budget=4), "StreamingLLM.budget = 4 .*5 or more for the sinks"),
    (lambda: SnapKV(budget=32), "SnapKV.budget = 32 .*33 or more for the observation window"),
    (lambda: SnapKV(kernel=4), "SnapKV.kernel = 4 .*odd"),
    (lambda: H2O(budget=1), "H2O.budget = 1 .*2 or more"),
    (lambda: Scissorhands(budget=10), "Scissorhands.budget = 10 .*11 or more"),
    (lambda: RandomKV(budget=32), "RandomKV.budget = 32 .*33 or more"),
    (lambda: H2O(share=0.0), "H2O.share = 0.0 "),
    (lambda: H2O(share=1.5), "H2O.share = 1.5 "),
    (lambda: Recipe(H2O(), SnapKV())(tiny()), "already under H2O.*SnapKV cannot"),
    (lambda: Recipe(KIVI(), KIVI(bits=2))(tiny()), "already under KIVI"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("cls", [RecentKV, StreamingLLM, H2O, Scissorhands, SnapKV, RandomKV, KIVI])
def test_every_position_of_a_slider_is_allowed(cls):
    for knob in cls.knobs().values():
        assert knob.default in knob.positions()
        for position in knob.positions():
            assert knob.check(position) == position


def test_weights_and_cache_compose():
    lm, ids = tiny(), prompt()
    recipe = Recipe(RTN(bits=4), SnapKV(budget=20, window=8), KIVI(bits=4, residual=32))
    both, other = recipe(lm), Recipe(*reversed(recipe.methods))(lm)
    assert torch.equal(write(both, ids)[1], write(other, ids)[1])
    assert len(both.history) == 3 and both.nbytes < lm.nbytes


def test_a_model_under_a_policy_runs_eagerly():
    from labkit.engine import NotCompilable

    with pytest.raises(NotCompilable, match="hook"):
        labkit.compile(RecentKV()(tiny()))


@pytest.mark.model
def test_saved_and_loaded(short_lm, tmp_path):
    small = Recipe(SnapKV(budget=40, window=8), KIVI(bits=4, residual=32))(short_lm)
    small.save(tmp_path / "model")
    again = labkit.load(tmp_path / "model")
    assert methods_of(again.model) == methods_of(small.model) and again.history == small.history
    ids = labkit.text.evaluation(short_lm, 1, 90)
    found, expected = steps(again, ids, 80)[0], steps(small, ids, 80)[0]
    # Not bit for bit: a loaded weight may lie in memory another way, which one token's matrix-vector products tell.
    assert torch.allclose(found, expected, atol=1e-3)
    assert not torch.allclose(found, steps(short_lm, ids, 80)[0], atol=0.1)
