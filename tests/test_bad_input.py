"""Bad input over the public surface, fuzzed: the answer is one clear sentence, and nothing half-written is left behind.

What the other tests hold already is not repeated: fetching (test_assets), stored rows (test_results), grids (test_sweep),
recorded numbers (test_record), a damaged embedded model (test_model).
"""

from __future__ import annotations

import decimal
import errno
import fractions
import json
import os
import shutil
import sys
from pathlib import Path

import httpx
import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import labkit
from labkit import cli
from labkit.model import LanguageModel

settings.register_profile("quick", deadline=None, suppress_health_check=list(HealthCheck))
quick = settings(settings.get_profile("quick"), max_examples=40)
few = settings(settings.get_profile("quick"), max_examples=12)

LONG = "What a student pastes where a file's name was wanted. " * 200
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=4),
    st.complex_numbers(),
    st.sampled_from(
        [
            10**400,
            -(10**400),
            fractions.Fraction(10**400),
            10**5000,
            decimal.Decimal("NaN"),
            np.int64(4),
            np.float32("nan"),
            np.bool_(True),
            np.zeros((40, 40)),
            torch.tensor(4),
            torch.zeros(40, 40),
            LONG,
            "a\0b",
            "\ud800",
            "~",
            "",
            object,
            object(),
            len,
        ]
    ),
)
anything = st.one_of(
    scalars,
    st.lists(scalars, max_size=2),
    st.tuples(scalars),
    st.dictionaries(st.text(max_size=2), scalars, max_size=1),
)


def sentence(error: BaseException) -> str:
    """The error's text, after it was found to be one sentence that one can read."""
    text = str(error)
    assert text.endswith(".") and "\n" not in text and 20 < len(text) <= 600, text[:2000]
    return text


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder, by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- models with a tokenizer that can be saved


