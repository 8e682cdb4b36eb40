"""The contract of DESIGN: every technique that labkit exports is held to it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

import labkit
from labkit._share import address
from labkit.measure import memory

METHODS = labkit.methods()
pytestmark = [pytest.mark.model, pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS)]


@pytest.fixture(scope="session")
def lm(short_lm):
    return short_lm


@pytest.fixture(scope="module")
def calib(lm):
    return labkit.text.calibration(lm, windows=2, length=64, source="manual")


@pytest.fixture(scope="module")
def ids(lm):
    return labkit.text.evaluation(lm, windows=2, length=64)


@pytest.fixture(scope="module")
def small(lm, calib):
    made = {}
    return lambda cls: made.setdefault(cls, cls()(lm, calib, progress=False))


def logits(model, ids):
    with torch.inference_mode():
        return model.model(ids).logits


def test_input_untouched_and_deterministic(cls, lm, calib, ids):
    before = {name: t.clone() for name, t in lm.model.state_dict().items()}
    first, second = (cls()(lm, calib, progress=False) for _ in range(2))
    after = lm.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(first, ids), logits(second, ids))


def test_untouched_tensors_are_shared(cls, lm, small):
    mine = {address(t) for t in lm.model.state_dict().values()}
    theirs = {address(t) for t in small(cls).model.state_dict().values()}
    assert mine & theirs


def test_finite_logits(cls, small, ids):
    assert torch.isfinite(logits(small(cls), ids)).all()


def test_lossless_end(cls, lm, calib, ids):
    assert cls.lossless, f"{cls.__name__} must say at which knob values it changes nothing"
    same = cls(**cls.lossless)(lm, calib, progress=False)
    assert labkit.divergence(same, lm, ids).kl <= cls.lossless_kl


def test_save_and_load_in_another_process(cls, small, ids, tmp_path):
    small(cls).save(tmp_path / "model")
    torch.save(ids, tmp_path / "ids.pt")
    code = (
        "import sys, torch, labkit; lm = labkit.load(sys.argv[1]); ids = torch.load(sys.argv[2])\n"
        "with torch.inference_mode(): torch.save((lm.model(ids).logits, lm.nbytes, lm.history), sys.argv[3])"
    )
    command = [sys.executable, "-c", code, *(str(tmp_path / n) for n in ("model", "ids.pt", "out.pt"))]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())})
    again, nbytes, history = torch.load(tmp_path / "out.pt")
    assert torch.equal(again, logits(small(cls), ids))
    assert nbytes == small(cls).nbytes  # both have run: where there is a kernel, it has the codes
    assert history == small(cls).history


def test_bytes_equal_the_files_tensors(cls, lm, calib, tmp_path):
    from safetensors import safe_open

    fresh = cls()(lm, calib, progress=False)
    fresh.save(tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        stored = sum(t.numel() * t.element_size() for t in map(file.get_tensor, file.keys()))
    rotary = sum(b.numel() * b.element_size() for n, b in fresh.model.named_buffers() if "inv_freq" in n)
    assert fresh.nbytes == stored + rotary  # rotary tables are computed, not stored
    if cls.kind == "cache":  # the weights stay as they are: the cache of 600 tokens is smaller
        ids = torch.ones(1, 600, dtype=torch.long)
        assert memory.bits_per_weight(fresh) == memory.bits_per_weight(lm)
        assert memory.cache_bytes(fresh.model(ids).past_key_values) < memory.cache_bytes(lm.model(ids).past_key_values)
    else:
        assert memory.bits_per_weight(fresh) < memory.bits_per_weight(lm)


def test_every_bad_knob_value_is_named(cls, lm):
    for name, spec in cls.knobs().items():
        bad = ["nonsense", float("nan"), [], 10**9, -(10**9)] + ([] if spec.none else [None])
        for value in bad:
            if spec.type is str and value == "nonsense" and not spec.choices:
                continue
            with pytest.raises(ValueError, match=f"{cls.__name__}.{name} = .*must be") as error:
                cls(**{name: value})
            assert repr(value) in str(error.value) and spec.allowed in str(error.value)


def test_frozen_and_described(cls):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(cls(), next(iter(cls.knobs())), 1)
    assert cls.summary() and cls.paper and cls.kind and all(k.help for k in cls.knobs().values())


def test_typed_is_the_method_again(cls):
    """In fewer words than its repr: a knob at its default is left out, but for the first."""
    for name, spec in cls.knobs().items():
        for setting in spec.positions():
            try:
                method = cls(**{name: setting})
            except ValueError:  # a knob that another one contradicts
                continue
            assert eval(method.typed(), {cls.__name__: cls}) == method
    assert next(iter(cls.knobs())) in cls().typed() and cls().typed().count("=") == 1


def test_nan_weight_is_refused(cls, lm, calib):
    broken = lm.copy()
    layer = broken.model.model.layers[1].mlp.up_proj
    weight = layer.weight.detach().clone()
    weight[3, 5] = float("nan")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match="NaN"):
        cls()(broken, calib, progress=False)
