"""Copy-on-write: two tensors read the same memory until one is written to, and with any torch they are right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import labkit
from labkit import _share
from labkit._share import address, raw, storage_address, twin

WRITES = {
    "in place": lambda t: t.mul_(0),
    "an item": lambda t: t.__setitem__((0, 0), 9.0),
    "through data": lambda t: t.data.fill_(2),
    "through a view": lambda t: t.detach().T[1].fill_(3),
    "through NumPy": lambda t: t.detach().numpy().fill(4),
}


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("first", [True, False])
def test_a_write_to_either_leaves_the_other(write, first, lazy, monkeypatch):
    if not lazy:  # a release of torch without it
        monkeypatch.delattr(torch, "_lazy_clone")
        monkeypatch.delattr(torch._C, "_data_address")
    t = torch.nn.Parameter(torch.randn(4, 3), requires_grad=False)
    before, new = t.clone(), twin(t)
    assert type(new) is type(t) and new is not t and new.stride() == t.stride()
    assert (address(new) == address(t)) == lazy
    mine, other = (t, new) if first else (new, t)
    write(mine)
    assert torch.equal(other, before) and not torch.equal(mine, before) and address(mine) != address(other)


def test_reading_parts_nothing():
    t = torch.randn(64, 64)
    new = twin(t)
    bytes(raw(new)), storage_address(new), new @ t, new.to(torch.bfloat16), new.T.contiguous(), new.sum()
    torch.nn.functional.embedding(torch.tensor([1]), new), torch.nn.functional.linear(t, new)
    assert address(new) == address(t) and bytes(raw(new)) == t.numpy().tobytes()


def test_memory_of_a_file_moves_once(tmp_path):
    save_file({"w": torch.randn(4, 3)}, tmp_path / "w.safetensors")
    t = load_file(tmp_path / "w.safetensors")["w"]
    before, new = t.clone(), twin(t)
    assert address(new) == address(t) == address(twin(t))
    new.zero_()
    assert torch.equal(t, before)
    foreign = torch.from_numpy(np.ones(3, np.float32))
    twin(foreign).zero_()
    assert foreign.tolist() == [1, 1, 1]


def test_inference_tensors_and_empty_ones():
    with torch.inference_mode():
        t = torch.ones(3)
    twin(t).zero_()
    assert t.tolist() == [1, 1, 1] and twin(torch.empty(0)).numel() == 0
    assert twin(torch.nn.Parameter(torch.ones(2))).requires_grad


def test_addresses():
    t = torch.zeros(8)
    assert address(t) == t.data_ptr() and address(t[2:]) == t.data_ptr() + 8
    assert storage_address(t[2:]) == t.data_ptr() and _share.raw(t[6:])[:] == bytes(8)


# ------------------------------------------------------------------------------------------------ models


def logits(lm, ids):
    with torch.inference_mode():
        return lm.model(ids).logits


def change_all(model, how: str):
    """What a user may do to a model that he takes for his own."""
    if how == "a dtype":
        model.to(torch.bfloat16)
    elif how == "a gradient":
        model.requires_grad_(any(p.is_floating_point() for p in model.parameters()))
    else:
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.zero_()


@pytest.mark.parametrize("how", ["a dtype", "a gradient", "a write"])
@pytest.mark.parametrize("cls", labkit.methods().values(), ids=labkit.methods())
def test_what_is_done_to_one_of_two_models_leaves_the_other_as_it_was(cls, how, tiny_lm):
    """torch's modules write into their Parameters: a Parameter of both models would change with either."""
    calib, ids = (torch.randint(1, 90, (2, n), generator=torch.Generator().manual_seed(n)) for n in (32, 24))
    original = tiny_lm
    before, made = logits(original, ids), cls()(original, calib, progress=False)
    change_all(made.model, how)
    assert torch.equal(logits(original, ids), before) and original.model.dtype == torch.float32
    assert not any(p.requires_grad for p in original.model.parameters())
    made = cls()(original, calib, progress=False)
    before = logits(made, ids)
    change_all(original.model, how)
    assert torch.equal(logits(made, ids), before)
    assert not any(p.requires_grad for p in made.model.parameters())
