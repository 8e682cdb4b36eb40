"""Notebook 07's views: pure functions, tested without widgets on tiny models; the real one where it is the point."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny

import labkit
from labkit.cache import H2O, KIVI, RecentKV, SnapKV, StreamingLLM, methods_of, read
from labkit.cache.sharing import catalogue
from labkit.check.kv_cache import POLICIES as kept_policies
from labkit.measure import memory
from labkit.measure.needles import Cell, grid
from labkit.method import Recipe
from labkit.quantize import RTN
from labkit.ui import svg
from labkit.ui.explore import explore
from labkit.ui.lessons import kivi_keys, kv_bytes, kv_codes, kv_models
from labkit.ui.lessons.cache_steps import CacheSteps
from labkit.ui.lessons.kept_tokens import LAST, KeptTokens, as_html, needle_prompt, under
from labkit.ui.lessons.kv_bytes import Meter
from labkit.ui.lessons.needle_map import NeedleMap
from labkit.ui.lessons.sinks import Sinks


def prompt(tokens: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 96, (1, tokens), generator=torch.Generator().manual_seed(seed))


def cells(trace) -> torch.Tensor:
    """A heat map's numbers; NaN where there is no cell."""
    return torch.tensor([[float("nan") if z is None else z for z in row] for row in trace.z])


@pytest.fixture
def still(monkeypatch):
    """A static page: nothing is worked out ahead."""
    monkeypatch.setenv("LABKIT_STATIC", "1")


@pytest.fixture
def kept(tiny_lm, still) -> KeptTokens:
    return KeptTokens(tiny_lm, prompt())


# ---------------------------------------------------------------------------------------------- kept tokens


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "GPTNeoX", "OPT"])
def test_the_attention_is_the_models_own(family, still):
    lm = tiny(family)
    found = KeptTokens(lm, prompt()).attention
    eager = lm.copy().model
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        truth = torch.stack(eager(prompt(), output_attentions=True).attentions)[:, 0]  # (layers, heads, query, key)
    heads = found.shape[1]
    assert torch.allclose(found, truth.unflatten(1, (heads, -1)).mean(2), atol=1e-5)


def test_the_mask_is_what_the_real_cache_holds(kept, tiny_lm):
    assert kept.budgets == [16, 24, 32]
    for name in kept.policies:
        mask = kept.mask(name, 16)
        assert mask.shape == (2, 2, 40) and (mask.sum(-1) == 16).all(), name
        small = kept.policies[name](16)(tiny_lm)
        with torch.inference_mode():
            cache = small.model(prompt(), use_cache=True).past_key_values
        for layer, head in ((0, 1), (1, 0)):
            assert mask[layer, head].nonzero().flatten().tolist() == cache.layers[layer].position[0, head].tolist()
    assert kept.mask("recent only", 16)[0, 0].nonzero().flatten().tolist() == list(range(24, 40))
    assert kept.mask("StreamingLLM", 16)[1, 1].nonzero().flatten().tolist() == [0, 1, 2, 3, *range(28, 40)]


def test_the_share_of_attention_is_added_up_over_kept_tokens(kept):
    mask, drawn = kept.mask("H2O", 16), kept.drawn("H2O", 16)
    row = kept.attention[1, 0, -LAST:]
    assert float(drawn[1, 0]) == pytest.approx(sum(float(r[mask[1, 0]].sum()) for r in row) / LAST, rel=1e-5)
    _, text, _ = kept.view("H2O", 16, 1, 0)
    assert f"{100 * float(drawn[1, 0]):.0f} % of the attention of the prompt's last 8 queries" in text
    assert text.startswith("H2O keeps 16 of 40 tokens in layer 1, KV head 0.")
    assert kept.view("recent only", 16, 0, 0)[1].endswith("Of the 3 other heads of the model 3 keep just the same.")
    assert "is evicted" in kept.view("recent only", 16, 0, 0)[1] and "is kept" in kept.view("StreamingLLM", 16, 0, 0)[1]


