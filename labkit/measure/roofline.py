"""The roofline: how fast can this machine be, and what holds a piece of work back?

    roof = roofline.measure()                        # this machine, measured once and remembered
    work = roofline.decode_work(lm, batch=1, context=512, weight_bits=4.5)
    roof.bound(work.intensity, "fp32")               # "memory" or "compute"
    roof.seconds(work, "fp32")                       # the least time that it can take here

A machine moves ``bandwidth`` bytes and does ``peak`` operations per second, at best. Work that does ``intensity``
operations per byte it moves can run no faster than ``min(peak, intensity * bandwidth)``; the two limits meet at the
ridge. (Williams, Waterman and Patterson, "Roofline: An Insightful Visual Performance Model for Multicore
Architectures", Communications of the ACM 52(4), 2009.)

What :func:`measure` returns is measured; the work of a transformer and the catalogue are modelled. The CUDA paths are
*unverified*: nobody has run them on a GPU yet.
"""

from __future__ import annotations

import hashlib
import json
import math
import numbers
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from functools import cache as remember
from pathlib import Path

import numpy as np
import torch
from torch import nn

from labkit._files import write_text
from labkit.measure import timing
from labkit.measure.machine import cores, machine
from labkit.paths import cache, data
from labkit.progress import track

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # what configs call their number of experts
DTYPES = ("fp32", "tf32", "bf16", "fp16", "fp8", "int8", "fp4")  # the names a peak can have
_VERSION = 1  # of the cached file: raise it when measuring changes


# --- roofs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Roof:
    """A memory slope and the flat tops over it: a measured :class:`Roofline` or a modelled :class:`Accelerator`.

    ``peaks``: dtype -> operations/s, a multiply and an add being two. Empty where only the slope is known.
    """

    name: str
    bandwidth: float  # bytes/s read from memory
    peaks: dict[str, float]
    label: str

    def peak(self, dtype: str) -> float:
        """Operations/s of dense matrix products in ``dtype``; ValueError when there is no such figure."""
        if dtype not in self.peaks:
            known = ", ".join(self.peaks) or "none, only its bandwidth"
            raise ValueError(f"dtype = {dtype!r}: no peak is known for {self.name}. Known: {known}.")
        return self.peaks[dtype]

    def ridge(self, dtype: str) -> float:
        """The intensity (operations per byte) at which memory and arithmetic take equally long."""
        return self.peak(dtype) / self.bandwidth

    def attainable(self, intensity: float, dtype: str | None) -> float:
        """The most operations/s that work of this intensity can reach. ``dtype=None``: under the memory slope alone."""
        slope = _positive("intensity", intensity, zero=True) * self.bandwidth
        return slope if dtype is None else min(self.peak(dtype), slope)

    def bound(self, intensity: float, dtype: str) -> str:
        """What holds work of this intensity back: ``"memory"`` left of the ridge, ``"compute"`` from it on."""
        return "memory" if _positive("intensity", intensity, zero=True) < self.ridge(dtype) else "compute"

    def seconds(self, work: Work, dtype: str) -> float:
        """The least time for this work: its bytes or its operations, whichever takes longer."""
        return max(work.bytes / self.bandwidth, work.flops / self.peak(dtype))


@dataclass(frozen=True)
class Roofline(Roof):
    """The roofs of one machine, measured: how fast it really read, and really multiplied."""

    when: str = ""  # UTC, ISO 8601
    threads: int = 1  # CPU threads used
    device: str = "cpu"
    reads: dict[str, float] = field(default_factory=dict)  # way of reading -> bytes/s; the best one is the bandwidth
    sizes: dict[str, int] = field(default_factory=dict)  # dtype -> n of the n x n matrices that reached the peak
    others: float = 0.0  # share of the cores' time that other programs took meanwhile; 0 where the system does not say

    @property
    def method(self) -> str:
        """The way of reading that was fastest, and so gives the bandwidth."""
        return max(self.reads, key=self.reads.get) if self.reads else ""

    def table(self) -> list[tuple[str, str, str]]:
        """Rows of (what, value, unit) for people."""
        rows = [("read bandwidth", f"{self.bandwidth / 1e9:.1f}", f"GB/s, by {self.method}")]
        for dtype, peak in self.peaks.items():
            how = f"GFLOP/s, {self.sizes[dtype]}² matrices; ridge at {self.ridge(dtype):.0f} FLOP per byte"
            rows.append((f"{dtype} matmul", f"{peak / 1e9:,.0f}", how))
        return rows

    def __str__(self) -> str:
        head = f"{self.name}, {self.device}, {self.threads} thread(s), {self.when} ({self.label})"
        if self.others > timing.BUSY:
            head += f"; other programs took {100 * self.others:.0f} % of the cores, so the roofs are too low"
        return "\n".join([head, *(f"  {what:<16}{value:>10}  {unit}" for what, value, unit in self.table())])


