"""One Measurement: accuracy, memory and latency of a model, side by side, each with how it was got."""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass, field, replace

from labkit.measure.busy import is_busy


@dataclass(frozen=True)
class Quality:
    """Quality on one text. ``*_se`` is the standard error over the windows of that text (its error band).

    KL twice: of the weights alone (products are exact), and *as run* (as one graph: activations rounded to 8 bits by the
    kernel, head and embedding in 8 bits). Under a method for the KV cache only tokens read after its prompt are scored.
    """

    perplexity: float
    perplexity_se: float
    tokens: int  # scored tokens
    kl: float | None = None  # nats per token against the uncompressed model
    kl_se: float | None = None
    top1: float | None = None  # share of tokens whose most likely next token agrees, 0 to 1
    top1_se: float | None = None
    kl_run: float | None = None  # KL of the compiled model against the uncompressed one; None: not compiled
    kl_run_se: float | None = None
    per_window: dict[str, list[float]] = field(default_factory=dict)  # "nll", "kl", "top1", "kl_run": means by window


@dataclass(frozen=True)
class Memory:
    """Bytes that are really held, never parameters times bits."""

    weights: int  # all parameters and buffers, with the copies that a kernel's runtime keeps
    linears: int  # the decoder's weights that compression is about: linears, and experts
    bits_per_weight: float  # of those: stored codes, scales and zeros over weights
    kv_bytes: int  # bytes the KV cache holds after kv_tokens tokens of one text, batch 1
    kv_tokens: int  # the length at which it was weighed
    peak: int | None = None  # highest resident set (CPU) or allocation (CUDA) while measuring, both models and all
    engine: int | None = None  # weights of the compiled model, head and embedding packed to 8 bits
    compressed: float = 1.0  # share of the decoder's weights that are no longer as they were, 0 to 1
    left: list[str] = field(default_factory=list)  # what is as it was: coverage.Coverage.left
    bits_before: int = 32  # of a weight of the model as it was loaded


@dataclass(frozen=True)
class Latency:
    """Medians with interquartile ranges.

    ``*_ratio``: paired and interleaved with the uncompressed model, run in the same way (eager with eager, graph with
    graph); ``*_spread`` its quartiles over the rounds.
    """

    prefill_ms: float
    prefill_iqr: float
    prefill_tokens: int
    decode_ms: float  # per token
    decode_iqr: float
    threads: int
    prefill_ratio: float | None = None  # above 1: faster than the uncompressed model
    decode_ratio: float | None = None
    prefill_spread: list[float] | None = None  # [low, high] quartile of the ratio
    decode_spread: list[float] | None = None
    context: int = 16  # tokens in the cache when decoding begins
    rounds: int = 0  # samples behind each median
    busy: float | None = None  # share of the cores that other programs took meanwhile, 0 to 1; None: unknown
    gemv_us: dict[str, float] = field(default_factory=dict)  # each kind of linear, one token, µs

    def speed(self, phase: str) -> str | None:
        """The ratio of "prefill" or "decode" with its quartiles, ``"2.60x (2.48 to 2.71)"``; None where there is none."""
        ratio, spread = getattr(self, f"{phase}_ratio"), getattr(self, f"{phase}_spread")
        if ratio is None:
            return None
        return f"{ratio:.2f}x" + (f" ({spread[0]:.2f} to {spread[1]:.2f})" if spread else "")


