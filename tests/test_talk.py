"""Text as it is written: pieces that add up, the same eagerly and as one graph."""

from __future__ import annotations

import pytest

from labkit.cli import main
from labkit.talk import Talk, fastest


@pytest.mark.model
def test_pieces_add_up_and_both_ways_say_the_same(lm):
    prompt = "The river rose in the night, and in the morning"
    eager, graph = Talk(lm, prompt, 12), Talk(fastest(lm), prompt, 12)
    for talk in (eager, graph):
        pieces = list(talk)
        assert len(pieces) > 6 and "".join(pieces) == talk.text
        assert talk.tokens == 12 and talk.rate > 0
    assert graph.model is not lm
    assert eager.text == lm.generate(prompt, 12)


@pytest.mark.model
def test_half_a_character_waits_for_its_other_half(lm):
    talk = Talk(lm, "Write only emoji: 😀 😃 😄 😁 😆 😅", 10)
    assert all("\ufffd" not in piece for piece in talk)


@pytest.mark.model
def test_a_question_is_put_into_the_models_template(lm):
    talk = Talk(lm, "What is salt?", chat=True)
    assert talk.prompt != "What is salt?" and "What is salt?" in talk.prompt


def test_bad_input(tiny_lm):
    with pytest.raises(ValueError, match="max_new_tokens = 0 is not allowed"):
        Talk(tiny_lm, "a", 0)
    with pytest.raises(ValueError, match="has no template for questions"):
        Talk(tiny_lm, "a", chat=True)
    with pytest.raises(ValueError, match="prompt is empty"):
        list(Talk(tiny_lm, "", 3))


@pytest.mark.model
def test_the_command_streams_to_stdout_and_tells_the_pace(capsys):
    assert (
        main(["generate", "rtn", "--bits", "8", "--prompt", "Salt is", "--max-new-tokens", "5", "--no-progress"]) == 0
    )
    said = capsys.readouterr()
    assert said.out.strip() and "5 tokens, " in said.err and "(one graph)" in said.err
    assert main(["generate", "--prompt", "Salt is", "--max-new-tokens", "5", "--kv-bits", "8"]) == 0
    assert capsys.readouterr().out.strip()
    assert main(["generate", "--prompt", "Salt is", "--eager", "--kv-bits", "8"]) == 2
    assert "leave --eager out" in capsys.readouterr().err
    assert main(["generate", "--prompt", "", "--eager"]) == 2
    assert "prompt is empty" in capsys.readouterr().err