@dataclass(frozen=True)
class Accelerator(Roof):
    """One entry of the catalogue: data-sheet figures, dense rates, nothing run. ``memory`` in bytes."""

    memory: int = 0
    kind: str = "gpu"  # "gpu", "soc" or "cpu"
    year: int = 0
    source: str = ""
    note: str = ""


def roof_points(roof: Roof, dtype: str | None, intensities: Iterable[float]) -> tuple[list[float], list[float]]:
    """What to draw: ``(x, y)``, intensities in rising order and the operations/s attainable there.

    The ridge is added where it lies between them, so that the corner is sharp. ``dtype=None`` gives the memory slope
    alone, for a machine whose peaks are not published.
    """
    xs = sorted({_positive("intensity", x, zero=True) for x in intensities})
    if not xs:
        raise ValueError("intensities is empty: give at least one number of operations per byte.")
    if dtype is not None and xs[0] < roof.ridge(dtype) < xs[-1]:
        xs = sorted({*xs, roof.ridge(dtype)})
    return xs, [roof.attainable(x, dtype) for x in xs]


@remember
def _catalogue() -> dict[str, Accelerator]:
    entries = tomllib.loads((data() / "accelerators.toml").read_text(encoding="utf-8"))
    return {
        key: Accelerator(
            name=e["name"],
            bandwidth=e["bandwidth_gbs"] * 1e9,
            peaks={dtype: rate * 1e12 for dtype, rate in e["peaks"].items()},
            label="modelled",
            memory=round(e["memory_gb"] * 1e9),
            kind=e["kind"],
            year=e["year"],
            source=e["source"],
            note=e["note"],
        )
        for key, e in entries.items()
    }


def catalogue() -> dict[str, Accelerator]:
    """Machines you may not have, from their data sheets (``data/accelerators.toml``): dense rates, modelled."""
    return dict(_catalogue())


# --- the work of a transformer, modelled ---------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Operations done and bytes moved to and from memory. Adds up with ``+``."""

    flops: float
    bytes: float
    label: str = "modelled"

    @property
    def intensity(self) -> float:
        """Operations per byte: where on the roofline's horizontal axis this work stands."""
        return self.flops / self.bytes if self.bytes else 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes, self.label)


def linear_work(
    tokens: int, out_features: int, in_features: int, weight_bits: float, activation_bytes: float = 4
) -> Work:
    """One linear layer on ``tokens`` tokens at once: weights read once, activations read once and written once.

    ``weight_bits``: stored bits per weight, metadata included (4-bit codes with an fp16 scale and a 4-bit zero per 64
    weights: 4.31). The bytes are the least possible: nothing is read twice.
    """
    t, m, n = _whole("tokens", tokens), _whole("out_features", out_features), _whole("in_features", in_features)
    bits, act = _positive("weight_bits", weight_bits), _positive("activation_bytes", activation_bytes)
    return Work(flops=2.0 * t * m * n, bytes=m * n * bits / 8 + t * (m + n) * act)


