"""Notebook 05's views: pure functions, tested without widgets; tiny models, and the real one where it is the point."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

import labkit
from labkit.formats import Integer
from labkit.linear.sparse import Bitmask
from labkit.measure.sparse_speed import SpeedRow
from labkit.prune import Magnitude, SparseGPT, Wanda
from labkit.prune.sparsegpt import sparsegpt
from labkit.ui import svg
from labkit.ui.lessons import alone, breakit, breakit_prune, containers, duel, fits, masks, puzzle, sparsegpt_stepper
from labkit.ui.lessons.inputs import Inputs
from labkit.ui.lessons.masks import METHODS, Masks
from labkit.walk import Stats, blocks, linears, set_weight, weight_of

Q, DOWN = "self_attn.q_proj", "mlp.down_proj"


def windows(count: int = 4, length: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(96, (count, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def inputs(tiny_lm) -> Inputs:
    return Inputs(tiny_lm, windows())


def output_share(change, weight, x) -> float:
    """The squared error of the output as a share of its square, in float64."""
    change, weight, x = change.double(), weight.double(), x.double()
    return float((x @ change.T).square().sum() / (x @ weight.T).square().sum())


# ---------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_the_error_is_that_of_the_layers_output(inputs, method, pattern):
    found = Masks(inputs, rows=8, columns=48)
    part = found.slice(1, DOWN)
    pruned, keep = found.pruned(1, DOWN, method, 0.5, pattern)
    x = inputs.of(1, DOWN)[:, part.start : part.start + 48]
    assert part.weight.shape == (8, 48) and torch.equal(part.weight, inputs.weight(1, DOWN)[::8, part.start :][:, :48])
    assert (pruned == 0).float().mean() == 0.5 and bool((pruned[~keep] == 0).all())
    truth = output_share(pruned - part.weight, part.weight, x)
    assert found.error(1, DOWN, method, 0.5, pattern) == pytest.approx(truth, rel=1e-3)


def test_each_method_compares_where_its_paper_does(inputs):
    found = Masks(inputs)
    part, norm = found.slice(0, Q), inputs.of(0, Q).double().square().sum(0).sqrt()
    _, wanda = found.pruned(0, Q, "Wanda", 0.5, "unstructured")
    _, magnitude = found.pruned(0, Q, "magnitude", 0.5, "unstructured")
    score = part.weight.double().abs() * norm
    for kept, s in zip(wanda, score):  # in every row, the half with the highest scores
        assert int(kept.sum()) == 32 and s[kept].min() >= s[~kept].max()
    assert part.weight[magnitude].abs().min() >= part.weight[~magnitude].abs().max()  # over all rows
    with pytest.raises(ValueError, match="method = 'wand' is not allowed: it must be one of magnitude, Wanda"):
        masks.prune(part.weight, part.stats, "wand", 0.5)


def test_the_picture_shows_what_is_kept_in_colour_and_what_is_dropped_in_grey(inputs):
    found = Masks(inputs)
    figures, text = found.view(0.5, "unstructured", "Wanda", 2, Q, 1)
    part, keep = found.slice(1, Q), found.pruned(1, Q, "Wanda", 0.5, "unstructured")[1]
    colour, grey = figures[0].data
    for y, x in itertools.product(range(24), range(64)):
        shown, other = (colour, grey) if keep[y, x] else (grey, colour)
        weight = float(part.weight[y, x])
        assert other.z[y][x] is None
        assert shown.z[y][x] == pytest.approx(weight if keep[y, x] else abs(weight), rel=0.01)
    rows = [row for row in figures[1].data[1].z if any(v is not None for v in row)]  # the row under the three masks
    kept = [found.pruned(1, Q, m, 0.5, "unstructured")[1][2] for m in METHODS]
    assert [[v is not None for v in row] for row in rows] == [k.tolist() for k in reversed(kept)]
    for method in METHODS:
        assert f"{100 * found.error(1, Q, method, 0.5, 'unstructured'):.3g} % by {method}" in text
    assert "Wanda drops 50 % of the weights" in text
    assert "as 2:4 demands" in found.view(0.9, "2:4", "SparseGPT", 0, Q, 1)[1]
    assert all(svg.draw(f) for f in figures)


def test_the_line_in_the_histogram_parts_what_is_dropped(inputs):
    part = Masks(inputs).slice(0, Q)
    figure = masks.scores(part, 0.3, "unstructured")
    lines = [t for t in figure.data if t.name == "threshold"]
    weight = part.weight.abs()
    below = (weight < weight.median() * 10 ** lines[0].x[0]).float().mean()
    assert below == pytest.approx(0.3, abs=0.005)
    assert lines[2].x[0] <= lines[1].x[0] <= lines[3].x[0]  # rows: lowest, median, highest
    bars = [t for t in figure.data if t.type == "bar"]
    assert all(sum(t.y) == pytest.approx(100, abs=0.1) for t in bars)
    assert not [t for t in masks.scores(part, 0.3, "2:4").data if t.name == "threshold"]  # each group has its own


def test_views_leave_the_model_as_it_is(tiny_lm):
    before = {name: t.clone() for name, t in tiny_lm.model.state_dict().items()}
    found = Inputs(tiny_lm, windows())
    Masks(found).view(0.5, "2:4", "SparseGPT", 0, Q, 1)
    alone.Alone(found, {"manual": windows(1)}).measure()
    after = tiny_lm.model.state_dict()
    assert all(torch.equal(t, after[name]) for name, t in before.items())


# ---------------------------------------------------------------------------------------------- SparseGPT, watched


@pytest.mark.parametrize("pattern, parsed", [("unstructured", None), ("2:4", (2, 4))])
def test_the_stepper_watches_the_algorithm_itself(inputs, monkeypatch, pattern, parsed):
    monkeypatch.setattr("labkit.prune.sparsegpt.BLOCK", 32)
    run = sparsegpt_stepper.Stepper(inputs, rows=8).run(1, DOWN, 0.5, pattern)
    x, weight, stats = inputs.of(1, DOWN), inputs.weight(1, DOWN)[::8], Stats()
    stats.add(x, "hessian")
    pruned, keep, _ = sparsegpt(weight, stats, 0.5, parsed)
    assert run.done == [0, 32, 64, 96]
    assert torch.equal(run.states[-1], pruned) and torch.equal(run.keep, keep)
    assert torch.equal(run.states[1][:, :32], run.states[3][:, :32])  # what is decided stays
    assert not torch.equal(run.states[1][:, 32:], weight[:, 32:])  # and the others have moved
    for i, done in enumerate(run.done):
        assert run.errors["SparseGPT"][i] == pytest.approx(output_share(run.states[i] - weight, weight, x), rel=1e-3)
        half = weight.clone()
        half[:, :done] = masks.prune(weight, stats, "Wanda", 0.5, parsed)[0][:, :done]
        assert run.errors["Wanda"][i] == pytest.approx(output_share(half - weight, weight, x), rel=1e-3)


def test_the_stepper_draws_and_says_where_it_stands(inputs, monkeypatch):
    monkeypatch.setattr("labkit.prune.sparsegpt.BLOCK", 32)
    stepper = sparsegpt_stepper.Stepper(inputs, rows=8)
    figures, text = stepper.view(50, 0.5, "unstructured", DOWN, 0)
    run = stepper.run(0, DOWN, 0.5, "unstructured")
    assert "32 of 96 columns are pruned" in text and f"{100 * run.errors['Wanda'][1]:.3g} % with Wanda" in text
    assert "64 columns to come have moved" in text
    assert figures[0].data[1].x[0] == 15.5  # cells of two columns
    share = sum(figures[1].data[0].y) / len(figures[1].data[0].y)
    assert share == pytest.approx(100 * 0.5 * 32 / 96, rel=1e-3) and not any(figures[1].data[0].y[16:])
    assert figures[2].data[2].y[-1] == pytest.approx(100 * run.errors["SparseGPT"][-1], rel=1e-3)
    assert "96 of 96" in stepper.view(10_000, 0.5, "unstructured", DOWN, 0)[1]
    assert stepper.settings()["columns"][-1] == 96
    assert all(svg.draw(f) for f in figures)


# ---------------------------------------------------------------------------------------------- the puzzle


def test_the_puzzles_errors_are_exact():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(50, 8, generator=draw, dtype=torch.float64) @ torch.randn(8, 8, generator=draw, dtype=torch.float64)
    weight = torch.randn(3, 8, generator=draw, dtype=torch.float64)
    groups = x.view(50, 2, 4)
    plain, fitted = puzzle.exact_errors(weight.view(3, 2, 4), torch.einsum("tgi,tgj->gij", groups, groups))
    for row, group, (i, pair) in itertools.product(range(3), range(2), enumerate(puzzle.PAIRS)):
        w, inputs = weight[row, 4 * group :][:4], groups[:, group]
        kept = torch.zeros(4, dtype=torch.float64)
        kept[list(pair)] = w[list(pair)]
        assert plain[row, group, i] == pytest.approx(float((inputs @ (w - kept)).square().sum()))
        best = torch.linalg.lstsq(inputs[:, list(pair)], inputs @ w).solution
        left = inputs @ w - inputs[:, list(pair)] @ best
        assert fitted[row, group, i] == pytest.approx(float(left.square().sum()), rel=1e-6)


def test_the_puzzle_answers_ticks_and_keeps_its_answer_until_asked(inputs):
    found = puzzle.Puzzle(inputs, block=1, kind="self_attn.o_proj", count=3)
    assert found.settings()["puzzle"] == [1, 2, 3]
    figures, text = found.view(1, True, False, True, False, False)
    plain, fitted = found.errors(0)[0, 2]
    assert (
        f"Keeping w1 and w3, the squared error is {100 * plain:.3g} %" in text and f"{100 * fitted:.3g} % when" in text
    )
    assert "Best" not in text and len(figures[2].data[0].x) == 1  # nothing else is told
    assert "ticked 3: 2:4 keeps exactly two" in found.view(2, True, True, True, False, False)[1]
    figures, text = found.view(1, True, False, True, False, True)
    errors = found.errors(0)
    best = min(errors, key=lambda pair: errors[pair][0])
    assert f"Best as the weights are is w{best[0] + 1} and w{best[1] + 1}" in text
    assert len(figures[2].data[0].x) == 6
    row, group = found.groups[0]
    weight = found.weights[row, group]
    top = sorted(weight.abs().topk(2).indices.tolist())
    assert f"Magnitude keeps w{top[0] + 1} and w{top[1] + 1}" in text
    assert all(svg.draw(f) for f in figures)
    right = (found.plain.gather(-1, found.choice["Wanda"][..., None])[..., 0] == found.plain.amin(-1)).double().mean()
    assert found.right("Wanda") == pytest.approx(float(right))
    assert ">3.5</text>" not in svg.draw(figures[1])  # the axes of the cosines have no numbers


# ---------------------------------------------------------------------------------------------- seen and unseen text


def test_least_squares_is_best_on_what_it_has_seen(inputs, tiny_lm):
    other = Inputs(tiny_lm, windows(seed=5))
    found = fits.Fits(inputs, other, rows=8)
    assert found.settings()["tokens"] == [48, 96]
    errors = found.errors(96, DOWN, 1)
    assert errors["SparseGPT, fitted"][0] <= errors["SparseGPT"][0]
    assert errors["Wanda, fitted"][0] < errors["Wanda"][0]
    weight, stats = inputs.weight(1, DOWN)[::8], Stats()
    stats.add(inputs.of(1, DOWN), "hessian")
    pruned, _ = masks.prune(weight, stats, "Wanda", 0.5)
    for x, share in zip((inputs.of(1, DOWN), other.of(1, DOWN)), errors["Wanda"]):
        assert share == pytest.approx(output_share(pruned - weight, weight, x), rel=1e-3)
    figure, text = found.view(48, DOWN, 1)
    assert (
        text.startswith("Calibrated on 48 tokens, 96 inputs") and len(figure.data) == 2 and len(figure.data[0].x) == 5
    )


# ---------------------------------------------------------------------------------------------- one block alone


def test_a_block_pruned_alone_costs_what_a_model_with_it_costs(inputs, tiny_lm):
    ids = windows(2, 16, seed=3)
    costs = alone.Alone(inputs, {"manual": ids, "prose": windows(1, 16, seed=4)}).measure(blocks=[1])
    assert [(c.block, c.method) for c in costs] == [(1, "magnitude"), (1, "Wanda")]
    small = tiny_lm.copy()
    for _, layer in linears(blocks(small.model)[1]):
        weight = weight_of(layer)
        threshold = weight.abs().flatten().sort().values[weight.numel() // 2]
        set_weight(layer, weight * (weight.abs() >= threshold))
    with torch.no_grad():
        p, q = (m.model(ids).logits.double().log_softmax(-1) for m in (tiny_lm, small))
    assert costs[0].damage["manual"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    figure, text = alone.view(costs, "prose")
    assert "On the prose, with magnitude block 1 costs most" in text and list(figure.data[0].x) == ["1"]
    assert len(alone.table(costs).rows) == 1 and "measured" in alone.table(costs).caption


# ---------------------------------------------------------------------------------------------- broken on purpose


def test_a_blind_wanda_lies_between_wanda_and_magnitude(tiny_lm):
    def weights(method):
        return [weight_of(m) for b in blocks(method(tiny_lm, windows(), progress=False).model) for _, m in linears(b)]

    for blind, seeing in ((0, Wanda()), (10_000, Magnitude(per="row"))):
        assert all(map(torch.equal, weights(breakit_prune.Blind(skip=blind)), weights(seeing)))
    assert "Blind" not in labkit.methods()


def test_switches_measure_kl_against_the_models_they_prune(tiny_lm, monkeypatch):
    monkeypatch.setattr(labkit.text, "calibration", lambda lm, w, length, **_: windows(w, 24))
    monkeypatch.setattr(labkit.text, "evaluation", lambda lm, w, length, source: windows(w, length, len(source)))
    bench = breakit.Damage(tiny_lm, windows=4, length=24, evaluation=(2, 24))
    found = breakit_prune.parts(bench)
    assert [o.group for o in found] == ["who competes"] * 4 + ["compensation"] * 3 + ["outlier channels"] * 5
    by = {o.name: o for o in found}
    small = SparseGPT(compensate=False)(tiny_lm, windows(4, 24), progress=False)
    truth = labkit.divergence(small, tiny_lm, bench.texts["prose"]).kl
    assert by["its choice, no compensation"].damage["prose"] == pytest.approx(truth, rel=1e-5)
    assert by["its choice, no compensation"].change["prose"] == pytest.approx(truth / by["SparseGPT"].damage["prose"])
    assert by["without all norms"].damage == by["magnitude, in each row"].damage
    assert len(breakit.bars(found, bench.unit, group="compensation").data[0].x) == 3
    fed = breakit_prune.calibrations(bench)
    assert [o.name for o in fed[:2]] == ["Wanda, mixed", "SparseGPT, mixed"] and len(fed) == 6
    assert fed[0].change == {"manual": 1.0, "prose": 1.0}


def pruned_row(method, kl, calib="mixed", **knobs) -> dict:
    made = labkit.methods()[method](**knobs)
    row = {"method": method, "knobs": made.key(), "repr": repr(made), "calib": calib, "memory.bits_per_weight": 17.0}
    return row | {"quality.manual.kl": kl, "quality.prose.kl": 2 * kl}


def test_calibrations_come_from_the_store_when_it_has_both_methods():
    known = {"m": "manual", "m2": "manual", "s": "self"}
    rows = [pruned_row("Wanda", 0.5, "m"), pruned_row("Wanda", 0.7, "m2"), pruned_row("SparseGPT", 0.8, "m")]
    assert breakit_prune.stored_fed(rows, known) == []  # one text alone shows nothing
    rows += [pruned_row("Wanda", 0.6, "s"), pruned_row("SparseGPT", 0.4, "s")]
    rows += [pruned_row("SparseGPT", 9.0, "s", sparsity=0.7), pruned_row("Wanda", 9.0, "elsewhere")]
    found = breakit_prune.stored_fed(rows, known)
    assert [o.name for o in found] == ["Wanda, self", "SparseGPT, self", "Wanda, manual", "SparseGPT, manual"]
    assert found[2].damage == {"manual": pytest.approx(0.6), "prose": pytest.approx(1.2)}  # the mean of two draws
    figure, text = breakit_prune.turn(found)
    assert "calibrated on self, SparseGPT is better (0.80 to 1.20)" in text
    assert "calibrated on manual, Wanda is better (1.20 to 1.60)" in text
    assert [t.name for t in figure.data] == ["Wanda", "SparseGPT"]


# ---------------------------------------------------------------------------------------------- the duel


def quantized_row(bits: float, kl: float, **more) -> dict:
    row = pruned_row("Wanda", kl) | {"method": "RTN", "knobs": f'{{"bits": {bits:.0f}}}', "repr": f"RTN at {bits}"}
    return row | {"memory.bits_per_weight": bits} | more


def test_bits_of_a_pruned_row_are_those_of_a_real_container_with_16_bit_values():
    draw = torch.Generator().manual_seed(0)
    for sparsity in (0.3, 0.5, 0.75):
        order = torch.rand(64, 64, generator=draw).flatten().argsort()[: round(sparsity * 4096)]
        weight = torch.ones(4096, dtype=torch.bfloat16).index_fill(0, order, 0).view(64, 64)
        truth = Bitmask.from_dense(weight).bits_per_weight
        assert duel.at_16_bits(pruned_row("Magnitude", 1, sparsity=sparsity)) == pytest.approx(truth, abs=0.01)
    assert duel.at_16_bits(pruned_row("Wanda", 1, pattern="2:4")) == 9
    assert duel.at_16_bits(pruned_row("Wanda", 1, pattern="4:8")) == 8 + 0.5 * 3
    assert duel.at_16_bits(pruned_row("Wanda", 1, container="dense")) == 16
    assert duel.at_16_bits(pruned_row("Wanda", 1, container="csr")) == 24


def test_sides_are_told_apart_also_in_recipes():
    assert duel.side_of(quantized_row(4.3, 0.1)) == "quantized"
    assert duel.side_of(pruned_row("SparseGPT", 0.1)) == "pruned"
    assert duel.side_of(pruned_row("SparseGPT", 0.1, bits=4)) == "both"
    recipe = json.dumps([["Wanda", json.loads(Wanda().key())], ["RTN", {"bits": 4}]])
    assert duel.side_of({"method": "Recipe", "knobs": recipe}) == "both"
    assert duel.side_of({"method": "Nobody", "knobs": "{}"}) is None
    twice = pruned_row("Wanda", 1) | {"knobs": json.dumps([["Wanda", json.loads(Wanda(pattern="2:4").key())]] * 2)}
    assert duel.side_of(twice) == "pruned" and duel.at_16_bits(twice) == 9


ROWS = [
    quantized_row(8.3, 0.001),
    quantized_row(4.3, 0.1, **{"engine.decode_ms": 7.3}),
    quantized_row(3.3, 0.9),
    pruned_row("Wanda", 0.6),
    pruned_row("SparseGPT", 0.4, sparsity=0.5),
    pruned_row("SparseGPT", 7.0, sparsity=0.9),
    pruned_row("SparseGPT", 0.5, bits=4) | {"memory.bits_per_weight": 3.3},
]


def test_the_best_of_each_side_meets_at_the_budget():
    found = duel.fighters(ROWS)
    assert duel.best(found, "pruned", 9, "manual").kl["manual"] == 0.4
    assert duel.best(found, "pruned", 8.9, "manual").bits == pytest.approx(2.6)
    assert duel.best(found, "quantized", 3, "manual") is None
    figures, text = duel.view(ROWS, 4, "manual", "both")
    assert text.startswith(
        "At 4 bits per weight, pruning and quantizing loses least on the manual. Your guess was right. (Each side's setting "
        "was picked on the prose, out of those that fit: 1 quantized, 1 pruned and 1 doing both.) "
    )
    assert (
        "2.60 bits modelled, 17.00 held" in text and "RTN(bits=3) with 3.30 bits, KL 0.90 (1.80 on the prose)" in text
    )
    assert list(figures[1].data[0].y) == [1.8, 14.0, 1.0] and figures[1].data[0].name == "the prose"
    assert [t.name for t in figures[0].data] == ["quantized", "pruned", "pruned and quantized", "budget"]
    _, text = duel.view(ROWS, 9, "prose", "pruned")
    assert "quantizing loses least on the prose. Your guess was pruned." in text
    assert "Nothing in the store is as small as 2 bits" in duel.view(ROWS, 2, "manual", "pruned")[1]


def test_a_setting_is_picked_on_one_text_and_judged_on_the_other():
    """Of two quantized settings the one that is lucky on the prose does not stand for its side there."""
    lucky, steady = quantized_row(4, 0.3), quantized_row(3.9, 0.1)
    rows = [lucky | {"quality.prose.kl": 0.05}, steady | {"quality.prose.kl": 0.2}, pruned_row("Wanda", 0.06)]
    found = duel.fighters(rows)
    assert duel.best(found, "quantized", 10, "prose").kl == {"prose": 0.2, "manual": 0.1}
    assert duel.best(found, "quantized", 10, "manual").kl == {"prose": 0.05, "manual": 0.3}
    _, text = duel.view(rows, 10, "prose", "quantized")
    assert "pruning loses least on the prose" in text and "out of those that fit: 2 quantized, 1 pruned and 0" in text
    assert [list(t.y) for t in duel.curves(found, 10, "prose").data[:2]] == [[0.2], [0.12]]
    assert duel.table(rows, budgets=(10,)).rows == (("10", "0.20 (3.90, of 2)", "0.12 (9.00, of 1)", "–", "pruned"),)
    assert "of the setting that loses least on the manual" in duel.table(rows).caption


def test_time_is_drawn_where_it_was_measured():
    figures, text = duel.view(ROWS, 5, "manual", "pruned")
    assert "7.30 ms per token as one graph" in text and "eagerly" not in text
    assert len(duel.view(ROWS, 4, "manual", "pruned")[0]) == 2  # without a time there is no figure of it
    eager = {"latency.decode_ms": 90.0, "engine.decode_ms": 20.0, "machine": "a CPU"}
    figures, text = duel.view([row | eager for row in ROWS[3:5]] + ROWS[:3], 17, "manual", "pruned")
    assert [(t.name, t.x, t.y) for t in figures[2].data] == [
        ("eager", ("pruned",), (90.0,)),
        ("one graph", ("pruned",), (20.0,)),
    ]
    untimed = [pruned_row("SparseGPT", 0.1, calib="manual"), pruned_row("SparseGPT", 0.2) | eager]
    first, second = duel.fighters(untimed)
    assert first.decode_ms == {"eager": 90.0, "one graph": 20.0}  # whatever it was calibrated on
    assert first.borrowed and not second.borrowed
    borrowed = "20.0 ms per token as one graph (the time is of the same setting with another calibration)."
    assert borrowed in duel.view(untimed[:1] + untimed[1:], 17, "prose", "pruned")[1]
    assert "measured on a CPU" in figures[2].layout.title.text and "90.0 ms per token eagerly, 20.0 ms" in text


def test_names_are_as_short_as_one_types_them():
    recipe = labkit.Recipe(labkit.Wanda(pattern="2:4"), labkit.RTN(bits=4, group_size=32))
    rows = [
        pruned_row("SparseGPT", 0.5, bits=4),
        pruned_row("Wanda", 0.5) | {"method": "Recipe", "knobs": recipe.key()},
        pruned_row("Wanda", 0.5) | {"knobs": '{"pattern": "2:4", "gone": 1}', "repr": "Wanda(gone=1)"},
    ]
    assert [f.name for f in duel.fighters(rows)] == [
        "SparseGPT(sparsity=0.5, bits=4)",
        "Recipe(Wanda(sparsity=0.5, pattern='2:4'), RTN(bits=4, group_size=32))",
        "Wanda(gone=1)",  # a knob of another version
    ]


def test_nothing_is_told_before_there_is_a_guess():
    figures, text = duel.view(ROWS, 4)
    assert "on the prose" in text and "Guess" in text and "0.9" not in text and not figures[0].data
    assert svg.draw(figures[0]).count("your guess?") == 1


def test_an_empty_store_is_said_plainly():
    for rows in ([], [quantized_row(4, 0.1) | {"method": "Nobody", "knobs": "{}"}]):
        figures, text = duel.view(rows, 4, "manual", "pruned")
        assert text.startswith("The store has no such rows") and not figures[0].data
        assert duel.table(rows).rows == () and "no such rows" in duel.table(rows).caption
    table = duel.table(ROWS, budgets=(9, 4, 2))
    assert [row[-1] for row in table.rows] == ["quantized", "both", "nobody fits"]
    assert table.rows[0][2] == "0.80 (9.00, of 3)" and table.rows[2][1:4] == ("–", "–", "–")


# ---------------------------------------------------------------------------------------------- bytes and time


def test_the_sizes_are_those_of_the_stored_tensors():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    table = containers.sizes(weight)
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["bitmask, 50 % zeros"][1::2] == ("17.00", "9.00") == rows["2:4, values and places"][1::2]
    assert rows["dense, 50 % zeros"] == ("32,768", "32.00", "16,384", "16.00")
    assert rows["4-bit, no zeros"][0] == f"{Integer(4, 64).encode(weight).nbytes:,}"
    assert float(rows["CSR, 50 % zeros"][3]) > 24


def test_the_curve_says_from_where_on_zeros_pay():
    def row(name, sparsity, ratio):
        return SpeedRow(name, sparsity, 1e-3, ratio, (ratio, ratio), 1, 1.0)

    rows = [row("dense", s, 1.0) for s in (0.5, 0.9)] + [row("csr", 0.5, 0.3), row("csr", 0.9, 1.4)]
    rows += [row("bitmask", s, 0.8) for s in (0.5, 0.9)] + [row("4-bit", s, 3.0) for s in (0.5, 0.9)]
    figure, text = containers.curve(rows)
    assert text.startswith("CSR beats dense from 90 % zeros on; bitmask beats dense at no sparsity that was tried;")
    assert "3.0x as fast as dense" in text and list(figure.data[1].x) == [50, 90]
    timed = containers.times((32, 64), sparsities=(0.5,), rounds=2, min_seconds=0.001)
    assert {"dense", "csr", "4-bit"} <= {r.name for r in timed}


# ---------------------------------------------------------------------------------------------- exercises


def test_bitmask_bits():
    ask = labkit.check.bitmask_bits
    assert ask(9)
    assert "where they belong" in str(ask(8)) and "whether it is there" in str(ask(8.5)) and "in full" in str(ask(17))
    assert not ask(10) and all("9" not in str(ask(a)) for a in (8, 8.5, 17, 10))


def test_masks_of_a_group():
    ask = labkit.check.masks_of_a_group
    assert ask(len(list(itertools.combinations(range(8), 4))))
    assert "one and three" in str(ask(36)) and "any number" in str(ask(256)) and "2:4" in str(ask(6))
    assert "order" in str(ask(1680)) and not ask(71) and all("70" not in str(ask(a)) for a in (36, 256, 6, 1680, 71))


def test_wanda_keeps():
    ask = labkit.check.wanda_keeps
    assert ask({"b", "c"}) and ask(["c", "b"])
    assert "magnitude" in str(ask({"a", "b"})) and "exactly two" in str(ask("b"))
    assert "drops" in str(ask({"a", "d"})) and not ask({"b", "d"})


def test_beats_4_bits():
    ask = labkit.check.beats_4_bits
    truth = 1 - (4 + 20 / 64 - 1) / 16
    assert ask(truth) and ask(0.79)
    assert "between 0 and 1" in str(ask(100 * truth)) and "mask" in str(ask(0.75)) and "scales" in str(ask(1 - 3 / 16))
    assert "kept" in str(ask(1 - truth)) and not ask(0.5)
    assert all(f"{truth:.2f}" not in str(ask(a)) for a in (0.75, 0.8125, 0.5))


# ---------------------------------------------------------------------------------------------- the real model


@pytest.mark.model
def test_what_the_notebook_says_about_the_real_model(lm):
    found = Inputs(lm, labkit.text.calibration(lm, windows=8, length=512)[:, :192])
    view = Masks(found)
    half = {m: view.error(3, Q, m, 0.5, "unstructured") for m in METHODS}
    assert half["SparseGPT"] < half["Wanda"] < 0.65 * half["magnitude"]
    assert all(view.error(3, Q, m, 0.5, "2:4") > half[m] for m in METHODS)
    up = {m: view.error(3, "mlp.up_proj", m, 0.5, "unstructured") for m in METHODS}
    assert up["Wanda"] / up["magnitude"] > half["Wanda"] / half["magnitude"]  # inputs that are more alike
    part, keep = view.slice(3, Q), view.pruned(3, Q, "Wanda", 0.5, "unstructured")[1]
    assert (
        keep[:, int(part.stats.channel_norm.argmax())].float().mean() > 0.85
    )  # of the largest input little is dropped
    games = puzzle.Puzzle(found, 3, "self_attn.o_proj")
    assert games.right("magnitude") < 0.8 < games.right("Wanda") < puzzle.Puzzle(found, 3, Q).right("Wanda")
    unseen = Inputs(lm, labkit.text.evaluation(lm, windows=1, length=256, source="prose"))
    errors = fits.Fits(found, unseen).errors(1536, DOWN, 3)  # as many tokens as inputs
    fitted = errors["SparseGPT, fitted"]
    assert fitted[0] < 0.2 * errors["Wanda"][0] and fitted[1] > 1.5 * errors["Wanda"][1]
    assert math.isfinite(fitted[1])
