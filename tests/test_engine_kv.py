"""A KV cache of codes in the engine's graph: what it holds, what it costs in bytes, and how far it is from fp32."""

from __future__ import annotations

import pytest
import torch
from test_engine import COMPILED, DENSE, IDS, eager, shaken

import labkit
from labkit.engine import NotCompilable, compile, kv_scales, session
from labkit.formats import unpack
from labkit.measure.quality import token_kl

CALIB = torch.arange(3 * 32).reshape(3, 32) * 11 % 96


def codes(compiled, layer: int, what: str, tokens: int) -> torch.Tensor:
    """Signed codes that a compiled model's cache holds: (heads, tokens, head_dim)."""
    held = torch.from_numpy(compiled._cache().buffers[f"{layer}.{what}"].numpy().copy())[0, :, :tokens]
    if held.dtype == torch.int8:
        return held
    return unpack(held.flatten(0, 1), 4, 2 * held.shape[-1]).to(torch.int8).view(*held.shape[:2], -1) - 8


@pytest.mark.parametrize("family", COMPILED)
@pytest.mark.parametrize("bits", kv_scales.BITS)
def test_the_cache_holds_the_models_keys_and_values_as_codes(family, bits):
    lm = shaken(family)
    compiled, steps = compile(lm, kv_bits=bits, calib=CALIB, **DENSE), kv_scales.find(lm, bits, CALIB)
    compiled.prefill(IDS[:, :30])
    for token in IDS[0, 30:]:
        compiled.decode(int(token))
    with torch.inference_mode():
        held = lm.model(IDS, use_cache=True).past_key_values.layers
    highest = 2 ** (bits - 1) - 1
    for i in range(2):
        for what, step in (("key", steps.keys[i]), ("value", steps.values[i])):
            exact = getattr(held[i], f"{what}s")[0]  # (heads, tokens, head_dim)
            expected = (exact / step.view(len(exact), 1, -1)).clamp(-highest - 1, highest)
            off = (codes(compiled, i, what, 40).float() - expected).abs()
            # In the first layer a code is the nearest one; later ones see what the first layer's rounding did.
            assert off.max() < 0.51 if i == 0 else off.mean() < 1.5


@pytest.mark.parametrize("family", COMPILED)
def test_logits_stay_close_and_fewer_bits_are_further_off(family):
    lm = shaken(family)
    if family == "Mistral":
        lm.model.config.sliding_window = 8
    plain = eager(lm)
    error = {}
    for bits in kv_scales.BITS:
        compiled = compile(lm, kv_bits=bits, calib=CALIB, **DENSE)
        got = [compiled.prefill(IDS[:, :5]).clone()] + [compiled.decode(int(t)).clone() for t in IDS[0, 5:]]
        error[bits] = float((torch.cat(got) - plain[0, 4:]).abs().max() / plain.abs().max())
    assert 0 < error[8] < 0.03 and 3 * error[8] < error[4] < 0.5


def test_bytes_are_a_quarter_and_an_eighth():
    lm = shaken()
    full, *small = (compile(lm, context=64, kv_bits=bits, calib=CALIB, **DENSE) for bits in (None, 8, 4))
    assert full.kv_nbytes == 2 * 2 * 2 * 16 * 64 * 4  # layers, key and value, heads, width, tokens, bytes
    for compiled, less in zip(small, (4, 8)):
        assert compiled.kv_nbytes * less == full.kv_nbytes
        assert sum(b.numpy().nbytes for b in compiled._cache().buffers.values()) == compiled.kv_nbytes
        assert "KV cache holds codes" in compiled.notes[-1] and f"{compiled.kv_nbytes / 1e6:.1f} MB" in repr(compiled)
        assert compiled.nbytes - full.nbytes == 2 * 2 * 2 * 16 * 4  # a step for each layer, key or value, head, channel


def test_a_key_is_bounded_at_every_position():
    """Turning a key keeps the length of each pair of channels, so the bound from few positions holds at all."""
    lm = shaken()
    steps = kv_scales.find(lm, 8, CALIB[:, :4])
    with torch.inference_mode():
        late = torch.arange(500, 504)[None].expand(3, -1)
        keys = lm.model(CALIB[:, :4], position_ids=late, use_cache=True).past_key_values.layers[0].keys
    assert (keys.abs().amax((0, 2)).flatten() <= 127 * steps.keys[0] * (1 + 1e-5)).all()


def test_what_cannot_be_asked_for_is_named(tiny_lm):
    for bad in (2, 16, True, "8"):
        with pytest.raises(ValueError, match=r"kv_bits = .* is not allowed: it must be 8, 4 or None"):
            compile(tiny_lm, kv_bits=bad, calib=CALIB)
    with pytest.raises(ValueError, match="token"):
        compile(tiny_lm, kv_bits=8, calib=CALIB + 96)


def test_a_runtime_that_takes_no_codes_is_named(tiny_lm, monkeypatch):
    def refuses(*_):
        raise RuntimeError("Unrecognized attribute: kv_cache_bit_width for operator GroupQueryAttention")

    monkeypatch.setattr(session, "_open", refuses)
    with pytest.raises(ValueError, match=r"attention takes no cache of codes .*kv_cache_bit_width"):
        compile(tiny_lm, kv_bits=8, calib=CALIB, **DENSE)
    with pytest.raises(NotCompilable, match="cannot run its graph .Unrecognized"):
        compile(tiny_lm, **DENSE)


def test_dense_prompts_fill_the_same_codes():
    lm = labkit.RTN(bits=4, group_size=32)(shaken(), progress=False)
    compiled = compile(lm, kv_bits=8, calib=CALIB, prefill="dense", **DENSE)
    plain = compile(lm, kv_bits=8, calib=CALIB, **DENSE)
    for model in (compiled, plain):
        model.prefill(IDS[:, :30])
    assert (compiled.decode(3) - plain.decode(3)).abs().max() < 0.05


def test_real_model_with_a_cache_of_8_bits_says_the_same(lm):
    ids = labkit.text.evaluation(lm, windows=1, length=256, source="prose")
    plain = eager(lm, ids).log_softmax(-1)
    kl = {}
    for bits in kv_scales.BITS:
        compiled = compile(lm, context=512, kv_bits=bits, **DENSE)
        kl[bits] = float(token_kl(plain, compiled.logits(ids).log_softmax(-1)).mean())
    assert kl[8] < 0.01 < 0.05 < kl[4]
