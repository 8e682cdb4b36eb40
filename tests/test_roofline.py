"""labkit.measure.roofline: the arithmetic against brute force and torch's own counter, measuring on this machine."""

from __future__ import annotations

import json
import math
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from labkit.measure import roofline
from labkit.measure.roofline import Accelerator, Roof, Roofline, Shape, Work

rates = st.floats(1e6, 1e16)
intensities = st.floats(1e-3, 1e6)
roofs = st.builds(lambda bw, peak: Roof("r", bw, {"fp32": peak}, "measured"), st.floats(1e6, 1e14), rates)


# --- roofs ---------------------------------------------------------------------------------------


@given(roofs, intensities, intensities)
def test_nothing_goes_through_the_roof(roof, x, y):
    low, high = sorted((x, y))
    assert roof.attainable(x, "fp32") <= min(roof.peak("fp32"), x * roof.bandwidth)
    assert roof.attainable(low, "fp32") <= roof.attainable(high, "fp32")
    assert roof.attainable(x, None) == x * roof.bandwidth


@given(roofs)
def test_the_two_limits_meet_at_the_ridge(roof):
    ridge = roof.ridge("fp32")
    assert roof.attainable(ridge, "fp32") == pytest.approx(roof.peak("fp32"))
    assert roof.bound(ridge * 0.999, "fp32") == "memory" and roof.bound(ridge * 1.001, "fp32") == "compute"
    assert roof.attainable(ridge / 2, "fp32") == pytest.approx(roof.peak("fp32") / 2)
    assert roof.attainable(ridge * 2, "fp32") == roof.peak("fp32")


@given(roofs, st.floats(1.0, 1e15), st.floats(1.0, 1e15))
def test_the_least_time_is_what_the_attainable_speed_takes(roof, flops, size):
    work = Work(flops, size)
    assert roof.seconds(work, "fp32") == pytest.approx(flops / roof.attainable(work.intensity, "fp32"))


@given(roofs, st.lists(intensities, min_size=1, max_size=20))
def test_roof_points_rise_and_hold_the_corner(roof, wanted):
    xs, ys = roofline.roof_points(roof, "fp32", wanted)
    assert xs == sorted(set(xs)) and set(wanted) <= set(xs)
    assert ys == [roof.attainable(x, "fp32") for x in xs] and ys == sorted(ys)
    assert (roof.ridge("fp32") in xs) == (min(wanted) <= roof.ridge("fp32") <= max(wanted))
    assert set(xs) <= {*wanted, roof.ridge("fp32")}


def test_a_machine_without_a_peak_is_a_slope():
    bare = Roof("bare", 100.0, {}, "modelled")
    assert roofline.roof_points(bare, None, [4, 1]) == ([1.0, 4.0], [100.0, 400.0])
    with pytest.raises(ValueError, match="dtype = 'fp32': no peak is known for bare. Known: none, only its bandwidth"):
        bare.ridge("fp32")


@pytest.mark.parametrize("bad", [-1, math.nan, math.inf, "1", None, True])
def test_a_bad_intensity_is_refused(bad):
    roof = Roof("r", 1.0, {"fp32": 1.0}, "measured")
    for use in (roof.attainable, roof.bound, lambda x, dtype: roofline.roof_points(roof, dtype, [x])):
        with pytest.raises(ValueError, match=re.escape(f"intensity = {bad!r}")):
            use(bad, "fp32")
    with pytest.raises(ValueError, match="intensities is empty"):
        roofline.roof_points(roof, "fp32", [])
    with pytest.raises(ValueError, match="dtype = 'fp8'.*Known: fp32"):
        roof.attainable(1, "fp8")


# --- the work of a transformer -------------------------------------------------------------------


@given(*[st.integers(1, 6)] * 3, st.sampled_from([2, 4, 4.5, 8, 16, 32]), st.sampled_from([2, 4]))
def test_a_linear_layers_work_is_what_a_loop_counts(tokens, out_features, in_features, bits, act):
    multiplies = adds = moved = 0
    for _ in range(tokens):
        for _ in range(out_features):
            for _ in range(in_features):
                multiplies, adds = multiplies + 1, adds + 1
        moved += (in_features + out_features) * act
    moved += out_features * in_features * bits / 8
    work = roofline.linear_work(tokens, out_features, in_features, bits, act)
    assert work.flops == multiplies + adds and work.bytes == pytest.approx(moved)
    assert work.intensity == pytest.approx(work.flops / work.bytes) and work.label == "modelled"


