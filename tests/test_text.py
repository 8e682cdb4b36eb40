"""Corpora: disjoint, deterministic, and clear about bad input."""

from __future__ import annotations

import pytest
import torch

import labkit
from labkit import probe, text, walk


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
    assert seen and all(s == [1, 2] or (isinstance(s, int) and s >= 2) for s in seen)


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
    from labkit import paths

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
