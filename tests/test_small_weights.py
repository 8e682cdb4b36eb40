"""Weights of 1e-6 in fp16, where a scale of 8-bit codes would be a tenth of the least number there is.

The oracle: the same weights times 2^14 in fp32, behind norms whose gains are as much smaller.
"""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny

import labkit
from labkit.formats import FORMATS, Affine, Integer, by_name
from labkit.formats.base import FINE
from labkit.walk import blocks, linears, walk, weight_of

LARGER = 2.0**14
SIZES = {"int": ({"bits": b, "symmetric": s} for b in (2, 4, 8) for s in (False, True)), "affine": ({"bits": 4},)}
CASES = [(name, knobs) for name in FORMATS for knobs in SIZES.get(name, ({},))]
METHODS = [
    *(labkit.RTN(format="affine"), labkit.HQQ(bits=2), labkit.GPTQ(), labkit.GPTQ(act_order=False, format="fp4")),
    *(labkit.AWQ(), labkit.AWQGPTQ(format="affine"), labkit.MixedPrecision(bits=6.0), labkit.SmoothQuant()),
    *(labkit.BitsAndBytes(), labkit.BitsAndBytes(type="int8"), labkit.Magnitude(), labkit.Wanda(repair=True)),
    *(labkit.SparseGPT(), labkit.SparseGPT(bits=4), labkit.Wanda(container="csr")),
]


def weights(rows: int, columns: int, size: float) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * size


def error(found: torch.Tensor, weight: torch.Tensor) -> float:
    return ((found - weight).norm() / weight.norm()).item()


@pytest.mark.parametrize(("name", "knobs"), CASES)
def test_every_format(name, knobs):
    form = by_name(name, **knobs)
    for size in (1e-6, 1e-12):
        small, large = weights(24, 128, size), weights(24, 128, 1.0)
        encoded = form.encode(small)
        again = by_name(name, **knobs).wrap(encoded.tensors(), encoded.shape)
        assert torch.equal(again.decode(), encoded.decode())
        assert error(again.decode(), small) < 1.1 * error(form.encode(large).decode(), large)


@pytest.mark.parametrize("form", [Integer(4, 16), Integer(4, 16, True), Affine(4, 16), by_name("fp4", group_size=16)])
def test_scales_take_16_bits_wherever_those_hold_them(form):
    weight = weights(8, 64, 0.02)
    weight[3, :16] = 0  # nothing in it: no reason for more bits
    weight[4, :16] *= 1e-2
    kept = form.encode(weight).tensors()
    assert {t.dtype for name, t in kept.items() if name in ("scale", "minimum")} == {torch.float16}
    weight[3, :16] = weights(1, 16, 1e-7)
    kept = form.encode(weight)
    assert kept.tensors()["scale"].dtype == torch.float32
    assert error(kept.decode()[3, :16], weight[3, :16]) < 0.2
    rounded = weights(1, 16, 0.02).abs()  # no more is stored than was fitted
    scale = form.fit(rounded.view(1, 1, 16))[0]
    assert scale > FINE and torch.equal(scale.half().float(), scale)


@pytest.fixture(scope="module")
def pair():
    """(weights of 1e-6 in fp16, the same times 2^14 in fp32): what each linear of the first block reads is the same."""
    small, large = tiny(), tiny()
    for ours, theirs in zip(blocks(small.model), blocks(large.model)):
        for (_, a), (_, b) in zip(linears(ours), linears(theirs)):
            weight = (a.weight * 5e-5).half().float()
            a.weight.data, b.weight.data = weight, weight * LARGER
        for name in ("input_layernorm", "post_attention_layernorm"):
            getattr(ours, name).weight.data *= 2.0**13
            getattr(theirs, name).weight.data *= 0.5
    small.model.half()
    return small, large


def effective(lm) -> list[torch.Tensor]:
    """The first block's matrices, with the gains of the norms before them, to which factors may have moved."""
    block = blocks(lm.model)[0]
    norms = {"self_attn": block.input_layernorm, "mlp": block.post_attention_layernorm}
    return [
        weight_of(m).float()
        * (1 if name.endswith(("o_proj", "down_proj")) else norms[name.split(".")[0]].weight.float())
        for name, m in linears(block)
    ]


@pytest.mark.filterwarnings("ignore:.*unpacked by labkit")
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.typed())
def test_every_method(pair, method):
    ids = torch.randint(0, 96, (8, 32), generator=torch.Generator().manual_seed(0))
    damage = []
    for lm in pair:
        small = method(lm, ids, progress=False)
        assert small.model(ids).logits.isfinite().all()
        damage.append(
            [error(a, b) for a, b in zip(effective(small), effective(lm))][:2]
        )  # q, k: their inputs are the same
    ours, theirs = damage
    assert all(a < 1.1 * b + 0.01 for a, b in zip(ours, theirs)), damage


@pytest.mark.parametrize("statistic", ["channel_norm", "hessian"])
def test_statistics_of_fp16_do_not_overflow(statistic):
    """Inputs of 3,000, whose squares fp16 does not have."""
    lm = tiny()
    lm.model.half()
    lm.model.model.layers[0].input_layernorm.weight.data[5] = 3000.0
    seen, ids = {}, torch.arange(64).view(2, 32)

    def note(weight, stats, path):
        seen.setdefault(path, stats.channel_norm)
        return weight

    inputs = []
    lm.model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    lm.model(ids)
    walk(lm, ids, statistic, note, progress=False)
    truth = inputs[0].double().flatten(0, 1).norm(dim=0)
    assert truth.max() > 1e4
    torch.testing.assert_close(seen["model.layers.0.self_attn.q_proj"].double(), truth, rtol=1e-3, atol=1e-3)
