"""The exported folder: onnxruntime-genai reads it and writes the engine's own tokens; it is whole, or it is not there."""

from __future__ import annotations

import json
import os
import sys
import warnings

import numpy as np
import pytest
import torch
import transformers
from tiny_models import Letters, tiny
from tiny_tokenizer import TEMPLATE, words
from torch import nn

import labkit
from labkit import cli
from labkit.engine import NotCompilable, compile, families, graph
from labkit.model import LanguageModel

PROMPTS = ("The river rose in the night and", "Salt is", "def fibonacci(n):\n")
BITS = {"head_bits": None, "embedding_bits": None}
needs_genai = pytest.mark.skipif(sys.version_info < (3, 11), reason="onnxruntime-genai has no build for Python 3.10")


class Saved(Letters):
    """The tiny models' tokenizer, with the files of a real one to be saved: genai is given ids here, not texts."""

    def __init__(self, real):
        self.save_pretrained = real.save_pretrained


@pytest.fixture
def letters(short_lm):
    """``letters(family)``: a tiny model that can be exported, its norms and biases neither ones nor zeros."""

    def made(family="Llama"):
        lm = tiny(family)
        lm.tokenizer = Saved(short_lm.tokenizer)
        torch.manual_seed(1)
        for name, p in lm.model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                p.data = p.data + 0.3 * torch.randn_like(p)
        if lm.model.generation_config.eos_token_id is None:
            lm.model.generation_config.eos_token_id = 2
        return lm

    return made


def write(model, rows, new: int, **search) -> list[list[int]]:
    """What genai adds to each row of ids (all of one length) in ``new`` steps, greedily."""
    import onnxruntime_genai as og

    rows = np.array(rows, dtype=np.int32)
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=rows.shape[1] + new, batch_size=len(rows), **search)
    generator = og.Generator(model, params)
    generator.append_tokens(rows if len(rows) > 1 else rows[0])
    steps = []
    while not generator.is_done():
        generator.generate_next_token()
        steps.append(generator.get_next_tokens().tolist())  # get_sequence() leaves out the token that ends a text
    return [list(tokens) for tokens in zip(*steps)]


def load(folder):
    import onnxruntime_genai as og

    return og.Model(str(folder))


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- onnxruntime-genai reads it


@needs_genai
@pytest.mark.model
@pytest.mark.parametrize("bits", (None, 4, 8))
def test_genai_writes_the_tokens_of_the_engine(short_lm, tmp_path, bits):
    import onnxruntime_genai as og

    lm = short_lm if bits is None else labkit.RTN(bits=bits, group_size=64)(short_lm, progress=False)
    ends = BITS if bits is None else {}
    folder = labkit.export.onnx(lm, tmp_path / "folder", context=512, **ends)
    compiled, model = compile(lm, context=512, threads=1, **ends), load(folder)
    tokenizer = og.Tokenizer(model)
    question = [{"role": "user", "content": "What is a bridge?"}]  # its turns end with the token that ends a text
    chat = lm.tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(json.dumps(question), add_generation_prompt=True) == chat
    for prompt in (*PROMPTS, chat):
        ids = lm.encode(prompt)[0].tolist()
        assert tokenizer.encode(prompt).tolist() == ids
        expected = list(compiled.stream(prompt, 32))
        assert write(model, [ids], 32) == [expected]
        assert tokenizer.decode(expected) == lm.tokenizer.decode(expected)


@needs_genai
@pytest.mark.parametrize("family", ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma"))
def test_every_family_is_read(letters, tmp_path, family):
    lm = letters(family)
    if family == "Mistral":
        lm.model.config.sliding_window = 8
    expected = list(compile(lm, threads=1, **BITS).stream("a long road", 24))
    model = load(labkit.export.onnx(lm, tmp_path / "folder", **BITS))
    assert write(model, [lm.encode("a long road")[0].tolist()], 24) == [expected]


@needs_genai
def test_logits_are_those_of_the_engine(letters, tmp_path):
    import onnxruntime_genai as og

    lm = labkit.RTN(bits=4, group_size=32)(letters(), progress=False)
    compiled, model = compile(lm, threads=1), load(labkit.export.onnx(lm, tmp_path / "folder"))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=40)
    generator = og.Generator(model, params)
    ids = lm.encode("a long road")
    generator.append_tokens(ids[0].numpy().astype(np.int32))
    expected = compiled.prefill(ids)
    for _ in range(8):
        assert np.abs(generator.get_logits().reshape(-1) - expected.numpy().reshape(-1)).max() < 1e-4
        generator.generate_next_token()
        expected = compiled.decode(generator.get_next_tokens()[0])