def test_the_map_and_the_text_show_the_same_tokens(kept):
    (attention, everywhere), _, text = kept.view("H2O", 24, 1, 1)
    mask = kept.mask("H2O", 24)
    assert len(re.findall("<b>", text)) == 24 and len(re.findall("<span", text)) == 16
    held, gone = map(cells, attention.data)
    assert torch.equal(held.isfinite().any(0), mask[1, 1]) and torch.equal(gone.isfinite().any(0), ~mask[1, 1])
    assert not (held.isfinite() & gone.isfinite()).any()
    query = attention.data[0].y.index(39)
    key = mask[1, 1].nonzero()[3].item()
    assert float(held[query, key]) == pytest.approx(max(kept.attention[1, 1, 39, key].log10().item(), -3), abs=0.01)
    assert torch.equal(cells(everywhere.data[0]).isfinite(), mask.flatten(0, 1))
    assert list(everywhere.data[1].y) == [3, 3]
    drawn = svg.draw(attention, everywhere, width=400)
    assert drawn.count("<path fill='#") > 8 and len(drawn) < 200_000


def test_the_text_is_escaped_and_marked():
    text = as_html(["<a>", "\n", "b", "c"], [True, False, False, True], {2}, 3)
    assert "<b>&lt;a&gt;</b><span style='opacity:0.4'><br></span>" in text
    assert re.search(r"<s style='color:#\w+'>b</s><b><u>c</u></b></div>$", text)


def test_the_attention_of_the_prompt_does_not_depend_on_the_policy(kept, tiny_lm):
    """The policy acts after the prompt's attention, so one map serves all."""
    for method in (H2O(budget=16), StreamingLLM(budget=16)):
        with torch.inference_mode():
            assert torch.allclose(
                under(tiny_lm, method).model(prompt()).logits, tiny_lm.model(prompt()).logits, atol=1e-5
            )


def test_what_is_likely_next_is_read_in_the_background(tiny_lm, monkeypatch):
    monkeypatch.delenv("LABKIT_STATIC", raising=False)
    kept = KeptTokens(tiny_lm, prompt())
    assert kept.unread("H2O", 16)
    kept.view("H2O", 16, 0, 0)
    assert kept._ahead.worker.join(120)
    assert not any(kept.unread("H2O", b) for b in kept.budgets)
    assert not any(kept.unread(p, 16) for p in kept.policies) and kept.unread("SnapKV", 24)
    monkeypatch.setattr(kept, "_ahead", SimpleNamespace(ask=lambda settings: None))
    monkeypatch.setattr("labkit.ui.lessons.kept_tokens._read", None)  # nothing is left to be read
    kept.view("H2O", 24, 1, 1)


def test_the_static_twins_show_text_and_figures(kept, tiny_lm, monkeypatch):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda *a, **_: shown.extend(a))
    explore(kept.view, slow=kept.unread, **kept.settings()).static()
    steps = CacheSteps(tiny_lm, prompt(), new=3)
    explore(steps.view, slow=steps.unread, **steps.settings()).static()
    pages = [d["text/html"] for d in shown if "text/html" in d]
    assert len(pages) == 2 and all("<b>" in p and "opacity" in p for p in pages)
    assert sum("image/svg+xml" in d for d in shown) == 4


# ---------------------------------------------------------------------------------------------- step by step


def test_steps_are_those_of_the_model_reading_the_same_text(tiny_lm, still):
    steps = CacheSteps(tiny_lm, prompt(), new=10)
    assert steps.ids.shape == (1, 50)
    with torch.inference_mode():
        full = tiny_lm.model(steps.ids).logits[0, 39:].float().log_softmax(-1)
    assert torch.equal(full[:-1].argmax(-1), steps.ids[0, 40:])  # greedy
    assert torch.allclose(full, steps.full, atol=1e-4)
    for name, method in (("H2O", H2O(budget=16)), ("recent only", RecentKV(budget=16))):
        run = steps.run(name, 16)
        mine = read(method(tiny_lm), steps.ids, 40)[0, 39:].float().log_softmax(-1)
        kl = (full.exp() * (full - mine)).sum(-1)
        assert torch.allclose(torch.tensor(run.kl), kl, atol=1e-4) and run.kl[0] < 1e-5 < run.kl[-1]
        assert run.top == mine.argmax(-1).tolist()