def test_one_token_reads_each_weight_for_two_operations():
    """The reason why decoding is memory-bound: 2 operations per weight, so 2 / bytes per weight."""
    for bits in (32, 16, 8, 4):
        work = roofline.linear_work(1, 4096, 4096, bits)
        assert work.intensity == pytest.approx(2 / (bits / 8), rel=0.01)
    big = roofline.linear_work(10**6, 4096, 4096, 16, 2)
    assert big.intensity == pytest.approx(2 * 4096 * 4096 / (2 * 8192), rel=0.01)  # weights no longer count


def test_work_adds_up():
    total = Work(6, 2) + Work(2, 2)
    assert (total.flops, total.bytes, total.intensity) == (8, 4, 2) and Work(0, 0).intensity == 0


@pytest.mark.parametrize(
    "args, message",
    [
        ((0, 4, 4, 8), "tokens = 0"),
        ((1, 4.0, 4, 8), "out_features = 4.0"),
        ((1, 4, -4, 8), "in_features = -4"),
        ((1, 4, 4, 0), "weight_bits = 0"),
        ((1, 4, 4, 8, "4"), "activation_bytes = '4'"),
    ],
)
def test_bad_work_is_refused(args, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        roofline.linear_work(*args)


TINY = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": 131}
CONFIGS = {
    "Llama": transformers.LlamaConfig(**TINY, intermediate_size=80, num_key_value_heads=2),
    "Qwen3": transformers.Qwen3Config(**TINY, intermediate_size=80, num_key_value_heads=2, head_dim=16),
    "Gemma2": transformers.Gemma2Config(**TINY, intermediate_size=80, num_key_value_heads=3, head_dim=16),
    "OPT": transformers.OPTConfig(**TINY, ffn_dim=96, word_embed_proj_dim=48, max_position_embeddings=64),
    "GPTNeoX": transformers.GPTNeoXConfig(**TINY, intermediate_size=96),
    "GPT2": transformers.GPT2Config(n_embd=48, n_layer=3, n_head=6, vocab_size=131),
}


@pytest.fixture(params=CONFIGS, scope="module")
def tiny(request):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param], attn_implementation="eager")
    return model.eval()


