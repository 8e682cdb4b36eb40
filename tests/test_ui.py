"""The panel, its sentences and its figures, without a browser. Numbers here are made up; models are not needed."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest

import labkit
from labkit.measure.measurement import Latency, Measurement, Memory, Quality
from labkit.measure.roofline import Accelerator, Roofline
from labkit.method import Knob, Method, Recipe, knob
from labkit.progress import track
from labkit.results import Key, Store
from labkit.ui import controls, plots, svg, words
from labkit.ui.explore import explore
from labkit.ui.panel import Panel, panel
from labkit.ui.static import bundle, page
from labkit.ui.view import view
from labkit.ui.worker import Latest, explain

REPO = Path(__file__).resolve().parents[1]
HASHES = {"manual": "1" * 16, "prose": "2" * 16}


@dataclass(frozen=True)
class Round(Method):
    """Rounds weights."""

    kind = "quantize"
    bits: int = knob(4, low=2, high=8, help="bits per weight")
    group_size: int | None = knob(64, low=8, stops=(32, 64, 128, None), none="one scale per row", help="group")
    symmetric: bool = knob(False, help="zero in the middle")
    clip: float = knob(1.0, low=0.5, high=1.0, step=0.1, help="share of the range")
    order: str = knob("rows", choices=("rows", "columns"), help="order")
    layers: str = knob("all", choices=("all", "q", "k", "v", "o"), help="which layers")
    name: str = knob("plain", help="any word")

    def __call__(self, lm, calib=None, progress=True):
        if self.bits == 7:
            raise ValueError("bits = 7 does not divide anything here: choose another.")
        return Model(self.bits)


@dataclass(frozen=True)
class Plain(Method):
    """Has no knobs."""


@dataclass(frozen=True)
class Evict(Method):
    """Keeps fewer tokens."""

    kind = "cache"


class Model:
    name, fingerprint = "tiny", "f" * 16
    model = SimpleNamespace(modules=list, config=SimpleNamespace(max_position_embeddings=2048))

    def __init__(self, bits=None):
        self.bits = bits


def around(mean: float, spread: float = 0.02) -> list[float]:
    """Eight windows with this mean, in a pattern that two made-up measurements share."""
    return [mean * (1 + spread * step) for step in (-3, 3, -2, 2, -1, 1, 0, 0)]


def text_of(ppl, kl=None, run=None, windows=True, tokens=4096) -> Quality:
    """A text's quality with made-up numbers, and values of eight windows unless ``windows`` is False."""
    by = {"nll": math.log(ppl)} | ({"kl": kl, "top1": 0.76} if kl is not None else {})
    by |= {} if run is None else {"kl_run": run}
    more = {} if kl is None else {"kl": kl, "kl_se": kl / 20, "top1": 0.76, "top1_se": 0.01}
    more |= {} if run is None else {"kl_run": run, "kl_run_se": run / 20}
    known = {name: around(value) for name, value in by.items()} if windows and math.isfinite(ppl) else {}
    return Quality(ppl, 0.5, tokens, **more, per_window=known)


def made(bits=None, *, decode=2.6, prefill=0.8, kl=0.3, run=None, spread=0.05, kv=1_000_000, factor=1.3, **more):
    """A measurement with made-up numbers; ``bits=None`` is the uncompressed model. ``spread``: of the ratios, ±."""
    base = bits is None
    size = 400_000_000 if base else int(400_000_000 * bits / 32)

    def quality(ppl, kl, run):
        return text_of(ppl) if base else text_of(ppl * factor, kl, run)

    def around_ratio(x):
        return None if base or x is None or spread is None else [x - spread, x + spread]

    times = Latency(
        800 if base else 800 / (prefill or 1),
        20,
        512,
        50 if base else 50 / (decode or 1),
        1.0,
        1,
        None if base else prefill,
        None if base else decode,
        around_ratio(prefill),
        around_ratio(decode),
        rounds=15,
    )
    texts = {"manual": quality(15.0, kl, run), "prose": quality(20.0, kl and 2 * kl, run and 2 * run)}
    return replace(
        Measurement(
            "tiny",
            "uncompressed" if base else f"Round(bits={bits})",
            texts,
            Memory(size + 100_000_000, size, 32.0 if base else bits + 0.5, kv, 1000),
            times,
            "cpu",
        ),
        **more,
    )


def as_graph(m, ratio=None, ms=10.0, context=16):
    """The same measurement, timed as one graph too."""
    spread = ratio and [ratio - 0.1, ratio + 0.1]
    engine = Latency(400.0, 10, 512, ms, 0.2, 2, ratio, ratio, spread, spread, context, 15)
    return replace(m, engine=engine, memory=replace(m.memory, engine=70_000_000))


# ------------------------------------------------------------------------------------------------ words


def test_the_sentence_of_a_gain_and_a_loss():
    v = view(Round(bits=4), made(), made(4))
    head, pace, accuracy = v.sentences
    assert head.startswith("At 4 bits with groups of 64, clip 1, order rows, layers all, name plain, ")
    shrunk = "shrink to 12 % of their bytes in fp32, or 25 % of those in 16 bits (modelled), at 4.50 bits per weight, "
    assert f"the linear layers {shrunk}metadata included." in head
    assert pace == (
        "Run eagerly, decode is 2.6x as fast as the uncompressed model; prefill is slower: 0.80x the speed of the "
        "uncompressed model."
    )
    assert "KL grows from 0 to 0.30 on the manual and 0.60 on the prose" in accuracy
    assert (
        "perplexity goes from 15.0 to 19.5 on the manual (worse) and from 20.0 to 26.0 on the prose (worse)" in accuracy
    )
    assert "the same in 76 % of places" in accuracy