@dataclass(frozen=True)
class Shape:
    """What of a dense decoder decides its work: the linear layers and the attention heads."""

    linears: tuple[tuple[int, int], ...]  # (out_features, in_features) of every linear layer in the blocks
    head: tuple[int, int]  # (vocabulary, hidden): the output layer
    layers: int
    heads: int  # query heads
    kv_heads: int
    head_dim: int

    @classmethod
    def llama(
        cls, hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int, head_dim: int | None = None
    ) -> Shape:
        """A Llama-like decoder by its numbers, e.g. 7B: ``Shape.llama(4096, 32, 32, 32, 11008, 32000)``."""
        given = {"hidden": hidden, "layers": layers, "heads": heads, "kv_heads": kv_heads, "ffn": ffn, "vocab": vocab}
        for name, value in given.items():
            _whole(name, value)
        if heads % kv_heads:
            raise ValueError(f"kv_heads = {kv_heads!r} does not divide heads = {heads}.")
        dim = hidden // heads if head_dim is None else _whole("head_dim", head_dim)
        q, kv = heads * dim, kv_heads * dim
        block = [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (ffn, hidden), (ffn, hidden), (hidden, ffn)]
        return cls(tuple(block) * layers, (vocab, hidden), layers, heads, kv_heads, dim)

    @classmethod
    def of(cls, model) -> Shape:
        """Read the shape off a LanguageModel, a module, a transformers config, or anything with Llama's config fields.

        A transformers config is built without memory (on torch's meta device), so every architecture counts as it
        is; that takes a moment, so keep the Shape when you need it often. ValueError for what is not a dense decoder.
        """
        if isinstance(model, Shape):
            return model
        module = model if isinstance(model, nn.Module) else getattr(model, "model", None)
        if isinstance(module, nn.Module):
            return cls._of_module(module)
        if hasattr(model, "to_diff_dict"):  # a transformers config
            from transformers import AutoModelForCausalLM

            with torch.device("meta"):
                return cls._of_module(AutoModelForCausalLM.from_config(model))
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
        missing = [n for n in names if not hasattr(model, n)]
        if missing:
            raise ValueError(f"{model!r} has no {', '.join(missing)}: give a LanguageModel, a config or a Shape.")
        hidden, layers, heads, ffn, vocab = (getattr(model, n) for n in names)
        kv_heads = getattr(model, "num_key_value_heads", None) or heads
        return cls.llama(hidden, layers, heads, kv_heads, ffn, vocab, getattr(model, "head_dim", None))

    @classmethod
    def _of_module(cls, module: nn.Module) -> Shape:
        if not hasattr(module, "config") or not hasattr(module, "get_output_embeddings"):
            raise ValueError(f"{type(module).__name__} is not a transformers language model.")
        config = module.config.get_text_config()
        # Experts: only some of them run per token, so counting every layer once would be wrong.
        odd = [n for n in _EXPERTS if (getattr(config, n, 0) or 0) > 1]
        odd += [name for name, p in module.named_parameters() if p.dim() > 2]  # stacked experts, convolutions
        if odd:
            raise ValueError(
                f"{type(module).__name__} is not a dense decoder, it has {odd[0]}: its work is not modelled."
            )
        linears = dict(_linears(module))
        head = linears.pop(id(module.get_output_embeddings()), None)
        if head is None:
            raise ValueError(f"{type(module).__name__} has no output layer: this is not a language model.")
        heads = getattr(config, "num_attention_heads", None)
        if not heads:
            raise ValueError(f"{type(module).__name__} has no attention heads: its work is not modelled.")
        return cls(
            linears=tuple(linears.values()),
            head=head,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        )