def _counted(model, ids, **kwargs) -> tuple[int, object]:
    """Operations that torch's own counter sees, without those that turn positions into angles."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = model(ids, use_cache=True, logits_to_keep=1, **kwargs)
    rotary = [sum(c.values()) for name, c in counter.get_flop_counts().items() if name.endswith("rotary_emb")]
    return counter.get_total_flops() - sum(rotary), out


def test_decode_and_prefill_count_what_torch_counts(tiny):
    """Against torch.utils.flop_counter on the running model; eager attention computes the masked half as well."""
    batch, context = 2, 11
    flops, out = _counted(tiny, torch.randint(0, 131, (batch, context)))
    shape = Shape.of(tiny)
    masked = context * (context - 1) // 2 * 4 * batch * shape.layers * shape.heads * shape.head_dim
    assert roofline.prefill_work(tiny, batch, context).flops + masked == flops
    flops, _ = _counted(tiny, torch.randint(0, 131, (batch, 1)), past_key_values=out.past_key_values)
    assert roofline.decode_work(tiny, batch, context).flops == flops


def test_the_modelled_bytes_are_weights_plus_the_cache_that_is_really_there(tiny):
    """With activations of almost no size, decode moves the linear weights and the KV cache (fp32), nothing else."""
    batch, context = 2, 11
    with torch.no_grad():
        cache = tiny(torch.randint(0, 131, (batch, context + 1)), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)  # context read, one token written
    embeddings = {id(p) for m in tiny.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    embeddings -= {id(tiny.get_output_embeddings().weight)}  # a tied output layer is read whole
    weights = sum(p.nbytes for p in tiny.parameters() if p.dim() == 2 and id(p) not in embeddings)
    work = roofline.decode_work(tiny, batch, context, 32, activation_bytes=1e-9, kv_bits=32)
    assert work.bytes == pytest.approx(weights + held, rel=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_a_module_and_a_language_model_have_one_shape(name):
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name])
    shape = Shape.of(CONFIGS[name])
    assert shape == Shape.of(model) == Shape.of(SimpleNamespace(model=model, tokenizer=None)) == Shape.of(shape)
    assert (shape.layers, shape.heads, shape.head) == (3, 6, (131, 48))


def test_a_llama_by_its_numbers_is_the_real_one():
    named = Shape.llama(hidden=48, layers=3, heads=6, kv_heads=2, ffn=80, vocab=131)
    config = SimpleNamespace(**TINY, intermediate_size=80, num_key_value_heads=2)
    for other in (Shape.of(CONFIGS["Llama"]), Shape.of(config)):
        assert sorted(named.linears) == sorted(other.linears)
        assert (named.head, named.layers, named.heads, named.kv_heads, named.head_dim) == (
            (other.head, other.layers, other.heads, other.kv_heads, other.head_dim)
        )
    seven = Shape.llama(4096, 32, 32, 32, 11008, 32000)
    assert sum(o * i for o, i in seven.linears) + 2 * 32000 * 4096 == pytest.approx(6.74e9, rel=1e-3)  # Llama-2-7B


def test_packed_layers_count_once():
    """A packed linear that keeps a dense one inside is one layer, and the output layer keeps its own bits."""

    class Packed(nn.Module):
        def __init__(self, dense):
            super().__init__()
            self.in_features, self.out_features, self.dense = dense.in_features, dense.out_features, dense

    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["Llama"])
    before = Shape.of(model)
    for layer in model.model.layers:
        layer.mlp.down_proj = Packed(layer.mlp.down_proj)
    assert Shape.of(model) == before
    four = roofline.decode_work(before, 1, 0, 4, head_bits=32, activation_bytes=1e-9, kv_bits=1e-9)
    assert four.bytes == pytest.approx(sum(o * i for o, i in before.linears) / 2 + 131 * 48 * 4)


@given(st.integers(1, 64), st.integers(0, 4096))
def test_batching_shares_the_weights_but_not_the_cache(batch, context):
    shape = Shape.llama(64, 2, 4, 2, 128, 256)
    one, many = (roofline.decode_work(shape, b, context, 16, activation_bytes=2) for b in (1, batch))
    assert many.flops == pytest.approx(batch * one.flops)
    assert many.bytes <= batch * one.bytes
    weights = (sum(o * i for o, i in shape.linears) + 64 * 256) * 2
    assert many.bytes - weights == pytest.approx(batch * (one.bytes - weights))


def test_decode_is_memory_bound_and_prefill_is_not():
    """The lesson of notebook 01, on a 7B shape under an H100's roof."""
    shape, h100 = Shape.llama(4096, 32, 32, 32, 11008, 32000), roofline.catalogue()["H100 SXM"]
    decode = roofline.decode_work(shape, 1, 512, 16, activation_bytes=2)
    prefill = roofline.prefill_work(shape, 1, 2048, 16, activation_bytes=2)
    assert h100.bound(decode.intensity, "bf16") == "memory" and h100.bound(prefill.intensity, "bf16") == "compute"
    four = roofline.decode_work(shape, 1, 512, 4.31, activation_bytes=2)
    assert 3 < h100.seconds(decode, "bf16") / h100.seconds(four, "bf16") < 16 / 4.31


@pytest.mark.parametrize(
    "model, message",
    [
        (nn.Linear(2, 2), "Linear is not a transformers language model"),
        (SimpleNamespace(hidden_size=8), "has no num_hidden_layers"),
        (
            transformers.MixtralConfig(**TINY, intermediate_size=32, num_key_value_heads=2),
            "not a dense decoder, it has num_local_experts",
        ),
        (3, "3 has no hidden_size"),
    ],
)
def test_what_is_not_a_dense_decoder_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        roofline.decode_work(model, 1, 1)


def test_bad_sizes_are_refused():
    shape = Shape.llama(64, 2, 4, 2, 128, 256)
    with pytest.raises(ValueError, match="batch = 0"):
        roofline.decode_work(shape, 0, 1)
    with pytest.raises(ValueError, match="context = -1"):
        roofline.decode_work(shape, 1, -1)
    with pytest.raises(ValueError, match=r"tokens = 1\.5"):
        roofline.prefill_work(shape, 1, 1.5)
    with pytest.raises(ValueError, match="kv_bits = 0"):
        roofline.decode_work(shape, 1, 1, kv_bits=0)
    with pytest.raises(ValueError, match="kv_heads = 3 does not divide heads = 4"):
        Shape.llama(64, 2, 4, 3, 128, 256)


# --- the catalogue -------------------------------------------------------------------------------

WANTED = ["H100 SXM", "H200", "B200", "MI300X", "A100 80GB", "RTX 4090", "L4", "M4 Max", "Laptop CPU", "Raspberry Pi 5"]