def lettered(vocabulary: int = 96, layers: int = 2) -> LanguageModel:
    """A tiny random Llama that reads one token per character."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {chr(32 + i): i for i in range(vocabulary - 1)} | {"[UNK]": vocabulary - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=vocabulary,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    return LanguageModel(model, fast, "tiny")


@pytest.fixture(scope="module")
def mine() -> LanguageModel:
    return lettered()


@pytest.fixture(scope="module")
def saved(mine, tmp_path_factory) -> dict[str, Path]:
    """A dense and a packed model on disk."""
    home = tmp_path_factory.mktemp("saved")
    packed = labkit.RTN(bits=4, group_size=32)(mine, progress=False)
    return {"dense": mine.save(home / "dense"), "packed": packed.save(home / "packed")}


IDS = torch.arange(24)[None] * 5 % 96


@torch.inference_mode()
def logits(lm) -> torch.Tensor:
    return lm.model(IDS).logits


# ---- knobs

KNOBS = [(cls, name) for cls in labkit.methods().values() for name in cls.knobs()]


@pytest.mark.parametrize(("cls", "name"), KNOBS, ids=[f"{cls.__name__}.{name}" for cls, name in KNOBS])
@quick
@given(value=anything)
@example(value=10**400)
@example(value=10**5000)
@example(value=torch.zeros(40, 40))
@example(value=LONG)
def test_a_knob_takes_a_value_or_says_what_it_takes(cls, name, value):
    knob = cls.knobs()[name]
    try:
        made = getattr(cls(**{name: value}), name)
    except ValueError as error:
        said = sentence(error)
        assert said.startswith(f"{cls.__name__}.") and knob.allowed in said
    else:
        assert made is None if value is None else type(made) is knob.type and bool(made == value)
        assert made is None or not knob.choices or made in knob.choices
        json.dumps(made)  # part of every key in the store


@pytest.mark.parametrize(("cls", "name"), KNOBS, ids=[f"{cls.__name__}.{name}" for cls, name in KNOBS])
@quick
@given(word=st.one_of(st.text(max_size=12), st.integers().map(str), st.floats().map(str), st.just("9" * 5000)))
@example(word="1e999")
@example(word="9" * 5000)
def test_a_knob_reads_a_word_or_says_what_it_takes(cls, name, word):
    try:
        cls(**{name: cls.knobs()[name].parse(word)})
    except ValueError as error:
        sentence(error)


# ---- texts


@pytest.mark.parametrize("cut", [labkit.text.evaluation, labkit.text.calibration], ids=["evaluation", "calibration"])
@quick
@given(
    content=st.one_of(st.binary(max_size=300), st.text(max_size=300).map(str.encode)),
    windows=st.integers(-1, 4),
    length=st.integers(-1, 40),
)
@example(content=b"", windows=1, length=2)
@example(content=b" \n", windows=1, length=2)
@example(content=b"\xef\xbb\xbf", windows=1, length=2)
@example(content=b"x" * 39, windows=1, length=40)
@example(content=b"x" * 300, windows=0, length=40)
def test_any_file_gives_windows_or_a_sentence(cut, mine, tmp_path_factory, content, windows, length):
    folder = tmp_path_factory.mktemp("text")
    path = folder / "some.txt"
    path.write_bytes(content)
    try:
        ids = cut(mine, windows, length, source=path)
    except ValueError as error:
        said = sentence(error)
        assert "some.txt" in said or f"= {windows} is" in said or f"= {length} is" in said
    else:
        assert ids.shape == (windows, length) and windows > 0 and length > 1
        content.decode()  # nothing but text was cut
    assert files(folder) == {"some.txt": content}


ARGUMENTS = [(labkit.text.evaluation, name) for name in ("lm", "windows", "length", "source")] + [
    (labkit.text.calibration, name) for name in ("lm", "windows", "length", "seed", "source")
]


@pytest.mark.parametrize(("cut", "name"), ARGUMENTS, ids=[f"{cut.__name__}.{name}" for cut, name in ARGUMENTS])
@quick
@given(value=anything)
@example(value=10**400)
@example(value="8")
@example(value=2**64)
@example(value=LONG)
@example(value=b"manual")
@example(value=None)
def test_any_argument_of_a_text_is_taken_or_refused(cut, name, mine, value):
    arguments = {"lm": mine, "windows": 2, "length": 16, "source": "manual"} | {name: value}
    try:
        ids = cut(**arguments)
    except ValueError as error:
        sentence(error)
    else:
        assert ids.dtype == torch.long and ids.shape == (arguments["windows"], arguments["length"])


def test_a_folder_or_a_file_without_permission_is_no_text(mine, tmp_path):
    with pytest.raises(ValueError, match="There is no text"):
        labkit.text.evaluation(mine, 1, 16, tmp_path)


# ---- names, devices and dtypes of models; the hub is stubbed where its client touches the network


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """``hub.answer``: a function from request to response, in place of the network. Its cache is an empty folder."""

    class Hub:
        cache = tmp_path / "hub"

        def answer(self, request):
            raise httpx.ConnectError("nobody is there", request=request)

    stub = Hub()
    transport = httpx.MockTransport(lambda request: stub.answer(request))
    huggingface_hub.set_client_factory(lambda: httpx.Client(transport=transport))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(stub.cache))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its tries
    yield stub
    huggingface_hub.set_client_factory(httpx.Client)


names = st.one_of(
    anything.filter(lambda value: value is not None),
    st.from_regex(r"[a-z]{1,6}(/[a-z]{1,6}){0,3}", fullmatch=True).map(lambda name: f"no-such-{name}"),
)


@quick
@given(name=names)
@example(name=LONG)
@example(name=5)
@example(name="https://example.org/model")
@example(name="owner/model")
def test_any_name_without_a_network_is_one_sentence(hub, name):
    with pytest.raises(ValueError) as error:
        labkit.load(name)
    sentence(error.value)
    assert not [p for p in hub.cache.rglob("*") if p.is_file()]


ANSWERS = {
    "not there": lambda request: httpx.Response(404, request=request),
    "gated": lambda request: httpx.Response(401, request=request, headers={"X-Error-Code": "GatedRepo"}),
    "forbidden": lambda request: httpx.Response(403, request=request, text="by the proxy"),
    "busy": lambda request: httpx.Response(503, request=request),
    "a login page": lambda request: httpx.Response(200, request=request, text="<html>\nwelcome\n</html>"),
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_any_answer_of_the_hub_is_one_sentence(hub, answer):
    hub.answer = answer
    with pytest.raises(ValueError, match=r"There is no model 'owner/model' here \(.*check the hub id") as error:
        labkit.load("owner/model")
    sentence(error.value)
    assert not [p for p in hub.cache.rglob("*") if p.suffix == ".incomplete"]


@pytest.mark.parametrize("fault", [httpx.ConnectTimeout, httpx.ReadError, httpx.ProxyError, OSError])
def test_any_fault_of_the_network_is_one_sentence(hub, fault):
    def answer(request):
        raise fault("the line\nis cut")

    hub.answer = answer
    with pytest.raises(ValueError, match="check the hub id and the network") as error:
        labkit.load("owner/model")
    sentence(error.value)


@quick
@given(value=anything.filter(lambda value: value is not None))
@example(value="nonsense")
@example(value="cuda:99")
@example(value=[1])
def test_any_device_is_used_or_refused(saved, value):
    try:
        assert labkit.load(saved["dense"], device=value).device == torch.device(value)
    except ValueError as error:
        assert sentence(error).startswith("device = ")


@quick
@given(value=anything.filter(lambda value: value is not None))
@example(value="nonsense")
@example(value=torch.int8)
@example(value="float16")
def test_any_dtype_is_known_or_refused(saved, value):
    try:
        labkit.load(saved["dense"], dtype=value)
    except ValueError as error:
        assert sentence(error).startswith("dtype = ")
    else:
        assert (value if isinstance(value, torch.dtype) else getattr(torch, value)).is_floating_point


def test_a_bad_dtype_does_not_cost_the_converted_model(monkeypatch, tmp_path):
    """A ValueError while the embedded model loads means that its cache is damaged: so nothing else may raise one there."""
    from labkit import embedded

    (tmp_path / "kept").write_text("half a gigabyte")
    monkeypatch.setattr(embedded, "folder", lambda: tmp_path)
    with pytest.raises(ValueError, match="dtype = "):
        labkit.load(dtype="nonsense")
    assert (tmp_path / "kept").exists()


# ---- damaged models


DAMAGE = {
    "deleted": lambda data, where: None,
    "cut off": lambda data, where: data[: int(where * len(data))],
    "zeros": lambda data, where: bytes(len(data)),
    "rubbish": lambda data, where: b"\x80rubbish" * 40,
    "a list": lambda data, where: b"[1, 2]",
    "an empty object": lambda data, where: b"{}",
    "null": lambda data, where: b"null",
}
FILES = ["config.json", "labkit.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", ["dense", "packed"])
@few
@given(name=st.sampled_from([*FILES, "generation_config.json"]), where=st.floats(0, 1))
@example(name="labkit.json", where=0.5)
@example(name="model.safetensors", where=0.999)
@example(name="tokenizer.json", where=0.5)
def test_a_damaged_model_is_refused_or_is_the_same_model(saved, tmp_path_factory, kind, damage, name, where):
    folder = tmp_path_factory.mktemp("damaged") / "model"
    shutil.copytree(saved[kind], folder)
    after = DAMAGE[damage]((folder / name).read_bytes(), where)
    (folder / name).unlink() if after is None else (folder / name).write_bytes(after)
    before = files(folder)
    try:
        lm = labkit.load(folder)
    except ValueError as error:
        said = sentence(error)
        assert str(folder) in said.replace("\\\\", "\\")
    else:
        assert torch.equal(logits(lm), logits(labkit.load(saved[kind])))
    assert files(folder) == before
    shutil.rmtree(folder)


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_a_missing_tensor_is_noticed_whichever_it_is(saved, tmp_path, kind):
    """transformers would fill it with random numbers, and every figure would be about those."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(saved[kind], folder)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        save_file(rest, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError) as error:
            labkit.load(folder)
        sentence(error.value)