def _linears(module: nn.Module) -> Iterator[tuple[int, tuple[int, int]]]:
    """(id, (out, in)) of every linear layer; what a layer is made of inside is not looked at, nor counted again."""
    shape = _linear_shape(module)
    if shape:
        yield id(module), shape
        return
    for child in module.children():
        yield from _linears(child)


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer, packed or not; None for anything else."""
    if isinstance(getattr(module, "out_features", None), int) and isinstance(getattr(module, "in_features", None), int):
        return module.out_features, module.in_features
    if type(module).__name__ == "Conv1D":  # GPT-2's transposed linear, weight (in, out)
        return module.weight.shape[1], module.weight.shape[0]
    return None


def decode_work(
    model,
    batch: int,
    context: int,
    weight_bits: float = 32,
    *,
    head_bits: float | None = None,
    activation_bytes: float = 4,
    kv_bits: float | None = None,
) -> Work:
    """One decode step: a new token for each of ``batch`` sequences that hold ``context`` tokens already.

    Weights are read once for the whole batch; every sequence reads its own KV cache and adds one token to it.
    ``head_bits``: those of the output layer, by default ``weight_bits``; ``kv_bits``: the cache's, by default the
    activations'. Left out as small: norms, rotary embedding, softmax, residual sums and the looked-up embedding rows.
    """
    s = Shape.of(model)
    batch, context = _whole("batch", batch), _whole("context", context, low=0)
    linears = _linears_work(s, batch, batch, weight_bits, head_bits, activation_bytes)
    kv_bits = _or(kv_bits, 8 * activation_bytes)
    return linears + _attention(s, batch, pairs=context + 1, read=context, written=1, kv_bits=kv_bits)


def prefill_work(
    model,
    batch: int,
    tokens: int,
    weight_bits: float = 32,
    *,
    head_bits: float | None = None,
    activation_bytes: float = 4,
    kv_bits: float | None = None,
) -> Work:
    """Reading a prompt: ``batch`` sequences of ``tokens`` tokens at once, causal attention, logits of the last only.

    Attention keeps its scores on chip (as flash attention does); the KV cache is written once. Else as decode_work.
    """
    s = Shape.of(model)
    batch, tokens = _whole("batch", batch), _whole("tokens", tokens)
    linears = _linears_work(s, batch * tokens, batch, weight_bits, head_bits, activation_bytes)
    pairs = tokens * (tokens + 1) // 2  # each query looks at itself and at what is before it
    kv_bits = _or(kv_bits, 8 * activation_bytes)
    return linears + _attention(s, batch, pairs, read=0, written=tokens, kv_bits=kv_bits)


def cache_outweighs_weights(
    model, batch: int = 1, weight_bits: float = 32, *, head_bits: float | None = None, kv_bits: float = 32
) -> float:
    """The context from which on a decode step reads more KV cache than weights, in tokens of each sequence; modelled.

    Weights are read once for the whole batch, a cache for each sequence: with the batch that context shrinks. Arguments as
    those of :func:`decode_work`.
    """
    s = Shape.of(model)
    rows = [(shape, weight_bits) for shape in s.linears] + [(s.head, _or(head_bits, weight_bits))]
    weights = sum(out * inputs * _positive("weight_bits", bits) / 8 for (out, inputs), bits in rows)
    return weights / _attention(s, _whole("batch", batch), pairs=0, read=1, written=0, kv_bits=kv_bits).bytes


def _linears_work(s: Shape, tokens: int, outputs: int, weight_bits, head_bits, activation_bytes) -> Work:
    work = linear_work(outputs, *s.head, _or(head_bits, weight_bits), activation_bytes)
    for out_features, in_features in s.linears:
        work += linear_work(tokens, out_features, in_features, weight_bits, activation_bytes)
    return work


def _or(value, default):
    return default if value is None else value


def _attention(s: Shape, batch: int, pairs: int, read: int, written: int, kv_bits: float) -> Work:
    """Scores and values (two products of head_dim multiply-adds per query-key pair), and the cache's traffic."""
    bits = _positive("kv_bits", kv_bits)
    flops = 2 * 2 * s.layers * s.heads * s.head_dim * pairs * batch
    per_token = 2 * s.layers * s.kv_heads * s.head_dim * bits / 8  # keys and values
    return Work(float(flops), batch * (read + written) * per_token)


# --- measuring this machine ----------------------------------------------------------------------