@needs_genai
def test_genai_stops_where_the_engine_stops(letters, tmp_path):
    lm = letters()
    text = list(compile(lm, threads=1, **BITS).stream("a long road", 24))
    lm.model.generation_config.eos_token_id = [text[9], 95]
    expected = list(compile(lm, threads=1, **BITS).stream("a long road", 24))
    assert expected == text[: text.index(text[9]) + 1]
    model = load(labkit.export.onnx(lm, tmp_path / "folder", **BITS))
    assert write(model, [lm.encode("a long road")[0].tolist()], 24) == [expected]


@needs_genai
def test_layers_with_other_numbers_of_heads_are_read(letters, tmp_path):
    lm = letters()
    attention = lm.model.model.layers[1].self_attn
    for name, rows in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16)):  # 1 of 2 key heads, with its 2 of 4 query heads
        linear = getattr(attention, name)
        linear.weight, linear.out_features = nn.Parameter(linear.weight[:rows].clone(), requires_grad=False), rows
    attention.o_proj.weight = nn.Parameter(attention.o_proj.weight[:, :32].clone(), requires_grad=False)
    attention.o_proj.in_features = 32
    expected = list(compile(lm, threads=1, **BITS).stream("a long road", 24))
    model = load(labkit.export.onnx(lm, tmp_path / "folder", **BITS))
    assert write(model, [lm.encode("a long road")[0].tolist()], 24) == [expected]


@needs_genai
def test_texts_of_other_lengths_in_one_batch_are_written_as_alone(letters, tmp_path):
    lm = letters()
    lm.model.generation_config.eos_token_id = 1  # or one text ends before the other
    lm.model.generation_config.pad_token_id = 0
    model = load(labkit.export.onnx(lm, tmp_path / "folder", **BITS))
    texts = [lm.encode(text)[0].tolist() for text in ("a long road", "hill")]
    alone = [write(model, [ids], 12, min_length=len(ids) + 12)[0] for ids in texts]
    longest = max(map(len, texts))
    padded = [ids + [0] * (longest - len(ids)) for ids in texts]
    assert write(model, padded, 12, min_length=longest + 12) == alone


@needs_genai
def test_a_text_longer_than_the_context_is_refused(letters, tmp_path):
    model = load(labkit.export.onnx(letters(), tmp_path / "folder", context=16, **BITS))
    with pytest.raises(Exception, match="max_length"):
        write(model, [[5, 6, 7]], 14)


def test_the_settings_say_what_the_graph_is(letters, tmp_path):
    lm = letters("Qwen2")
    lm.model.generation_config.eos_token_id = [7, 9]
    settings = json.loads((labkit.export.onnx(lm, tmp_path / "folder", context=100) / "genai_config.json").read_text())
    model, search = settings["model"], settings["search"]
    assert (model["type"], model["context_length"], model["vocab_size"]) == ("qwen2", 100, 96)
    assert (model["eos_token_id"], model["pad_token_id"]) == ([7, 9], 7)
    decoder = model["decoder"]
    assert [decoder[k] for k in ("num_hidden_layers", "num_key_value_heads", "head_size")] == [2, 2, 16]
    assert search["max_length"] == 100 and search["do_sample"] is False


# ---- what belongs to the model


def written(lm) -> LanguageModel:
    """The same model with a tokenizer of its own that can be saved, and louder, so that it does not repeat itself."""
    lm.tokenizer = words()
    for p in lm.model.parameters():
        p.data.mul_(8 if p.dim() >= 2 else 1)
    return lm


@needs_genai
@pytest.mark.parametrize(
    "asked",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 1},
        {"min_length": 20},
        {"repetition_penalty": 1.2, "min_length": 18},
    ],
    ids=str,
)
def test_genai_follows_the_generation_config_as_lm_generate_does(tmp_path, asked):
    lm = written(tiny())
    ids = lm.encode("w3 w4 w5 w6 w7 w8")
    lm.model.generation_config.eos_token_id = 2
    free = lm.model.generate(ids, max_new_tokens=24, do_sample=False)[0, 6:].tolist()
    lm.model.generation_config.eos_token_id = [free[8], 95]
    plain = lm.model.generate(ids, max_new_tokens=24, do_sample=False)[0, 6:].tolist()
    for name, value in asked.items():
        setattr(lm.model.generation_config, name, value)
    expected = lm.model.generate(ids, max_new_tokens=24, do_sample=False)[0, 6:].tolist()
    assert expected != plain
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = labkit.export.onnx(lm, tmp_path / "folder", **BITS)
    assert write(load(folder), ids.tolist(), 24) == [expected]


