"""The calibration trials: what the script keeps of a search, and what the notebook says of the trials."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import labkit
from labkit import paths, text
from labkit.quantize import awq
from labkit.ui.lessons import few_windows

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "calibration_order.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("calibration_order", SCRIPT)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def trial(order, seed, manual, chosen=()):
    return {
        "method": "AWQ(bits=4)",
        "order": order,
        "seed": seed,
        "kl": {"manual": manual, "prose": [2 * v for v in manual]},
        "chosen": [list(c) for c in chosen],
    }


def test_means_over_windows_and_draws_with_half_their_range():
    trials = [trial("in turns", seed, [0.1, 0.1 + 0.2 * seed]) for seed in (0, 1)] + [trial("manual first", 0, [0.5])]
    assert few_windows.table(trials).rows == (
        ("AWQ(bits=4)", "in turns", "2", "0.1500 ± 0.0500", "0.3000 ± 0.1000"),
        ("AWQ(bits=4)", "manual first", "1", "0.5000", "1.0000"),
    )


def test_the_agreement_of_two_searches():
    one = trial("manual first", 0, [0.1], [("q", 0.5, 0.8, 0.4, 0.6), ("o", 0.2, 0.6, 0.2, 0.2)])
    other = trial("in turns", 0, [0.1], [("q", 0.6, 0.8, 0.5, 0.7), ("o", 0.2, 0.6, 0.2, 0.2)])
    odd = trial("own text first", 0, [0.1], [("q", 0.9, 0.8, 0.5, 0.7)])
    assert list(few_windows.pairs([other, one, odd])) == [(one, other)]
    found = few_windows.agreement(one, other)
    assert found == pytest.approx({"same": 0.5, "near": 1.0, "apart": 0.05, "left": 0.7})
    said = few_windows.sentence([one, other])
    assert "50 %" in said and "100 %" in said and "0.05 apart" in said and "70 %" in said
    assert "benchmarks/calibration_order.py" in few_windows.sentence([one])


def test_what_is_kept_of_a_search(script):
    losses = [1.0, 0.5, 0.404, 0.4, 0.403, 0.405, 0.4001]  # within 1 %: 2 to 4; the last is near, but not next to them
    search = awq.Search([i / 20 for i in range(7)], losses, torch.ones(3))
    assert script.choice("q", search) == ("q", 0.15, 0.4, 0.1, 0.2)


def test_the_orders_hold_the_same_windows(script, tiny_lm, monkeypatch):
    drawn = {"manual": torch.arange(32).view(16, 2), "self": torch.arange(32, 64).view(16, 2)}
    monkeypatch.setattr(text, "calibration", lambda lm, windows, length, seed, source: drawn[source])
    orders = {order: script.ordered(tiny_lm, order, 0)[:, 0].tolist() for order in script.ORDERS}
    assert {tuple(sorted(o)) for o in orders.values()} == {tuple(range(0, 64, 2))}
    assert orders["manual first"][:4] == [0, 2, 4, 6] and orders["own text first"][:4] == [32, 34, 36, 38]
    assert orders["in turns"][:4] == [0, 32, 2, 34]


def test_a_trial_is_the_method_and_its_divergence(script, tiny_lm, monkeypatch):
    def windows(*shape):
        return torch.randint(96, shape, generator=torch.Generator().manual_seed(sum(shape)))

    monkeypatch.setattr(script, "ordered", lambda lm, order, seed: windows(4, 24))
    monkeypatch.setattr(text, "evaluation", lambda lm, count, length, name: windows(2, 24 + len(name)))
    search = awq.best_factors
    made = script.measure(tiny_lm, script.Trial("AWQ(bits=3, group_size=16)", "in turns", 0))
    assert awq.best_factors is search
    small = labkit.AWQ(bits=3, group_size=16)(tiny_lm, windows(4, 24), progress=False)
    for name, values in made.kl.items():
        truth = labkit.divergence(small, tiny_lm, windows(2, 24 + len(name))).kl
        assert sum(values) / 2 == pytest.approx(truth, rel=1e-3)
    assert len(made.chosen) == 2 * 4  # four folds in each of two blocks
    assert all(low <= best <= high and left <= 1 for _, best, left, low, high in made.chosen)


def test_the_shipped_trials_are_those_that_the_script_wants(script):
    trials = few_windows.shipped()
    settings = {t.setting for t in script.wanted()}
    assert len(settings) == len(script.wanted())
    assert {(t["method"], t["order"], t["seed"]) for t in trials} <= settings
    assert all(len(v) == 8 for t in trials for v in t["kl"].values())
    assert json.loads((paths.data() / "calibration_order.json").read_text()) == trials