def measure(
    seconds: float = 1.0,
    device: str | torch.device | None = None,
    refresh: bool = False,
    progress: bool = True,
    threads: int | None = None,
) -> Roofline:
    """Measure this machine's roofs: read bandwidth, and the peak of dense matrix products in each dtype it can do.

    About ``seconds`` go into each figure. ``device``: "cpu", "cuda", or None for the GPU where there is one.
    ``threads``: CPU threads, by default all cores this process may use. The result is kept in ``cache()`` for this
    machine and answered from there at once; ``refresh=True`` measures again. Each figure is the best *median* over
    ways of doing it (of reading, of matrix sizes), so one lucky sample does not raise the roof.

    Other programs pull the roofs down, and by much, for threads wait for the slowest among them. The result says what
    share of the cores they took (``others``), with a warning where that is more than a tenth: then close them and
    ``refresh``. Raises ValueError, naming the value, for bad input.
    """
    seconds = _positive("seconds", seconds)
    threads = cores() if threads is None else _whole("threads", threads)
    watch = timing.stopwatch(device)  # refuses a device that is not there
    if watch.name == "mps":
        raise ValueError("device = 'mps': the roofline is measured on 'cpu' or 'cuda' only.")
    path = _cache_path(watch.name, threads)
    found = None if refresh else _read(path)
    if found is not None:
        _warn_if_busy(found)
        return found
    with timing.alone("the roofline"), timing.threads(threads), torch.inference_mode():
        roof = _measure(watch.name, seconds, threads, progress)
    _warn_if_busy(roof)
    _write(path, roof)
    return roof


def _measure(device: str, seconds: float, threads: int, progress: bool) -> Roofline:
    cuda = device != "cpu"
    products = _cuda_products(device) if cuda else _cpu_products()
    reads, peaks, sizes = {}, {}, {}
    others = timing.Watch()
    for stage in track(["read", *products], f"measuring the roofline of {device}", show=progress):
        if stage == "read":
            reads = _bandwidths(device, seconds)
        elif (best := _best_product(products[stage], device, seconds)) is not None:
            peaks[stage], sizes[stage] = best
    name = torch.cuda.get_device_name(torch.device(device)) if cuda else machine()
    share = others.share() or 0.0
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Roofline(name, max(reads.values()), peaks, "measured", when, threads, device, reads, sizes, share)


def _warn_if_busy(roof: Roofline) -> None:
    if roof.others > timing.BUSY:
        warnings.warn(
            f"Other programs took {100 * roof.others:.0f} % of the cores while these roofs were measured, so the roofs "
            "are too low. Close those programs and call measure(refresh=True).",
            stacklevel=3,
        )


def _bandwidths(device: str, seconds: float) -> dict[str, float]:
    """Bytes/s of several ways to read a buffer that no cache can hold; each way reads every byte exactly once."""
    size = 1 << 30 if device != "cpu" else min(max(4 * timing.last_level_cache(), 256 << 20), 1 << 30)
    columns = 4096
    rows = size // (4 * columns)
    # Ones, not zeros: zero pages that were never written all share one physical page, which stays in the cache.
    matrix = torch.ones(rows, columns, device=device)
    flat, vector = matrix.view(-1), torch.ones(columns, device=device)
    half = flat.numel() // 2
    ways: dict[str, Callable[[], object]] = {
        "torch.sum": flat.sum,
        "torch.dot": lambda: torch.dot(flat[:half], flat[half:]),
        "torch.mv": lambda: torch.mv(matrix, vector),
    }
    if device == "cpu":
        array = flat.numpy()
        ways["numpy.sum"] = lambda: np.add.reduce(array)
    share = seconds / len(ways) / 2  # calibrating takes about as long again
    return {name: matrix.nbytes / _median(fn, device, share) for name, fn in ways.items()}


def _best_product(make: Callable[[int], Callable[[], object]], device: str, seconds: float):
    """(operations/s, n) of the n that multiplies fastest; None where the library cannot multiply this dtype.

    Sizes double while the next one, eight times the work, still fits the time: small ones do not fill the machine,
    but a dtype without a fast kernel must not take minutes.
    """
    best = None
    largest = 2048 if device == "cpu" else 8192
    n = 256
    while n <= largest:
        try:
            fn = make(n)
            fn()
        except (RuntimeError, AttributeError, NotImplementedError, TypeError):
            break  # no kernel for this dtype here, or no memory for this size
        once = _median(fn, device, seconds / 8)
        rate = 2 * n**3 / once
        if best is None or rate > best[0]:
            best = rate, n
        if 8 * once > seconds:
            break
        n *= 2
    return best