def test_what_genai_will_not_do_is_said_in_one_sentence_each(tmp_path):
    lm = written(tiny())
    lm.tokenizer = words(bos=True)
    lm.model.generation_config.eos_token_id = None
    for name, value in {"min_new_tokens": 3, "min_length": 9, "suppress_tokens": [5], "num_beams": 4}.items():
        setattr(lm.model.generation_config, name, value)
    with pytest.warns(UserWarning) as said:
        folder = labkit.export.onnx(lm, tmp_path / "folder")
    texts = [str(w.message) for w in said]
    assert len(texts) == 3 and not any(". " in text for text in texts)
    assert (
        "will not apply min_new_tokens = 3, suppress_tokens = [5], num_beams = 4 of the generation_config" in texts[0]
    )
    assert "needs a token that ends a text and gets 2" in texts[1] and "begin with '<s>'" in texts[2]
    assert "min_length" not in json.loads((folder / "genai_config.json").read_text())["search"]


def test_a_saved_model_exports_as_the_first_did(tmp_path):
    """The ends, penalties and the template survive save(), load() and export()."""
    lm = written(tiny("Gemma"))
    lm.tokenizer = words(template=TEMPLATE)
    lm.model.generation_config.eos_token_id, lm.model.generation_config.repetition_penalty = [7, 9], 1.3
    back = labkit.load(labkit.RTN()(lm, progress=False).save(tmp_path / "small"))
    made = [labkit.export.onnx(m, tmp_path / name) for name, m in (("a", lm), ("b", back))]
    first, second = (json.loads((folder / "genai_config.json").read_text()) for folder in made)
    assert first == second and first["model"]["eos_token_id"] == [7, 9]
    assert first["search"]["repetition_penalty"] == 1.3
    assert transformers.AutoTokenizer.from_pretrained(made[1]).chat_template == TEMPLATE


# ---- its size


@pytest.mark.model
def test_the_folder_is_as_large_as_what_the_engine_holds(short_lm, tmp_path):
    import onnx

    small = labkit.RTN(bits=4, group_size=64)(short_lm, progress=False)
    folder = labkit.export.onnx(small, tmp_path / "folder", context=512)
    written = onnx.load(folder / "model.onnx", load_external_data=False)
    products = {n.input[2] for n in written.graph.node if n.op_type == "MatMulNBits"}
    scales = sum(4 * int(np.prod(t.dims)) for t in written.graph.initializer if t.name in products)
    held = compile(small, context=512, threads=1).nbytes - scales  # the kernel's own sums, one for each scale
    size = sum((folder / name).stat().st_size for name in ("weights.bin", "model.onnx"))
    assert held <= size < held + 4 * 65536 + 40_000  # gaps before the few large tensors, and the graph


# ---- whole, or not there


def cut_short(error):
    """A builder that stops half-way."""

    def build(decoder, folder, *rest):
        (folder / "weights.bin").write_bytes(b"half of it")
        raise error

    return build


@pytest.mark.parametrize("error", (OSError("No space left on device"), KeyboardInterrupt()))
def test_an_interrupted_export_leaves_nothing(letters, tmp_path, monkeypatch, error):
    monkeypatch.setattr(graph, "build", cut_short(error))
    with pytest.raises(type(error)):
        labkit.export.onnx(letters(), tmp_path / "deep" / "folder")
    assert names(tmp_path / "deep") == set()