@pytest.mark.parametrize(
    "speed, spread, says",
    [
        (2.6, 0.1, "decode is 2.6x as fast as the uncompressed model"),
        (1.02, 0.01, "decode is 1.02x as fast"),  # a small gain in every other round is a gain
        (1.10, 0.2, "decode is no faster than the uncompressed model: 1.10x (quartiles 0.90 to 1.30)"),
        (0.97, 0.2, "decode is no faster than the uncompressed model: 0.97x"),
        (1.004, 0.001, "decode is no faster than the uncompressed model: 1.00x"),
        (0.5, 0.1, "decode is slower: 0.50x the speed of the uncompressed model"),
        (1.02, None, "decode is no faster than the uncompressed model: 1.02x;"),  # a row without quartiles
        (1.10, None, "decode is 1.10x as fast"),
        (None, 0.1, "decode takes 50.0 ms per token (not timed beside"),
    ],
)
def test_direction_is_told_by_the_quartiles_of_the_ratio(speed, spread, says):
    assert says in words.latency(made(4, decode=speed, spread=spread)).lower()


def test_a_graph_is_compared_with_a_graph():
    base, m = as_graph(made(), ms=12.0), as_graph(made(4), 2.1, ms=12 / 2.1)
    assert words.latency(m).endswith("run as one graph, decode is 2.1x as fast as the uncompressed graph.")
    figure = view(Round(), base, m).latency
    assert {n.text for n in figure.layout.annotations} == {"0.80x", "2.1x", "2.6x"}
    compressed = figure.data[3]
    assert compressed.x == ("eager", "graph") and compressed.y[1] == pytest.approx(12 / 2.1)
    assert "2.10x (2.00 to 2.20) the speed of the uncompressed model, one graph too" in compressed.hovertext[1]
    table = rows_of(view(Round(), base, m).table)
    assert table["decode speed, one graph"][1:] == ["2.10x (2.00 to 2.20)", table["decode speed, one graph"][2]]
    assert "one graph too, in turns; 15 rounds" in table["decode speed, one graph"][2]
    assert table["threads, eager"][:2] == ["1", "1"] and table["threads, one graph"][:2] == ["2", "2"]
    assert (
        table["decode speed against 16 bits"][1] == "at least 1.05x"
        and "modelled" in table["decode speed against 16 bits"][2]
    )


def test_a_method_that_its_graph_does_not_read_packed_has_no_time_as_one():
    """The uncompressed graph's bar stands alone, and the reason is said."""
    note = "As one graph its weights would be fp32 again, so it is not timed as one."
    base, m = as_graph(made()), made(4, notes=[note])
    v = view(Round(), base, m)
    assert note in v.sentences and "one graph, decode" not in v.sentence
    assert v.latency.data[1].y[1] is None and v.latency.data[0].y[1] == 400.0
    assert rows_of(v.table)["decode after 16 tokens, one graph"][1] == "–"
    assert "decode speed, one graph" not in v.table
    assert note in str(m) and note in m._repr_html_()


def rows_of(table: str) -> dict[str, list[str]]:
    """The rows of an HTML table: first cell -> the others."""
    rows = ElementTree.fromstring(table).findall(".//tr")
    return {r[0].text: [cell.text for cell in r[1:]] for r in rows}


def test_missing_latency_and_missing_kl_are_said():
    m = made(4, kl=None, latency=None)
    v = view(Round(), made(latency=None), m)
    assert "Latency was not measured." in v.sentences
    assert "KL" not in v.sentence and "perplexity goes from 15.0" in v.sentence.lower()
    assert "KL" not in v.table and "prefill" not in v.table and "threads" not in v.table
    assert "not measured" in v.latency.to_json()


def test_kl_whose_interval_reaches_0_does_not_grow():
    unsure = replace(text_of(15.0, 0.01), per_window={"kl": [0.06, 0.0, 0.0, 0.0, 0.0, 0.0, 0.01, 0.01]})
    text = words.accuracy(made(), made(4, quality={"manual": unsure, "prose": text_of(20.0, 0.01)}))
    assert "KL grows from 0 to 0.010 on the prose (nats per token); KL is 0.010 on the manual: cannot tell" in text
    assert "its interval reaches 0" in text
    one = replace(text_of(15.0, 0.2), per_window={"kl": [0.2]})
    assert "cannot tell whether it grows (one window has no interval)" in words.accuracy(
        made(), made(4, quality={"manual": one})
    )
    nothing = words.accuracy(made(), made(8, kl=1e-6, factor=1.0))
    assert nothing.startswith("KL is 0 on the manual and 0 on the prose; ") and "grows" not in nothing


def test_rows_without_values_by_window_say_so():
    old = made(4, quality={"manual": text_of(19.5, 0.3, windows=False)})
    assert "KL is 0.30 on the manual: cannot tell whether it grows (no values by window)" in words.accuracy(made(), old)
    assert "→ 0.30 (cannot tell (no values by window))" not in words.step(Round(), made(), old, Round(bits=8), made(8))
    assert "→ 0.30 (cannot tell: no values by window)" in words.step(Round(), made(), old, Round(bits=8), made(8))


def test_kl_as_run_stands_beside_kl():
    m = made(4, kl=0.3, run=0.4)
    v = view(Round(), made(), m)
    assert (
        "as run by one graph, with activations rounded to 8 bits too, KL is 0.40 on the manual and 0.80 on"
        in v.sentence
    )
    assert [t.name for t in v.accuracy.data] == ["uncompressed", "compressed", "compressed", "as run"]
    assert v.accuracy.data[3].y == (0.4, 0.8) and v.accuracy.data[3].error_y.array == (0.02, 0.04)
    table = rows_of(v.table)
    assert table["KL on manual"][1] == "0.3000 ± 0.0150" and table["KL as run on manual"][1] == "0.4000 ± 0.0200"
    assert "as run" not in view(Round(), made(), made(4)).sentence


def test_perplexity_is_judged_window_by_window():
    """±0.5 around 15.0 and 15.2 overlap; the differences leave no doubt."""
    close = {t: text_of(p * 1.013, 0.01) for t, p in (("manual", 15.0), ("prose", 20.0))}
    text = words.accuracy(made(), made(4, quality=close))
    assert "perplexity goes from 15.0 to 15.2 on the manual (worse)" in text


def test_tokens_read_under_a_cache_method_are_not_compared_with_all():
    half = {"manual": text_of(30.0, 0.1, tokens=2048)}
    text = words.accuracy(made(), made(4, quality=half))
    assert "perplexity goes to 30.0 on the manual (over 2,048 of its 4,096 tokens)" in text and "15.0" not in text
    assert "KL grows from 0 to 0.10 on the manual" in text  # whose reference is 0 on every token


