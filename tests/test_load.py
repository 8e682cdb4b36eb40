"""What a load must not do: delete or remake a model because of another fault, run foreign code, build a foreign class."""

from __future__ import annotations

import builtins
import json
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import Letters, tiny
from tiny_tokenizer import TEMPLATE, words

import labkit
from labkit import assets, embedded


@pytest.fixture(autouse=True)
def letters(monkeypatch):
    """Every folder here has the tests' tokenizer, unless a test wants the real loader."""
    real = transformers.AutoTokenizer.from_pretrained
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: Letters())
    return real


# ---- the embedded model


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache in which a tiny model stands for the embedded one, and the list of conversions."""
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    made = []

    def convert(gguf, target, seed=0):
        made.append(target)
        time.sleep(0.2)
        tiny().model.save_pretrained(target)
        (target / "tokenizer.json").write_text("{}")

    monkeypatch.setattr(embedded, "convert", convert)
    monkeypatch.setattr(assets, "fetch", lambda name, progress: tmp_path / "model.gguf")
    return tmp_path, made


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def flip(path: Path) -> None:
    """Change one bit in the middle of a file; its size stays."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))


def fail_with(monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)


OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 1 bytes"),
]


@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, ImportError("no module named gguf")], ids=lambda e: type(e).__name__)
def test_what_is_no_fault_of_the_model_is_passed_on(home, monkeypatch, error):
    _folder, made = home
    labkit.load()
    before = {p: p.stat().st_mtime_ns for p in embedded.place().iterdir()}
    fail_with(monkeypatch, error)
    with pytest.raises(type(error)) as caught:
        labkit.load()
    assert caught.value is error and len(made) == 1
    assert {p: p.stat().st_mtime_ns for p in embedded.place().iterdir()} == before


@pytest.mark.parametrize("error", [ValueError("a new transformers"), KeyError("rope"), OSError("too many open files")])
def test_a_load_that_fails_on_intact_files_removes_nothing(home, monkeypatch, error):
    folder, made = home
    labkit.load()
    before = names(folder)
    fail_with(monkeypatch, error)
    with pytest.raises(RuntimeError, match=r"cannot be loaded, although its files in .* are intact: .*labkit doctor"):
        labkit.load()
    assert names(folder) == before and len(made) == 1 and embedded.intact()


def test_a_damaged_model_is_set_aside_and_made_again(home, capsys):
    folder, made = home
    whole = {name: tensor.clone() for name, tensor in labkit.load().model.state_dict().items()}  # not the file's pages
    weights = embedded.place() / "model.safetensors"
    weights.write_bytes(b"\0" * weights.stat().st_size)  # the size is right, so only a read finds it
    assert embedded.complete() and not embedded.intact()
    again = labkit.load()
    assert len(made) == 2 and embedded.intact()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in again.model.state_dict().items())
    (kept,) = [name for name in names(folder) if ".damaged-" in name]
    assert kept in capsys.readouterr().out
    assert set((folder / kept / "model.safetensors").read_bytes()) == {0}


def test_one_bit_is_damage(home):
    labkit.load()
    assert embedded.intact() and embedded.mend() is None
    for name in embedded.FILES:
        if (embedded.place() / name).stat().st_size:
            flip(embedded.place() / name)
            assert not embedded.intact(), name
            flip(embedded.place() / name)
    assert embedded.intact()


def test_a_model_that_may_not_be_read_is_not_damaged(home, monkeypatch):
    folder, made = home
    labkit.load()
    before = names(folder)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    fail_with(monkeypatch, OSError("cannot open the file"))
    monkeypatch.setattr(embedded, "_sha256", refuse)
    with pytest.raises(PermissionError):
        labkit.load()
    assert names(folder) == before and len(made) == 1


