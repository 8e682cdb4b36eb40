"""Which windows AWQ's search sees: what the script measures, against the method itself, and what the notebook shows."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import labkit
from labkit import text
from labkit.formats import Integer
from labkit.quantize import awq
from labkit.results import Store
from labkit.sweep import sweep
from labkit.ui.lessons import few_windows
from labkit.ui.lessons.inputs import Inputs

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "calibration_order.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("calibration_order", SCRIPT)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def trial(order, seed, manual):
    kl = {"manual": manual, "prose": [2 * v for v in manual]}
    return {"method": "AWQ(bits=4)", "order": order, "seed": seed, "kl": kl}


def test_means_over_windows_and_draws_with_half_their_range():
    trials = [trial("in turns", seed, [0.1, 0.1 + 0.2 * seed]) for seed in (0, 1)] + [trial("manual first", 0, [0.5])]
    assert few_windows.orders(trials).rows == (
        ("AWQ(bits=4)", "in turns", "2", "0.1500 ± 0.0500", "0.3000 ± 0.1000"),
        ("AWQ(bits=4)", "manual first", "1", "0.5000", "1.0000"),
    )


def test_searches_are_means_over_places():
    where = {"block": 0, "layer": "q", "source": "manual", "exponent": 0.5, "gain": {"manual": 2.0, "self": 4.0}}
    found = [
        where | {"fold": 0, "windows": 1, "cost": {"manual": 1.0, "self": 1.2}},
        where | {"fold": 1, "windows": 1, "cost": {"manual": 1.1, "self": 1.2}},
        where | {"fold": 0, "windows": 4, "source": "self", "cost": {"manual": 1.3, "self": 1.0}},
    ]
    table = few_windows.searches(found)
    assert table.rows == (
        ("1 window of the manual", "1.050", "1.200"),
        ("4 windows of its own text", "1.300", "1.000"),
        ("none: plain rounding", "2.000", "4.000"),
    )
    assert "2 places" in table.caption and not few_windows.searches([]).rows


def test_the_orders_hold_the_same_windows(script, tiny_lm, monkeypatch):
    drawn = {"manual": torch.arange(32).view(16, 2), "self": torch.arange(32, 64).view(16, 2)}
    monkeypatch.setattr(text, "calibration", lambda lm, windows, length, seed, source: drawn[source])
    orders = {order: script.ordered(tiny_lm, order, 0)[:, 0].tolist() for order in script.ORDERS}
    assert {tuple(sorted(o)) for o in orders.values()} == {tuple(range(0, 64, 2))}
    assert orders["manual first"][:4] == [0, 2, 4, 6] and orders["own text first"][:4] == [32, 34, 36, 38]
    assert orders["in turns"][:4] == [0, 32, 2, 34]


def windows(*shape):
    return torch.randint(96, shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_a_trial_is_the_method_and_its_divergence(script, tiny_lm, monkeypatch):
    monkeypatch.setattr(script, "ordered", lambda lm, order, seed: windows(4, 24))
    monkeypatch.setattr(text, "evaluation", lambda lm, count, length, name: windows(2, 24 + len(name)))
    made = script.measured(tiny_lm, {"method": "AWQ(bits=3, group_size=16)", "order": "in turns", "seed": 0})
    small = labkit.AWQ(bits=3, group_size=16)(tiny_lm, windows(4, 24), progress=False)
    for name, values in made["kl"].items():
        truth = labkit.divergence(small, tiny_lm, windows(2, 24 + len(name))).kl
        assert sum(values) / 2 == pytest.approx(truth, rel=1e-3)


def test_what_a_store_has_is_not_measured_again(script, tiny_lm, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "ordered", lambda lm, order, seed: windows(4, 24))
    monkeypatch.setattr(text, "evaluation", lambda lm, count, length, name: windows(2, 24 + len(name)))
    store, asked = Store(tmp_path / "rows.sqlite"), {"order": "in turns", "seed": 0}
    sweep(tiny_lm, [labkit.AWQ(bits=3, group_size=16)], store, windows(4, 24), latency=False, progress=False)
    made = script.measured(tiny_lm, asked | {"method": "AWQ(bits=3, group_size=16)"})
    monkeypatch.setattr(labkit.AWQ, "__call__", None)
    found = script.measured(tiny_lm, asked | {"method": "AWQ(bits=3, group_size=16)"}, store)
    for name, values in made["kl"].items():
        assert found["kl"][name] == pytest.approx(values, rel=1e-3)


def test_a_search_is_judged_on_more_windows_of_both_texts(script, tiny_lm, monkeypatch):
    drawn = {"manual": windows(8, 24), "self": windows(8, 25)[:, :24]}
    monkeypatch.setattr(text, "calibration", lambda lm, count, length, seed, source: drawn[source])
    monkeypatch.setattr(script, "FEW", (2, 8))
    found = script.searches(tiny_lm, 3, 16, blocks=(1,))
    assert len(found) == 4 * 2 * 2  # folds, texts, numbers of windows
    for search in found:
        assert all(v >= 1 for part in ("cost", "gain") for v in search[part].values())
        if search["windows"] == 8:  # judged by what it saw, it has chosen the best
            assert search["cost"][search["source"]] == 1
    inputs = Inputs(tiny_lm, drawn["self"])
    fold = inputs.folds(1)[2]
    run = {n: lambda n=n: inputs.run(1, n) for n in (2, 8)}
    with torch.no_grad():
        few, many = (awq.best_factors(inputs.stack[1], fold, run[n], Integer(3, 16)) for n in (2, 8))
    (mine,) = (s for s in found if (s["fold"], s["source"], s["windows"]) == (2, "self", 2))
    at = few.losses.index(min(few.losses))
    assert mine["layer"] == fold.readers[0] and mine["exponent"] == few.exponents[at]
    assert mine["cost"]["self"] == pytest.approx(many.losses[at] / min(many.losses), rel=1e-3)
    assert mine["gain"]["self"] == pytest.approx(many.losses[0] / min(many.losses), rel=1e-3)


def test_what_ships_is_what_the_script_wants(script):
    assert all(wanted not in script.wanted()[:i] for i, wanted in enumerate(script.wanted()))
    few = few_windows.shipped()
    if not few["searches"]:
        pytest.skip("the searches and trials do not ship yet: benchmarks/calibration_order.py measures them")
    assert all({n: t[n] for n in ("method", "order", "seed")} in script.wanted() for t in few["trials"])
    assert all(len(v) == 8 for t in few["trials"] for v in t["kl"].values())
    assert len(few["searches"]) == len(script.BLOCKS) * 4 * 2 * len(script.FEW)


def test_four_windows_of_either_text_do_for_the_search():
    """What notebook 03 says: the other text's exponent costs a few per cent, and scaling gains far more."""
    searches = [s for s in few_windows.shipped()["searches"] if s["windows"] == 4]
    if not searches:
        pytest.skip("the searches do not ship yet: benchmarks/calibration_order.py measures them")
    for source, other in (("manual", "self"), ("self", "manual")):
        mine = [s for s in searches if s["source"] == source]
        cost = sum(s["cost"][other] - 1 for s in mine) / len(mine)
        gain = sum(s["gain"][other] - 1 for s in mine) / len(mine)
        assert cost < 0.06 and gain > 5 * cost