def test_a_broken_model_is_called_broken_and_does_not_break_the_figure():
    m = made(2, factor=math.inf)
    v = view(Round(bits=2), made(), m)
    assert "perplexity is infinite on the manual and infinite on the prose: the model is broken" in v.sentence
    assert v.accuracy.data[1].y == (None, None)
    svg.draw(*v.figures)


def test_bytes_that_grow_or_stay_and_the_kv_cache():
    grown = words.memory(Round(bits=8), made(4), made(8))
    assert "grow to 200 % of their bytes in fp32" in grown
    assert "as many bytes as before" in words.memory(Round(), made(4), made(4))
    less = words.memory(Round(), made(), made(4, kv=250_000))
    assert "the KV cache of 1,000 tokens holds 0.25 MB, 25 % of the uncompressed model's" in less
    elsewhere = made(4, kv=250_000)
    elsewhere = replace(elsewhere, memory=replace(elsewhere.memory, kv_tokens=2048))
    apart = words.memory(Round(), made(), elsewhere)
    assert "of 2,048 tokens holds 0.25 MB (the uncompressed model's was weighed at 1,000 tokens)" in apart
    v = view(Round(), made(), elsewhere)
    assert v.memory.data[2].y == (0.0, 0.0) and "without any cache" in v.memory.layout.yaxis.title.text
    assert rows_of(v.table)["KV cache of 2,048 tokens"][:2] == ["–", "0.2"]


def test_a_16_bit_model_is_its_own_baseline():
    def half(m):
        return replace(m, memory=replace(m.memory, bits_before=16))

    text = words.memory(Round(), half(made()), half(made(4)))
    assert "shrink to 12 % of their bytes, at 4.50 bits" in text and "modelled" not in text
    v = view(Round(), half(made()), half(made(4)))
    assert [t.name for t in v.memory.data] == ["linears", "other", "KV cache"]
    assert rows_of(v.table)["share of 16-bit weights"] == ["200", "28", "%"]
    assert "against 16 bits" not in v.table


def test_what_was_left_alone_is_named():
    m = made(4)
    some = replace(m, memory=replace(m.memory, compressed=0.44, left=["model.layers.*.mlp.experts.down_proj", "b"]))
    says = "Only 44 % of the decoder's weights were compressed; left as they were: model.layers.*.mlp.experts.down_proj and b."
    assert says in view(Round(), made(), some).sentences
    assert rows_of(view(Round(), made(), some).table)["decoder's weights compressed"][1] == "44"
    assert words.left(Round(), m) == "" and words.left(Evict(), some) == ""  # a cache method touches no weight
    assert words.left(Recipe(Evict(), Round()), some).startswith("Only 44 %")


def test_a_cache_is_timed_where_it_evicts():
    """Decoded after 1,024 tokens, and the bar beside it is the uncompressed model's after as many."""
    long = made(4, latency=replace(made(4).latency, context=1024, decode_ms=40.0, decode_ratio=1.5))
    assert words.latency(long).startswith("Run eagerly, after 1,024 tokens, decode is 1.50x as fast")
    figure = view(Evict(), made(), long).latency
    assert figure.data[2].y == (60.0,) and figure.data[3].y == (40.0,)  # 40 ms at 1.5x, not the 50 ms after 16 tokens
    assert "from the run in turns" in figure.data[2].hovertext[0]
    assert "after 1,024" in figure.layout.yaxis2.title.text
    table = rows_of(view(Evict(), made(), long).table)
    assert table["decode after 16 tokens, eager"][:2] == ["50.0 ± 1.0", "–"]
    assert table["decode after 1,024 tokens, eager"][:2] == ["–", "40.0 ± 1.0"]
    assert words.drift(made(), long) == ""  # times at two lengths say nothing about the machine


def test_before_and_after():
    v = view(Round(bits=4), made(), made(4), before=(Round(bits=8), made(8, decode=1.5, kl=0.01)))
    last = v.sentences[-1]
    assert last.startswith("Compared with 8 bits") and "decode 1.50x → 2.6x" in last
    assert "KL on the manual 0.010 → 0.30 (worse)" in last and "linear layers 25 % → 12 %" in last
    back = view(Round(bits=8), made(), made(8, kl=0.01), before=(Round(bits=4), made(4, kv=250_000)))
    assert "0.30 → 0.010 (better)" in back.sentences[-1]
    assert "KV cache of 1,000 tokens 0.25 → 1.00 MB" in back.sentences[-1]
    assert "<th" in v.table and "before" in v.table
    same = view(Round(bits=4), made(), made(4), before=(Round(bits=4), made(4)))
    assert "Compared" not in same.sentence and "before" not in same.table


def test_a_drifting_machine_is_noticed():
    assert words.drift(made(), made(4)) == ""
    slow = made(latency=replace(made().latency, decode_ms=80.0))
    assert "Trust the ratios" in words.drift(slow, made(4))
    assert "Trust the ratios" in view(Round(), slow, made(4)).sentence


def test_the_question_follows_the_hand():
    assert words.question(Round()).startswith("Predict: if you move bits from 4 to 3, will decode get faster or slower")
    assert "bits from 4 to 5" in words.question(Round(), "bits", upward=True)
    assert "bits from 2 to 3" in words.question(Round(bits=2), "bits", upward=False)  # turns at the end
    assert "group_size from 128 to one scale per row" in words.question(Round(group_size=128), "group_size", True)
    assert words.question(Round(group_size=40), "group_size").startswith("Predict: will decode")  # between two stops
    assert words.waiting(Round()).startswith("Predict, before the answer comes: at 4 bits with groups of 64, ")
    assert words.waiting(Plain()).startswith("Predict, before the answer comes: with Plain, what will change")
    assert words.question(Plain()) == f"Predict: {words.OTHERWISE}"