def test_the_catalogue_is_complete_and_sourced():
    entries = roofline.catalogue()
    assert list(entries) == WANTED
    for key, a in entries.items():
        assert isinstance(a, Accelerator) and a.label == "modelled" and a.kind in ("gpu", "soc", "cpu"), key
        assert re.search(r"20\d\d", a.source) and len(a.note) > 20 and 2018 <= a.year <= 2026, key
        assert 1e10 < a.bandwidth < 1e13 and 4e9 <= a.memory <= 3e11, key
        assert list(a.peaks) == [d for d in roofline.DTYPES if d in a.peaks], f"{key}: unknown or unordered dtype"
    entries.clear()
    assert roofline.catalogue()  # a caller may do what it likes with its own copy


@pytest.mark.parametrize("key", WANTED)
def test_catalogue_roofs_make_sense(key):
    a = roofline.catalogue()[key]
    for dtype in a.peaks:
        assert 1 < a.ridge(dtype) < 1200, f"{key} {dtype}: implausible ridge"
    if key == "M4 Max":
        assert a.peaks == {}  # its vendor publishes none
        return
    speeds = [a.peaks[d] for d in ("fp32", "tf32", "bf16", "fp8", "fp4") if d in a.peaks]
    assert speeds == sorted(speeds)  # fewer bits are never slower
    for fewer, more in (("fp8", "bf16"), ("fp4", "fp8"), ("bf16", "tf32")):
        if fewer in a.peaks and more in a.peaks:
            assert a.peaks[fewer] / a.peaks[more] == pytest.approx(2, rel=0.03), f"{key}: {fewer} against {more}"


def test_dense_rates_and_not_the_sparse_ones_of_the_leaflets():
    """Twice these figures, the ones with 2:4 sparsity, are what the headlines print."""
    dense = {"H100 SXM": 989e12, "H200": 989e12, "B200": 2250e12, "MI300X": 1307e12, "A100 80GB": 312e12, "L4": 121e12}
    for key, rate in dense.items():
        assert roofline.catalogue()[key].peak("bf16") == pytest.approx(rate, rel=0.001)
    assert roofline.catalogue()["B200"].peak("fp4") == 9e15
    # what the H200 is for: the same arithmetic, more memory
    h100, h200 = (roofline.catalogue()[k] for k in ("H100 SXM", "H200"))
    assert h100.peaks == h200.peaks and h200.bandwidth > h100.bandwidth and h200.memory > h100.memory


# --- measuring -----------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def made(home, monkeypatch):
    """``measure`` with the measuring itself replaced; every call of it is noted."""
    calls = []

    def fake(device, seconds, threads, progress):
        calls.append((device, seconds, threads))
        peaks, sizes, reads = {"fp32": 2e11, "int8": 8e11}, {"fp32": 512, "int8": 1024}, {"torch.sum": 4e10, "x": 1e10}
        return Roofline("box", 4e10 + len(calls), peaks, "measured", "2026-01-01", threads, device, reads, sizes, 0.01)

    monkeypatch.setattr(roofline, "_measure", fake)
    return calls


def left(home) -> list:
    """The files in the cache, but for those of the lock."""
    return [path.name for path in home.iterdir() if not path.name.startswith("measuring-")]


def test_this_machine_is_measured_for_real(home):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a shared machine is busy, and says so
        roof = roofline.measure(seconds=0.02, device="cpu", progress=False, threads=1)
    assert roof.label == "measured" and roof.threads == 1 and roof.device == "cpu"
    assert {"fp32", "bf16"} <= set(roof.peaks) and set(roof.sizes) == set(roof.peaks)
    assert set(roof.reads) == {"torch.sum", "torch.dot", "torch.mv", "numpy.sum"}
    assert roof.bandwidth == max(roof.reads.values()) == roof.reads[roof.method]
    assert 1e7 < roof.bandwidth < 1e13 and all(1e6 < p < 1e15 for p in roof.peaks.values())
    assert 0 <= roof.others <= 1
    assert f"{roof.bandwidth / 1e9:.1f}" in str(roof) and roof.method in str(roof)
    assert roofline._read(next(home.glob("roofline-*.json"))) == roof