@pytest.mark.parametrize("moment", ("while it is written", "when it is moved"))
def test_an_interrupted_replacement_leaves_the_old_folder(letters, tmp_path, monkeypatch, moment):
    folder = labkit.export.onnx(letters(), tmp_path / "folder")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    real, moved = os.rename, []

    def move(source, target):
        moved.append(source)
        if len(moved) == 2:  # the old folder was moved away, the new one is to come
            raise KeyboardInterrupt
        real(source, target)

    if moment == "when it is moved":
        monkeypatch.setattr(os, "rename", move)
    else:
        monkeypatch.setattr(graph, "build", cut_short(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        labkit.export.onnx(letters("Qwen2"), folder, overwrite=True)
    assert names(tmp_path) == {"folder"}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_in_use_is_refused_and_one_exported_before_can_be_replaced(letters, tmp_path):
    folder = labkit.export.onnx(letters(), tmp_path / "folder")
    assert names(folder) >= {"model.onnx", "weights.bin", "genai_config.json", "tokenizer.json"}
    with pytest.raises(FileExistsError, match="not an empty folder"):
        labkit.export.onnx(letters(), folder)
    (folder / "left over").touch()
    labkit.export.onnx(letters("Qwen2"), folder, overwrite=True)
    assert json.loads((folder / "genai_config.json").read_text())["model"]["type"] == "qwen2"
    assert "left over" not in names(folder) and names(tmp_path) == {"folder"}


@pytest.mark.parametrize("part", ("model.onnx", "weights.bin", "my thesis.txt"))
def test_what_is_no_whole_export_is_never_replaced(letters, tmp_path, part):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / part).write_text("precious")
    for target in (mine, mine / part):
        with pytest.raises(FileExistsError, match="is no exported model"):
            labkit.export.onnx(letters(), target, overwrite=True)
    assert (mine / part).read_text() == "precious"


def test_an_empty_folder_is_filled(letters, tmp_path):
    (tmp_path / "folder").mkdir()
    assert "model.onnx" in names(labkit.export.onnx(letters(), tmp_path / "folder"))


# ---- errors


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"context": 0}, "context = 0 is not allowed"),
        ({"context": 2.0}, r"context = 2\.0 is not allowed"),
        ({"context": 10**6}, "must be from 1 to"),
        ({"head_bits": 3}, "head_bits = 3 is not allowed"),
        ({"embedding_bits": 16}, "embedding_bits = 16 is not allowed"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(letters, tmp_path, bad, said):
    with pytest.raises(ValueError, match=said):
        labkit.export.onnx(letters(), tmp_path / "folder", **bad)
    assert names(tmp_path) == set()


def test_models_that_cannot_be_exported_say_why_and_nothing_is_written(letters, tmp_path):
    with pytest.raises(NotCompilable, match="GPT2"):
        labkit.export.onnx(tiny("GPT2"), tmp_path / "folder")
    heads = letters()
    heads.model.config.head_dim = 8
    for block in heads.model.model.layers:
        block.self_attn.head_dim = 8
    with pytest.raises(NotCompilable, match="heads have 8 channels"):
        labkit.export.onnx(heads, tmp_path / "folder")
    with pytest.raises(ValueError, match=r"tiny-Llama writes no tokenizer\.json"):
        labkit.export.onnx(tiny(), tmp_path / "folder")
    endless = letters()
    endless.model.config.eos_token_id = endless.model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="names no token that ends a text"):
        labkit.export.onnx(endless, tmp_path / "folder")
    assert names(tmp_path) == set()


def test_a_graph_that_no_runtime_can_run_is_not_written(letters, tmp_path, monkeypatch):
    monkeypatch.setattr(families, "HEAD", 1)  # as if the rule for heads were another one
    lm = letters()
    for block in lm.model.model.layers:
        block.self_attn.head_dim = 8
    with pytest.raises(NotCompilable, match="onnxruntime cannot run its graph .head_size"):
        labkit.export.onnx(lm, tmp_path / "folder")
    assert names(tmp_path) == set()


def test_without_the_onnx_package_the_error_says_what_to_install(letters, tmp_path, monkeypatch):
    lm = letters()
    monkeypatch.setitem(sys.modules, "onnx", None)
    for name in ("labkit.engine.graph", "labkit.export.genai"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=r"needs onnx, which is not installed: .*-m pip install -e .*\[kernels\]"):
        labkit.export.onnx(lm, tmp_path / "folder")


# ---- the command


@needs_genai
@pytest.mark.model
def test_the_command_exports_a_compressed_folder(short_lm, tmp_path, capsys):
    small = labkit.RTN(bits=4, group_size=64)(short_lm, progress=False)
    small.save(tmp_path / "small")
    words = ["export", "onnx", str(tmp_path / "small"), "--out", str(tmp_path / "phone"), "--context", "256"]
    assert cli.main([*words, "--head-bits", "4", "--embedding-bits", "none"]) == 0
    assert "RTN(bits=4" in capsys.readouterr().out
    expected = list(compile(small, context=256, head_bits=4, embedding_bits=None, threads=1).stream(PROMPTS[0], 16))
    assert write(load(tmp_path / "phone"), [small.encode(PROMPTS[0])[0].tolist()], 16) == [expected]
    assert cli.main(words) == 2 and "not an empty folder" in capsys.readouterr().err
    assert cli.main([*words, "--force"]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "FORMAT"),
        (["paper"], "paper"),
        (["onnx"], "--out"),
        (["onnx", "--out", "a\0b"], "cannot be a path here"),
        (["onnx", "--out", "f", "--head-bits", "3"], "--head-bits"),
        (["onnx", "--out", "f", "--context", "long"], "--context"),
    ],
)
def test_bad_words_are_refused_before_the_model_is_loaded(words, said, monkeypatch, tmp_path, capsys):
    def loaded(name=None):
        raise AssertionError("the model was loaded before the words were checked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(labkit, "load", loaded)
    assert cli.main(["export", *words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_help_tells_of_the_formats_and_of_one(capsys):
    assert cli.main(["export", "--help"]) == 0 and "onnx" in capsys.readouterr().out
    assert cli.main(["export", "onnx", "--help"]) == 0
    out = capsys.readouterr().out
    assert "labkit export onnx" in out and "--force" in out and "--head-bits" in out