@pytest.mark.parametrize("broken", ["no record", "half a record", "a record of nothing", "a file less", "a short file"])
def test_an_incomplete_folder_is_kept_and_made_again(home, broken, capsys):
    folder, made = home
    embedded.folder(progress=False)
    place = embedded.place()
    record = place / embedded.MADE
    if broken == "no record":
        record.unlink()
    elif broken == "half a record":
        record.write_text(record.read_text()[:20])
    elif broken == "a record of nothing":
        record.write_text("{}")
    elif broken == "a file less":
        (place / "config.json").unlink()
    else:
        (place / "config.json").write_text("{")
    assert not embedded.complete()
    assert embedded.folder(progress=False) == place and embedded.intact() and len(made) == 2
    assert len([name for name in names(folder) if ".incomplete-" in name]) == 1
    assert "is not complete; it is kept as" in capsys.readouterr().out


def test_a_conversion_that_stops_leaves_nothing(home, monkeypatch):
    folder, _ = home

    def stop(gguf, target):
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "convert", stop)
    with pytest.raises(KeyboardInterrupt):
        embedded.folder(progress=False)
    assert names(folder) == []


def test_many_at_once_convert_once(home):
    _folder, made = home
    found = []
    threads = [threading.Thread(target=lambda: found.append(embedded.folder(progress=False))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [embedded.place()] * 4 and len(made) == 1


def test_a_finished_model_is_only_read(home, monkeypatch):
    """So it may lie in a folder of another user."""
    embedded.folder(progress=False)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    for name in ("alone", "set_aside", "whole_folder", "write_text"):
        monkeypatch.setattr(embedded, name, refuse)
    monkeypatch.setattr(assets, "fetch", refuse)
    assert labkit.load().model is not None


def test_a_cache_that_refuses_the_model_says_what_to_do(home, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(embedded, "whole_folder", refuse)
    with pytest.raises(OSError, match=r"could not be written to .*Permission denied.*LABKIT_CACHE"):
        embedded.folder(progress=False)


# ---- foreign code

SPY = "import pathlib\npathlib.Path({mark!r}).touch()\n"


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A folder whose ``auto_map`` names Python files of its own; whoever runs one leaves a mark."""

    def asked(*_):
        raise AssertionError("the user was asked on stdin")

    monkeypatch.setattr(builtins, "input", asked)
    monkeypatch.setattr(sys, "stdin", None)
    folder, mark = tmp_path / "foreign", tmp_path / "it ran"
    folder.mkdir()
    for name in ("configuration_x", "modeling_x", "tokenization_x"):
        (folder / f"{name}.py").write_text(SPY.format(mark=str(mark)))
    return folder, mark


def test_a_model_with_code_of_its_own_is_refused(foreign):
    folder, mark = foreign
    auto = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": auto}))
    with pytest.raises(
        ValueError, match=r"it brings Python code of its own, which labkit never runs\); check"
    ) as caught:
        labkit.load(folder)
    assert "\n" not in str(caught.value) and "trust_remote_code" not in str(caught.value) and not mark.exists()


def test_a_tokenizer_with_code_of_its_own_is_refused(foreign, letters, monkeypatch):
    folder, mark = foreign
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", letters)
    tiny().model.save_pretrained(folder)
    auto = {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(auto))
    with pytest.raises(ValueError, match="it brings Python code of its own"):
        labkit.load(folder)
    assert not mark.exists()


def test_every_load_says_that_no_code_is_trusted():
    import ast

    root = Path(labkit.__file__).parent
    calls = []
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained":
                keywords = {k.arg: k.value for k in node.keywords}
                spread = [ast.unparse(k.value) for k in node.keywords if k.arg is None]
                calls.append((path, "trust_remote_code" in keywords or spread))
    assert len(calls) >= 6 and all(said for _, said in calls), calls
    for path in {path for path, _ in calls}:
        text = path.read_text(encoding="utf-8")
        assert '"trust_remote_code": False' in text and "trust_remote_code=True" not in text


# ---- foreign classes


@pytest.fixture
def saved(tmp_path, tiny_lm):
    """A saved folder, and a function that changes its manifest."""
    small = labkit.RTN(bits=4, group_size=32)(tiny_lm, progress=False)
    folder = small.save(tmp_path / "saved")

    def change(**fields):
        manifest = json.loads((folder / "labkit.json").read_text())
        (folder / "labkit.json").write_text(json.dumps(manifest | fields))

    return folder, change


def test_a_saved_model_comes_back(saved):
    assert labkit.load(saved[0]).history


@pytest.mark.parametrize(
    "name",
    ["Trainer", "pipeline", "BertModel", "LlamaModel", "LlamaConfig", "AutoModelForCausalLM", "os", "", 3, None, ["x"]],
)
def test_a_manifest_names_a_causal_language_model_or_nothing(saved, name):
    folder, change = saved
    change(**{"class": name})
    with pytest.raises(ValueError, match=r"class = .* is not allowed: it must be a causal language model") as caught:
        labkit.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spec", [{"module": "Linear"}, {"module": "os.system"}, {"module": 3}, {}, "PackedLinear", None]
)
def test_a_manifest_names_our_layers_or_nothing(saved, spec):
    folder, change = saved
    packed = json.loads((folder / "labkit.json").read_text())["packed"]
    change(packed=dict.fromkeys(packed, spec))
    with pytest.raises(ValueError, match=r"module = .* is not allowed: it must be one of PackedLinear, "):
        labkit.load(folder)


# ---- what belongs to a model comes with it


@pytest.fixture
def there_and_back(tmp_path, letters, monkeypatch):
    """Saves a model and loads it again, with the real loader of tokenizers."""
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", letters)
    return lambda lm: labkit.load(labkit.RTN(bits=8, group_size=32)(lm, progress=False).save(tmp_path / "small"))


def test_the_generation_config_comes_back(there_and_back):
    lm = tiny("Gemma")
    lm.tokenizer = words()
    asked = {
        "eos_token_id": [7, 9],
        "repetition_penalty": 1.3,
        "suppress_tokens": [3, 4],
        "sequence_bias": [[[5, 6], -2.0]],
        "stop_strings": ["w8"],
        "temperature": 0.6,  # beside do_sample = False transformers warns of it, and its save_pretrained refuses
        "do_sample": False,
    }
    for name, value in asked.items():
        setattr(lm.model.generation_config, name, value)
    back = there_and_back(lm)
    assert {name: getattr(back.model.generation_config, name) for name in asked} == asked
    plain = transformers.GenerationConfig().to_dict() | lm.model.generation_config.to_dict()
    assert back.model.generation_config.to_dict() == plain


def test_a_folder_without_a_generation_config_takes_the_ends_of_the_config(there_and_back, tmp_path):
    lm = tiny()
    lm.tokenizer, lm.model.config.eos_token_id = words(), 11
    there_and_back(lm)
    (tmp_path / "small" / "generation_config.json").unlink()
    assert labkit.load(tmp_path / "small").model.generation_config.eos_token_id == 11


def test_the_template_and_the_special_tokens_come_back(there_and_back):
    lm = tiny()
    lm.tokenizer = words(bos=True, template=TEMPLATE)
    lm.tokenizer.add_special_tokens({"additional_special_tokens": ["w5"]})
    back = there_and_back(lm)
    assert back.tokenizer.chat_template == TEMPLATE
    assert back.tokenizer.all_special_ids == lm.tokenizer.all_special_ids and 5 in back.tokenizer.all_special_ids
    assert back.encode("w3 w4").tolist() == lm.encode("w3 w4").tolist() == [[1, 3, 4]]


def test_a_damaged_generation_config_is_said(there_and_back, tmp_path):
    lm = tiny()
    lm.tokenizer = words()
    there_and_back(lm)
    (tmp_path / "small" / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match="holds no complete labkit model"):
        labkit.load(tmp_path / "small")
