"""Corpora: disjoint, deterministic, and clear about bad input."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import labkit
from labkit import paths, probe, shipped, text, walk


def ngrams(windows, n=120):
    flat = [w.tolist() for w in windows]
    return {tuple(w[i : i + n]) for w in flat for i in range(len(w) - n)}


def test_calibration_is_disjoint_from_evaluation(tiny_lm):
    calib = text.calibration(tiny_lm, 200, 256, source="manual")
    shared = ngrams(calib) & ngrams(text.evaluation(tiny_lm, 100, 256, "manual"))
    assert not shared
    assert not ngrams(calib) & ngrams(text.evaluation(tiny_lm, 20, 256, "prose"))


def test_seeded(tiny_lm):
    a, b, c = (text.calibration(tiny_lm, 4, 64, seed=s, source="manual") for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert text.fingerprint(a) == text.fingerprint(b) != text.fingerprint(c)


def test_self_and_mixed(tiny_lm, tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    own = text.calibration(tiny_lm, 3, 16, source="self", progress=False)
    assert own.shape == (3, 16) and own.dtype == torch.long
    assert list((tmp_path / "self").glob("*.safetensors"))
    mixed = text.calibration(tiny_lm, 5, 16, progress=False)
    assert mixed.shape == (5, 16)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_the_mixed_windows_take_turns(tiny_lm, tmp_path, monkeypatch, count):
    """Whoever looks at the first few of them sees both texts: manual, self, manual, self, …"""
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))

    def windows(source, count):
        return text.calibration(tiny_lm, count, 16, 1, source, progress=False)

    mixed, manual = windows("mixed", count), windows("manual", count - count // 2)
    assert mixed.shape == (count, 16) and torch.equal(mixed[::2], manual)
    if count > 1:
        assert torch.equal(mixed[1::2], windows("self", count // 2))


@pytest.mark.parametrize("few", [2, 4])
def test_the_first_few_hidden_states_are_of_both_texts(tiny_lm, tmp_path, monkeypatch, few):
    """What AWQ's search and the folds look at, in batches that hold more than one window or less than few."""
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    mixed = text.calibration(tiny_lm, 6, 16, progress=False)
    parts = [text.calibration(tiny_lm, 3, 16, source=source, progress=False) for source in ("manual", "self")]
    embedding = tiny_lm.model.get_input_embeddings()
    for batch in (16, 48, 1024):
        monkeypatch.setattr(walk, "BATCH", (batch, batch))
        seen = walk.Flow(tiny_lm.model, walk.blocks(tiny_lm.model), mixed).few(few)
        assert torch.equal(seen[::2], embedding(parts[0][: few // 2]))
        assert torch.equal(seen[1::2], embedding(parts[1][: few // 2]))


@pytest.mark.parametrize(
    "method",
    [labkit.MixedPrecision(), labkit.Wanda(allocation="sensitivity"), labkit.AWQ(), labkit.AWQGPTQ()],
    ids=repr,
)
def test_whoever_probes_on_a_few_windows_sees_both_texts(tiny_lm, monkeypatch, method):
    first, second = torch.full((4, 300), 1), torch.full((4, 300), 2)
    mixed = text._interleaved(first, second)
    seen, few, begin = [], walk.Flow.few, probe.Probe.__init__

    def looked(self, windows):
        seen.append(windows)
        return few(self, windows)

    def begun(self, lm, ids):
        seen.append(ids.unique().tolist())
        begin(self, lm, ids)

    monkeypatch.setattr(walk.Flow, "few", looked)
    monkeypatch.setattr(probe.Probe, "__init__", begun)
    method(tiny_lm, mixed, progress=False)
    probed = [s for s in seen if s != 1]  # on one window folds are proved, and those hold on any
    assert probed and all(s == [1, 2] or (isinstance(s, int) and s >= 2) for s in probed)


@pytest.mark.model
def test_the_hash_of_the_default_calibration_is_that_of_both_parts_in_turns(lm):
    """Of the embedded model, whose own text ships: the same windows and the same hash every time."""
    found = [text.calibration(lm, 8, 512) for _ in range(2)]
    assert text.fingerprint(found[0]) == text.fingerprint(found[1])
    assert torch.equal(found[0][:4], text.calibration(lm, 4, 512))  # fewer windows are the first of more
    parts = [text.calibration(lm, 4, 512, source=source) for source in ("manual", "self")]
    assert text.fingerprint(found[0]) == text.fingerprint(torch.stack(parts, 1).flatten(0, 1))
    assert text.fingerprint(found[0]) != text.fingerprint(torch.cat(parts))


def test_prose_is_long_enough():
    words = sum(len(f.read_text().split()) for f in (paths.data() / "prose").glob("*.md"))
    assert words >= 8000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There is no text"),
        (b"", "is empty"),
        (b"\xff\xfe\0\0", "not a UTF-8 text file"),
        (b"short", "too short"),
    ],
)
def test_bad_files(tiny_lm, tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        text.evaluation(tiny_lm, 1, 512, path)


def test_bad_windows(tiny_lm):
    for bad, message in (
        (torch.zeros(3), "LongTensor"),
        ([[1, 2]], "not list"),
        (torch.zeros(0, 5, dtype=torch.long), "too short"),
        (torch.full((1, 4), 4000), "another tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            text.check_windows(tiny_lm, bad)
    with pytest.raises(ValueError, match="windows = 0 is not allowed"):
        text.calibration(tiny_lm, 0, 64)


# ---- the same text everywhere

OTHERS = [found for minor in range(10, 16) if (found := shutil.which(f"python3.{minor}"))] + ["/usr/bin/python3"]
BARE = f"""
import sys, types
package = types.ModuleType("labkit")
package.__path__ = [{str(Path(shipped.__file__).parent)!r}]
sys.modules["labkit"] = package
"""
SHA = """
import hashlib
from labkit import shipped
print(*(hashlib.sha256(shipped.text(name).encode()).hexdigest() for name in ("manual", "prose")))
"""


def sha(name: str) -> str:
    return hashlib.sha256(text.raw(name).encode()).hexdigest()


def test_the_texts_are_those_of_the_manifest():
    """sha256 of pydoc_data/topics.py's text in CPython 3.11.7, and of the essays."""
    assert sha("manual") == "71f2ff5d99bdc1f9c48c5c2353ad138201c5ca1c377e0226857ef8fa89b8bcee"
    assert sha("prose") == "e77eec0873815e0250780f9873117f4de4ef6a0d9d7467ddedbc984b8fa2c984"
    known = shipped.shipped()
    assert known["manual"].sha256 == sha("manual") and known["manual"].version == "3.11.7"
    assert all(shipped.intact(name) for name in known)
    for what in known.values():
        assert what.paths and what.source and what.licence and what.note
        assert all(path.stat().st_size < 2 << 20 for path in what.paths)
        assert not what.licence_file or (paths.data() / what.licence_file).is_file()


def test_the_licence_of_the_manual_goes_along():
    licence = (paths.data() / shipped.shipped()["manual"].licence_file).read_text(encoding="utf-8")
    for part in (
        "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2",
        "Copyright (c) 2001",
        "ZERO-CLAUSE BSD",
    ):
        assert part in licence
    notice = (paths.data() / "manual" / "README.md").read_text(encoding="utf-8")
    assert "Python 3.11.7" in notice and "Changed for labkit" in notice


@pytest.mark.skipif(sys.version_info[:3] != (3, 11, 7), reason="only Python 3.11.7 has this manual")
def test_the_manual_is_the_one_of_python_3_11_7():
    from pydoc_data.topics import topics

    assert text.raw("manual") == "\n\n".join(topics[name] for name in sorted(topics))


def test_another_interpreters_manual_moves_no_id(tiny_lm, monkeypatch):
    before = [text.evaluation(tiny_lm, 4, 128, s) for s in ("manual", "prose")] + [
        text.calibration(tiny_lm, 4, 128, source="manual")
    ]
    module = types.ModuleType("pydoc_data.topics")
    module.topics = {"assert": "Another manual, of another release of Python. " * 5000}
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", module)
    text._tokens.cache_clear()
    after = [text.evaluation(tiny_lm, 4, 128, s) for s in ("manual", "prose")] + [
        text.calibration(tiny_lm, 4, 128, source="manual")
    ]
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_a_process_with_another_manual_reads_the_same_texts():
    fake = "m = types.ModuleType('pydoc_data.topics'); m.topics = {'a': 'b'}; sys.modules['pydoc_data.topics'] = m"
    out = subprocess.run([sys.executable, "-c", BARE + fake + SHA], check=True, capture_output=True, text=True).stdout
    assert out.split() == [sha("manual"), sha("prose")]


@pytest.mark.parametrize("python", sorted({str(Path(p).resolve()) for p in OTHERS if Path(p).exists()}), ids=str)
def test_other_pythons_read_the_same_texts(python):
    """Whatever interpreters this machine has; reading the texts needs nothing but the standard library."""
    asked = subprocess.run(
        [python, "-c", "import sys; print(sys.version_info >= (3, 11))"], capture_output=True, text=True
    )
    if asked.stdout.strip() != "True":
        pytest.skip("does not run, or is 3.10 and needs tomli")
    out = subprocess.run([python, "-S", "-c", BARE + SHA], check=True, capture_output=True, text=True).stdout
    assert out.split() == [sha("manual"), sha("prose")]


def test_line_ends_of_windows_move_no_id(tiny_lm, tmp_path, monkeypatch):
    """A checkout or an editor that writes \\r\\n changes neither the texts nor what the manifest says of them."""
    before = [text.evaluation(tiny_lm, 4, 128, s) for s in ("manual", "prose")]
    shutil.copytree(paths.data(), tmp_path / "data")
    for path in [*(tmp_path / "data/manual").glob("*.txt"), *(tmp_path / "data/prose").glob("*.md")]:
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    monkeypatch.setattr(paths, "data", lambda: tmp_path / "data")
    text._tokens.cache_clear()
    assert all(shipped.intact(name) for name in ("manual", "prose"))
    assert all(torch.equal(a, text.evaluation(tiny_lm, 4, 128, s)) for a, s in zip(before, ("manual", "prose")))
    (tmp_path / "data/prose/01_rivers.md").write_text("Another essay.")
    assert shipped.intact("manual") and not shipped.intact("prose")


def test_a_text_that_is_missing_is_said(tmp_path, monkeypatch):
    (tmp_path / "manifest.toml").write_text((paths.data() / "manifest.toml").read_text(encoding="utf-8"))
    monkeypatch.setattr(paths, "data", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match="text 'manual' is missing from .*: it ships with labkit"):
        text.raw("manual")


def test_git_keeps_the_bytes():
    attributes = Path(__file__).resolve().parent.parent / ".gitattributes"
    if not attributes.exists():
        pytest.skip("needs a checkout")
    command = ["git", "check-attr", "eol", "text", "--", "data/manual/python-3.11.7.txt", "data/prose/01_rivers.md"]
    done = subprocess.run(command, cwd=attributes.parent, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("needs git")
    assert done.stdout.count("eol: lf") == 2 and "text: unset" not in done.stdout


@pytest.mark.model
def test_the_ids_are_those_of_the_manifest_and_of_every_shipped_row(lm):
    """Frozen twice: a hash of all ids of each text, and the hashes of the windows that the shipped rows were measured on."""
    from labkit.reproduce import TEXTS, sweeps
    from labkit.sweep import text_hashes

    for name in TEXTS:
        ids, what = text.whole(lm.tokenizer, name), shipped.shipped()[name]
        assert (len(ids), text.fingerprint(ids)) == (what.tokens, what.ids)
    for file in sorted((paths.data() / "results").glob("*.jsonl")):
        hashes = [text_hashes(lm, TEXTS, **vars(reading)) for reading in sweeps()[file.stem].readings(lm)]
        lines = file.read_text(encoding="utf-8").splitlines()
        assert lines and all(json.loads(json.loads(line)["key"]["texts"]) in hashes for line in lines)
