"""The shipped rows keep the rules of measuring: like with like, weights and what runs apart, differences paired."""

from __future__ import annotations

import itertools
import json

import pytest

import labkit
from labkit import paths
from labkit.measure.measurement import Measurement
from labkit.measure.paired import BETTER, WORSE, between, interval
from labkit.results import Key

TEXTS = ("manual", "prose")
FILES = sorted((paths.data() / "results").glob("*.jsonl"))


def read(file) -> list[tuple[Key, Measurement]]:
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [(Key(**row["key"]), Measurement.from_dict(row["measurement"])) for row in rows]


ROWS = [(file.stem, key, m) for file in FILES for key, m in read(file)]
EACH = pytest.mark.parametrize("key,m", [(k, m) for _, k, m in ROWS], ids=[f"{s}-{m.method}"[:70] for s, _, m in ROWS])


def shipped(method, sweep: str = "ptq") -> Measurement:
    """The first row of a sweep that has this method; its calibration is the sweep's own."""
    for name, key, m in ROWS:
        if (name, key.method, key.knobs) == (sweep, type(method).__name__, method.key()):
            return m
    pytest.skip(f"{method} is not in data/results/{sweep}.jsonl yet: labkit reproduce {sweep} measures it")


def test_something_ships():
    assert {"rtn", "rtn-quick"} <= {file.stem for file in FILES}


@EACH
def test_no_engine_time_where_a_graph_would_be_dense(key, m):
    dense = any("dense" in note for note in m.notes)
    assert (m.engine is None and m.memory.engine is None) or not dense
    if m.engine and key.method != "uncompressed":
        (whole,) = {r.memory.engine for s, k, r in ROWS if k.method == "uncompressed" and s == "rtn"}
        assert m.memory.engine < 0.6 * whole


@EACH
def test_ratios_have_their_own_quartiles(key, m):
    for way in (t for t in (m.latency, m.engine) if t):
        assert way.rounds >= 15 and way.threads >= 1 and not (way.busy or 0) > 0.1
        for ratio, spread in ((way.decode_ratio, way.decode_spread), (way.prefill_ratio, way.prefill_spread)):
            assert (ratio is None) == (key.method == "uncompressed")
            assert ratio is None or spread[0] <= ratio <= spread[1]


@EACH
def test_what_runs_is_never_better_than_its_weights(key, m):
    """Rounded activations and an 8-bit head can only add: nowhere is KL as run clearly below that of the weights."""
    for q in m.quality.values():
        if q.kl_run is None or q.kl is None or q.kl > 5:  # one guess is as bad as another where nothing is left
            continue
        _, high = interval([run - weights for run, weights in zip(q.per_window["kl_run"], q.per_window["kl"])])
        assert high >= 0
        if q.kl < 0.01:  # where the weights are nearly intact it is most of the damage
            assert q.kl_run > 1.5 * q.kl


@EACH
def test_values_by_window_are_those_of_the_means(key, m):
    for q in m.quality.values():
        for name in ("kl", "top1", "kl_run"):
            values, mean = q.per_window.get(name), getattr(q, name)
            assert (values is None) == (mean is None)
            assert mean is None or sum(values) / len(values) == pytest.approx(mean)


def test_one_format_has_one_speed():
    """RTN, GPTQ and AWQ at 4 bits are read by the same kernel: they agree within the quartiles of their ratios."""
    found = [shipped(cls(bits=4)) for cls in (labkit.RTN, labkit.GPTQ, labkit.AWQ, labkit.AWQGPTQ)]
    if any(m.engine is None for m in found):
        pytest.skip("not all of them are timed yet: labkit reproduce ptq measures what is missing")
    for a, b in itertools.combinations((m.engine.decode_spread for m in found), 2):
        assert a[0] <= b[1] and b[0] <= a[1]


@pytest.mark.parametrize("text", TEXTS)
def test_paired_intervals_know_the_order_of_methods(text):
    worst_first = [labkit.RTN(bits=4), labkit.GPTQ(bits=4), labkit.AWQGPTQ(bits=4)]
    for one, other in itertools.pairwise(map(shipped, worst_first)):
        assert between(one, other, text).verdict == BETTER
        assert between(other, one, text).verdict == WORSE


@pytest.mark.parametrize("text", TEXTS)
def test_paired_intervals_know_the_order_of_widths(text):
    widths = [shipped(labkit.RTN(bits=bits), "rtn") for bits in (3, 4, 5, 6, 7, 8)]
    for fewer, more in itertools.pairwise(widths):
        assert between(fewer, more, text).verdict == BETTER
