"""Loading, un-snapping, saving, and the quality figures that DESIGN expects."""

from __future__ import annotations

import pytest
import torch

import labkit
from labkit import embedded
from labkit.measure.quality import quality

pytestmark = pytest.mark.model


def original(tmp_path, sigma):
    from transformers import AutoModelForCausalLM

    from labkit import assets

    gguf = assets.fetch(embedded.ASSET, progress=False)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    return model


def real_zero_error(weight, size=32):
    """Relative error of a 4-bit format whose groups of 32 have a real-valued minimum, as Q4_1 has."""
    groups = weight.double().reshape(-1, size)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    step = ((high - low) / 15).clamp(min=1e-12)
    back = ((groups - low) / step).round() * step + low
    return ((back - groups).norm() / groups.norm()).item()


def test_unsnapping_keeps_the_function_and_leaves_the_grid(lm, tmp_path):
    snapped = original(tmp_path, 0)
    ids = labkit.text.evaluation(lm, windows=2, length=256)
    with torch.inference_mode():
        before, after = snapped(ids).logits, lm.model(ids).logits
    assert (before - after).abs().max() < 1e-3
    was, now = (
        torch.nn.functional.cross_entropy(x[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) for x in (before, after)
    )
    assert abs(was.exp() - now.exp()) < 1e-3
    path = "model.layers.3.mlp.up_proj.weight"
    assert real_zero_error(snapped.get_parameter(path).data) < 1e-6
    assert real_zero_error(lm.model.get_parameter(path).data) > 0.03


def test_perplexities_in_line(lm):
    """15.4 on the beginning of the manual's last part, 10.4 on windows spread over it; 8 bits row-wise change nothing."""
    whole = labkit.text.whole(lm.tokenizer, "manual")
    first = whole[int(len(whole) * labkit.text.CALIBRATION_SHARE) :][: 8 * 512].view(8, 512)
    assert 15 < labkit.perplexity(lm, first) < 16
    ids = labkit.text.evaluation(lm, windows=8, length=512)
    base = labkit.perplexity(lm, ids)
    assert 10 < base < 11
    eight = labkit.RTN(bits=8, group_size=None)(lm, progress=False)
    assert labkit.perplexity(eight, ids) / base == pytest.approx(1, abs=0.01)
    four = quality(labkit.RTN(bits=4)(lm, progress=False), ids, lm, progress=False)
    assert 1.15 < four.perplexity / base < 1.5 and 0.2 < four.kl < 0.5


def test_unknown_names():
    with pytest.raises(ValueError, match="There is no model 'no-such/model' here.*check the hub id"):
        labkit.load("no-such/model")


def test_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="holds no model that can be read"):
        labkit.load(tmp_path)


def test_damaged_saved_model(lm, tmp_path):
    small = labkit.RTN()(lm, progress=False)
    folder = small.save(tmp_path / "m")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match="holds a damaged model"):
        labkit.load(folder)
    with pytest.raises(FileExistsError, match="not an empty folder"):
        small.save(tmp_path / "m")


def test_damaged_cache_is_made_again(lm, tmp_path, monkeypatch, capsys):
    import os
    import shutil

    from labkit import assets, paths

    real = paths.cache()
    assets.fetch(embedded.ASSET, progress=False)
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    shutil.copytree(real / "assets", tmp_path / "assets", copy_function=os.link)
    folder = embedded.folder(progress=False)
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.write(b"\xff" * 8)  # the length of the header; every file has its size
    again = labkit.load()
    assert "is damaged; it is kept as" in capsys.readouterr().out
    assert again.fingerprint == lm.fingerprint and embedded.intact()
    assert oct(weights.stat().st_mode & 0o777) == oct(0o666 & folder.stat().st_mode)


def test_generate(lm):
    assert lm.generate("The capital of France is", 4).strip().startswith("Paris")
    with pytest.raises(ValueError, match="prompt is empty"):
        lm.generate("")
