"""What the notebooks claim of the shipped rows is in the shipped rows: the whole model, both texts."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

import pytest

import labkit
from labkit import paths
from labkit.reproduce import calibrations, serving, sweeps
from labkit.results import Key
from labkit.sweep import text_hashes

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def rows():
    """(method, its knobs, source and draw of its calibration) -> KL on the manual, KL on the prose."""
    draws = calibrations(labkit.load())
    found = {}
    for name in sweeps():
        file = paths.data() / "results" / f"{name}.jsonl"
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
            row = json.loads(line)
            key, quality = row["key"], row["measurement"]["quality"]
            if name.endswith("quick") or key["method"] == "uncompressed":
                continue
            key = key["method"], key["knobs"], draws.get(key["calib"])
            found[key] = tuple(quality[text]["kl"] for text in ("manual", "prose"))
    return found


@pytest.fixture(scope="module")
def kl(rows):
    def look(method, source="mixed", draw=0):
        key = type(method).__name__, method.key(), (source, draw) if type(method).calibrated else None
        if key not in rows:
            pytest.skip(f"{method} on {source} text, draw {draw}, does not ship yet: labkit reproduce measures it")
        return rows[key]

    return look


def both(one, other) -> bool:
    """Less damage on both texts."""
    return all(a < b for a, b in zip(one, other))


@pytest.mark.parametrize(("bits", "manual", "prose"), [(4, 0.6, 0.75), (3, 0.6, 0.8)])
@pytest.mark.parametrize("cls", [labkit.GPTQ, labkit.AWQGPTQ], ids=["GPTQ", "AWQGPTQ"])
def test_gptq_against_plain_rounding(kl, cls, bits, manual, prose):
    plain, found = kl(labkit.RTN(bits=bits)), kl(cls(bits=bits))
    assert found[0] <= manual * plain[0] and found[1] <= prose * plain[1]


@pytest.mark.parametrize("bits", [3, 4])
def test_awq_and_gptq_together_are_better_than_either_on_both_texts(kl, bits):
    for alone in (labkit.GPTQ(bits=bits), labkit.AWQ(bits=bits)):
        assert both(kl(labkit.AWQGPTQ(bits=bits)), kl(alone))


@pytest.mark.parametrize("bits", [3, 4])
def test_awq_is_better_than_plain_rounding(kl, bits):
    assert both(kl(labkit.AWQ(bits=bits)), kl(labkit.RTN(bits=bits)))


def test_what_each_part_of_gptq_and_awq_is_good_for(kl):
    """Order and scaling pay most, and about equally; clipping less; damping trades one text for the other."""
    base, papers = kl(labkit.GPTQ(bits=4)), kl(labkit.GPTQ(bits=4, act_order=False))
    order = [b / p for b, p in zip(base, papers)]  # what is left of the damage
    scaling, clipping, together = (
        [f / b for f, b in zip(kl(labkit.AWQGPTQ(bits=4, scale=s, clip=c)), base)]
        for s, c in ((True, False), (False, True), (True, True))
    )
    assert all(left < 0.72 for left in (*order, *scaling)) and all(left < 0.85 for left in clipping)
    assert all(abs(o - s) < 0.1 for o, s in zip(order, scaling))
    assert both(scaling, clipping) and both(together, scaling)
    less, more = kl(labkit.GPTQ(bits=4, damp=0.001)), kl(labkit.GPTQ(bits=4, damp=0.1))
    assert less[0] < base[0] < more[0] and less[1] > base[1]
    assert more[1] > 0.97 * base[1]  # the prose gains nothing worth telling


def test_bits_given_where_they_count_beat_plain_rounding_with_more(kl):
    """MixedPrecision at 3.5 bits on average against RTN at 4: less damage on both texts."""
    assert all(m < r for m, r in zip(kl(labkit.MixedPrecision(bits=3.5)), kl(labkit.RTN(bits=4))))


@pytest.mark.parametrize("cls", [labkit.GPTQ, labkit.AWQ, labkit.AWQGPTQ])
def test_three_draws_of_calibration_agree(kl, cls):
    plain, draws = kl(labkit.RTN(bits=4)), [kl(cls(bits=4), draw=d) for d in range(3)]
    for text in (0, 1):
        band = [d[text] for d in draws]
        assert max(band) < 0.75 * plain[text]
        assert max(band) - min(band) < 0.2 * (plain[text] - max(band))  # far narrower than what the method gains


def test_the_hybrid_is_ahead_of_gptq_by_more_than_the_draws_differ(kl):
    for text in (0, 1):
        ours, theirs = ([kl(cls(bits=4), draw=d)[text] for d in range(3)] for cls in (labkit.AWQGPTQ, labkit.GPTQ))
        assert max(ours) < min(theirs)


def test_the_manual_alone_over_fits(kl):
    """Calibrated on the manual GPTQ is better there, and worse on other text, than calibrated on the model's own."""
    manual, own, mixed = (kl(labkit.GPTQ(bits=4), source) for source in ("manual", "self", "mixed"))
    assert manual[0] < mixed[0] < own[0]
    assert manual[1] > own[1] and manual[1] > mixed[1]