def test_recipes_and_knobless_methods_have_words():
    assert words.describe(Recipe(Round(bits=3), Plain())).startswith("Round (3 bits with groups of 64")
    assert words.describe(Recipe(Round(), Plain())).endswith("), then Plain")
    assert words.memory(Plain(), made(), made(4)).startswith("With Plain, the linear layers shrink")


@pytest.mark.parametrize(
    "x, text",
    [
        (0.00001, "0"),
        (0.0042, "0.0042"),
        (0.02, "0.020"),
        (0.3, "0.30"),
        (15.26, "15.3"),
        (586.1, "586"),
        (1e5, "100,000"),
    ]
    + [(math.nan, "not a number"), (math.inf, "infinite")],
)
def test_numbers_are_short(x, text):
    assert words.short(x) == text


def test_where_numbers_come_from():
    class Found:
        def __init__(self, here, shipped, machine):
            self.here, self.shipped = here, shipped
            self.key = Key("m", "{}", "Round", "{}", "", machine, "torch 9")

    assert words.source(None, "A") == words.source(Found(True, False, "A"), "A") == "Measured here."
    assert "like this one, shipped" in words.source(Found(True, True, "A"), "A")
    assert "this machine with other versions (torch 9)" in words.source(Found(False, False, "A"), "A")
    other = words.source(Found(False, True, "B"), "A")
    assert "another machine (B), shipped with labkit" in other and "times need not" in other
    assert words.source(None, "A", "simulated") == "Simulated here."


# ------------------------------------------------------------------------------------------------ figures


def test_the_figures_show_the_measurements():
    base, m = made(), made(4)
    v = view(Round(), base, m)
    uncompressed, compressed, kl, run = v.accuracy.data
    assert uncompressed.y == (15.0, 20.0) and compressed.y == (19.5, 26.0) and kl.y == (0.3, 0.6)
    assert compressed.error_y.array == (0.5, 0.5) and kl.error_y.array == (0.3 / 20, 0.6 / 20)
    assert run.y == (None, None)
    linears, other, cache, half = v.memory.data
    assert linears.y == (400.0, 50.0) and other.y == (100.0, 100.0) and cache.y == (1.0, 1.0)
    assert half.y == (250.5, 250.5) and half.name == "in 16 bits"  # of all that the uncompressed model holds
    assert [b.y[0] for b in v.latency.data] == [800.0, 1000.0, 50.0, 50 / 2.6]
    assert v.latency.data[0].error_y.array == (10.0,)  # half of the interquartile range, up and down
    assert {n.text for n in v.latency.layout.annotations} == {"0.80x as fast", "2.6x as fast"}
    for figure in v.figures:
        assert len(figure.to_json()) < 5000, "a figure must not swell a saved notebook"
        axes = [a for name, a in figure.layout.to_plotly_json().items() if name.startswith("yaxis")]
        assert axes and all(a["title"]["text"] for a in axes)


def test_a_view_without_a_measurement_shows_the_uncompressed_model():
    v = view(Round(), made())
    assert "Not measured yet" in v.sentence
    assert v.accuracy.data[0].y == (15.0, 20.0) and v.accuracy.data[1].y == (None, None)
    assert v.table.count("<th style") == 1
    svg.draw(*v.figures)


def test_perplexity_goes_logarithmic_only_when_it_must():
    assert view(Round(), made(), made(4)).accuracy.layout.yaxis.type != "log"
    wild = view(Round(), made(), made(2, factor=1000)).accuracy.layout.yaxis
    assert wild.type == "log" and "log scale" in wild.title.text
    assert 10 ** wild.range[0] < 15 and 10 ** wild.range[1] > 20000


def test_axes_hold_still_between_settings():
    one, two = (view(Round(), made(), made(b, kl=k)) for b, k in ((8, 0.01), (4, 0.2)))
    for a, b in zip(one.figures[:2], two.figures[:2]):
        assert a.layout.yaxis.range == b.layout.yaxis.range


def test_the_table_escapes_and_counts():
    odd = "<b>&"
    base = made(quality={odd: text_of(15.0)})
    v = view(Round(), base, made(4, quality={odd: text_of(16.0, 0.1)}))
    assert "<b>&" not in v.table and "&lt;b&gt;&amp;" in v.table
    rows = ElementTree.fromstring(v.table.replace("&nbsp;", " ")).findall(".//tr")
    assert {len(r) for r in rows} == {4}


def test_roofline_is_a_roofline():
    roof = Roofline("this machine", 10e9, {"fp32": 80e9, "bf16": 40e9}, "measured")
    others = {
        "a": Accelerator("A card", 1e12, {"bf16": 100e12}, "modelled"),
        "b": Accelerator("B chip", 1e11, {}, "modelled"),  # no peak is published
    }
    dots = [
        {"name": "decode", "intensity": 0.5, "speed": 4e9, "group": "decode"},
        {"name": "prefill", "intensity": 200, "speed": 40e9, "group": "prefill", "note": "512 tokens"},
    ]
    figure = plots.roofline(roof, dots, others)
    lines = {
        t.name if "measured" in t.name else t.hovertext[0].split("<br>")[0]: t for t in figure.data if t.mode == "lines"
    }
    mine = lines["fp32 (measured)"]
    assert 8.0 in mine.x and mine.y[mine.x.index(8.0)] == 80.0  # the ridge: 80 GFLOP/s over 10 GB/s
    assert all(y == pytest.approx(min(80, 10 * x)) for x, y in zip(mine.x, mine.y))
    assert "limited by memory" in mine.hovertext[0] and "limited by arithmetic" in mine.hovertext[-1]
    unknown = lines["B chip, bandwidth alone (modelled)"]
    assert all(y == pytest.approx(100 * x) for x, y in zip(unknown.x, unknown.y))
    assert "A card, bf16 (modelled)" in lines
    decode, prefill = (t for t in figure.data if t.mode != "lines")
    assert decode.y == (4.0,) and "80 % of what the roof allows (fp32)" in decode.hovertext[0]
    assert "512 tokens" in prefill.hovertext[0] and "50 %" in prefill.hovertext[0]
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"
    assert [t.showlegend for t in figure.data[:2]] == [True, False]  # one entry for all the grey lines
    text = svg.draw(figure, width=800, height=460)
    assert "A card" in text and "ridge: 8 FLOP/byte" in text
    assert plots.roofline(roof, {"one": (1.0, 5e9)}).data[-1].text == ("one",)


