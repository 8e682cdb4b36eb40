"""Two models on the same windows: intervals against scipy and against simulation, verdicts, and what is refused."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest

import labkit
from labkit.measure.measurement import Measurement, Memory, Quality
from labkit.measure.paired import between, interval, paired, t_quantile


def quality(tokens=4096, **by) -> Quality:
    """A text's quality with these values by window."""
    mean = {name: sum(values) / len(values) for name, values in by.items()}
    known = {name: mean[name] for name in ("kl", "top1", "kl_run") if name in mean}
    return Quality(math.exp(mean.get("nll", 0.0)), 0.5, tokens, **known, per_window=by)


def measured(method="RTN()", texts=None, model="tiny", **quality_by_text) -> Measurement:
    hashes = dict.fromkeys(quality_by_text, "0" * 16) if texts is None else texts
    return Measurement(model, method, quality_by_text, Memory(1, 1, 4.0, 1, 1), None, "cpu", texts=hashes)


# ---- the interval


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 8, 15, 31, 60, 127, 1000])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_t_quantiles_are_scipys(freedom, confidence):
    stats = pytest.importorskip("scipy.stats")
    assert t_quantile(freedom, confidence) == pytest.approx(stats.t.ppf((1 + confidence) / 2, freedom), rel=1e-9)


@pytest.mark.parametrize("freedom, t", [(1, 12.706), (2, 4.303), (7, 2.365), (30, 2.042), (120, 1.980)])
def test_t_quantiles_are_those_of_the_printed_tables(freedom, t):
    assert t_quantile(freedom) == pytest.approx(t, abs=6e-4)


def test_the_interval_is_scipys_paired_one():
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(0)
    a, b = draw.normal(2.0, 0.5, 8), draw.normal(2.1, 0.5, 8)
    found = paired(quality(nll=list(a)), quality(nll=list(b)), "nll")
    truth = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((truth.low, truth.high)) and found.windows == 8
    assert found.difference == pytest.approx((b - a).mean())


@pytest.mark.parametrize("windows", [2, 4, 8, 32])
def test_the_interval_covers_the_difference_95_times_in_100(windows):
    """Windows differ by far more than the two models do, and each model has noise of its own."""
    draw, times, truth = np.random.default_rng(windows), 4000, 0.05
    covered = 0
    for _ in range(times):
        hardness = draw.normal(3.0, 0.6, windows)
        a, b = hardness + draw.normal(0, 0.02, windows), hardness + truth + draw.normal(0, 0.02, windows)
        found = paired(quality(nll=a.tolist()), quality(nll=b.tolist()), "nll")
        covered += found.low <= truth <= found.high
    assert covered / times == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / times))


def test_it_covers_nearly_as_often_where_differences_are_skewed():
    """As KL over windows is: gamma with a shape of 4. What a t interval loses there is a few in a hundred."""
    draw, times = np.random.default_rng(1), 3000
    hits = [low <= 0.4 <= high for low, high in (interval(draw.gamma(4, 0.1, 8).tolist()) for _ in range(times))]
    assert 0.91 < sum(hits) / times < 0.96


def test_overlapping_error_bands_hide_what_pairs_show():
    """Perplexities of 55.9 ± 9.7 and 48.8 ± 8.2 look alike; on each window the second model is ahead."""
    hard = np.array([3.3, 4.6, 3.6, 4.4, 3.9, 4.2, 3.5, 4.7])
    gain = np.array([0.10, 0.17, 0.12, 0.15, 0.13, 0.14, 0.11, 0.16])
    a, b = quality(nll=hard.tolist()), quality(nll=(hard - gain).tolist())
    band = hard.std(ddof=1) / math.sqrt(8)
    found = paired(a, b, "nll")
    assert abs(found.difference) < band and found.verdict == "better"
    assert found.high < 0


# ---- the verdict


def test_verdicts_speak_of_the_second():
    low, high = [0.1, 0.12, 0.11, 0.13], [0.2, 0.23, 0.2, 0.24]
    for what in ("nll", "kl", "kl_run"):
        assert paired(quality(**{what: low}), quality(**{what: high}), what).verdict == "worse"
        assert paired(quality(**{what: high}), quality(**{what: low}), what).verdict == "better"
    assert paired(quality(top1=low), quality(top1=high), "top1").verdict == "better"
    mixed = [0.2, 0.05, 0.3, 0.01]
    assert paired(quality(kl=low), quality(kl=mixed), "kl").verdict == "cannot tell"
    assert paired(quality(kl=low), quality(kl=low), "kl").verdict == "cannot tell"