def _median(fn: Callable[[], object], device: str, seconds: float) -> float:
    """Median seconds per call over about ``seconds``, five samples or more."""
    return timing.time_one(fn, device=device, repeats=5, warmup=0, min_seconds=seconds).median  # calibration warms up


def _cpu_products() -> dict[str, Callable]:
    """dtype -> n -> a product of two n x n matrices. fp16 is left out: torch has no fast CPU kernel for it."""
    return {"fp32": _dense(torch.float32, "cpu"), "bf16": _dense(torch.bfloat16, "cpu"), "int8": _int8("cpu")}


def _cuda_products(device: str) -> dict[str, Callable]:
    """The same on a GPU, *unverified*. fp32 with TF32 switched off, tf32 with it on, fp8 where the chip has it."""
    full, fast = _dense(torch.float32, device), _dense(torch.float32, device)
    products = {
        "fp32": lambda n: _with_precision("highest", full(n)),
        "tf32": lambda n: _with_precision("high", fast(n)),
        "bf16": _dense(torch.bfloat16, device),
        "int8": _int8(device),
    }
    major, minor = torch.cuda.get_device_capability(torch.device(device))
    if (major, minor) < (8, 0):
        del products["tf32"]
    if (major, minor) >= (8, 9):
        products["fp8"] = _fp8(device)
    return products


def _dense(dtype: torch.dtype, device: str):
    def make(n: int):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty(n, n, device=device, dtype=dtype)
        return lambda: torch.mm(a, b, out=out)

    return make


def _int8(device: str):
    def make(n: int):
        a, b = (torch.randint(-127, 128, (n, n), device=device, dtype=torch.int8) for _ in range(2))
        b = b.t()  # column-major, as the GPU's kernel wants it
        return lambda: torch._int_mm(a, b)

    return make


def _fp8(device: str):
    def make(n: int):
        a, b = (torch.randn(n, n, device=device).to(torch.float8_e4m3fn) for _ in range(2))
        b, one = b.t(), torch.ones((), device=device)
        return lambda: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    return make


def _with_precision(level: str, fn: Callable[[], object]) -> Callable[[], object]:
    """``fn`` under torch's fp32 matmul precision ``level``, which is put back after every call."""

    @contextmanager
    def precision():
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(level)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def call():
        with precision():
            return fn()

    return call


# --- remembering it ------------------------------------------------------------------------------


def _cache_path(device: str, threads: int) -> Path:
    """One file per machine, device, thread count and torch (another torch may have other kernels)."""
    key = json.dumps([_VERSION, machine(), device, threads, torch.__version__])
    return cache() / f"roofline-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _read(path: Path) -> Roofline | None:
    """The remembered roofline; None when there is none, or when the file is damaged (it is then measured anew)."""
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
        if set(row) != {f.name for f in fields(Roofline)}:
            return None
        numbers_ = [row["bandwidth"], *row["peaks"].values(), *row["reads"].values(), *row["sizes"].values()]
        for value in (*numbers_, row["threads"]):
            _positive("value", value)
        _positive("others", row["others"], zero=True)
        texts = [row[k] for k in ("name", "label", "when", "device")]
        if not all(isinstance(t, str) for t in texts) or set(row["sizes"]) != set(row["peaks"]) or not row["reads"]:
            return None
        return Roofline(**row)
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None


def _write(path: Path, roof: Roofline) -> None:
    """All of the file or nothing. A full or read-only disk costs the memory of it, not the measurement."""
    try:
        write_text(path, json.dumps(asdict(roof), indent=1))
    except OSError as error:
        warnings.warn(f"The roofline was measured but could not be kept in {path}: {error}.", stacklevel=3)


# --- checks --------------------------------------------------------------------------------------


def _positive(name: str, value, zero: bool = False) -> float:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name} = {value!r} is not allowed: it must be a number {'from' if zero else 'above'} 0.")
    return float(value)


def _whole(name: str, value, low: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < low:
        raise ValueError(f"{name} = {value!r} is not allowed: it must be a whole number, {low} or more.")
    return int(value)
