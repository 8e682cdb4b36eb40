"""sweep(): fills the store, skips what is there, resumes after an interrupt; and the grids that feed it."""

import os
import signal
import sys
import types
from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit import paths, results
from labkit.measure.measurement import Latency, Measurement, Memory, Quality
from labkit.method import Method, Recipe, knob
from labkit.progress import Cancelled, listen
from labkit.results import Key, Store
from labkit.sweep import grid, parse_grid, sweep, text_hashes


@dataclass(frozen=True)
class Round(Method):
    """Rounds the only weight."""

    bits: int = knob(4, 2, 8)
    group_size: int | None = knob(64, 8, 128, none="per row")
    symmetric: bool = knob(False)

    def apply(self, lm, calib, progress):
        lm.weight = round(lm.weight * 2**self.bits) / 2**self.bits


@dataclass(frozen=True)
class Fit(Method):
    """Sets the weight to the mean of the windows."""

    calibrated: ClassVar[bool] = True
    pattern: str = knob("2:4", choices=("2:4", "4:8"))
    damp: float = knob(0.01, 0.0, 1.0)

    def apply(self, lm, calib, progress):
        lm.weight = sum(calib) / len(calib)


class Model:
    """The edge of a LanguageModel that a sweep touches."""

    coverage = None  # set where a method has looked at which weights it changes
    model = types.SimpleNamespace(modules=list, config=types.SimpleNamespace(max_position_embeddings=2048))

    def __init__(self, weight=0.7, history=()):
        self.name, self.fingerprint, self.weight, self.history = "tiny", "0123", weight, history

    def copy(self):
        return Model(self.weight, self.history)


class Measure:
    """Stands in for labkit.measure; notes each call, and may stop at the nth."""

    def __init__(self, stop=None, error=KeyboardInterrupt):
        self.calls, self.stop, self.error = [], stop, error

    def __call__(
        self, lm, against=None, texts=(), windows=8, length=512, latency=True, progress=True, engine=True, prompt=0
    ):
        if len(self.calls) == self.stop:
            raise self.error
        self.calls.append((lm.history, against, texts, windows, length, latency, engine))
        quality = {text: Quality(lm.weight, 0.0, windows * length) for text in texts}
        speed = Latency(1.0, 0.0, 512, 1.0, 0.0, 1) if latency else None
        return Measurement(
            lm.name, lm.history[-1] if lm.history else "uncompressed", quality, Memory(1, 1, 4.0, 1, 1), speed, "cpu"
        )

    @property
    def methods(self):
        return [history[-1] if history else None for history, *_ in self.calls]


@pytest.fixture(autouse=True)
def nothing_shipped(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "data", lambda: tmp_path / "no data")


@pytest.fixture(autouse=True)
def text(request, monkeypatch):
    """Stands in for labkit.text, and counts how often windows are made."""
    if "real" in request.fixturenames:
        return
    stub = types.SimpleNamespace(
        fingerprint=lambda ids: f"hash of {ids}",
        evaluation=lambda lm, windows, length, source: [source, windows, length],
        calibration=lambda lm: stub.made.append(lm) or [1.0, 2.0],
        check_windows=lambda lm, ids: None,
        check_size=lambda windows, length: None,
        made=[],
    )
    import labkit

    monkeypatch.setitem(sys.modules, "labkit.text", stub)
    monkeypatch.setattr(labkit, "text", stub, raising=False)
    monkeypatch.setattr(sys.modules["labkit.measure.reading"], "text", stub)
    return stub


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "results.sqlite")


def test_the_baseline_comes_first_and_everything_is_stored(store, capsys):
    lm, measure = Model(), Measure()
    methods = [Round(bits=2), Round(bits=8), Recipe(Round(bits=3), Round(bits=2))]
    got = sweep(lm, iter(methods), store, texts=["manual"], windows=3, length=7, measure=measure)
    assert [m.method for m in got] == ["uncompressed", repr(methods[0]), repr(methods[1]), repr(methods[2].methods[1])]
    assert [m.quality["manual"].perplexity for m in got] == [0.7, 0.75, 179 / 256, 0.75]
    assert [against for _, against, *_ in measure.calls] == [None, lm, lm, lm]
    assert all(call[2:] == (("manual",), 3, 7, True, True) for call in measure.calls)
    hashes = {"manual": "hash of ['manual', 3, 7]"}
    assert hashes == text_hashes(lm, ["manual"], 3, 7)
    assert [store.get(Key.of(lm, method, hashes)) for method in (None, *methods)] == got
    assert "4 measured, 0 were in the store already" in capsys.readouterr().out