def test_labels_are_pushed_apart_in_their_order():
    places = plots._apart({"low": 10.0, "a": 1000.0, "b": 990.0, "c": 1001.0}, gap=0.2, top=2.9)
    assert list(places) == ["c", "a", "b", "low"]
    assert list(places.values()) == pytest.approx([2.9, 2.7, 2.5, 1.0])


def test_histogram_counts_here_and_not_in_the_page():
    numbers = np.random.default_rng(0).normal(size=50_000)
    figure = plots.histogram({"w": numbers, "w rounded": np.round(numbers)}, "weight", bins=40)
    assert all(sum(t.y) == pytest.approx(1, abs=2e-3) and len(t.x) == 40 for t in figure.data)
    assert len(figure.to_json()) < 8000
    with pytest.raises(ValueError, match="no series may be empty"):
        plots.histogram({"w": []}, "weight")
    assert sum(plots.histogram({"w": [1.0, math.nan, 3.0]}, "w", bins=2).data[0].y) == pytest.approx(1)


# ------------------------------------------------------------------------------------------------ svg


def heights(text: str) -> list[float]:
    """Heights of the bars in an SVG, in drawing order."""
    root = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    return [
        float(r.get("height")) for r in root.iter(f"{space}rect") if r.get("class") is None and r.get("height") != "9"
    ]


def test_svg_bars_are_as_tall_as_their_numbers():
    text = svg.draw(plots.bars({"a": {"x": 10.0, "y": 5.0}, "b": {"x": 2.5, "y": 20.0}}, unit="ms"))
    a, b, c, d = heights(text)
    assert [a / d, b / d, c / d] == pytest.approx([0.5, 0.25, 0.125], abs=0.01)
    stacked = plots.bars({"a": {"x": 10.0}, "b": {"x": 5.0}}, unit="MB", stacked=True)
    a, b = heights(svg.draw(stacked))
    assert a / b == pytest.approx(2, abs=0.05)
    log = plots.bars({"a": {"x": 10.0, "y": 100.0, "z": 1000.0}}, unit="ppl", log=True)
    a, b, c = heights(svg.draw(log))
    assert c - b == pytest.approx(b - a, abs=0.3)  # equal ratios, equal steps


def test_svg_is_valid_small_and_readable_in_both_themes():
    v = view(Round(), made(), made(4))
    text = svg.draw(*v.figures, label=v.sentence)
    ElementTree.fromstring(text)
    assert len(text) < 11_000
    assert "prefers-color-scheme:dark" in text and "class='bg' fill='#fff'" in text
    assert ElementTree.fromstring(text).get("fill") == "#3b3b3b"  # where styles are stripped: dark text on white
    for shown in ("Accuracy", "Memory", "Latency", "2.6x as fast", "perplexity", "ms per token", "19.5", "0.30"):
        assert shown in text, shown
    odd = plots.lines({"<a> & b": ([1, 2], [3, math.nan])}, "x <", "y &", logx=True, logy=True)
    ElementTree.fromstring(svg.draw(odd))
    with pytest.raises(ValueError, match="at least one figure"):
        svg.draw()


@pytest.mark.parametrize(
    "span, log, ticks",
    [
        ((0, 10), False, [0, 2, 4, 6, 8, 10]),
        ((0, 0.5), False, [0, 0.1, 0.2, 0.3, 0.4, 0.5]),
        ((0, 2), True, [1, 2, 5, 10, 20, 50, 100]),
        ((-1, 3), True, [0.1, 1, 10, 100, 1000]),
    ],
)
def test_ticks_are_round_numbers(span, log, ticks):
    assert svg._ticks(span, log, 5) == pytest.approx(ticks)


def test_a_bundle_has_both_forms():
    figure = plots.lines({"a": ([1, 2], [3, 4])}, "batch", "tokens/s", title="Speed")
    forms = bundle(figure)
    assert forms["application/vnd.plotly.v1+json"]["data"][0]["y"] == [3.0, 4.0]
    assert forms["image/svg+xml"].startswith("<svg") and forms["text/plain"] == "Speed"


# ------------------------------------------------------------------------------------------------ controls


def test_every_knob_type_has_its_control():
    kinds = {name: type(controls.control(k, k.default)).__name__ for name, k in Round.knobs().items()}
    assert kinds == {
        "bits": "SelectionSlider",
        "group_size": "SelectionSlider",
        "symmetric": "Checkbox",
        "clip": "SelectionSlider",
        "order": "ToggleButtons",
        "layers": "Dropdown",
        "name": "Text",
    }


def test_controls_give_back_what_they_were_given():
    for name, k in Round.knobs().items():
        for value in k.positions():
            widget = controls.control(k, value)
            assert controls.read(widget) == value, name
            assert widget.tooltip == k.help
    groups = Round.knobs()["group_size"]
    widget = controls.control(groups, None)
    assert widget.label == "one scale per row" and controls.read(widget) is None
    controls.write(widget, 32)
    assert controls.read(widget) == 32
    controls.write(widget, None)
    assert controls.read(widget) is None


def test_a_start_between_two_positions_is_added():
    widget = controls.control(Round.knobs()["group_size"], 48)
    assert [label for label, _ in widget.options] == ["32", "48", "64", "128", "one scale per row"]
    beyond = controls.control(Round.knobs()["group_size"], 500)
    assert [label for label, _ in beyond.options][-2:] == ["500", "one scale per row"]


# ------------------------------------------------------------------------------------------------ worker


def test_latest_wins_and_nothing_else_is_told():
    worker, told = Latest(wait=1.0, exclusive=False), []  # long beside five submits, also on a busy machine
    for i in range(5):
        worker.submit(lambda i=i: i, told.append, told.append)
    assert worker.join(60) and told == [4]


