"""Text as it is written: pieces that add up, the same eagerly and as one graph."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from tiny_models import SMALL, Letters, tiny
from tiny_tokenizer import TEMPLATE, characters, words

from labkit.cli import main
from labkit.engine import compile
from labkit.engine.cuda_graph import GraphedModel
from labkit.model import LanguageModel
from labkit.talk import Talk, fastest

PROMPT, NEW = "w3 w4 w5 w6 w7 w8 w9 w10", 15


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


# ---- the model's generation_config: the same tokens in every way to write


def loud(family: str = "Llama", **settings) -> LanguageModel:
    """A tiny model that does not repeat itself at once, with a real tokenizer and these settings in its generation_config."""
    lm = tiny(family)
    lm.tokenizer = words()
    for p in lm.model.parameters():
        p.data.mul_(8 if p.dim() >= 2 else 1)
    lm.model.generation_config.eos_token_id = None
    for name, value in settings.items():
        setattr(lm.model.generation_config, name, value)
    return lm


def ways(lm) -> dict:
    graph = compile(lm, context=64, threads=1, head_bits=None, embedding_bits=None)
    return {"eager": lm, "one graph": graph, "step of a CUDA graph": GraphedModel(lm, 64)}


@functools.cache
def free() -> list[int]:
    """What the model of these tests writes with no setting at all."""
    return [int(word[1:]) for word in loud().generate(PROMPT, NEW).split()]


SETTINGS = {  # name -> the settings, made of what the model writes without them
    "ends": lambda text: {"eos_token_id": [text[9], 95]},
    "end": lambda text: {"eos_token_id": text[9]},
    "repetition_penalty": lambda text: {"repetition_penalty": 1.7},
    "no_repeat_ngram_size": lambda text: {"no_repeat_ngram_size": 1},
    "bad_words_ids": lambda text: {"bad_words_ids": [[text[2]], text[7:9]]},
    "sequence_bias": lambda text: {"sequence_bias": [[[text[4]], -50.0]]},
    "suppress_tokens": lambda text: {"suppress_tokens": text[3:5]},
    "begin_suppress_tokens": lambda text: {"begin_suppress_tokens": [text[0]]},
    "min_new_tokens": lambda text: {"eos_token_id": [text[9], 95], "min_new_tokens": 13},
    "min_length": lambda text: {"eos_token_id": [text[9], 95], "min_length": 21},
    "forced_eos_token_id": lambda text: {"forced_eos_token_id": 30},
    "exponential_decay": lambda text: {"eos_token_id": text[-1], "exponential_decay_length_penalty": (2, 3.0)},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_way_to_write_follows_the_generation_config(name):
    """The oracle is transformers' own generate, through lm.generate; the setting must have done something at all."""
    asked = SETTINGS[name](free())
    lm, other = loud(**asked), loud(eos_token_id=asked.get("eos_token_id") if len(asked) > 1 else None)
    expected = lm.generate(PROMPT, NEW)
    assert expected != other.generate(PROMPT, NEW)
    for way, model in ways(lm).items():
        talk = Talk(model, PROMPT, NEW)
        assert "".join(talk) == talk.text == expected, way
        if model is not lm:
            assert model.generate(PROMPT, NEW) == expected, way


def test_an_answer_ends_at_a_stop_string_wherever_a_token_begins():
    def model(**settings):
        lm = loud(**settings)
        lm.tokenizer = characters()
        return lm

    whole = model().generate("a long road", NEW)
    lm = model(stop_strings=[whole[5:8]])
    assert lm.generate("a long road", NEW) == whole[:8]
    for m in ways(lm).values():
        talk = Talk(m, "a long road", NEW)
        assert "".join(talk) == whole[:8] and talk.tokens == 8


def test_a_prompt_of_one_token_and_a_forced_beginning():
    lm = loud(forced_bos_token_id=30, begin_suppress_tokens=[31])
    expected = lm.generate("w3", 4)
    assert expected.startswith("w30 ")
    assert {"".join(Talk(model, "w3", 4)) for model in ways(lm).values()} == {expected}


UNAPPLIED = {
    "num_beams": 3,
    "guidance_scale": 1.5,
    "penalty_alpha": 0.6,
    "token_healing": True,
    "max_time": 1e-6,
    "dola_layers": "high",
}


@pytest.mark.parametrize("name", UNAPPLIED)
def test_what_would_not_be_greedy_is_left_out_and_said_in_one_sentence(name):
    lm = loud(**{name: UNAPPLIED[name]}, top_k=4)
    with pytest.warns(UserWarning, match=f"greedy: .* sets {name} = .*, not applied") as said:
        expected = lm.generate(PROMPT, NEW)
    assert expected == " ".join(f"w{token}" for token in free()) and len(said) == 1
    for way, model in ways(lm).items():
        with pytest.warns(UserWarning, match=name) as said:
            assert "".join(Talk(model, PROMPT, NEW)) == expected, way
        assert len(said) == 1 and str(said[0].message).count(". ") == 0
        assert model is lm or name in model.notes[-1]


def test_settings_of_sampling_say_nothing():
    lm = loud(do_sample=True, temperature=0.6, top_p=0.9, top_k=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = lm.generate(PROMPT, NEW)
        assert {"".join(Talk(model, PROMPT, NEW)) for model in ways(lm).values()} == {expected}


@pytest.mark.parametrize("family", ["Mamba", "RecurrentGemma", "GPTNeo"])
def test_models_that_keep_another_state_than_a_cache_of_keys_talk_too(family):
    import transformers

    more = {"Mamba": {"state_size": 8}, "RecurrentGemma": {"num_hidden_layers": 3, "intermediate_size": 96}}
    fields = SMALL | more.get(family, {})
    if family == "GPTNeo":
        fields = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 96, "window_size": 4}
        fields["attention_types"] = [[["global", "local"], 1]]
    config = getattr(transformers, f"{family}Config")(**fields)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for p in model.parameters():
        p.data.mul_(4 if p.dim() >= 2 else 1)
    model.generation_config.eos_token_id = None
    lm = LanguageModel(model, Letters(), family)
    assert "".join(Talk(lm, "abcdefgh", 12)) == lm.generate("abcdefgh", 12)


# ---- the first token of a text


def test_a_bos_stands_before_a_prompt_once_and_in_every_way():
    lm = loud()
    plain = lm.generate(PROMPT, NEW)
    lm.tokenizer = words(bos=True, template=TEMPLATE)
    assert lm.encode("w3 w4").tolist() == lm.encode("<s> w3 w4").tolist() == [[1, 3, 4]]
    assert lm.encode("").shape == (1, 0)
    expected = lm.generate(PROMPT, NEW)
    assert expected != plain
    for model in ways(lm).values():
        assert "".join(Talk(model, PROMPT, NEW)) == expected
        asked = Talk(model, "w3 w4", 6, chat=True)
        assert asked.prompt.startswith("<s>") and lm.encode(asked.prompt).tolist() == [[1, 3, 4, 9]]
        assert "".join(asked) == lm.generate("<s> w3 w4 w9", 6)
        with pytest.raises(ValueError, match="prompt is empty"):
            list(Talk(model, "", 3))