def test_a_second_call_is_answered_from_the_cache(made):
    first = roofline.measure(device="cpu")
    assert roofline.measure(device="cpu") == first and len(made) == 1
    assert roofline.measure(device="cpu", refresh=True) != first and len(made) == 2
    roofline.measure(device="cpu", threads=7)  # another thread count is another roof
    assert len(made) == 3 and made[-1][2] == 7


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "\x00\xff" + text,
        lambda text: "[]",
        lambda text: "null",
        lambda text: json.dumps(json.loads(text) | {"bandwidth": -1}),
        lambda text: json.dumps(json.loads(text) | {"bandwidth": math.nan}),
        lambda text: json.dumps(json.loads(text) | {"peaks": {"fp32": "fast"}}),
        lambda text: json.dumps(json.loads(text) | {"peaks": [1, 2]}),
        lambda text: json.dumps(json.loads(text) | {"sizes": {}}),
        lambda text: json.dumps(json.loads(text) | {"reads": {}}),
        lambda text: json.dumps(json.loads(text) | {"name": None}),
        lambda text: json.dumps(json.loads(text) | {"surprise": 1}),
    ],
)
def test_a_damaged_file_is_measured_anew_and_mended(home, made, damage):
    roofline.measure(device="cpu")
    (path,) = home.glob("roofline*")
    path.write_text(damage(path.read_text()), encoding="latin-1")
    again = roofline.measure(device="cpu")
    assert len(made) == 2 and roofline._read(path) == again and roofline.measure(device="cpu") == again


def test_a_disk_that_cannot_be_written_costs_only_the_memory(home, made, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.warns(UserWarning, match="could not be kept.*No space left"):
        roof = roofline.measure(device="cpu")
    assert roof.peaks["fp32"] == 2e11 and left(home) == []


def test_an_interrupt_while_writing_leaves_nothing_half_written(home, made, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        roofline.measure(device="cpu")
    assert left(home) == []


def test_a_busy_machine_is_told_each_time(home, made, monkeypatch):
    quiet = roofline._measure("cpu", 1, 1, False)
    busy = Roofline(**{**vars(quiet), "others": 0.4})
    monkeypatch.setattr(roofline, "_measure", lambda *a: busy)
    for _ in range(2):  # measured, then remembered
        with pytest.warns(UserWarning, match="Other programs took 40 % of the cores"):
            assert roofline.measure(device="cpu") == busy
    assert "too low" in str(busy) and "too low" not in str(quiet)


def test_sizes_grow_until_the_next_one_would_take_too_long(monkeypatch):
    """The best rate is kept with its size; a dtype without a fast kernel stops early; none at all gives None."""
    tried = []

    def product(rate):
        def make(n):
            tried.append(n)
            fn = lambda: None  # noqa: E731
            fn.seconds = 2 * n**3 / rate(n)
            return fn

        return make

    monkeypatch.setattr(roofline, "_median", lambda fn, device, seconds: fn.seconds)
    fast = roofline._best_product(product({256: 1e11, 512: 3e11, 1024: 2e11, 2048: 1e11}.__getitem__), "cpu", 1.0)
    assert fast == (pytest.approx(3e11), 512) and tried == [256, 512, 1024, 2048]
    tried.clear()
    slow = roofline._best_product(product(lambda n: 2e8), "cpu", 1.0)
    assert slow == (pytest.approx(2e8), 256) and tried == [256]

    def missing(n):
        raise RuntimeError("not implemented for 'Char'")

    assert roofline._best_product(missing, "cpu", 1.0) is None


def test_products_are_products():
    """What is timed is the product it claims to be."""
    for make in roofline._cpu_products().values():
        fn = make(32)
        a, b = _operands(fn)
        torch.testing.assert_close(fn().double(), a.double() @ b.double(), rtol=2e-2, atol=1e-1)


def _operands(fn):
    cells = dict(zip(fn.__code__.co_freevars, (c.cell_contents for c in fn.__closure__)))
    return cells["a"], cells["b"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"seconds": 0}, "seconds = 0"),
        ({"seconds": "long"}, "seconds = 'long'"),
        ({"seconds": math.inf}, "seconds = inf"),
        ({"threads": 0}, "threads = 0"),
        ({"device": "tpu"}, "device = 'tpu'"),
        ({"device": "meta"}, "device = 'meta'"),
    ],
)
def test_bad_settings_are_refused(made, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        roofline.measure(**settings)
    assert made == []


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_is_measured_below_its_data_sheet(home):
    roof = roofline.measure(seconds=0.2, device="cuda", progress=False)
    assert {"fp32", "bf16"} <= set(roof.peaks) and roof.peaks["bf16"] > roof.peaks["fp32"]
    for key, sheet in roofline.catalogue().items():
        if key.split()[0] in roof.name:
            assert roof.bandwidth < 1.02 * sheet.bandwidth
            assert all(roof.peaks[d] < 1.05 * sheet.peaks[d] for d in roof.peaks if d in sheet.peaks)