def test_what_measure_is_told(store):
    measure = Measure()
    sweep(Model(), [], store, windows=3, length=7, latency=False, engine=False, measure=measure)
    assert [call[3:] for call in measure.calls] == [(3, 7, False, False)]


def test_what_is_there_is_skipped_and_said(store, capsys):
    first = sweep(Model(), [Round(bits=2)], store, measure=Measure())
    measure = Measure()
    again = sweep(Model(), [Round(bits=3), Round(bits=2), Round(bits=3)], store, measure=measure)
    assert measure.methods == [repr(Round(bits=3))], "each setting once"
    assert (again[0], again[2]) == tuple(first) and again[1] == again[3]
    assert "1 measured, 3 were in the store already" in capsys.readouterr().out
    assert sweep(Model(), [], store, measure=Measure(stop=0), progress=False) == first[:1]
    assert capsys.readouterr().out == ""


def test_other_windows_other_texts_are_measured_anew(store):
    sweep(Model(), [], store, measure=Measure())
    for settings in ({"windows": 4}, {"length": 64}, {"texts": ["manual"]}, {"texts": "prose"}):
        measure = Measure()
        sweep(Model(), [], store, measure=measure, **settings)
        assert len(measure.calls) == 1, settings
    assert measure.calls[0][2] == ("prose",), "one text may be given by its name"


def test_a_row_without_latency_is_measured_again_only_when_latency_is_wanted(store):
    sweep(Model(), [], store, latency=False, measure=Measure())
    assert sweep(Model(), [], store, latency=False, measure=Measure(stop=0))[0].latency is None
    assert sweep(Model(), [], store, measure=Measure())[0].latency is not None
    assert sweep(Model(), [], store, latency=False, measure=Measure(stop=0))[0].latency is not None, (
        "more than asked for"
    )


def test_calibration_is_made_once_and_only_where_needed(store, text):
    sweep(Model(), [Round()], store, measure=Measure())
    assert text.made == []
    got = sweep(Model(), [Fit(), Fit(damp=0.5), Round()], store, measure=Measure())
    assert len(text.made) == 1 and got[1].quality["manual"].perplexity == 1.5
    assert {row["calib"] for row in store.rows(method="Fit")} == {"hash of [1.0, 2.0]"}
    measure = Measure()
    sweep(Model(), [Fit(), Round()], store, calib=[5.0], measure=measure)
    assert measure.methods == [repr(Fit())], "other windows are another experiment, except for Round"
    assert len(text.made) == 1 and [row["calib"] for row in store.rows(method="Round")] == [""]


@pytest.mark.parametrize("error", [KeyboardInterrupt, Cancelled, RuntimeError("the machine is on fire")])
def test_an_interrupt_keeps_what_is_done_and_says_how_to_resume(store, error, capsys):
    methods = grid(Round, bits=[2, 3, 4])
    with pytest.raises(error if isinstance(error, type) else type(error)) as caught:
        sweep(Model(), methods, store, measure=Measure(stop=2, error=error))
    said = "".join(getattr(caught.value, "__notes__", [])) + capsys.readouterr().err
    assert f"stopped at {methods[1]!r}; 2 of 4 are in the store. Run the same sweep again" in said
    assert len(store.rows()) == 2
    measure = Measure()
    assert len(sweep(Model(), methods, store, measure=measure)) == 4
    assert measure.methods == [repr(methods[1]), repr(methods[2])]


def test_a_listener_can_stop_it_before_the_first_step(store):
    def stop(*progress):
        raise Cancelled

    with listen(stop), pytest.raises(Cancelled):
        sweep(Model(), [Round()], store, measure=Measure())
    assert store.rows() == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and kill")
def test_a_sweep_that_is_killed_resumes(store):
    methods = grid(Round, bits=[2, 3, 4])

    class Kill(Measure):
        def __call__(self, *args, **settings):
            if len(self.calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(*args, **settings)

    pid = os.fork()
    if pid == 0:
        sweep(Model(), methods, store, measure=Kill(), progress=False)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    measure = Measure()
    sweep(Model(), methods, store, measure=measure)
    assert measure.methods == [repr(methods[1]), repr(methods[2])]


def test_a_thing_that_is_no_method_is_refused_before_any_work(store):
    measure = Measure()
    with pytest.raises(ValueError, match=r"sweep takes methods such as RTN\(bits=4\), not 4"):
        sweep(Model(), [Round(), 4], store, measure=measure)
    assert measure.calls == [] and store.rows() == []


def test_the_default_store_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "cache"))
    got = sweep(Model(), [Round()], measure=Measure(), progress=False)
    assert len(Store().rows()) == len(got) == 2 and results.machine() == Store().rows()[0]["machine"]


# ---- the whole of it, on a real if tiny model


