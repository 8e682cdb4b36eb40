"""Corpora: disjoint, deterministic, and clear about bad input."""

from __future__ import annotations

import pytest
import torch

from labkit import text


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