def test_cancel_stops_a_running_job_at_its_next_step():
    worker, steps, told = Latest(wait=0.0), [], []

    def job():
        for i in track(range(100_000), "counting"):
            steps.append(i)
            time.sleep(0.005)

    worker.submit(job, told.append, told.append)
    while len(steps) < 3:
        time.sleep(0.005)
    worker.cancel()
    assert worker.join(60) and not worker.busy
    assert len(steps) < 100_000 and told == []


def test_two_measurements_never_overlap():
    running, most = [0], [0]

    def job():
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.1)
        running[0] -= 1

    workers = [Latest(wait=0.0) for _ in range(3)]
    for w in workers:
        w.submit(job, lambda _: None, lambda e: None)
    assert all(w.join(60) for w in workers) and most == [1]


def test_errors_are_explained():
    assert explain(ValueError("bits = 9 is too many")) == "bits = 9 is too many."
    assert explain(KeyError("x")) == "KeyError: 'x'."
    assert explain(ValueError()) == "ValueError: no message."


# ------------------------------------------------------------------------------------------------ panel


class Bench:
    """Stands in for ``labkit.measure``: counts its calls, may wait, makes numbers up."""

    def __init__(self):
        self.calls, self.gate = [], threading.Event()
        self.gate.set()

    def __call__(self, lm, against=None, **how):
        self.calls.append(lm.bits)
        for _ in track(range(500), "measuring"):
            if self.gate.wait(0.01):
                break
        assert self.gate.is_set()
        return made(lm.bits, latency=None) if not how["latency"] else made(lm.bits)


@pytest.fixture
def bench():
    return Bench()


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    return Store(tmp_path / "results.sqlite")


@pytest.fixture
def make(store, bench):
    """A panel on a store that holds the uncompressed model, 8, 4 and 3 bits."""
    store.put(Key.of(Model(), None, HASHES), made())
    for bits in (8, 4, 3):
        store.put(Key.of(Model(), Round(bits=bits), HASHES), made(bits, kl=1 / bits))
    opened = []

    def make(**start):
        opened.append(Panel(Round, Model(), store, start=start, measure=bench, hashes=HASHES))
        opened[-1].worker.wait = 0.02
        return opened[-1]

    yield make
    bench.gate.set()
    for one in opened:
        one.worker.cancel()
        assert one.worker.join(20)


def shown(panel) -> list[dict]:
    """The plotly figures that the page has."""
    return [o.outputs[0]["data"]["application/vnd.plotly.v1+json"] for o in panel.stage.children]


def test_a_moved_slider_is_answered_from_the_store(make, bench):
    panel = make()
    assert "At 4 bits" in panel.sentence.value and "if you move bits from 4 to 3" in panel.ask.value
    assert shown(panel)[0]["data"][2]["y"] == [0.25, 0.5]
    panel.controls["bits"].value = 8
    assert "At 8 bits" in panel.sentence.value and "Compared with 4 bits" in panel.sentence.value
    assert "if you move bits from 8 to 7" in panel.ask.value  # at the end of the slider it turns
    assert shown(panel)[0]["data"][2]["y"] == [0.125, 0.25]
    assert "before" in panel.table.value
    assert panel.last_answer_ms > 0 and f"nswered in {panel.last_answer_ms:.0f} ms from the store" in panel.status.value
    assert bench.calls == [] and panel.measure_button.layout.display == "none"


def test_reset_goes_back_in_one_step(make, bench):
    panel = make(bits=3)
    panel.controls["bits"].value = 8
    panel.reset()
    assert panel.method() == Round(bits=3) and "At 3 bits" in panel.sentence.value and bench.calls == []


def test_a_miss_is_measured_and_kept(make, bench, store):
    panel = make()
    bench.gate.clear()
    panel.controls["bits"].value = 2
    assert "Not in the store yet" in panel.sentence.value and "still show 4 bits" in panel.sentence.value
    assert panel.working.layout.display == "flex" and "before the answer comes: at 2 bits" in panel.ask.value
    while "measuring" not in panel.progress_text.value:
        time.sleep(0.01)
    assert 0 <= panel.bar.value < 1
    bench.gate.set()
    assert panel.worker.join(60)
    assert "At 2 bits" in panel.sentence.value and "Measured just now" in panel.status.value
    assert panel.working.layout.display == "none" and bench.calls == [2]
    assert store.get(Key.of(Model(), Round(bits=2), HASHES)) == made(2)


def test_the_store_answers_while_something_is_measured(make, bench, store):
    panel = make()
    bench.gate.clear()
    panel.controls["bits"].value = 2
    while not bench.calls:
        time.sleep(0.01)
    panel.controls["bits"].value = 3
    assert "At 3 bits" in panel.sentence.value and panel.working.layout.display == "none"
    assert panel.worker.join(60)
    assert "At 3 bits" in panel.sentence.value
    assert store.get(Key.of(Model(), Round(bits=2), HASHES)) is None


def test_only_the_last_of_several_moves_is_measured(make, bench):
    panel = make()
    panel.worker.wait = 1.0
    for bits in (5, 6, 2):
        panel.controls["bits"].value = bits
    assert panel.worker.join(60)
    assert bench.calls == [2] and "At 2 bits" in panel.sentence.value


def test_cancel_keeps_the_figures_and_offers_to_measure(make, bench):
    panel = make()
    figures = shown(panel)
    bench.gate.clear()
    panel.controls["bits"].value = 2
    while not bench.calls:
        time.sleep(0.01)
    panel.cancel_button.click()
    assert panel.sentence.value.count("Cancelled: 2 bits") == 1 and "still show 4 bits" in panel.sentence.value
    assert panel.worker.join(60) and shown(panel) == figures
    assert panel.measure_button.layout.display is None
    bench.gate.set()
    panel.measure_button.click()
    assert panel.worker.join(60) and "At 2 bits" in panel.sentence.value


def test_an_error_is_one_sentence(make):
    panel = make()
    panel.controls["bits"].value = 7
    assert panel.worker.join(60)
    assert "bits = 7 does not divide anything here" in panel.sentence.value and "labkit-error" in panel.sentence.value
    assert isinstance(panel.error, ValueError) and panel.working.layout.display == "none"
    panel.controls["bits"].value = 8
    assert "At 8 bits" in panel.sentence.value and panel.error is None