def test_a_token_is_evicted_for_each_that_comes(tiny_lm, still):
    steps = CacheSteps(tiny_lm, prompt(), new=6)
    run = steps.run("recent only", 16)
    assert [k.shape[-1] for k in run.kept] == list(range(40, 47)) and all((k.sum(-1) == 16).all() for k in run.kept)
    assert run.evicted(0, 0, 0) == list(range(24)) and run.evicted(3, 1, 1) == [26]
    heavy = steps.run("H2O", 16)
    for s in range(1, 7):
        gone = heavy.evicted(s, 1, 0)
        assert len(gone) == 1 and heavy.kept[s - 1][1, 0, gone[0]] and not heavy.kept[s][1, 0, gone[0]]
    snap = steps.run("SnapKV", 16)  # acts on the prompt alone
    assert [int(k[0, 0].sum()) for k in snap.kept] == list(range(16, 23)) and snap.evicted(4, 0, 0) == []


def test_the_steps_view_says_what_it_shows(tiny_lm, still):
    steps = CacheSteps(tiny_lm, prompt(), new=6)
    (kl, line), text, page = steps.view(3, 16, "recent only", 1, 1)
    run = steps.run("recent only", 16)
    assert "evicted just now" in text and "(26)" in text and "16 of 43 tokens" in text
    assert page.count("<s ") == 1 and page.count("<b>") == 16 and page.count("<u>") == 1
    assert kl.data[1].x[0] == 3 and kl.data[0].y[6] == pytest.approx(run.kl[6], rel=1e-3)
    rows = cells(line.data[0]).isfinite()
    assert rows.sum(-1).tolist() == [16] * 7 and list(line.data[1].y) == [3, 3]
    first = steps.view(0, 16, "recent only", 1, 1)
    assert "both models agree" in first[1] and "<s " not in first[2]
    assert "in the cache" in svg.draw(kl, line).lower()
    assert steps.settings()["step"] == list(range(7)) and steps.settings()["budget"] == [16, 24, 32]


# ---------------------------------------------------------------------------------------------- sinks


def test_sinks_are_measured_token_by_token(tiny_lm):
    ids = prompt(120)
    sinks = Sinks(tiny_lm, ids, budget=16, chunk=4, counts=(0, 2))
    assert sinks.unread(2)
    figure, text = sinks.view(2)
    assert not sinks.unread(2) and not sinks.unread(0)
    with torch.inference_mode():
        logp = tiny_lm.model(ids).logits[0, :-1].log_softmax(-1)
    truth = -logp.gather(1, ids[0, 1:, None])[:, 0]
    assert torch.allclose(sinks.losses(None), truth, atol=1e-4)
    assert sinks.perplexity(None) == pytest.approx(float(truth[16:].double().mean().exp()), rel=1e-4)
    mine = read(StreamingLLM(budget=16, sinks=2)(tiny_lm), ids, 4, 4)[0, :-1].log_softmax(-1)
    assert torch.allclose(sinks.losses(2), -mine.gather(1, ids[0, 1:, None])[:, 0], atol=1e-4)
    assert torch.allclose(sinks.losses(0)[:12], sinks.losses(None)[:12], atol=1e-5)  # nothing is evicted yet
    assert [t.name for t in figure.data] == ["full cache", "no sinks", "2 sinks", "the budget is full"]
    assert figure.data[0].y[0] == pytest.approx(float(truth[:64].mean()), rel=1e-3) and figure.data[0].x[0] == 64
    assert "of the loss that the window had added is gone" in text and text.count("perplexity") == 0
    assert [r[0] for r in sinks.table().rows] == ["full cache", "0 + 16", "2 + 14"]
    assert "the newest alone" in sinks.view(0)[1] and "is gone" not in sinks.view(0)[1]


def test_a_text_that_is_too_short_for_sinks_is_refused(tiny_lm):
    with pytest.raises(ValueError, match="The text has 40 tokens: with budget = 16 it must have 80 or more"):
        Sinks(tiny_lm, prompt(40), budget=16)


# ---------------------------------------------------------------------------------------------- needles


@pytest.fixture
def needles(tiny_lm) -> NeedleMap:
    policies = {"recent only": lambda share: RecentKV(share=share), "H2O": lambda share: H2O(share=share)}
    return NeedleMap(tiny_lm, lengths=(160, 192), depths=(0.1, 0.5, 0.9), policies=policies)