@dataclass(frozen=True)
class Measurement:
    """What ``labkit.measure`` returns: prints as a table, renders as HTML, and becomes a row of the store."""

    model: str
    method: str  # repr of the technique(s), "uncompressed" for the baseline
    quality: dict[str, Quality]  # by text: "manual", "prose", …
    memory: Memory
    latency: Latency | None  # eager, through transformers
    device: str
    label: str = "measured"
    engine: Latency | None = None  # as one graph; None where a graph would not read the weights packed
    notes: list[str] = field(default_factory=list)  # what to know about these numbers, in sentences
    texts: dict[str, str] = field(default_factory=dict)  # text -> hash of its token ids

    def to_dict(self) -> dict:
        """A plain, JSON-ready dictionary; :meth:`from_dict` reads it back."""
        return asdict(self)

    def kept(self) -> Measurement:
        """What of it may be stored: all, or all but times that other programs disturbed."""
        if not any(is_busy(t.busy) for t in (self.latency, self.engine) if t):
            return self
        return replace(self, latency=None, engine=None)

    @classmethod
    def from_dict(cls, row: dict) -> Measurement:
        row = dict(row)
        row["quality"] = {name: Quality(**q) for name, q in row["quality"].items()}
        row["memory"] = Memory(**row["memory"])
        for way in ("latency", "engine"):
            row[way] = Latency(**row[way]) if row.get(way) else None
        return cls(**row)

    def table(self) -> list[tuple[str, str, str]]:
        """Rows of (what, value, unit) for people; ± is one standard error over windows, of times the interquartile range."""
        return [*_quality_rows(self.quality), *_memory_rows(self), *_latency_rows(self)]

    def __str__(self) -> str:
        rows = self.table()
        width = max(len(what) for what, _, _ in rows)
        head = f"{self.method} on {self.model}, {self.device} ({self.label})"
        lines = [f"  {what:<{width}}  {value:>16}  {unit}" for what, value, unit in rows]
        return "\n".join([head, *lines, *(f"  * {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><td style='text-align:left'>{html.escape(what)}</td><td>{html.escape(value)}</td>"
            f"<td style='text-align:left'>{html.escape(unit)}</td></tr>"
            for what, value, unit in self.table()
        )
        head = html.escape(f"{self.method} on {self.model}, {self.device} ({self.label})")
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return f"<table><caption style='text-align:left'><b>{head}</b></caption>{cells}</table>{notes}"


Rows = list[tuple[str, str, str]]


def _quality_rows(quality: dict[str, Quality]) -> Rows:
    rows = []
    for text, q in quality.items():
        rows.append((f"perplexity on {text}", f"{q.perplexity:,.2f} ± {q.perplexity_se:,.2f}", "lower is better"))
        if q.kl is not None:
            rows.append((f"KL on {text}", f"{q.kl:.4f} ± {q.kl_se or 0:.4f}", "nats per token, products exact"))
        if q.kl_run is not None:
            unit = "nats per token, as one graph: activations and head in 8 bits"
            rows.append((f"KL as run on {text}", f"{q.kl_run:.4f} ± {q.kl_run_se or 0:.4f}", unit))
        if q.top1 is not None:
            rows.append((f"same top token on {text}", f"{100 * q.top1:.1f} ± {100 * (q.top1_se or 0):.1f}", "%"))
    return rows


def _memory_rows(found: Measurement) -> Rows:
    m = found.memory
    rows = [
        ("weights held", f"{m.weights / 1e6:,.1f}", "MB"),
        ("linear layers", f"{m.linears / 1e6:,.1f}", "MB"),
        ("bits per linear weight", f"{m.bits_per_weight:.2f}", "metadata included"),
        (f"share of {m.bits_before}-bit weights", f"{100 * m.bits_per_weight / m.bits_before:.0f}", "%"),
    ]
    if m.bits_before > 16:
        unit = "%, the field's baseline (modelled)"
        rows.append(("share of 16-bit weights", f"{100 * m.bits_per_weight / 16:.0f}", unit))
    if m.left and found.method != "uncompressed":
        rows.append(("decoder's weights compressed", f"{100 * m.compressed:.0f}", f"%, all but {', '.join(m.left)}"))
    if m.engine is not None:
        rows.append(("weights as one graph", f"{m.engine / 1e6:,.1f}", "MB, head and embedding at 8 bits"))
    if m.kv_tokens:  # else it could not be weighed
        rows.append((f"KV cache of {m.kv_tokens:,} tokens", f"{m.kv_bytes / 1e6:,.1f}", "MB"))
    if m.peak is not None:
        rows.append(("peak of the process", f"{m.peak / 1e6:,.0f}", "MB, while measuring, with both models"))
    return rows


def _latency_rows(found: Measurement) -> Rows:
    rows = []
    for t, way in ((found.latency, "eager"), (found.engine, "one graph")):
        if t is None:
            continue
        prefill, decode = f"{t.prefill_ms:,.0f} ± {t.prefill_iqr:,.0f}", f"{t.decode_ms:,.1f} ± {t.decode_iqr:,.1f}"
        rows.append((f"prefill of {t.prefill_tokens:,} tokens, {way}", prefill, "ms, median ± IQR"))
        rows.append((f"decode after {t.context:,} tokens, {way}", decode, "ms per token, median ± IQR"))
        unit = f"of the uncompressed model's, {way} too, in turns" + (f"; {t.rounds} rounds" if t.rounds else "")
        for phase in ("prefill", "decode"):
            if (speed := t.speed(phase)) is not None:
                rows.append((f"{phase} speed, {way}", speed, unit))
        rows.append((f"threads, {way}", str(t.threads), ""))
    fastest = found.engine or found.latency
    if fastest and fastest.decode_ratio and found.memory.bits_before == 32:
        unit = "modelled: half of the bytes make it at most twice as fast as fp32"
        rows.append(("decode speed against 16 bits", f"at least {fastest.decode_ratio / 2:.2f}x", unit))
    if found.latency and found.latency.gemv_us:
        each = found.latency.gemv_us
        slowest = max(each, key=each.get)
        what = f"µs for one token; the slowest is {slowest}: {each[slowest]:.0f}"
        rows.append(("one linear of each kind", f"{sum(each.values()):.0f}", what))
    return rows