def test_a_store_that_cannot_be_read_is_a_sentence_too(make, monkeypatch):
    panel = make()
    monkeypatch.setattr(panel.store, "find", lambda key: (_ for _ in ()).throw(OSError("the disk is gone")))
    panel.controls["bits"].value = 8
    assert "the disk is gone." in panel.sentence.value


def test_the_baseline_is_measured_first_where_it_is_missing(store, bench):
    panel = Panel(Round, Model(), store, measure=bench, hashes=HASHES)
    assert panel.worker.join(20)
    assert bench.calls == [None, 4] and "At 4 bits" in panel.sentence.value
    assert store.get(Key.of(Model(), None, HASHES)) == made()


def test_rows_from_another_machine_say_so_and_can_be_measured_here(store, bench):
    for method, m in ((None, made()), (Round(), made(4))):
        store.put(replace(Key.of(Model(), method, HASHES), machine="a far machine"), m)
    panel = Panel(Round, Model(), store, measure=bench, hashes=HASHES)
    assert "another machine (a far machine)" in panel.status.value and bench.calls == []
    assert shown(panel)[2]["data"][0]["y"] == [800.0]  # both from there: comparable
    assert panel.measure_button.layout.display is None
    panel.measure_button.click()
    assert panel.worker.join(60) and bench.calls == [None, 4]
    assert "Measured here." in panel.status.value and panel.measure_button.layout.display == "none"


def test_times_of_two_machines_are_never_drawn_side_by_side(store, bench):
    store.put(replace(Key.of(Model(), None, HASHES), machine="one"), made())
    store.put(replace(Key.of(Model(), Round(), HASHES), machine="two"), made(4))
    panel = Panel(Round, Model(), store, measure=bench, hashes=HASHES)
    uncompressed, compressed = shown(panel)[2]["data"][:2]
    assert uncompressed["y"] == [None] and compressed["y"] == [1000.0]
    assert shown(panel)[0]["data"][0]["y"] == [15.0, 20.0]


def test_panel_measures_with_labkit_and_the_texts_it_was_given(store, monkeypatch):
    pytest.importorskip("labkit.measure.reading")
    asked = []

    def hashes(lm, texts, windows, length, prompt):
        asked.append((texts, windows, length, prompt))
        return HASHES

    def measure(lm, against=None, **how):
        asked.append(how)
        return made(lm.bits)

    monkeypatch.setattr(sys.modules["labkit.sweep"], "text_hashes", hashes)
    monkeypatch.setattr(sys.modules["labkit.measure"], "measure", measure)
    widget = panel(Round, Model(), store, texts=("manual",), windows=3, length=128, latency=False, bits=8)
    assert widget.worker.join(60) and "At 8 bits" in widget.sentence.value
    how = {"texts": ("manual",), "windows": 3, "length": 128, "latency": False, "prompt": 0}
    assert asked == [(("manual",), 3, 128, 0), how, how]


def test_a_panel_of_a_cache_method_reads_texts_that_are_long_enough(store, monkeypatch):
    """And the uncompressed model is scored on the same tokens: those after the prompt."""
    pytest.importorskip("labkit.measure.reading")
    asked = []
    monkeypatch.setattr(
        sys.modules["labkit.sweep"], "text_hashes", lambda lm, texts, **how: asked.append(how) or HASHES
    )
    monkeypatch.setattr(
        sys.modules["labkit.measure"], "measure", lambda lm, against=None, **how: asked.append(how) or made()
    )
    monkeypatch.setattr(labkit.SnapKV, "__call__", lambda method, lm, calib=None: lm)
    widget = panel(labkit.SnapKV, Model(), store, latency=False)
    assert widget.worker.join(60) and widget.error is None
    long = {"windows": 4, "length": 1024, "prompt": 512}
    assert asked == [long, *[{"texts": ("manual", "prose"), "latency": False} | long] * 2]


def test_a_bad_start_is_refused(store, bench):
    with pytest.raises(ValueError, match=r"Round.bits = 9 is not allowed: it must be a whole number from 2 to 8"):
        Panel(Round, Model(), store, start={"bits": 9}, measure=bench, hashes=HASHES)
    with pytest.raises(ValueError, match="Round has no knob 'bitz': it has bits, group_size"):
        panel(Round, Model(), store, bitz=4)


def test_without_latency_nothing_is_timed(store, bench):
    panel = Panel(Round, Model(), store, {"latency": False}, measure=bench, hashes=HASHES)
    assert panel.worker.join(60) and "Latency was not measured." in panel.sentence.value
    timed = Panel(Round, Model(), store, measure=bench, hashes=HASHES)  # the rows are there, but without times
    assert "Latency was not measured." in timed.sentence.value and timed.measure_button.layout.display is None


def test_the_saved_output_falls_back_to_words_and_table(make):
    forms = make()._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in forms
    assert "At 4 bits" in forms["text/html"] and "<table" in forms["text/html"] and "At 4 bits" in forms["text/plain"]
    assert len(json.dumps(forms)) < 20_000


@pytest.fixture
def displayed(monkeypatch):
    """Every MIME form that was displayed since the last call: ``displayed() -> {mime: data}``."""
    seen: dict = {}
    monkeypatch.setattr("IPython.display.display", lambda data, raw: seen.update(data))

    def take() -> dict:
        taken = dict(seen)
        seen.clear()
        return taken

    return take


def test_the_static_twin_of_panel_and_view(make, monkeypatch, bench, displayed):
    panel = make()
    panel.static()
    forms = displayed()
    assert set(forms) == {"text/html", "image/svg+xml", "text/plain"}
    assert page(panel.view) == forms["text/html"] and "2.6x as fast" in forms["image/svg+xml"]
    panel.view._ipython_display_()
    assert displayed() == forms

    monkeypatch.setenv("LABKIT_STATIC", "1")
    fixed = make(bits=2)  # measured in the foreground, no thread, no widget on the page
    assert bench.calls == [2] and "At 2 bits" in fixed.view.sentence and not fixed.worker.busy
    fixed._ipython_display_()
    assert "At 2 bits" in displayed()["text/html"]
    with pytest.raises(ValueError, match="bits = 7 does not divide"):
        make(bits=7)


