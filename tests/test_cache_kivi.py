"""The rounded cache: exact packing, groups, bytes, the residual window, and the paper's point about keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny

from labkit.cache import H2O, KIVI, RecentKV, SnapKV, read
from labkit.cache.kivi import Rounded
from labkit.formats.affine import Affine
from labkit.measure import memory
from labkit.method import Recipe


def grid(group: np.ndarray, bits: int) -> np.ndarray:
    """KIVI's equation 1 for one group, in float64, with scale and minimum as fp16 keeps them."""
    low, high = group.min(), group.max()
    scale, low = np.float64(np.float16((high - low) / (2**bits - 1))), np.float64(np.float16(low))
    if scale == 0:
        return np.full_like(group, low)
    return np.clip(np.round((group - low) / scale), 0, 2**bits - 1) * scale + low


def reference(x: np.ndarray, bits: int, size: int, by_channel: bool) -> np.ndarray:
    """x (tokens, width) rounded group by group."""
    found = x.copy()
    tokens, width = x.shape
    for i in range(0, tokens if by_channel else width, size):
        for j in range(width if by_channel else tokens):
            at = (slice(i, i + size), j) if by_channel else (j, slice(i, i + size))
            found[at] = grid(x[at], bits)
    return found


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 4, 8]),
    size=st.sampled_from([8, 16, 32]),
    width=st.sampled_from([4, 16, 20, 64, 80]),
    tokens=st.integers(1, 70),
    blocks=st.integers(1, 2),
    by_channel=st.booleans(),
    seed=st.integers(0, 99),
)
def test_what_is_stored_is_what_the_equation_says(bits, size, width, tokens, blocks, by_channel, seed):
    residual = blocks * size
    x = torch.randn(2, 3, tokens, width, generator=torch.Generator().manual_seed(seed)) * 3 + 1
    store = Rounded(Affine(bits, size), residual, by_channel)
    for part in x.split([tokens - tokens // 3, *[1] * (tokens // 3)], 2):  # a prompt, then token by token
        store.append(part)
        store.settle(None)
    rounded = tokens // residual * residual if by_channel else max(0, tokens - residual)
    found = store.read()
    assert torch.equal(found[:, :, rounded:], x[:, :, rounded:])  # the newest are as they were
    for row in range(2):
        for head in range(3):
            expected = reference(x[row, head, :rounded].double().numpy(), bits, size, by_channel)
            one_step = (x[row, head].max() - x[row, head].min()) / (2**bits - 1)
            error = (found[row, head, :rounded].double() - torch.from_numpy(expected)).abs()
            # A number half-way between two codes may go either way in fp32, and so may a minimum between two of fp16.
            assert (error > 0.01).sum() <= 0.01 * error.numel() and (
                not error.numel() or error.max() <= 1.01 * one_step
            )
    groups = rounded // size * width if by_channel else rounded * -(-width // size)
    full = (tokens - rounded) * width * 4
    stored = 6 * (rounded * -(-width * bits // 8) + groups * 4 + full)
    assert sum(t.untyped_storage().nbytes() for t in store.tensors()) == stored


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("keys", ["channel", "token"])
def test_rounding_error_is_half_a_step(bits, keys):
    x = torch.randn(1, 2, 64, 32)
    store = Rounded(Affine(bits, 32), 32, keys == "channel")
    store.append(x)
    store.settle(None)
    scale = store.scale.float()
    step = scale.repeat_interleave(32, 2) if keys == "channel" else scale.expand(-1, -1, -1, 32)
    done = store.codes.shape[2]
    assert ((store.read() - x)[:, :, :done].abs() <= 0.51 * step + 2e-3).all()


def test_two_bits_per_channel_beat_two_bits_per_token_where_channels_stand_out():
    """The paper's point (section 3.2): keys have a few large channels, which stretch the grid of every token."""
    torch.manual_seed(0)
    keys = torch.randn(1, 1, 128, 64)
    keys[..., [5, 40]] = keys[..., [5, 40]] * 2 + 20

    def error(by_channel):
        store = Rounded(Affine(2, 32), 32, by_channel)
        store.append(keys)
        store.settle(None)
        query = torch.randn(1, 1, 16, 64, generator=torch.Generator().manual_seed(1))
        query[..., [5, 40]] *= 0.1
        attention = lambda k: (query @ k.transpose(2, 3) / 8).softmax(-1)  # noqa: E731
        return (attention(store.read()[:, :, :96]) - attention(keys[:, :, :96])).abs().sum(-1).mean()

    assert error(True) < 0.4 * error(False)


def test_eight_bits_write_what_full_precision_writes():
    lm = tiny()
    ids = torch.randint(1, 96, (1, 80), generator=torch.Generator().manual_seed(0))
    how = {"max_new_tokens": 20, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    write = lambda m: m.model.generate(ids, **how)  # noqa: E731
    plain, fine, coarse = write(lm), write(KIVI(bits=8, residual=32)(lm)), write(KIVI(bits=2, residual=32)(lm))
    far = lambda out: float((torch.stack(out.logits) - torch.stack(plain.logits)).abs().max())  # noqa: E731
    assert far(fine) < 0.01 < far(coarse)
    assert torch.equal(fine.logits[0], plain.logits[0])  # attention over the prompt is in full precision


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Mistral", "Gemma", "GPTNeoX", "OPT", "Phi"])
def test_families(family):
    lm, ids = tiny(family), torch.randint(1, 96, (1, 60), generator=torch.Generator().manual_seed(0))
    plain = read(lm, ids, 40)
    for keys in ("channel", "token"):
        fine, coarse = (read(KIVI(bits=b, group_size=8, residual=16, keys=keys)(lm), ids, 40) for b in (8, 2))
        assert torch.allclose(fine, plain, atol=0.05)
        assert 0 < (fine - plain).abs().mean() < 0.2 * (coarse - plain).abs().mean()


@pytest.mark.parametrize(("bits", "most"), [(8, 0.34), (4, 0.22), (2, 0.16)])
def test_bytes_against_fp32(bits, most):
    lm = tiny()
    ids = torch.ones(1, 1024, dtype=torch.long)
    full = memory.cache_bytes(lm.model(ids).past_key_values)
    small = memory.cache_bytes(KIVI(bits=bits, group_size=32, residual=32)(lm).model(ids).past_key_values)
    assert small < most * full
    grows = memory.kv_per_token(KIVI(bits=bits, residual=32)(lm))
    # 2 layers, 2 heads, 16 channels: keys have 4 bytes per channel and 32 tokens, values 4 bytes per token
    assert grows == 4 * (2 * 16 * bits // 8 + 16 * 4 // 32 + 4)


@pytest.mark.parametrize(
    ("knobs", "most"),
    [
        ({"bits": 4, "group_size": 64, "residual": 64}, 0.30),
        ({"bits": 4}, 0.36),  # the paper's groups of 32, and 128 tokens in full precision
        ({"bits": 2, "group_size": 64, "residual": 64}, 0.18),
    ],
)
def test_bytes_against_bf16_at_2048_tokens(knobs, most):
    """One head of 64 channels, as the embedded model has them."""
    x = torch.randn(1, 1, 2048, 64).bfloat16()
    held = 0
    for store in KIVI(**knobs).stores():
        store.append(x)
        store.settle(None)
        held += sum(t.untyped_storage().nbytes() for t in store.tensors())
    assert 0.8 * most < held / (2 * x.nbytes) <= most


def test_padding_of_whole_groups_changes_nothing():
    """Texts in a batch share groups of tokens; with padding that fills whole groups each row is as it is alone."""
    small = KIVI(bits=4, group_size=8, residual=16)(tiny())
    ids = torch.randint(1, 96, (2, 48), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :16] = 0
    how = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    both = small.model.generate(ids, attention_mask=mask, **how)
    alone = small.model.generate(ids[:1, 16:], attention_mask=mask[:1, 16:], **how)
    assert torch.equal(both[0, 16:], alone[0])


def test_per_token_keys_take_any_policy():
    lm, ids = tiny(), torch.randint(1, 96, (1, 60), generator=torch.Generator().manual_seed(0))
    for policy in (H2O(budget=24), RecentKV(budget=24)):
        with pytest.raises(ValueError, match=r"while decoding.*keys='token'"):
            Recipe(policy, KIVI())(lm)
        with pytest.raises(ValueError, match="budget = 24 .*residual = 32"):
            Recipe(KIVI(keys="token", residual=32), policy)(lm)
        small = Recipe(policy, KIVI(bits=8, keys="token", residual=8))(lm)
        out = small.model.generate(ids, max_new_tokens=20, do_sample=False, return_dict_in_generate=True)
        layer = out.past_key_values.layers[0]
        assert layer.tokens == 24 and layer.k.codes.shape[2] == 16 and layer.k.new.shape[2] == 8


def test_recent_tokens_in_eight_bits_are_recent_tokens():
    lm, ids = tiny(), torch.randint(1, 96, (1, 60), generator=torch.Generator().manual_seed(0))
    how = {"max_new_tokens": 20, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    plain = RecentKV(budget=24)(lm).model.generate(ids, **how)
    small = Recipe(RecentKV(budget=24), KIVI(bits=8, keys="token", residual=8))(lm).model.generate(ids, **how)
    assert torch.allclose(torch.stack(plain.logits), torch.stack(small.logits), atol=0.02)


def test_snapkv_then_kivi_holds_the_product():
    lm, ids = tiny(), torch.ones(1, 512, dtype=torch.long)
    bytes_of = lambda method: memory.cache_bytes(method(lm).model(ids).past_key_values)  # noqa: E731
    # Of each of 4 heads: 128 keys in 4 bits, 4 groups of them; 96 values in 4 bits with a group each, 32 in fp32; positions.
    expected = 4 * (128 * 8 + 4 * 16 * 4 + 96 * (8 + 4) + 32 * 16 * 4 + 128 * 4)
    assert bytes_of(Recipe(SnapKV(budget=128), KIVI(bits=4, residual=32))) == expected
    assert expected < 0.4 * min(bytes_of(SnapKV(budget=128)), bytes_of(KIVI(bits=4, residual=32)))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"bits": 3}, "KIVI.bits = 3 "),
        ({"group_size": 4}, "KIVI.group_size = 4 "),
        ({"residual": 0}, "KIVI.residual = 0 .*multiple"),
        ({"residual": 48}, "KIVI.residual = 48 .*group_size = 32.*multiple"),
        ({"keys": "head"}, "KIVI.keys = 'head' "),
    ],
)
def test_bad_settings(knobs, message):
    with pytest.raises(ValueError, match=message):
        KIVI(**knobs)
    assert KIVI(residual=0, keys="token").residual == 0