def test_every_cell_is_measured_once_under_its_policy(needles, monkeypatch):
    calls = []

    def grid(lm, lengths, depths, kind, question, needles):
        names = [type(m).__name__ for m in methods_of(lm.model)]
        calls.append((*names, *lengths, *depths, question))
        found = int(("H2O" in names and question == "before") or not names)
        return [Cell(kind, question, lengths[0], depths[0], found, needles, (("1", "1"),), found / 2)]

    monkeypatch.setattr("labkit.ui.lessons.needle_map.grid", grid)
    assert needles.unmeasured("before", 0.25)
    figures, text = needles.view("before", 0.25)
    assert len(calls) == len(set(calls)) == 3 * 6 and not needles.unmeasured("before", 0.25)
    assert "full cache 100 %, recent only 0 %, H2O 100 %" in text and "the question is known before eviction" in text
    needles.view("after", 0.25)
    assert len(calls) == 5 * 6  # the full cache, where nothing is evicted, is not asked twice
    assert needles.table().rows[2] == ("H2O", "100 %", "50 %", "0 %", "0 %")
    assert len(figures) == 3 and figures[1].layout.title.text == "recent only: 0 of 6"
    assert [list(row) for row in figures[2].data[0].z] == [[1.0, 1.0]] * 3
    drawn = svg.draw(*figures, width=260, height=260)
    assert drawn.count(">1/1<") == 12 and drawn.count(">0/1<") == 6 and ">192<" in drawn and ">0.5<" in drawn


def test_needles_are_hidden_in_front_of_the_real_cache(needles, tiny_lm):
    cells = needles.cells("recent only", "after", 0.25)
    small = RecentKV(share=0.25)(tiny_lm)
    truth = grid(small, (160, 192), (0.1, 0.5, 0.9), "food", "after")
    assert [c for row in cells for c in row] == sorted(truth, key=lambda c: (c.depth, c.length))
    assert needles.recall("recent only", "after", 0.25) == sum(c.found for c in truth) / 6


def test_the_prompt_hides_a_number_and_asks_for_it(tiny_lm):
    ids = needle_prompt(tiny_lm, 140, 0.5)
    text = tiny_lm.tokenizer.decode(ids[0])
    assert ids.shape == (1, 140) and len(text) == 140


# ---------------------------------------------------------------------------------------------- bytes


METERED = {"full": None, "StreamingLLM": StreamingLLM(budget=32), "KIVI": KIVI(bits=2, group_size=16, residual=32)}


def test_one_blocks_cache_times_the_blocks_is_the_whole(tiny_lm):
    for method in METERED.values():
        lm = tiny_lm if method is None else method(tiny_lm)
        with torch.inference_mode():
            cache = lm.model(prompt(96), use_cache=True).past_key_values
        assert kv_bytes.measured(tiny_lm, method, 96) == memory.cache_bytes(cache)
    assert kv_bytes.measured(tiny_lm, None, 96) == 96 * memory.kv_per_token(tiny_lm)
    both = Recipe(SnapKV(budget=32, window=8), KIVI(bits=2, group_size=16, residual=16))
    assert kv_bytes.measured(tiny_lm, both, 96) < kv_bytes.measured(tiny_lm, both.methods[0], 96)
    assert len(tiny_lm.model.model.layers) == tiny_lm.model.config.num_hidden_layers == 2


def test_the_meter_finds_where_the_cache_outweighs_the_weights(tiny_lm):
    meter = Meter(tiny_lm, {"weights": 50_000}, (32, 64, 128), METERED)
    each = memory.kv_per_token(tiny_lm)
    assert meter.crossing("full", 50_000) == 50_000 // each + 1
    assert meter.crossing("full", 50_000, texts=4) == 50_000 // (4 * each) + 1
    assert meter.crossing("StreamingLLM", 50_000) is None  # the cache is full before
    assert meter.modelled("full", 100) == 100 * each and meter.modelled("full", 1000) == 1000 * each
    assert meter.modelled("KIVI", 96) == pytest.approx((meter.measured("KIVI", 64) + meter.measured("KIVI", 128)) / 2)
    figure, text = meter.view("StreamingLLM", 4)
    assert "never" not in text and "of the full one's (measured)" in text
    assert "never" in meter.sentence("StreamingLLM", 1)
    assert [t.name for t in figure.data][:2] == ["full (modelled)", "full (measured)"]
    assert list(figure.data[1].y) == [pytest.approx(4 * t * each / 1e6, rel=1e-3) for t in (32, 64, 128)]
    assert list(figure.data[4].y) == [0.05, 0.05]
    assert meter.table().rows[0][-1] == "100 %" and "measured" in meter.table().caption
    assert "<circle" in svg.draw(figure)