@pytest.fixture
def real():
    """A random two-layer Llama with a byte tokenizer, as a LanguageModel."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from labkit import LanguageModel

    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.2,  # large enough that rounding shows
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return LanguageModel(model, PreTrainedTokenizerFast(tokenizer_object=tokenizer), "tiny random Llama")


def test_a_sweep_over_a_real_model(real, store, tmp_path):
    from labkit import RTN

    texts = [tmp_path / "essay.txt", tmp_path / "letter.txt"]
    for path, sentence in zip(texts, ("A river carries its valley to the sea.", "One grain at a time, and no faster.")):
        path.write_text(f"{sentence} " * 200)
    first = str(texts[0])
    methods = grid(RTN, bits=[3, 8], group_size=32)
    got = sweep(real, methods, store, texts=texts, windows=2, length=64, latency=False, progress=False)
    coarse, fine = got[1].quality[first], got[2].quality[first]
    assert got[0].method == "uncompressed" and got[0].quality[first].kl is None
    assert coarse.kl > 10 * fine.kl > 0 and coarse.top1 < fine.top1
    assert got[1].memory.linears < got[2].memory.linears < got[0].memory.linears
    assert set(got[1].quality) == set(map(str, texts))
    hashes = text_hashes(real, texts, 2, 64)
    assert all(m.texts == hashes for m in got), "the key holds the hashes of what was measured"
    assert [store.find(Key.of(real, m, hashes)).measurement for m in (None, *methods)] == got

    again = {"texts": texts, "windows": 2, "length": 64, "latency": False, "progress": False}
    assert sweep(real, methods, store, measure=Measure(stop=0), **again) == got, "all from the store"
    other = real.copy()
    next(other.model.parameters()).data = next(other.model.parameters()) * 1.5
    with pytest.raises(KeyboardInterrupt):  # other weights under the same name are another model
        sweep(other, methods, store, measure=Measure(stop=0), **again)


# ---- grids


def test_a_grid_is_the_product_in_order():
    assert grid(Round, bits=[3, 4], group_size=[64, None]) == [
        Round(bits=3, group_size=64),
        Round(bits=3, group_size=None),
        Round(bits=4, group_size=64),
        Round(bits=4, group_size=None),
    ]
    assert grid(Round) == [Round()] and grid(Round, bits=3) == grid(Round, bits=(3, 3)) == [Round(bits=3)]
    assert grid(Round, bits=range(2, 5)) == [Round(bits=2), Round(bits=3), Round(bits=4)]
    assert grid(Fit, pattern="4:8") == [Fit(pattern="4:8")], "a string is one value"
    assert grid(Round, group_size=None) == [Round(group_size=None)]
    assert grid(Round, symmetric=[False, True]) == [Round(), Round(symmetric=True)]


@pytest.mark.parametrize(
    "lists, says",
    [
        ({"bit": [2]}, "Round has no knob 'bit': it has bits, group_size, symmetric"),
        ({"bits": []}, "Round.bits has no values to try"),
        ({"bits": [4, 9]}, "Round.bits = 9 is not allowed: it must be a whole number from 2 to 8"),
        ({"bits": "4"}, "Round.bits = '4' is not allowed"),
    ],
)
def test_a_bad_grid_is_named(lists, says):
    with pytest.raises(ValueError) as caught:
        grid(Round, **lists)
    assert says in str(caught.value)


def test_a_grid_from_the_command_line():
    assert parse_grid(Round, {"bits": "2, 3", "group_size": "64,none"}) == grid(
        Round, bits=[2, 3], group_size=[64, None]
    )
    assert parse_grid(Round, {"symmetric": "yes,no"}) == [Round(symmetric=True), Round()]
    assert parse_grid(Fit, {"pattern": "2:4,4:8", "damp": "0.1"}) == grid(Fit, pattern=["2:4", "4:8"], damp=0.1)
    for words, says in (
        ({"bits": "2,,3"}, "bits = '' is not allowed: it must be a whole number from 2 to 8"),
        ({"bits": ""}, "bits = '' is not allowed"),
        ({"bits": "2-4"}, "bits = '2-4' is not allowed"),
        ({"bit": "2"}, "Round has no knob 'bit'"),
    ):
        with pytest.raises(ValueError) as caught:
            parse_grid(Round, words)
        assert says in str(caught.value)


@given(bits=st.lists(st.integers() | st.floats() | st.text() | st.none() | st.booleans(), min_size=1, max_size=3))
def test_any_grid_is_made_or_refused_with_a_value_error(bits):
    try:
        made = grid(Round, bits=bits)
    except ValueError as error:
        assert "Round.bits = " in str(error)
    else:
        assert [m.bits for m in made] == list(dict.fromkeys(bits))