# ------------------------------------------------------------------------------------------------ explore


def curve(batch, log=False):
    if batch == 16:
        raise ValueError("batch = 16 is too many")
    return plots.lines({"a": ([1, 2], [batch, 2 * batch])}, "threads", "tokens/s", logy=log), f"Batch {batch}."


def test_explore_runs_a_pure_function():
    box = explore(curve, start={"batch": 2}, help={"batch": "sequences"}, batch=[1, 2, 4, 16], log=False)
    assert box.figures[0].data[0].y == (2, 4) and "Batch 2." in box.sentence.value
    box.controls["batch"].value = 4
    assert box.worker.join(60)
    assert box.figures[0].data[0].y == (4, 8) and shown(box)[0]["data"][0]["y"] == [4, 8]
    assert box.last_answer_ms > 0
    box.controls["log"].value = True
    assert box.worker.join(60) and box.figures[0].layout.yaxis.type == "log"
    box.controls["batch"].value = 16
    assert box.worker.join(60)
    assert "batch = 16 is too many." in box.sentence.value and box.figures[0].data[0].y == (4, 8)


def test_explore_takes_views_knobs_mappings_and_lists():
    box = explore(
        lambda method, bits, which, group: view(Round(bits=bits), made(), made(bits)),
        method=["RTN", "GPTQ"],
        bits=Round.knobs()["bits"],
        which={"small": 1, "none": None},
        group=Knob("group", bool, True),
    )
    names = [type(c).__name__ for c in box.controls.values()]
    assert names == ["ToggleButtons", "SelectionSlider", "SelectionSlider", "Checkbox"]
    assert len(box.figures) == 3 and "<table" in box.table.value
    controls.write(box.controls["which"], None)
    assert box.values() == {"method": "RTN", "bits": 4, "which": None, "group": True} and box.worker.join(60)


def test_explore_refuses_what_it_cannot_show():
    with pytest.raises(ValueError, match="no setting size; its settings are batch"):
        explore(curve, start={"size": 1}, batch=[1])
    with pytest.raises(ValueError, match="batch = 3 is not one of"):
        explore(curve, start={"batch": 3}, batch=[1, 2])
    with pytest.raises(ValueError, match="batch has no positions"):
        explore(curve, batch=[])
    box = explore(lambda batch: batch, batch=[1])
    assert "returned int, not a plotly figure" in box.sentence.value


def test_explore_has_a_static_twin(displayed):
    explore(curve, batch=[1, 2]).static()
    forms = displayed()
    assert "Batch 1." in forms["text/html"] and "tokens/s" in forms["image/svg+xml"]


# ------------------------------------------------------------------------------------------------ without widgets


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_core_does_not_import_widgets():
    names = "import sys, labkit; print([m for m in ('ipywidgets', 'plotly', 'anywidget') if m in sys.modules])"
    assert run(names).strip() == "[]"


@pytest.mark.parametrize("package, module", [("ipywidgets", "labkit.ui.panel"), ("plotly", "labkit.ui.view")])
def test_a_missing_package_is_named(package, module):
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        f"try:\n    import {module}\nexcept ImportError as error:\n    print(error)"
    )
    said = run(code)
    assert package in said and re.search(r'-m pip install -e ".*\[lab\]"', said)


@pytest.mark.parametrize("static", ["", "1"])
def test_nothing_hangs_without_a_front_end(tmp_path, static, monkeypatch):
    """papermill runs a panel on a miss to its end, and a saved notebook stays small."""
    import nbformat
    import papermill

    cells = [
        "import sys; sys.path.insert(0, " + repr(str(REPO / "tests" / "browser")) + ")\n"
        "import tiny\nfrom labkit.results import Store\nfrom labkit.ui.panel import Panel\n"
        f"store = Store({str(tmp_path / 'results.sqlite')!r})",
        "panel = Panel(tiny.Rounding, tiny.Tiny(), store, tiny.HOW, measure=tiny.measure, hashes=tiny.HASHES)\npanel",
        "panel.static()",
        "from labkit.ui.explore import explore\nfrom labkit.ui import plots\n"
        "explore(lambda n: plots.lines({'a': ([1, 2], [n, n])}, 'x', 'y'), n=[1, 2])",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "in.ipynb")
    monkeypatch.setenv("LABKIT_STATIC", static)
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    papermill.execute_notebook(
        str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb"), execution_timeout=60, progress_bar=False
    )
    saved = nbformat.read(tmp_path / "out.ipynb", 4)
    forms = [set(o.get("data", {})) for o in saved.cells[2].outputs]
    assert {"text/html", "text/plain"} in forms and {"image/svg+xml", "text/plain"} in forms
    assert "At 4 bits" in json.dumps(saved.cells[2].outputs)
    widget = "application/vnd.jupyter.widget-view+json" in json.dumps(saved.cells)
    assert widget is (static == "")
    assert (tmp_path / "out.ipynb").stat().st_size < 200_000


def test_titles_and_legends_have_room_side_by_side():
    from labkit.ui.stage import LINE, Stage

    long = "How far the weights that remain have moved, in steps of the grid (measured)"
    names = ("activations before smoothing", "activations after", "weights before smoothing")
    stage, figures = Stage(), [plots.lines({n: ([0, 1], [0, 1]) for n in names}, "x" * 30 + " yy", "y", long)] * 3
    alone, beside = [], []
    for shown, found in ((figures[:1], alone), (figures, beside)):
        stage.show(*shown)
        found += [o.outputs[0]["data"]["application/vnd.plotly.v1+json"]["layout"] for o in stage.children]
    assert alone[0]["title"]["text"] == long and "<br>" not in alone[0]["xaxis"]["title"]["text"]
    for layout in beside:
        lines = layout["title"]["text"].split("<br>")
        assert " ".join(lines) == long and max(map(len, lines)) <= 39
        assert layout["height"] - alone[0]["height"] == LINE * (len(lines) - 1 + 2)  # and a legend of three lines
        assert layout["margin"]["t"] - alone[0]["margin"]["t"] == layout["height"] - alone[0]["height"]