def test_one_window_has_no_interval():
    found = paired(quality(kl=[0.1]), quality(kl=[0.9]), "kl")
    assert (found.low, found.high, found.windows, found.verdict) == (None, None, 1, "cannot tell")
    assert found.difference == pytest.approx(0.8)


def test_a_broken_model_is_worse_and_two_cannot_be_told_apart():
    fine, broken = quality(nll=[1.0, 2.0]), replace(quality(nll=[1.0, 2.0]), per_window={"nll": [math.inf, math.inf]})
    assert paired(fine, broken, "nll").verdict == "worse" and paired(broken, fine, "nll").verdict == "better"
    assert paired(broken, broken, "nll").verdict == "cannot tell"


def test_what_is_not_paired_is_refused():
    a = quality(kl=[0.1, 0.2])
    with pytest.raises(ValueError, match="what = 'ppl' is not allowed: it must be one of nll, kl, kl_run, top1"):
        paired(a, a, "ppl")
    with pytest.raises(ValueError, match="no values by window"):
        paired(a, replace(a, per_window={}), "kl")
    for other in (quality(kl=[0.1, 0.2, 0.3]), quality(kl=[0.1, 0.2], tokens=2048)):
        with pytest.raises(ValueError, match="other tokens were scored"):
            paired(a, other, "kl")


# ---- two measurements


def test_compare_tells_each_text_apart():
    easy = [0.50, 0.52, 0.48, 0.51]
    a = measured(manual=quality(kl=easy, nll=easy, top1=easy), prose=quality(kl=easy))
    b = measured(
        "GPTQ()",
        manual=quality(kl=[x - 0.1 for x in easy], nll=easy, top1=easy),
        prose=quality(kl=[0.9, 0.1, 0.9, 0.1]),
    )
    found = labkit.compare(a, b)
    verdicts = {key: p.verdict for key, p in found.found.items()}
    assert verdicts[("manual", "kl")] == "better" and verdicts[("prose", "kl")] == "cannot tell"
    assert ("manual", "kl_run") not in verdicts
    text = str(found)
    assert text.startswith("GPTQ() against RTN(), window by window (measured)") and repr(found) == text
    assert re.search(r"manual +KL, nats per token +-0\.1000 +-0\.1000 to -0\.1000 +4 +better", text)
    assert "<table>" in found._repr_html_() and "95 % interval" in found._repr_html_()


def test_the_uncompressed_model_has_a_kl_of_0():
    base = measured("uncompressed", manual=quality(nll=[2.0, 3.0]))
    m = measured(manual=quality(nll=[2.1, 3.1], kl=[0.3, 0.31], kl_run=[0.4, 0.39], tokens=2048))
    found = labkit.compare(base, m).found
    assert found[("manual", "kl")].difference == pytest.approx(0.305)
    assert found[("manual", "kl")].verdict == found[("manual", "kl_run")].verdict == "worse"
    assert str(found[("manual", "nll")]) == "cannot tell: other tokens were scored"


def test_older_rows_say_that_they_cannot_tell():
    a, b = measured(manual=quality(kl=[0.1, 0.2])), measured(manual=quality(kl=[0.3, 0.4]))
    old = replace(b, quality={"manual": replace(b.quality["manual"], per_window={})})
    assert str(between(a, old, "manual", "kl")) == "cannot tell: no values by window"
    assert "cannot tell: no values by window" in str(labkit.compare(a, old))


def test_other_texts_and_other_references_are_not_compared():
    a = measured(manual=quality(kl=[0.1, 0.2], nll=[1.0, 1.1]))
    with pytest.raises(ValueError, match="'manual' is not the same text in both"):
        labkit.compare(a, replace(a, texts={"manual": "1" * 16}))
    with pytest.raises(ValueError, match="No text in common: manual against prose"):
        labkit.compare(a, measured(prose=quality(kl=[0.1])))
    with pytest.raises(ValueError, match="takes two Measurements"):
        labkit.compare(a, a.quality["manual"])
    other = labkit.compare(a, replace(a, model="another")).found
    assert other[("manual", "kl")].why == "another reference" and other[("manual", "nll")].windows == 2


def test_what_measure_returns_can_be_compared(tiny_lm, monkeypatch):
    """Values by window as labkit.measure fills them; two formats of one model, and the same one twice."""
    import torch

    ids = torch.randint(90, (6, 24), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(labkit.text, "evaluation", lambda *_: ids)
    how = {"against": tiny_lm, "texts": "manual", "latency": False, "progress": False}
    two, eight = (labkit.measure(labkit.RTN(bits=b, group_size=16)(tiny_lm, progress=False), **how) for b in (2, 8))
    assert labkit.compare(two, eight).found[("manual", "kl")].verdict == "better"
    assert labkit.compare(eight, eight).found[("manual", "kl")].verdict == "cannot tell"
