"""Notebook 02's views: pure functions, without widgets, against brute force on small matrices."""

from __future__ import annotations

import math
import time

import pytest
import torch

import labkit
from labkit import formats
from labkit.check import formats as exercises
from labkit.formats import FP4, MXFP4, NF4, NVFP4, Affine, Float8, Integer
from labkit.linear import exact
from labkit.measure import memory
from labkit.quantize import RTN
from labkit.ui import svg
from labkit.ui.lessons import code_usage, damage, rounding, snapped
from labkit.ui.lessons.rounding import FOUR_BITS, Point, Rounding, clipped, front, grid, levels

ALL = {**FOUR_BITS, **rounding.EIGHT_BITS, "int3": Integer(3, 16)}


@pytest.fixture
def tiny_rounding(tiny_lm):
    return Rounding(tiny_lm, rows=10_000)  # all rows


def relative(weight, form):
    return float((weight - form.encode(weight).decode()).norm() / weight.norm())


# ------------------------------------------------------------------------------------------------ grids


@pytest.mark.parametrize("form", ALL.values(), ids=ALL)
def test_a_grid_holds_every_value_that_the_group_decodes_to(form):
    torch.manual_seed(0)
    weight = torch.randn(6, 256)
    encoded = form.encode(weight)
    size = form.size(256)
    decoded = encoded.decode()
    for row, group in ((0, 0), (5, 256 // size - 1)):
        values = grid(form, encoded.params(), row, group)
        assert len(values) <= 1 << form.bits and (values.diff() > 0).all()
        mine = decoded[row, group * size : (group + 1) * size]
        assert torch.isin(mine, values).all()
        assert torch.equal(values[rounding.nearest(values, mine)], mine)


@pytest.mark.parametrize("form", ALL.values(), ids=ALL)
def test_levels_are_scaled_to_one(form):
    values = levels(form)
    assert values.abs().max() == 1 and (values.diff() > 0).all() and len(values) == len(form.levels())


def test_clipped_counts_what_saturates():
    # MXFP4's scale is 1 for a largest weight of 7.9, its last step is from 4 to 6: beyond 7 is clipped.
    weight = torch.zeros(1, 32)
    weight[0, :6] = torch.tensor([7.9, -7.5, 7.1, 6.9, -6.5, 1.0])
    form = MXFP4()
    groups = form.groups(weight)
    assert clipped(form, groups, form.fit(groups)) == 3 / 32
    torch.manual_seed(0)
    weight = torch.randn(8, 64)
    for form in (Integer(4, 64), Affine(4, 64), FP4(64), NF4(double_quant=False), Float8()):
        groups = form.groups(weight)
        assert clipped(form, groups, form.fit(groups)) == 0, form
    half = Integer(4, 64)
    groups = half.groups(weight)
    assert clipped(half, groups, half.fit(groups, shrink=0.5)) > 0.02


def test_usage_counts_codes_and_blocks_that_saturate():
    weight = torch.zeros(1, 64)
    weight[0, :6] = torch.tensor([7.9, -7.5, 3.0, 1.0, -0.5, 6.5])  # MXFP4's first block, whose scale is 1
    weight[0, 32:34] = torch.tensor([4.0, 2.0])  # and its second, which fits
    u = code_usage.usage([weight], {"mxfp4": MXFP4()})["mxfp4"]
    share = dict(zip(u.values[:7] + u.values[9:], u.shares[:7] + u.shares[9:]))  # zero has two codes
    assert u.above == 0.5
    assert {v: round(64 * s) for v, s in share.items() if s} == {-6: 1, -0.5: 1, 1: 1, 2: 1, 3: 1, 4: 1, 6: 2}
    assert sum(u.shares) == pytest.approx(1) and u.bits < 4


def test_usage_of_exactly_normal_weights():
    """Yoshida, arXiv:2306.06965; and the one that uses its codes most evenly is not the one that errs least."""
    found = code_usage.usage([code_usage.normal()])
    nf4 = found["nf4"]
    assert max(nf4.shares) > 5 * min(nf4.shares) and nf4.bits == pytest.approx(3.88, abs=0.01)
    assert found["int4"].error < nf4.error < found["mxfp4"].error and found["mxfp4"].bits > nf4.bits
    assert nf4.above == 0 and found["int4"].above is None
    figure = code_usage.bars({"normal": found}, "nf4")
    assert len(figure.data[0].x) == 16 and sum(figure.data[0].y) == pytest.approx(100, abs=0.1)
    assert len(code_usage.table({"normal": found}).rows) == len(found)


# ------------------------------------------------------------------------------------------------ Rounding


@pytest.mark.parametrize("form", [Integer(4, 16), Integer(3), NF4(32), MXFP4(), NVFP4(), Float8()], ids=str)
def test_errors_and_bits_are_those_of_encoded_layers(tiny_lm, tiny_rounding, form):
    r = tiny_rounding
    off = total = 0.0
    for block in range(r.blocks):
        for kind in r.kinds:
            weight = r.weight(block, kind)
            left = weight - form.encode(weight).decode()
            off, total = off + float(left.square().sum()), total + float(weight.square().sum())
            assert r.round(form, block, kind).error == pytest.approx(relative(weight, form), rel=1e-4)
    assert r.error(form) == pytest.approx(math.sqrt(off / total), rel=1e-4)


@pytest.mark.parametrize("name", ["int", "nf4", "mxfp4", "nvfp4", "fp8_e4m3"])
def test_bits_are_those_of_the_model_that_rtn_stores(tiny_lm, tiny_rounding, name):
    form = formats.by_name(name, **({"bits": 4, "group_size": 32} if name == "int" else {}))
    stored = RTN(format=name, bits=4, group_size=getattr(form, "group_size", None))(tiny_lm, progress=False)
    assert tiny_rounding.bits(form) == pytest.approx(memory.bits_per_weight(stored), rel=1e-6)


def test_every_family_can_be_looked_at(each_family):
    r = Rounding(each_family)
    figures, sentence = r.view("int", 4, 16, r.kinds[-1], 1, 3, 20)
    assert "row 3, columns 16 to 31" in sentence and r.kinds[-1] in sentence
    assert r.blocks == 2 and all(f.data for f in figures)


def test_the_view_shows_the_chosen_group(tiny_rounding):
    r = tiny_rounding
    kind = r.kinds[0]
    (hist, lines), sentence = r.view("int", 3, 16, kind, 1, 5, 40)
    comb, dots = hist.data[1:]
    mine = r.weight(1, kind)[5, 32:48]
    assert dots.x == pytest.approx(mine.tolist(), rel=1e-3)
    assert len(comb.x) == 3 * 8  # eight values, three points for each tooth
    assert min(comb.x) <= float(mine.min()) + 0.51 * (comb.x[3] - comb.x[0])
    assert sum(hist.data[0].y) <= 1.001
    assert lines.data[-1].y[0] == pytest.approx(100 * relative(r.weight(1, kind), Integer(3, 16)), rel=1e-3)
    assert f"{100 * relative(r.weight(1, kind), Integer(3, 16)):.3g} %" in sentence
    assert "8 values" in sentence and "decides its" not in sentence
    assert "nvfp4 decides its bits and group size itself" in r.view("nvfp4", 3, 16, kind, 1, 5, 40)[1]


def test_an_unknown_format_or_width_is_refused(tiny_rounding):
    with pytest.raises(ValueError, match="format = 'int5'"):
        tiny_rounding.view("int5", 4, 16, tiny_rounding.kinds[0], 0, 0, 0)
    with pytest.raises(ValueError, match="bits = 9"):
        tiny_rounding.view("int", 9, 16, tiny_rounding.kinds[0], 0, 0, 0)


def test_settings_are_all_valid_positions(tiny_rounding):
    choices = tiny_rounding.settings()
    for name in choices["format"]:
        for where in (0, -1):
            bits, size = choices["bits"][where], list(choices["group_size"].values())[where]
            kind, block = choices["kind"][where], choices["block"][where]
            figures, _ = tiny_rounding.view(
                name, bits, size, kind, block, choices["row"][where], choices["column"][where]
            )
            assert svg.draw(*figures).startswith("<svg")


@pytest.mark.model
def test_a_remembered_format_answers_at_once(lm):
    r = Rounding(lm)
    kind = r.kinds[0]
    r.view("int", 4, 64, kind, 0, 0, 0)
    took = []
    for row in range(8):
        start = time.process_time()  # CPU seconds: what else runs here does not count
        r.view("int", 4, 64, kind, 0, row, 64 * row)
        took.append(time.process_time() - start)
    assert min(took) < 0.1


# ------------------------------------------------------------------------------------------------ trade-off


def test_front_by_brute_force():
    torch.manual_seed(0)
    points = [Point(str(i), float(b), float(e)) for i, (b, e) in enumerate(torch.rand(60, 2))]
    beaten = {
        p.name
        for p in points
        for q in points
        if q.bits <= p.bits and q.error <= p.error and (q.bits, q.error) != (p.bits, p.error)
    }
    assert {p.name for p in front(points)} == {p.name for p in points} - beaten


def test_smaller_groups_cost_bits_and_take_off_error(tiny_rounding):
    points = tiny_rounding.sweep(bits=(3,), sizes=(16, 32, None))
    assert [p.name for p in points] == ["3 bits, groups of 16", "3 bits, groups of 32", "3 bits, per row"]
    assert points[0].bits > points[1].bits > points[2].bits and points[0].error < points[1].error < points[2].error
    figure = rounding.tradeoff(points, tiny_rounding.points(rounding.OTHERS))
    assert [t.name for t in figure.data] == ["3 bits, by group size", "Pareto front", "other formats"]


def test_combs_have_a_tooth_for_every_value():
    figure = rounding.combs(FOUR_BITS)
    assert [len(set(t.x)) for t in figure.data] == [len(f.levels()) for f in FOUR_BITS.values()]
    fitted = rounding.combs(FOUR_BITS, torch.randn(64))
    assert [len(t.x) for t in fitted.data if t.mode == "markers"] == [64, 64, 64, 32, 16, 64]
    spans = rounding.spans(rounding.EIGHT_BITS)
    assert [round(min(t.x), 1) for t in spans.data] == [-7.0, -17.8, -31.8]  # log2 of 128, 448·2^9 and 57344·2^16
    assert all("None" not in svg.draw(f, width=720) for f in (figure, fitted, spans))


def test_anatomy_adds_up():
    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    table = rounding.anatomy({"mxfp4": MXFP4(), "nvfp4": NVFP4(), "int4": Integer(4, 64)}, weight)
    want = [4.25, 4.5 + 32 / weight.numel(), 4 + (2 * 16 + 8) / 128]  # a row's two 4-bit zero points fill a byte
    assert [row[-1] for row in table.rows] == [f"{b:.3f}" for b in want]
    assert table.rows[0][1:5] == ("15", "3.6", "32", "4.00") and table.rows[1][5].startswith("scale 0.5, tensor scale")


# ------------------------------------------------------------------------------------------------ the case


@pytest.mark.parametrize("group_size", [16, 32])
def test_residues_are_zero_on_a_grid_and_spread_off_it(group_size):
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    on = Affine(4, group_size).encode(weight).decode()
    assert snapped.residues(on, group_size).abs().max() < 1e-4
    off = snapped.residues(weight, group_size)
    assert off.abs().max() <= 0.5 and float((off.abs() < 0.25).float().mean()) == pytest.approx(0.5, abs=0.05)


def test_only_the_embedded_model_has_a_case(tiny_lm):
    with pytest.raises(ValueError, match="did not come from the embedded file"):
        snapped.Case(tiny_lm)


@pytest.fixture(scope="module")
def case(lm):
    return snapped.Case(lm)


@pytest.mark.model
def test_the_file_lies_on_the_grid_of_affine_32_and_on_no_other(case):
    for kind in case.kinds:
        assert case.type_of(kind, 3) == "Q4_1"
        assert case.error(snapped.SAME_GRID, kind, 3, file=True) < 1e-6
        assert case.error(snapped.SAME_GRID, kind, 3, file=False) > 0.03
        for name, form in FOUR_BITS.items():
            assert case.error(form, kind, 3, file=True) > 0.03, name
    shown = dict(case.line_up({"affine": snapped.SAME_GRID, "nf4": NF4()}).rows)
    assert float(shown["affine"]) < 1e-6 < float(shown["nf4"])


@pytest.mark.model
def test_the_clue_stands_out_only_in_the_file_at_32(case):
    share = {
        (w, g): float((snapped.residues(get("mlp.down_proj", 0), g).abs() < 0.012).float().mean())
        for w, get in {"in the file": case.in_file, "as loaded": case.as_loaded}.items()
        for g in (16, 32, 64)
    }
    assert share["in the file", 32] > 0.999
    assert all(s < 0.5 for at, s in share.items() if at != ("in the file", 32))
    assert "100 %" in case.clue("in the file", 32)[1] and "2.4 %" in case.clue("as loaded", 32)[1]


@pytest.mark.model
def test_the_files_blocks_compute_the_same_and_only_they_survive_rounding(case, lm):
    windows = labkit.text.evaluation(lm, windows=1, length=64)
    before = lm.model.get_input_embeddings().weight.sum(), case.as_loaded("mlp.down_proj", 0).clone()
    verdict = case.verdict(windows, count=2)
    assert verdict.file.before == pytest.approx(verdict.loaded.before, rel=1e-5)
    assert verdict.file.after == pytest.approx(verdict.file.before, rel=1e-5) and verdict.file.kl < 1e-6
    assert verdict.loaded.kl > 1e-3
    assert torch.equal(before[1], case.as_loaded("mlp.down_proj", 0))  # lm itself is untouched
    assert len(verdict.table.rows) == 2


# ------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("name", ["int", "nf4", "nvfp4", "fp8_e4m3"])
def test_a_form_gives_the_logits_of_rtn_and_leaves_the_model_alone(each_family, name):
    lm = each_family
    group_size = {"int": 16, "nf4": 64}.get(name)
    form = formats.by_name(name, **({"bits": 3, "group_size": 16} if name == "int" else {}))
    windows = torch.arange(48).view(2, 24)
    before = {n: t.clone() for n, t in lm.model.state_dict().items()}
    stored = RTN(format=name, bits=3, group_size=group_size)(lm, progress=False)
    found = damage.remembering(lm, windows, form)
    plain = damage.remembering(lm, windows)
    for ids in windows[:, None]:
        with exact(), torch.inference_mode():
            theirs, dense = stored.model(ids).logits, lm.model(ids).logits
        assert torch.allclose(found.model(ids).logits, theirs, atol=1e-4)
        assert torch.allclose(plain.model(ids).logits, dense, atol=1e-4)
        assert not torch.allclose(theirs, dense, atol=1e-4)
    for n, t in lm.model.state_dict().items():
        assert torch.equal(t, before[n])
    assert all(torch.equal(t, before[n]) for n, t in found.model.state_dict().items())  # the hooks put all back


def test_a_window_that_was_not_read_is_not_answered(tiny_lm):
    reader = damage.remembering(tiny_lm, torch.arange(16).view(2, 8))
    assert reader.model(torch.arange(8)[None]).logits.shape == (1, 8, 96)
    with pytest.raises(KeyError):
        reader.model(torch.arange(1, 9)[None])


def test_damage_is_the_divergence_of_rtn_from_the_model(tiny_lm, tiny_rounding):
    texts = {"a": torch.arange(48).view(2, 24), "b": 95 - torch.arange(48).view(2, 24)}
    forms = {"int2": Integer(2, 16), "fp8": Float8()}
    rtn = {"int2": RTN(bits=2, group_size=16), "fp8": RTN(format="fp8_e4m3", group_size=None)}
    found = damage.damage(tiny_lm, forms, texts, tiny_rounding)
    assert [d.name for d in found] == list(forms)
    for d in found:
        small = rtn[d.name](tiny_lm, progress=False)
        assert d.bits == pytest.approx(memory.bits_per_weight(small))
        for text, windows in texts.items():
            want = labkit.divergence(small, tiny_lm, windows)
            assert (d.kl[text], d.top1[text]) == pytest.approx((want.kl, want.top1), rel=1e-2, abs=1e-7)
    assert found[0].kl["a"] > found[1].kl["a"]
    table = damage.table(found)
    assert [row[0] for row in table.rows] == ["int2", "fp8"] and "KL, b" in table.head
    figure = damage.scatter(found)
    assert [list(t.x) for t in figure.data] == [[round(found[0].bits, 4)]] * 2  # fp8 is beyond the figure
    assert len(damage.scatter(found, most=9).data[0].x) == 2


# ------------------------------------------------------------------------------------------------ exercises


def test_block_price():
    assert exercises.block_price(0.25)
    assert "difference" in exercises.block_price(4.5).text and "bits or bytes" in exercises.block_price(2).text
    assert "other way" in exercises.block_price(-0.25).text and not exercises.block_price(1)


def test_widest_step():
    assert exercises.widest_step("fp4")
    assert not exercises.widest_step("nf4") and "name that one" in exercises.widest_step({"fp4", "nf4"}).text


def test_wider_range():
    assert exercises.wider_range(14)
    assert "Subtract" in exercises.wider_range(31.8).text and "factor" in exercises.wider_range(2**14).text
    assert "farther down" in exercises.wider_range(7).text and not exercises.wider_range(3)


@pytest.mark.model
def test_group_worth(lm):
    r = Rounding(lm)
    middle = (r.error(Integer(3)) + r.error(Integer(4))) / 2
    enough = [size for size in (16, 32, 64, 96, 192) if r.error(Integer(3, size)) < middle]
    assert exercises.group_worth(max(enough), lm)
    assert "larger group" in exercises.group_worth(min(enough), lm).text
    assert "Smaller groups" in exercises.group_worth(192, lm).text
    assert "Choose one" in exercises.group_worth(100, lm).text
