"""Notebook 00's chat: answers that grow, a verdict, and a widget that streams, stops and explains errors."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from tiny_models import tiny

from labkit.progress import Cancelled, listen
from labkit.quantize import RTN
from labkit.talk import Talk
from labkit.ui.lessons import chat
from labkit.ui.lessons.chat import Answer, Chat, answers, shared, verdict


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(1)
    lm, other = tiny(), tiny()
    for weight in other.model.parameters():
        weight.add_(0.3 * torch.randn_like(weight))  # so far away that it says something else
    for model in (lm.model, other.model):
        model.generation_config.eos_token_id = None  # an answer has as many tokens as were asked for
    return {"before": lm, "after": RTN(bits=4, group_size=16)(other, progress=False)}


@pytest.fixture
def box(models):
    made = Chat(*models.values(), prompt="abc", max_new_tokens=6, graph=False)
    yield made
    made.worker.cancel()
    made.worker.join(10)


def column(box, name: str) -> str:
    return box.columns[name].value


# ---------------------------------------------------------------------------------------------- without widgets


def test_answers_grow_one_model_after_the_other(models):
    seen = list(answers(models, "abc", 6))
    names = [a.model for a in seen]
    assert names == sorted(names, key=list(models).index)  # never in turns: the clocks would run for the other
    for name, lm in models.items():
        mine = [a for a in seen if a.model == name]
        assert [a.tokens for a in mine] == [0, 1, 2, 3, 4, 5, 6, 6]
        assert all(b.text.startswith(a.text) for a, b in itertools.pairwise(mine))
        assert [a.done for a in mine] == [False] * 7 + [True]
        assert mine[-1].text == lm.generate("abc", 6) and mine[-1].rate > 0
    assert seen[7].text != seen[-1].text, "these two must not agree"


def test_the_pace_is_that_of_talk(models, monkeypatch):
    monkeypatch.setattr(Talk, "rate", property(lambda self: 10.0 * self.tokens))
    assert [a.rate for a in answers({"x": models["before"]}, "abc", 3)] == [0, 10, 20, 30, 30]
    assert Answer("x", "", 5, 41.26).pace == "5 tokens, 41.3 tokens/s (measured)"
    assert Answer("x", "", 1, 0.0).pace == "1 token" and Answer("x", "", 0, 0.0).pace == "0 tokens"


def test_a_question_goes_through_the_template_where_there_is_one(models, monkeypatch):
    prompts = []
    monkeypatch.setattr(Talk, "__iter__", lambda self: prompts.append(self.prompt) or iter(()))
    lm = tiny()
    list(answers({"x": lm}, "Hi?", 2))
    lm.tokenizer = type(
        "Chatty", (), {"chat_template": "…", "apply_chat_template": lambda _, turn, **__: f"<{turn}>"}
    )()
    for template in (None, True, False):
        list(answers({"x": lm}, "Hi?", 2, template=template))
    asked = "<[{'role': 'user', 'content': 'Hi?'}]>"
    assert prompts == ["Hi?", asked, asked, "Hi?"]
    with pytest.raises(ValueError, match="has no template for questions"):
        list(answers(models, "Hi?", 2, template=True))


@pytest.mark.parametrize("prompt", ["", "  \n", None, 3])
def test_a_prompt_without_words_is_refused(models, prompt):
    with pytest.raises(ValueError, match="prompt = .* is not allowed: it must be a text with at least one word"):
        next(answers(models, prompt))


def test_it_can_be_cancelled_at_every_token(models):
    told, seen = [], []

    def stop(what, done, total):
        told.append((what, done, total))
        if done == 3:
            raise Cancelled

    with listen(stop), pytest.raises(Cancelled):
        for answer in answers(models, "abc", 6):
            seen.append(answer)
    assert told == [("before writes", n, 6) for n in range(4)] and seen[-1].tokens == 3


@pytest.mark.parametrize(
    "a, b, same",
    [
        ("the sea is salt", "the sea is deep", "the sea is "),
        ("the sea", "the seat", "the "),
        ("same", "same", "same"),
        ("one", "two", ""),
        ("", "two", ""),
        ("a b", "a b c", "a b"),
    ],
)
def test_where_two_texts_part(a, b, same):
    assert a[: shared(a, b)] == same == b[: shared(b, a)]


def test_the_verdict():
    first = Answer("32 bits", "The sea is salt", 4, 20.0, True)
    text = verdict(first, Answer("4 bits", "The sea is deep", 4, 50.0, True))
    assert "part after 3 words: “…The sea is”" in text
    assert "4 bits wrote 50.0 tokens/s, 32 bits 20.0: 2.5x as fast (measured" in text
    assert "same text" in verdict(first, first) and "1.00x as fast" in verdict(first, first)
    assert "part at the first word" in verdict(first, Answer("4 bits", "A sea", 2, 50.0, True))
    assert "as fast" not in verdict(first, Answer("4 bits", "", 1, 0.0, True))


# ---------------------------------------------------------------------------------------------- the widget


def test_go_writes_both_columns_and_says_where_they_part(box, models):
    assert "0 tokens" in column(box, "before") and not box.answers
    box.go_button.click()
    assert box.worker.join(30) and box.error is None
    assert box.answers["before"].text != box.answers["after"].text
    for name, lm in models.items():
        assert box.answers[name].text == lm.generate("abc", 6) and "tokens/s (measured)" in column(box, name)
    assert "<u>" in column(box, "after") and "part" in box.sentence.value and "as fast" in box.sentence.value
    assert box.working.layout.display == "none"


def test_enter_is_go_and_other_messages_are_not(box):
    text = box.controls["prompt"]
    text._handle_custom_msg({"event": "other"}, [])
    assert not box.worker.busy
    text._handle_custom_msg({"event": "submit"}, [])
    assert box.worker.join(30) and len(box.answers) == 2


def test_go_returns_at_once_and_stop_keeps_what_is_written(box, monkeypatch):
    wrote, go_on = threading.Event(), threading.Event()

    def slowly(self):
        for piece in ("one ", "two ", "three"):
            self.tokens, self.text = self.tokens + 1, self.text + piece
            yield piece
            wrote.set()
            go_on.wait(10)

    monkeypatch.setattr(Talk, "__iter__", slowly)
    box.go()
    assert wrote.wait(10) and box.worker.busy and box.working.layout.display == "flex"
    box.cancel_button.click()
    go_on.set()
    assert box.worker.join(10)
    assert "Stopped." in box.sentence.value and "one " in column(box, "before") and "three" not in column(box, "before")
    assert "after" not in box.answers and box.working.layout.display == "none"


def test_an_error_is_one_sentence_and_the_next_go_works(box):
    box.controls["prompt"].value = " "
    box.go()
    assert box.worker.join(10)
    assert "is not allowed: it must be a text" in box.sentence.value and isinstance(box.error, ValueError)
    box.controls["prompt"].value = "abc"
    box.go()
    assert box.worker.join(30) and box.error is None and len(box.answers) == 2


def test_a_new_go_overtakes_the_old_one(box):
    box.go()
    box.controls["prompt"].value = "xyz"
    box.go()
    assert box.worker.join(30)
    assert box.answers["before"].text == box.models["before"].generate("xyz", 6)


def test_what_a_model_writes_is_escaped(box, monkeypatch):
    def nasty(self):
        self.tokens, self.text = 1, "<script>&"
        yield self.text

    monkeypatch.setattr(Talk, "__iter__", nasty)
    box.go()
    assert box.worker.join(10)
    assert "&lt;script&gt;&amp;" in column(box, "before") and "<script>" not in column(box, "before")


def test_names_must_differ(models):
    with pytest.raises(ValueError, match="two different names"):
        Chat(*models.values(), names=("a", "a"))


def test_the_static_twin(models, monkeypatch):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda data, raw: shown.append(data))
    monkeypatch.setenv("LABKIT_STATIC", "1")
    made = Chat(*models.values(), prompt="a<b", max_new_tokens=4, names=("32 bits", "2 bits"), graph=False)
    made._ipython_display_()
    page, text = shown[0]["text/html"], shown[0]["text/plain"]
    assert "<b>a&lt;b</b>" in page and "tokens/s (measured)" in page and "as fast" in page
    assert models["before"].generate("a<b", 4).strip() in text and "32 bits" in text and len(shown) == 1
    assert not made._graphs


@pytest.mark.model
def test_the_shipped_model_answers_as_one_graph(lm):
    made = Chat(lm, lm, max_new_tokens=4)
    assert made.controls["template"].value
    made.go()
    assert made.worker.join(120) and made.error is None
    assert all(a.tokens == 4 for a in made.answers.values()) and chat.has_template(lm)
    assert all(hasattr(graph, "stream") for graph in made._graphs.values())