@pytest.mark.parametrize("key", ["class", "packed", "shared", "history"])
@few
@given(value=st.one_of(st.none(), st.integers(), st.text(max_size=5), st.lists(st.integers(), max_size=2)))
def test_a_manifest_that_says_something_else(saved, tmp_path_factory, key, value):
    folder = tmp_path_factory.mktemp("manifest") / "model"
    shutil.copytree(saved["packed"], folder)
    manifest = json.loads((folder / "labkit.json").read_text())
    (folder / "labkit.json").write_text(json.dumps(manifest | {key: value}))
    try:
        lm = labkit.load(folder)
    except ValueError as error:
        sentence(error)
    else:
        assert torch.equal(logits(lm), logits(labkit.load(saved["packed"])))
    shutil.rmtree(folder)


def test_a_disk_that_fills_while_saving_leaves_nothing(mine, tmp_path, monkeypatch):
    import safetensors.torch

    def full(tensors, path, **_):
        Path(path).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        mine.save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_saving_over_something_leaves_it_alone(mine, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine too")
    before = files(tmp_path)
    for target in ("file", "folder", "file/below"):
        with pytest.raises(OSError):
            mine.save(tmp_path / target)
    assert files(tmp_path) == before


# ---- measuring


QUICK = {"windows": 1, "length": 32, "latency": False, "progress": False, "texts": ("manual",)}


@pytest.mark.parametrize("name", ["lm", "against", "texts", "windows", "length"])
@few
@given(value=anything)
@example(value="manual")
@example(value=())
@example(value=5)
@example(value=["nope"])
@example(value="8")
def test_any_argument_of_measure_is_taken_or_refused(mine, name, value):
    try:
        found = labkit.measure(**({"lm": mine} | QUICK | {name: value}))
    except ValueError as error:
        sentence(error)
    else:
        assert found.quality and all(np.isfinite(q.perplexity) for q in found.quality.values())


@quick
@given(value=anything)
@example(value=torch.zeros(2, 3))
@example(value=torch.full((1, 9), 96))
@example(value=torch.full((1, 9), -1))
@example(value=torch.zeros(1, 300, dtype=torch.long))  # longer than the model's context
def test_any_windows_are_taken_or_refused(mine, value):
    reads = (labkit.perplexity, labkit.GPTQ(), lambda lm, ids: labkit.divergence(lm, lm, ids))
    for read in reads:
        if value is None and isinstance(read, labkit.Method):
            continue  # the default calibration
        with pytest.raises(ValueError) as error:
            read(mine, value)
        sentence(error.value)


def test_a_model_with_another_vocabulary_cannot_be_compared(mine):
    with pytest.raises(ValueError, match="vocabularies of 100 and 96 tokens"):
        labkit.measure(mine, against=lettered(100, 1), **QUICK)
    with pytest.raises(ValueError, match="another tokenizer"):
        labkit.measure(mine, against=lettered(80, 1), **QUICK)


@pytest.mark.parametrize("use", [labkit.RTN(), labkit.perplexity, labkit.measure, labkit.divergence])
def test_the_transformers_model_in_place_of_ours_is_named(mine, use):
    extra = {labkit.perplexity: [IDS], labkit.divergence: [mine, IDS]}.get(use, [])
    with pytest.raises(ValueError, match="LanguageModel, as labkit.load.* not LlamaForCausalLM"):
        use(mine.model, *extra)


@quick
@given(data=st.data(), value=st.sampled_from([float("nan"), float("inf"), -float("inf")]))
def test_nan_in_any_weight_is_told_and_never_becomes_a_number(mine, data, value):
    broken = mine.copy()
    name = data.draw(st.sampled_from(sorted(n for n, _ in broken.model.named_parameters())))
    path, _, leaf = name.rpartition(".")
    module = broken.model.get_submodule(path)
    weight = getattr(module, leaf).detach().clone()
    weight.view(-1)[data.draw(st.integers(0, weight.numel() - 1))] = value
    setattr(module, leaf, torch.nn.Parameter(weight, requires_grad=False))
    for reference in (None, mine):
        try:
            found = labkit.measure(broken, against=reference, **QUICK).quality["manual"]
        except ValueError as error:
            assert "NaN" in sentence(error)
        else:  # a token's embedding that the text does not use
            assert not np.isnan(found.perplexity) and (found.kl is None or not np.isnan(found.kl))


def test_a_model_that_predicts_nan_writes_no_calibration_text(mine, tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    broken = mine.copy()
    weight = torch.full_like(broken.model.model.norm.weight, float("nan"))
    broken.model.model.norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match="predicts NaN") as error:
        labkit.text.calibration(broken, 2, 8, source="self", progress=False)
    sentence(error.value)
    assert not files(tmp_path)


@quick
@given(prompt=anything, tokens=anything)
@example(prompt="to", tokens="x")
@example(prompt="to", tokens=1.5)
@example(prompt=5, tokens=1)
def test_any_prompt_is_continued_or_refused(mine, prompt, tokens):
    if isinstance(tokens, int) and tokens > 4:
        tokens = 4
    if isinstance(prompt, str) and len(prompt) > 200:
        prompt = prompt[:200]
    try:
        assert isinstance(mine.generate(prompt, tokens), str)
    except ValueError as error:
        sentence(error)


# ---- the command line


@pytest.fixture
def shell(monkeypatch, tmp_path, capsys, mine, hub):
    """``shell(words) -> (exit code, stdout, stderr)`` in an empty folder; what takes long is not reached, or tiny."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "cache"))
    real = labkit.load
    monkeypatch.setattr(labkit, "load", lambda name=None: mine if name is None else real(name))
    monkeypatch.setattr(labkit, "measure", lambda lm, **_: labkit.Measurement("tiny", "x", {}, None, None, "cpu"))
    monkeypatch.setattr(labkit.Measurement, "__str__", lambda self: "measured")
    monkeypatch.setattr(
        sys.modules["labkit.sweep"], "sweep", lambda *args, **kwargs: []
    )  # the name is a function's too
    monkeypatch.setattr("labkit.assets.fetch", lambda name, **_: Path(__file__))
    monkeypatch.setattr("labkit.doctor.report", lambda network: labkit.doctor.Report(()))
    monkeypatch.setattr("labkit.regress.run", lambda *args, **kwargs: labkit.doctor.Report(()))
    monkeypatch.setattr("labkit.text.calibration", lambda lm, **_: IDS)

    def run(words):
        code = cli.main(list(words))
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


known = [
    *cli._commands(),
    *map(str.lower, labkit.methods()),
    "+",
    "default",
    "none",
    "4",
    "64",
    "int",
    "--",
    "-",
    "--out",
]
known += [
    "small",
    "--model",
    "--bits",
    "--group-size",
    "--bits=3",
    "--calib",
    "--json",
    "--markdown",
    "--quick",
    "--help",
]
known += [
    "--text",
    "--against",
    "--timeout",
    "--no-progress",
    "--no-network",
    "--export",
    "--profile",
    "a/b/c",
    "file/x",
]
word = st.one_of(st.sampled_from(known), st.text(max_size=6), st.sampled_from(["\ud800", "a\nb", LONG, "9" * 5000]))
lines = st.one_of(
    st.lists(word, max_size=7),
    st.tuples(st.sampled_from(list(cli._commands())), st.lists(word, max_size=6)).map(lambda p: [p[0], *p[1]]),
    st.tuples(
        st.sampled_from(cli.TAKES_METHODS),
        st.sampled_from(sorted(labkit.methods())),
        st.lists(word, max_size=6),
        st.just(["--out", "small"]),
    ).map(lambda p: [p[0], p[1], *p[2], *p[3]]),
)


@settings(settings.get_profile("quick"), max_examples=250)
@given(words=lines)
@example(words=["show", LONG])
@example(words=["compress", "rtn", "--bits", "9" * 5000, "--out", "small"])
@example(words=["compress", "rtn", "--out", "file/x"])
@example(words=["compress", "rtn", "--out", "a\0b"])
@example(words=["compress", "rtn", "--out", LONG])
@example(words=["measure", LONG])
@example(words=["measure", "\ud800"])
@example(words=["sweep", "rtn", "--export", "no/such/folder.jsonl"])
@example(words=["sweep", "rtn", "--export", "a\0b"])
@example(words=["regress", "--out", "\0"])
@example(words=["fetch", "nothing"])
def test_any_words_run_or_are_refused_in_one_line(shell, tmp_path, words):
    (tmp_path / "file").write_text("in the way")
    before = set(files(tmp_path)) | {p.name for p in tmp_path.iterdir()}
    code, out, err = shell(words)
    assert code in (0, 2), (words, err)
    if code == 2:
        assert not out and err.startswith("labkit: ") and err.count("\n") == 1 and len(err) < 700, (words, err)
        after = {p.name for p in tmp_path.iterdir()} - {"cache", "hub"}
        assert after <= before, words
    for made in ("small",):
        shutil.rmtree(tmp_path / made, ignore_errors=True)


def test_compress_on_a_full_disk_leaves_nothing(shell, tmp_path, monkeypatch):
    import safetensors.torch

    def full(tensors, path, **_):
        Path(path).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    code, _, err = shell(["compress", "rtn", "--out", "small", "--no-progress"])
    assert code == 1 and err.count("\n") == 1 and "No space left" in err
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("cache", "hub")] == []
