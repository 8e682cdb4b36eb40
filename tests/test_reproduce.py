"""The sweeps that ship: what they list exists, and what they write is what the store then answers from."""

from __future__ import annotations

import dataclasses
import json

import pytest
from tiny_models import tiny

import labkit
from labkit import reproduce
from labkit.measure.machine import machine
from labkit.results import Key, Store
from labkit.sweep import text_hashes


def test_every_listed_setting_is_a_method_with_such_knobs():
    found = reproduce.sweeps()
    assert {"rtn", "rtn-quick", "ptq", "gptq", "calibration"} <= found.keys()
    for sweep in found.values():
        methods = sweep.methods()
        assert sweep.what and methods and len({(type(m), m.key()) for m in methods}) == len(methods)


def test_an_unknown_sweep_is_refused(tiny_lm):
    with pytest.raises(ValueError, match="There is no sweep 'x'"):
        reproduce.reproduce("x", tiny_lm)


def test_what_is_written_is_found_again(tmp_path, monkeypatch):
    lm = tiny("Llama")
    store = Store(tmp_path / "a.sqlite")
    small = reproduce.Sweep(
        "small",
        "two settings",
        ({"method": "RTN", "bits": [3], "group_size": [16, "none"]}, {"method": "GPTQ", "bits": 3, "group_size": 16}),
        windows=1,
        length=32,
        latency=False,
        sources=("manual",),
        seeds=(0, 1),
    )
    monkeypatch.setattr(reproduce, "sweeps", lambda: {"small": small})
    out = reproduce.reproduce("small", lm, store, tmp_path / "small.jsonl", progress=False)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["key"]["method"] for r in rows] == ["uncompressed", "RTN", "RTN", "GPTQ", "GPTQ"]
    assert len({r["key"]["calib"] for r in rows[3:]}) == 2
    other = Store(tmp_path / "b.sqlite")
    assert other.load(out) == 5
    hashes = text_hashes(lm, reproduce.TEXTS, 1, 32)
    assert other.find(Key.of(lm, labkit.RTN(bits=3, group_size=None), hashes)).here


def test_missing_measures_only_what_no_machine_has(tmp_path, monkeypatch):
    lm = tiny("Llama")
    one = reproduce.Sweep("s", "x", ({"method": "RTN", "bits": 3, "group_size": 16},), 1, 32, latency=False)
    two = dataclasses.replace(one, settings=({"method": "RTN", "bits": [3, 4], "group_size": 16},))
    monkeypatch.setattr(reproduce, "sweeps", lambda: {"s": one})
    first = reproduce.reproduce("s", lm, Store(tmp_path / "a.sqlite"), tmp_path / "s.jsonl", progress=False)
    elsewhere = first.read_text().replace(machine(), "another machine")
    first.write_text(elsewhere)
    monkeypatch.setattr(reproduce, "sweeps", lambda: {"s": two})
    for missing, expected in ((True, ["another machine"] * 2 + [machine()]), (False, [machine()] * 3)):
        store = Store(tmp_path / f"{missing}.sqlite")
        store.load(first)
        out = reproduce.reproduce("s", lm, store, tmp_path / "out.jsonl", progress=False, missing=missing)
        rows = [json.loads(line)["key"] for line in out.read_text().splitlines()]
        assert [r["machine"] for r in rows] == expected
        assert [r["method"] for r in rows] == ["uncompressed", "RTN", "RTN"]


@pytest.mark.model
def test_what_ships_fits_the_embedded_model_and_the_texts(lm):
    from labkit import paths

    files = {f.stem for f in (paths.data() / "results").glob("*.jsonl")}
    assert {"rtn", "rtn-quick"} <= files <= set(reproduce.sweeps())
    store = Store()
    for name in ("rtn", "rtn-quick"):
        sweep = reproduce.sweeps()[name]
        hashes = text_hashes(lm, reproduce.TEXTS, sweep.windows, sweep.length)
        for method in (None, *sweep.methods()):
            assert store.find(Key.of(lm, method, hashes)) is not None, f"{name} has no {method!r}"
