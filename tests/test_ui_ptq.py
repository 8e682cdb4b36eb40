"""Notebook 03's views: pure functions, tested without widgets; tiny models, and the real one where it is the point."""

from __future__ import annotations

import re

import pytest
import torch

import labkit
from labkit.check import ptq
from labkit.formats import Integer
from labkit.linear import W8A8Linear
from labkit.quantize import AWQ, GPTQ, RTN
from labkit.quantize.gptq import gptq
from labkit.ui import heat, svg
from labkit.ui.lessons import breakit, front, gptq_stepper, int8
from labkit.ui.lessons.awq_curve import Curves
from labkit.ui.lessons.gptq_stepper import Stepper
from labkit.ui.lessons.inputs import Inputs
from labkit.ui.lessons.outliers import ALPHAS, Outliers
from labkit.walk import Stats, blocks


def windows(count: int = 4, length: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(96, (count, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def inputs(tiny_lm) -> Inputs:
    return Inputs(tiny_lm, windows())


# ---------------------------------------------------------------------------------------------- inputs


def test_inputs_are_what_the_layers_really_get(each_family):
    ids = windows(2, 12)
    seen: dict[str, torch.Tensor] = {}
    found = Inputs(each_family, ids)
    last = len(found.stack) - 1
    for kind in found.kinds:
        module = blocks(each_family.model)[last].get_submodule(kind)
        handle = module.register_forward_pre_hook(lambda m, args, kind=kind: seen.update({kind: args[0]}))
        with torch.no_grad():
            each_family.model(ids)
        handle.remove()
        assert torch.allclose(found.of(last, kind), seen[kind].flatten(0, -2), atol=1e-5), kind


def test_views_leave_the_model_as_it_is(tiny_lm):
    before = {name: t.clone() for name, t in tiny_lm.model.state_dict().items()}
    found = Inputs(tiny_lm, windows())
    Curves(found).view(0, 4)
    Outliers(found, found).view(0.5, found.kinds[0], 1)
    breakit.with_outlier(tiny_lm)
    after = tiny_lm.model.state_dict()
    assert all(torch.equal(t, after[name]) for name, t in before.items())


# ---------------------------------------------------------------------------------------------- GPTQ, watched


@pytest.mark.parametrize("act_order", [True, False])
def test_watching_shows_every_column_and_changes_nothing(act_order):
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(8, 48, generator=draw), torch.randn(200, 48, generator=draw)
    stats = Stats()
    stats.add(x @ torch.randn(48, 48, generator=draw), "hessian")
    seen = []
    form = Integer(3, 16)
    watched = gptq(weight, stats, form, act_order, watch=lambda done, columns: seen.append((done, columns.T.clone())))
    assert torch.equal(watched.decode(), gptq(weight, stats, form, act_order).decode())
    assert [done for done, _ in seen] == list(range(1, 49))
    order, factor, _ = stats.cholesky(0.01, act_order)
    assert torch.allclose(seen[-1][1], watched.decode()[:, order], atol=1e-6)  # the last state is the result
    state = weight[:, order]
    for j, (_, after) in enumerate(seen):  # each step is the paper's equation, in float64
        error = (state[:, j] - after[:, j]).double() / factor[j, j].double()
        expected = state.double() - torch.outer(error, factor[j].double())
        assert torch.allclose(after[:, j + 1 :].double(), expected[:, j + 1 :], atol=1e-5)
        assert torch.equal(after[:, :j], seen[max(j - 1, 0)][1][:, :j])  # what is rounded stays
        state = after


def test_the_stepper_counts_the_error_of_the_real_output(inputs):
    stepper = Stepper(inputs, columns=24, rows=8)
    kind = inputs.kinds[0]
    run = stepper.run(1, kind, 3, True)
    assert len(run.states) == len(run.gptq) == len(run.rtn) == 25
    x, weight = inputs.of(1, kind)[:, run.columns].double(), run.states[0].double()
    for j in (1, 12, 24):
        change = run.states[j].double() - weight
        truth = float((x @ change.T).square().sum() / (x @ weight.T).square().sum())
        assert run.gptq[j] == pytest.approx(truth, rel=1e-3)
    assert run.gptq[0] == run.rtn[0] == 0
    assert run.gptq[-1] < run.rtn[-1]  # it pays at the output
    assert run.moved > run.rounding  # and costs at the weights
    assert run.rounding == pytest.approx(1 / 12**0.5, rel=0.2)  # errors of rounding are even over a step


def test_the_stepper_draws_and_says_what_it_counted(inputs):
    stepper = Stepper(inputs, columns=24, rows=8)
    settings = stepper.settings()
    assert settings["column"] == list(range(25)) and settings["kind"] == list(inputs.kinds)
    (change, errors), text = stepper.view(12, True, 3, inputs.kinds[0], 0)
    run = stepper.run(0, inputs.kinds[0], 3, True)
    assert "12 of 24 columns are rounded" in text and f"{100 * run.gptq[12]:.3g} %" in text
    assert errors.data[1].y[12] == pytest.approx(100 * run.gptq[12], rel=1e-3)
    z = torch.tensor(change.data[0].z)
    assert torch.allclose(z, (run.states[12] - run.states[0]) / run.step, atol=2e-2)
    assert change.data[1].x[0] == 11.5  # the line between what is rounded and what is not
    assert "the squared error of the output" in gptq_stepper.sentence(run, 24, "k", 0)


# ---------------------------------------------------------------------------------------------- outliers


def test_the_error_is_that_of_a_real_int8_layer(inputs):
    outliers = Outliers(inputs, inputs)
    kind = inputs.kinds[0]
    x, weight = inputs.of(1, kind), inputs.weight(1, kind)
    truth = x @ weight.T
    plain = (W8A8Linear(weight)(x) - truth).norm() / truth.norm()
    assert outliers.error(1, kind, None, False) == pytest.approx(float(plain), rel=1e-4)
    s = outliers.factors(1, kind, 0.5)
    assert torch.allclose(s, (x.abs().amax(0) / _largest(outliers, 1, kind)).sqrt(), rtol=1e-4)
    smoothed = (W8A8Linear(weight * s)(x / s) - truth).norm() / truth.norm()
    assert outliers.error(1, kind, 0.5, False) == pytest.approx(float(smoothed), rel=1e-4)


def _largest(outliers, block, kind):
    return torch.stack([outliers.seen.weight(block, r).abs().amax(0) for r in outliers.readers(kind)]).amax(0)


def test_only_what_a_norm_feeds_is_smoothed(inputs):
    outliers = Outliers(inputs, inputs)
    assert outliers.readers("self_attn.k_proj") == ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert outliers.readers("mlp.gate_proj") == ("mlp.gate_proj", "mlp.up_proj")
    for kind in ("self_attn.o_proj", "mlp.down_proj"):
        assert outliers.readers(kind) is None
        assert outliers.error(0, kind, 1.0, True) == outliers.error(0, kind, None, True)
    figures, text = outliers.view(0.5, "mlp.down_proj", 1)
    assert "No norm feeds this layer" in text and len(figures) == 3
    table = outliers.table()
    assert len(table.rows) == 4 and table.rows[3][4] == "as it is" and "measured" in table.caption


def test_an_injected_outlier_shows_in_the_map_and_smoothing_removes_it(tiny_lm):
    odd = breakit.with_outlier(tiny_lm, 200.0)
    calm, wild = (Outliers(i, i) for i in (Inputs(tiny_lm, windows()), Inputs(odd, windows())))
    kind = "self_attn.q_proj"
    assert wild.peak(1, kind).max() > 50 * calm.peak(1, kind).max()
    assert wild.error(1, kind, None, False) > 3 * calm.error(1, kind, None, False)
    assert wild.error(1, kind, 0.5, False) < 1.5 * calm.error(1, kind, 0.5, False)
    before, after = wild.view(0.5, kind, 1)[0][0].data
    assert max(map(max, before.z)) > max(map(max, after.z)) + 1  # powers of ten
    assert len(wild.view(0.5, kind, 1)[0][2].data[0].x) == len(ALPHAS)


# ---------------------------------------------------------------------------------------------- AWQ's curve


def test_the_curve_is_the_search_of_awq_itself(inputs):
    from labkit.quantize.awq import best_factors

    curves = Curves(inputs)
    found = curves.search(1, 3)
    assert "self_attn.q_proj, self_attn.k_proj, self_attn.v_proj" in found
    fold = inputs.folds(1)[0]
    with torch.no_grad():
        again = best_factors(inputs.stack[1], fold, lambda: inputs.run(1), Integer(3, 64))
    assert found[", ".join(fold.readers)].losses == pytest.approx(again.losses)
    figure, text = curves.view(1, 3)
    assert all(trace.y[0] == 1 and len(trace.x) == 20 for trace in figure.data)  # exponent 0 is plain rounding
    for name, search in found.items():
        best = search.exponents[search.losses.index(min(search.losses))]
        assert f"{name.rsplit('.', 1)[-1]} at r = {best:g}" in text


# ---------------------------------------------------------------------------------------------- broken on purpose


def test_an_injected_outlier_changes_no_prediction(each_family):
    odd = breakit.with_outlier(each_family)
    ids = windows(1, 16)
    with torch.no_grad():
        expected, found = each_family.model(ids).logits, odd.model(ids).logits
    assert torch.allclose(expected, found, atol=1e-3)


def test_only_the_first_blocks_are_compressed(tiny_lm):
    small = breakit.start_only(RTN(bits=2, group_size=16), tiny_lm, None, 1)
    first, second = blocks(small.model)
    assert type(first.mlp.down_proj).__name__ == "PackedLinear"
    assert torch.equal(second.mlp.down_proj.weight, blocks(tiny_lm.model)[1].mlp.down_proj.weight)
    everything = RTN(bits=2, group_size=16)(tiny_lm, progress=False)
    assert torch.equal(first.mlp.down_proj.weight, blocks(everything.model)[0].mlp.down_proj.weight)
    assert tiny_lm.model.config.num_hidden_layers == len(blocks(tiny_lm.model)) == 2
    with pytest.raises(ValueError, match="blocks = 3 is not allowed: it must be a whole number from 1 to 2"):
        breakit.start_only(RTN(), tiny_lm, None, 3)


def test_switches_measure_kl_against_the_models_they_compress(tiny_lm, monkeypatch):
    monkeypatch.setattr(labkit.text, "calibration", lambda lm, w, length, **_: windows(w, 24))
    monkeypatch.setattr(labkit.text, "evaluation", lambda lm, w, length, source: windows(w, length, len(source)))
    bench = breakit.Damage(tiny_lm, windows=8, length=24, evaluation=(2, 24))
    found = bench.broken(bits=3)
    by = {o.name: o for o in found}
    small = GPTQ(bits=3, act_order=False)(tiny_lm, windows(8, 24), progress=False)
    truth = labkit.divergence(small, tiny_lm, bench.texts["prose"]).kl
    assert by["no act-order (the paper's)"].damage["prose"] == pytest.approx(truth, rel=1e-5)
    assert by["no act-order (the paper's)"].change["prose"] == pytest.approx(truth / found[0].damage["prose"], rel=1e-5)
    assert by["8 windows, mixed"].damage == found[0].damage
    assert by["GPTQ, 3 bits"].damage == by["GPTQ"].damage == found[0].damage
    assert by["AWQGPTQ, 3 bits"].damage == by["with AWQ's scaling too"].damage
    assert {o.group for o in found} == {"parts", "calibration", "outlier"} and len(found) == 20
    table = breakit.table(found, bench.unit)
    assert len(table.rows) == 20 and "KL" in table.caption and "measured" in table.caption
    figure = breakit.bars(found, bench.unit, group="calibration")
    assert len(figure.data) == 2 and list(figure.data[0].x)[-1] == "random tokens"
    pairs = breakit.bars(found, bench.unit, group="outlier")
    assert [len(t.x) for t in pairs.data] == [5] * 4 and pairs.data[3].name == "the prose, with an outlier"
    assert pairs.data[3].y[4] == pytest.approx(by["SmoothQuant, with an outlier"].damage["prose"], rel=1e-3)
    methods = bench.methods({"RTN": RTN(bits=4), "AWQ": AWQ(bits=4)})
    assert methods[0].change == {"manual": 1.0, "prose": 1.0}


# ---------------------------------------------------------------------------------------------- the store's picture


def row(method="GPTQ", bits=4, linears=50e6, kl=0.1, calib="a", **more) -> dict:
    key = {"method": method, "knobs": f'{{"bits": {bits}}}', "calib": calib, "repr": f"{method}(bits={bits})"}
    found = {"memory.linears": linears, "memory.bits_per_weight": 4.3}
    return key | found | {"quality.manual.kl": kl, "quality.prose.kl": 2 * kl, "quality.manual.kl_se": 0.01} | more


def test_the_front_holds_what_nobody_beats():
    assert front.front([(4, 0.1), (4, 0.2), (3, 0.5), (8, 0.1), (5, 0.05)]) == [(3, 0.5), (4, 0.1), (5, 0.05)]
    assert front.front([]) == []


def test_the_picture_draws_the_rows_and_says_what_is_on_the_front():
    rows = [row(), row("RTN", kl=0.3), row("RTN", bits=8, linears=90e6, kl=0.001)]
    figure, text = front.picture(rows, "prose")
    assert [t.name for t in figure.data] == ["GPTQ", "RTN", "Pareto front"]
    assert list(figure.data[0].x) == [50.0] and list(figure.data[0].y) == [0.2]
    assert list(figure.data[2].y) == [0.2, 0.002]
    assert text.startswith("3 settings on the prose") and "GPTQ 1 time and RTN 1 time" in text
    assert text.endswith("2 of its 2 settings are on the manual's front too.")
    assert "27 % of 16" in figure.data[0].hovertext[0]


def test_a_front_that_holds_on_one_text_only_says_so():
    rows = [row(), row("RTN", kl=0.3, **{"quality.prose.kl": 0.05}), row("RTN", bits=8, linears=90e6, kl=0.001)]
    assert [r["method"] for r in front.on_front(rows, "manual")] == ["GPTQ", "RTN"]
    assert [r["quality.prose.kl"] for r in front.on_front(rows, "prose")] == [0.05, 0.002]
    assert front.picture(rows, "manual")[1].endswith("1 of its 2 settings are on the prose's front too.")


def test_an_empty_store_is_said_plainly(tmp_path, tiny_lm):
    store = labkit.Store(tmp_path / "results.sqlite")
    rows = store.rows(model="nobody")
    figure, text = front.picture(rows)
    assert not figure.data and "nothing in the store yet" in svg.draw(figure)
    assert text.startswith("The store has no such rows")
    assert front.calibrations([row(calib="other")], {"a": "manual"})[1] == text


def test_calibrations_are_told_apart_by_their_hash():
    rows = [row(calib=c, kl=k) for c, k in (("m0", 0.1), ("m1", 0.3), ("s0", 0.4), ("unknown", 9.0))]
    figure, text = front.calibrations(rows, {"m0": "manual", "m1": "manual", "s0": "self"})
    assert list(figure.data[0].x) == ["calibrated on manual", "calibrated on self"]
    assert list(figure.data[0].y) == [pytest.approx(0.2), 0.4] and list(figure.data[1].y) == [0.4, 0.8]
    assert list(figure.data[0].error_y.array) == [pytest.approx(0.1), 0.0]
    assert "2 draws" in text


def test_the_parts_of_gptq_and_awq_are_listed_as_one_types_them():
    GPTQ, AWQGPTQ = labkit.GPTQ, labkit.AWQGPTQ
    kl = {
        AWQGPTQ(bits=4): 0.1,
        GPTQ(bits=4): 0.2,
        GPTQ(bits=4, act_order=False): 0.3,
        AWQGPTQ(bits=4, clip=False): 0.15,
    }
    rows = [row(type(m).__name__, knobs=m.key(), calib="m", kl=value) for m, value in kl.items()]
    rows.append(row(knobs=GPTQ(bits=3).key(), calib="m"))
    rows.append(row(knobs=GPTQ(bits=4, format="nf4").key(), calib="m"))
    rows.append(row(knobs=GPTQ(bits=4, damp=0.1).key(), calib="of another text"))
    rows.append(row("AWQ", knobs=AWQ(bits=4).key(), calib="m"))
    rows.append(row(knobs=AWQGPTQ(bits=4).key(), calib="m"))  # when GPTQ still had these knobs
    table = front.parts(rows, {"m": "mixed"})
    assert table.rows == (
        ("GPTQ(bits=4, act_order=False)", "0.300", "0.600"),
        ("GPTQ(bits=4)", "0.200", "0.400"),
        ("AWQGPTQ(bits=4, clip=False)", "0.150", "0.300"),
        ("AWQGPTQ(bits=4)", "0.100", "0.200"),
    )


# ---------------------------------------------------------------------------------------------- heat maps


def test_the_static_twin_has_every_cell_in_its_colour():
    trace = heat.heat([[0.0, 0.0, 1.0], [1.0, None, 0.0]], 0.0, 1.0, ((0.0, "#000000"), (1.0, "#ffffff")))
    drawn = heat.cells(trace, lambda x: 10 * x, lambda y: -10 * y)
    dark, light = re.findall(r"<path fill='(#\w+)' d='([^']*)'", drawn)
    assert (dark[0], light[0]) == ("#000000", "#ffffff")
    assert dark[1].count("M") == 2 and light[1].count("M") == 2  # two neighbours of one shade are one box; None is none
    assert "H15.0" in dark[1] and drawn.count("M") == 4
    assert heat.mix(((0.0, "#000000"), (1.0, "#0000ff")), 0.5) == "#000080"


def test_a_figure_with_a_heat_map_has_an_svg(inputs):
    figures, _ = Stepper(inputs, columns=24, rows=8).view(3, True, 3, inputs.kinds[0], 0)
    drawn = svg.draw(*figures, width=400)
    assert drawn.count("<path fill='#") >= 3 and "in the order in which they are rounded" in drawn


# ---------------------------------------------------------------------------------------------- int8


def test_int8_is_timed_beside_fp32(tiny_lm):
    table = int8.layer(tiny_lm, tokens=(1, 32), rounds=2)
    assert [r[0] for r in table.rows] == ["1", "32"] and "measured" in table.caption
    assert all(re.fullmatch(r"[\d.]+x \([\d.]+ to [\d.]+\)", speed) for r in table.rows for speed in r[4:])
    small = labkit.SmoothQuant()(tiny_lm, windows(2, 24), progress=False)
    found = int8.prefill({"fp32": tiny_lm, "W8A8": small}, tokens=16, rounds=2)
    assert found.rows[0][3] == "1" and float(found.rows[1][1]) > 0


# ---------------------------------------------------------------------------------------------- exercises


def test_smooth_factor():
    ask = labkit.check.smooth_factor
    assert ask(16)
    assert "activations" in str(ask(1 / 16)) and "exponent" in str(ask(256)) and "maxima become" in str(ask(4))
    assert not ask(17) and all("16" not in str(ask(a)) for a in (1 / 16, 256, 4, 3))


def test_without_correlation():
    ask = labkit.check.without_correlation
    assert ask("rtn") and ask({"rtn"})
    assert "exactly one" in str(ask({"rtn", "awq"})) and not ask("awq")
    assert "rtn" not in str(ask("awq")).lower()


def test_least_tokens(tiny_lm):
    def ask(answer):
        return labkit.check.least_tokens(answer, tiny_lm)

    assert ask(96)  # the tiny model's intermediate size
    assert "rank" in str(ask(96 * 96)) and "other layers" in str(ask(64)) and "rank" in str(ask(50))
    assert all("96" not in str(ask(a)) for a in (96 * 96, 64, 50))


def test_the_rank_of_the_hessian_is_what_the_exercise_says():
    draw = torch.Generator().manual_seed(0)
    for tokens, rank in ((40, 40), (64, 64), (90, 64)):
        x = torch.randn(tokens, 64, generator=draw, dtype=torch.float64)
        assert torch.linalg.matrix_rank(x.T @ x) == rank


def test_codes_left(inputs):
    outliers = Outliers(inputs, inputs)
    kind, block, peak = ptq.outlier_input(outliers)
    assert kind == "mlp.down_proj"
    truth = float(127 * peak.median() / peak.max())

    def ask(answer):
        return labkit.check.codes_left(answer, outliers)

    assert ask(truth) and ask(1.05 * truth)
    assert "on either side" in str(ask(2 * truth))
    assert not ask(0.5 * truth) and not ask(127 / truth)
    assert all(f"{truth:.2g}" not in str(ask(a)) for a in (3 * truth, 0.5 * truth))
    assert max(float(outliers.peak(b, kind).max() / outliers.peak(b, kind).median()) for b in (0, 1)) == float(
        outliers.peak(block, kind).max() / outliers.peak(block, kind).median()
    )


# ---------------------------------------------------------------------------------------------- the real model


@pytest.mark.model
def test_what_the_notebook_says_about_the_real_model(lm):
    found = Inputs(lm, labkit.text.calibration(lm, windows=8, length=512))
    stepper = Stepper(found)
    for kind in found.kinds:
        run = stepper.run(3, kind, 3, True)
        assert run.gptq[-1] < run.rtn[-1] and run.moved > run.rounding, kind
    down, q = (stepper.run(3, k, 3, True) for k in ("mlp.down_proj", "self_attn.q_proj"))
    assert down.gptq[-1] / down.rtn[-1] > q.gptq[-1] / q.rtn[-1]  # inputs with less in common gain less
    outliers = Outliers(found, found)
    kind, block, peak = ptq.outlier_input(outliers)
    assert peak.max() > 500 * peak.median()  # one channel of one down_proj towers over the rest
    x = found.of(block, kind).abs().view(8, 512, -1)
    assert x.amax(-1).argmax(-1).eq(0).float().mean() >= 0.75  # at the first token of a text
    assert outliers.error(10, "self_attn.q_proj", 0.5, False) < 0.7 * outliers.error(
        10, "self_attn.q_proj", None, False
    )