def test_published_models_cross_their_weights_where_shapes_say():
    # Llama-2-7B: 32 layers, keys and values, 32 heads of 128, 2 bytes = 512 KB a token against 13.48 GB.
    assert kv_models.crossing("Llama-2-7B") == 13_480_000_000 // 524_288 + 1
    assert kv_models.crossing("Llama-2-7B", texts=8, weights=4) == 3_370_000_000 // (8 * 524_288) + 1
    assert kv_models.ratio("Llama-3-8B", 1000) == pytest.approx(1000 * 131_072 / 16.06e9)
    figure, text = kv_models.ratios(8, 16, "bf16")
    assert [t.name for t in figure.data[:-1]] == list(kv_models.DRAWN) and list(figure.data[-1].y) == [1, 1]
    assert f"Llama-2-7B {kv_models.crossing('Llama-2-7B', 8):,}" in text and "modelled" in text
    rows = {r[0]: r[1:] for r in kv_models.table().rows}
    assert rows["Llama-2-7B"][:3] == ("MHA", "512.0", "1x") and rows["Llama-3-8B"][:3] == ("GQA", "128.0", "4x")
    assert rows["Mistral-7B"][-1] == "never" and kv_models.crossing("Mistral-7B") is None  # its window is full before
    assert rows["DeepSeek-V3"][0] == "MLA" and rows["DeepSeek-V3"][1] == f"{61 * 576 * 2 / 1024:.1f}"
    assert set(kv_models.PARAMETERS) <= set(catalogue())


def test_the_latent_layer_caches_little_and_decodes_the_same():
    rows = dict(kv_models.latent_layer(8).rows)
    assert rows["numbers cached per token"] == "80" and rows["in MHA of the same heads"] == "512"
    assert float(rows["largest difference, plain and absorbed decode"].split()[0]) < 1e-5


# ---------------------------------------------------------------------------------------------- KIVI


def test_the_error_is_that_of_kivis_own_grid(tiny_lm):
    cached = kivi_keys.Cached(tiny_lm, prompt(70))
    x = cached.keys[1, 0, :64].double()
    for by_channel, groups in ((True, x.T.reshape(-1, 32)), (False, x.reshape(64, 1, 16))):
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        step = (high - low) / 3
        rounded = ((groups - low) / step).round() * step + low
        truth = float((rounded - groups).square().sum() / groups.square().sum())
        assert cached.error("keys", by_channel, 2, 1, 0) == pytest.approx(truth, rel=0.02)
    assert cached.error("values", False, 8, 0, 1) < 1e-4 < cached.error("values", False, 2, 0, 1)
    figures, text = cached.view(2, 1, 0)
    assert len(figures) == 2 and f"{100 * cached.error('keys', True, 2, 1, 0):.0f} %" in text


def test_a_stretched_channel_shows_as_a_stripe_and_in_the_error(tiny_lm):
    cached = kivi_keys.Cached(tiny_lm, prompt(64))
    cached.keys[0, 0, :, 3] += 30 * cached.keys[0, 0].std()
    assert cached.error("keys", False, 2, 0, 0) > 3 * cached.error("keys", True, 2, 0, 0)
    z = cells(cached.view(2, 0, 0)[0][0].data[0])
    assert (z.argmax(1) == 3).all()


def test_kivis_settings_are_compared_on_the_real_cache(tiny_lm):
    settings = {"8 bits": KIVI(bits=8, group_size=16), "2 bits": KIVI(bits=2, group_size=16)}
    windows = torch.cat([prompt(128), prompt(128, 1)])
    found = kivi_keys.compare(tiny_lm, windows, 32, 128, settings)
    truth = labkit.divergence(KIVI(bits=2, group_size=16, residual=32)(tiny_lm), tiny_lm, windows)
    assert found[1].kl == pytest.approx(truth.kl) and found[0].kl < found[1].kl / 10
    small = KIVI(bits=2, group_size=16, residual=32)(tiny_lm)
    with torch.inference_mode():
        held = memory.cache_bytes(small.model(prompt(128), use_cache=True).past_key_values)
    assert found[1].share == pytest.approx(held / (128 * memory.kv_per_token(tiny_lm) / 2))
    table = kivi_keys.table(found)
    assert table.rows[1][3] == f"{found[1].share:.2f}" and "measured" in table.caption
    assert list(kivi_keys.bars(found).data[0].x) == ["8 bits", "2 bits"]


