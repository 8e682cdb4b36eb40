"""The exercises' checker: right, wrong, nearly right and of the wrong kind, for every exercise."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

import labkit
from labkit.check import bottleneck, start
from labkit.check.answer import Note, exercise, number, some_of, whole
from labkit.measure import breakdown, roofline
from labkit.ui.lessons import bottleneck as bench

# Roofs that were not measured, so that the tests do not depend on this machine: ridge at 8 FLOP per byte.
ROOF = roofline.Roofline("test", 10e9, {"fp32": 80e9}, "modelled", reads={"a": 10e9}, sizes={"fp32": 1024})

EXERCISES = dir(labkit.check)


@pytest.fixture(scope="module")
def model():
    """Wide enough for groups of 64, one layer: its weights are drawn from a normal distribution."""
    import transformers

    from labkit.model import LanguageModel

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2, vocab_size=256
    )
    return LanguageModel(transformers.LlamaForCausalLM(config).eval(), None, "wide")


def test_names_are_listed_and_an_unknown_one_is_refused():
    assert {"bits_per_weight", "compute_bound_batch"} <= set(EXERCISES)
    with pytest.raises(AttributeError, match="no exercise 'bits_per_wieght'. There are: .*bits_per_weight, "):
        labkit.check.bits_per_wieght(1)
    assert not hasattr(labkit.check, "__nonsense__")


@pytest.mark.parametrize("name", EXERCISES)
def test_every_exercise_says_what_kind_of_answer_it_wants(name):
    ask = getattr(labkit.check, name)
    assert ask.__doc__ and ask.__doc__.split("\n")[0].endswith(("?", ")."))
    for nothing in (None, ...):
        note = ask(nothing)
        assert not note and str(note).startswith("No answer yet. Put ")
    for odd in ("", "x", object(), [], {}, float("nan"), float("inf"), True, torch.ones(3), lambda: 1, b"1", 1j):
        note = ask(odd)
        assert not note and "is not the kind of answer" in str(note), odd
    assert len(str(ask("x" * 1000))) < 400


@pytest.mark.parametrize("name", EXERCISES)
def test_two_values_are_no_answer_and_what_was_probably_meant_is_said(name):
    """4,5 is how much of the world writes 4.5; in Python it is two arguments."""
    ask = getattr(labkit.check, name)
    wanted = ask().text
    if "a number" in wanted or "a whole number" in wanted or "a share" in wanted:
        several = [ask(4, 5), ask(0, 75), ask("4", "5"), ask(4, 5, 6), ask((4, 5)), ask([4, 5])]
        as_text = [ask(text) for text in ("4,5", " 0,75 ", "1.234,5", "-4,5 %")]
        assert all("with a point, as in 4.5" in note.text for note in (*several, *as_text))
        assert all("Leave the quotation marks out" in ask(text).text for text in ("4.5", "12", "50%"))
    else:
        words = re.findall(r"'([^']+)'", wanted)
        several = [ask(*words[:2]), ask(*words), ask(4, 5), ask("4", "5")]
        assert all("stand in braces" in note.text for note in several)
        as_text = [ask("4,5")]
    assert not any((*several, *as_text)), "nothing of it is right"
    assert "asked for" in several[0].text and len(str(several[0])) < 400


@pytest.mark.parametrize("name", EXERCISES)
def test_the_question_stands_in_a_notebook_and_its_solution_is_checked(name):
    from pathlib import Path

    folder = Path(__file__).resolve().parent.parent / "notebooks"
    asked = [f for f in folder.glob("*.ipynb") if f"labkit.check.{name}(..." in f.read_text()]
    assert len(asked) == 1, f"no notebook asks {name}, or several"
    assert f"labkit.check.{name}(" in (folder / "solutions" / asked[0].name).read_text()


# ---------------------------------------------------------------------------------------------- notebook 00


def test_bits_per_weight():
    ask = labkit.check.bits_per_weight
    assert ask(2 + 16 / 32 + 2 / 32)
    assert "codes alone" in str(ask(2))
    assert "Which code stands for zero" in str(ask(2.5))
    assert "pays only a share" in str(ask(20))
    assert "Too few" in str(ask(2.2))
    assert not ask(2.59)
    _no_answer_leaks(ask, (2, 2.5, 20, 2.2), "2.56")


def test_the_stored_bits_are_those_of_the_format():
    assert start.stored_bits(4, 64) == 4 + (16 + 4) / 64
    assert start.stored_bits(3, 32, symmetric=True) == 3 + 16 / 32


def test_error_per_bit(model):
    def ask(answer):
        return labkit.check.error_per_bit(answer, model)

    assert ask(4) and ask((15 / 7) ** 2)
    assert "error's *square*" in str(ask(2.1))
    assert "Upside down" in str(ask(0.22))
    assert "grows more" in str(ask(3)) and "grows less" in str(ask(16))
    _no_answer_leaks(ask, (2.1, 0.22, 3, 16), "4.5")


def test_the_rounding_error_is_the_real_one(model):
    weight = model.model.model.layers[0].mlp.down_proj.weight.detach()[:4].double().view(-1, 64)
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    step = ((high - low) / 7)[:, None]
    error = ((weight / step).round() * step - weight).square().mean().item()  # a grid without a zero point's shift
    assert math.isclose(start.rounding_error(model, 3), error, rel_tol=0.25)


def test_most_speed(model):
    linears = sum(m.weight.numel() for m in model.model.model.layers.modules() if isinstance(m, torch.nn.Linear))
    head = 128 * 256
    truth = 32 * (linears + head) / (4.3125 * linears + 32 * head)

    def ask(answer):
        return labkit.check.most_speed(answer, model)

    assert ask(truth) and ask(np.float64(truth))
    assert "large matrix" in str(ask(32 / 4.3125)) and "large matrix" in str(ask(8))
    assert "Above 1" in str(ask(1 / truth))
    assert "More" in str(ask(1.2)) and "Less" in str(ask(0.8 * 32 / 4.4))
    _no_answer_leaks(ask, (7.4, 0.3, 1.2), f"{truth:.1f}")


def test_carries_over():
    ask = labkit.check.carries_over
    assert ask({"perplexity", "kl", "linears"}) and ask(["kl", "linears", "perplexity"])
    assert "depends on how fast" in str(ask({"perplexity", "kl", "linears", "decode_ms"}))
    assert "there is more" in str(ask("kl"))
    assert "is not the kind" in str(ask({"perplexity", "speed"}))


# ---------------------------------------------------------------------------------------------- notebook 01


def test_compute_bound_batch(model):
    def intensity(batch):
        return roofline.decode_work(model, batch, bench.CONTEXT, 32).intensity

    roof = roofline.Roofline("test", 1.0, {"fp32": intensity(40)}, "modelled")

    def ask(answer):
        return labkit.check.compute_bound_batch(answer, model, roof)

    assert ask(40) and ask(43) and ask(40.0)
    assert "a little up" in str(ask(30)) and "a little down" in str(ask(60))
    assert "go up" in str(ask(1)) and "go down" in str(ask(4000))
    assert "the ridge, in FLOP per byte" in str(ask(round(roof.ridge("fp32"))))
    assert "is not the kind" in str(ask(2.5)) and "is not the kind" in str(ask(0))
    _no_answer_leaks(ask, (1, 30, 60, 4000), "batch 40")
    never = roofline.Roofline("test", 1.0, {"fp32": 1e9}, "modelled")
    assert "no batch is large enough" in str(labkit.check.compute_bound_batch(5, model, never))


def test_tokens_per_second():
    ask = labkit.check.tokens_per_second
    truth = 3.35e12 / 35e9
    assert ask(truth) and ask(round(truth))
    assert "bits or bytes" in str(ask(truth * 8)) and "bits or bytes" in str(ask(truth / 8))
    assert "16 bits per weight" in str(ask(truth / 4))
    assert "seconds for one token" in str(ask(1 / truth))
    assert "arithmetic peak" in str(ask(989e12 / 70e9 / 2))
    assert "How many bytes" in str(ask(truth * 1.3))
    _no_answer_leaks(ask, (truth * 8, truth / 4, truth * 1.3), "95", "96")


def test_most_gain():
    # 50 ms: 20 to read, 20 for kernels, 10 for the framework.
    steps = [
        breakdown.Step("4-bit", "one graph", 0.01, 0.001, 1, 1.0),
        breakdown.Step("fp32", "eager", 0.05, 0.01, 20, 1e3),
    ]

    def ask(answer):
        return labkit.check.most_gain(answer, steps)

    assert ask(5) and ask(4.8) and not ask(6)
    assert "share that stays" in str(ask(0.2))
    assert "takes the framework away" in str(ask(50 / 40))
    assert "takes the reading away" in str(ask(50 / 30))
    assert "More than that" in str(ask(3)) and "Less than that" in str(ask(8))
    _no_answer_leaks(ask, (0.2, 50 / 40, 50 / 30, 3, 8), "5.0", "at most 5")
    empty = [breakdown.Step("fp32", "eager", 0.05, 0.06, 0, 1e3)]  # nothing but the framework
    assert labkit.check.most_gain(1, empty) and not labkit.check.most_gain(3, empty)


def test_prefill_gain(model):
    def ask(answer, roof=ROOF):
        return labkit.check.prefill_gain(answer, model, roof)

    assert ask(1) and ask(1.05)
    assert "Where does prefill stand" in str(ask(4)) and "slower than before" in str(ask(0.5))
    slope = roofline.Roofline("test", 1.0, {"fp32": 1e9}, "modelled")
    assert "under the slope" in str(ask(1.11, slope)), "there fewer bytes do help; activations are most of them here"


# ---------------------------------------------------------------------------------------------- notes and kinds


def test_a_note_is_true_when_right_and_shows_it_in_words_and_colour():
    good, bad = Note(True, "Because <b>."), Note(False, "Look again.")
    assert good and not bad
    assert str(good) == "Right. Because <b>." and repr(bad) == "Not yet. Look again."
    assert "#009e73" in good._repr_html_() and "#e69f00" in bad._repr_html_()
    assert "Because &lt;b&gt;." in good._repr_html_() and "<b>Not yet.</b> Look again." in bad._repr_html_()


@pytest.mark.parametrize("value", [3, 3.0, np.int64(3), np.float32(3), torch.tensor(3.0), torch.tensor(3)])
def test_numbers_of_every_library_count(value):
    assert number("x").read(value) == 3 and whole("x").read(value) == 3


def test_an_exercise_keeps_its_name_and_passes_more_arguments_on():
    @exercise(some_of(["p", "q"]))
    def ask(answer, model=None):
        """Which?"""
        return Note(answer == {"p"}, str(model))

    assert ask.exercise and ask.__name__ == "ask" and ask.__doc__ == "Which?"
    assert ask("p", "m") == Note(True, "m") and not ask(("p", "q"), model=1)
    assert str(ask()).startswith("No answer yet.")


def test_two_exercises_of_one_name_are_refused(monkeypatch):
    labkit.check._exercises.cache_clear()
    monkeypatch.setattr(bottleneck, "bits_per_weight", bottleneck.prefill_gain, raising=False)
    with pytest.raises(RuntimeError, match="Two exercises are called bits_per_weight"):
        dir(labkit.check)
    monkeypatch.undo()
    labkit.check._exercises.cache_clear()
    assert dir(labkit.check) == EXERCISES


def _no_answer_leaks(ask, wrong, *secrets: str) -> None:
    """No hint contains the answer."""
    for answer in wrong:
        note = ask(answer)
        assert not note
        for secret in secrets:
            assert not re.search(rf"(?<![\d.]){re.escape(secret)}", str(note).replace(f"batch {answer}", "")), note