def test_order_of_the_pruners(kl):
    for pattern in ("unstructured", "2:4"):
        cut = [kl(m(pattern=pattern)) for m in (labkit.SparseGPT, labkit.Wanda, labkit.Magnitude)]
        assert cut[0][0] < cut[1][0] < cut[2][0]


def test_calibration_on_the_manual_alone_turns_wanda_and_sparsegpt_round_on_other_text(kl):
    sparse, wanda = ({s: kl(m(), s) for s in ("manual", "self", "mixed")} for m in (labkit.SparseGPT, labkit.Wanda))
    assert sparse["manual"][0] < wanda["manual"][0] and sparse["manual"][1] > wanda["manual"][1]
    assert sparse["self"][0] < wanda["self"][0] and sparse["self"][1] < wanda["self"][1]
    assert sparse["mixed"][0] < wanda["mixed"][0]  # on the prose the two are within what a draw of the windows moves


def test_giving_zeros_to_the_blocks_that_bear_them_pays(kl):
    even, owl, tried = (kl(labkit.Wanda(sparsity=0.7, allocation=a)) for a in ("uniform", "owl", "sensitivity"))
    assert all(t < o < e for e, o, t in zip(even, owl, tried))


def test_at_equal_bytes_rounding_beats_zeros(kl):
    """Half of 16-bit weights with a bit mask take 9 bits each; 8-bit codes take less and change almost nothing."""
    eight = kl(labkit.RTN(bits=8))
    for method in (labkit.SparseGPT(), labkit.SparseGPT(sparsity=0.3)):
        assert all(e < 0.1 * p for e, p in zip(eight, kl(method)))


def test_every_shipped_row_answers_here():
    """Its key is what this installation works out: weights, both texts, calibration. And this labkit can read it."""
    counts = serving(labkit.load(device="cpu", dtype="float32"))
    assert dict(counts) == {"here": sum(counts.values())}


def test_rows_that_do_not_answer_are_counted_by_reason(tmp_path, monkeypatch, tiny_lm):
    from labkit.measure.measurement import Measurement, Memory, Quality

    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    shutil.copytree(paths.data(), data, ignore=shutil.ignore_patterns("results"))
    (data / "results").mkdir()
    (data / "sweeps.toml").write_text(
        '[one]\nwhat = "x"\nwindows = 2\nlength = 64\nsources = ["manual", "self"]\nsettings = []\n'
    )
    monkeypatch.setattr(paths, "data", lambda: data)
    hashes = text_hashes(tiny_lm, ("manual", "prose"), 2, 64)
    known = calibrations(tiny_lm, ["manual"], [0])
    m = Measurement(tiny_lm.name, "x", {"manual": Quality(1.0, 0.1, 8)}, Memory(1, 1, 4.0, 8, 8), None, "cpu").to_dict()
    right = asdict(Key.of(tiny_lm, None, hashes))
    keys = [
        right,
        right | {"method": "GPTQ", "calib": next(iter(known))},
        right | {"model": "tiny@0000"},
        right | {"texts": "{}"},
        right | {"calib": "what it wrote itself"},
    ]
    lines = [json.dumps({"key": k, "measurement": m, "when": "2026-01-01T00:00:00+00:00"}) for k in keys]
    lines += ["{", json.dumps({"key": right, "measurement": {}, "when": ""})]
    (data / "results" / "one.jsonl").write_text("\n".join(lines))
    assert serving(tiny_lm) == {"here": 2, "model": 1, "texts": 1, "calibration": 1, "labkit": 2}
    assert not (tmp_path / "cache" / "self").exists(), "nothing was written to find that out"