# ---------------------------------------------------------------------------------------------- exercises


def test_kv_bytes_per_token(tiny_lm):
    def ask(answer):
        return labkit.check.kv_bytes_per_token(answer, tiny_lm)

    truth = 2 * 2 * 2 * 16 * 4  # layers, keys and values, KV heads, head_dim, bytes
    assert ask(truth) and memory.kv_per_token(tiny_lm) == truth
    assert "besides the keys" in str(ask(truth / 2)) and "How many bytes" in str(ask(truth / 4))
    assert "bits" in str(ask(8 * truth)) and "Multiply" in str(ask(77))
    assert all(str(truth) not in str(ask(a)) for a in (truth / 2, 2 * truth, truth / 4, 8 * truth, 77))


def test_outweighs(tiny_lm):
    weights = RTN(bits=4)(tiny_lm, progress=False).nbytes
    truth = weights / memory.kv_per_token(tiny_lm)

    def ask(answer):
        return labkit.check.outweighs(answer, None, tiny_lm)

    assert ask(truth) and labkit.check.outweighs(2 * truth, 2 * weights, tiny_lm)
    assert "in 4 bits" in str(ask(tiny_lm.nbytes / memory.kv_per_token(tiny_lm)))
    assert "bits and bytes" in str(ask(8 * truth)) and "Fewer" in str(ask(3 * truth)) and "More" in str(ask(truth / 3))


def test_keeps_first(kept):
    held = {p: float(kept.mask(p, 16)[..., 0].float().mean()) for p in kept_policies}
    truth = {p for p, share in held.items() if share >= 0.75}
    assert "StreamingLLM" in truth and "recent only" not in truth

    def ask(answer):
        return labkit.check.keeps_first(answer, kept, 16)

    assert ask(truth)
    assert "never looks" in str(ask(truth | {"recent only"})) and not ask({"recent only"})
    assert not ask(truth - {"StreamingLLM"}) if len(truth) > 1 else True
    assert "kind of answer" in str(ask("LRU"))


def test_kivi_share(short_lm):
    def ask(answer):
        return labkit.check.kivi_share(answer, short_lm)

    values = (896 * 3 + 128 * 32) / (1024 * 32)
    assert ask((3 / 32 + values) / 2)  # keys: all are rounded
    assert "codes alone" in str(ask(2 / 32)) and "not rounded" in str(ask(3 / 32))
    assert "for the values" in str(ask(values)) and not ask(0.5) and not ask(0.01)


# ---------------------------------------------------------------------------------------------- the real model


@pytest.mark.model
def test_what_the_notebook_says_about_the_real_model(lm, still):
    kept = KeptTokens(lm, needle_prompt(lm))
    assert "The secret number is" in "".join(kept.pieces)
    first = kept.attention[:, :, -LAST:, 0].mean()
    assert first > 0.3  # most attention rests on the first token
    shares = {p: float(kept.mask(p, 32)[..., 0].float().mean()) for p in kept.policies}
    assert min(shares[p] for p in ("StreamingLLM", "H2O", "SnapKV")) > 0.8
    assert max(shares[p] for p in ("recent only", "random")) < 0.6
    drawn = {p: float(kept.drawn(p, 32).mean()) for p in kept.policies}
    assert drawn["SnapKV"] > drawn["StreamingLLM"] > drawn["recent only"]


# Codes that the engine's attention reads


def test_a_cache_of_codes_is_timed_beside_fp32():
    found = kv_codes.compare(tiny(), contexts=(8, 24), rounds=2)
    assert [f.context for f in found] == [8, 24]
    for f in found:
        assert f.nbytes == (f.context * 2 * 2 * 2 * 16 * 4, f.context * 2 * 2 * 2 * 16)  # layers, k and v, heads, width
        assert all(t > 0 for t in f.decode + f.prefill) and 0 < f.kl < 0.1
    shown = kv_codes.table(found)
    assert shown.rows[0][0] == "8" and "→" in shown.rows[0][2] and "(measured)" in shown.caption
