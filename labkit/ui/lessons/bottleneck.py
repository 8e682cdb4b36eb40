"""Notebook 01's views: passes through a model timed on this machine, under its roofs and under those of data sheets.

    bench = Bench({"fp32": lm, "4-bit": RTN(bits=4)(lm)}, roofline.measure())
    bench.passes("decode", batch=8)          # one Pass for each model: timed in turns, once, and remembered
    explore(bench.view, slow=bench.untimed, batch=[1, 2, 4, 8], phase=["decode", "prefill"])

Speeds are measured; the operations and bytes of a pass, and with them its place on the horizontal axis, are modelled.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from labkit.measure import memory, roofline, timing
from labkit.progress import track
from labkit.ui import need, plots, words
from labkit.ui.table import Table

go = need("plotly.graph_objects")

PHASES = ("decode", "prefill")
CONTEXT = 16  # tokens in the cache of each sequence before a decode step
PROMPT = 32  # tokens of each sequence in a prefill
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

# Llama 3 70B: Grattafiori et al., "The Llama 3 Herd of Models", arXiv:2407.21783, 2024, table 3.
LLAMA_70B = roofline.Shape.llama(hidden=8192, layers=80, heads=64, kv_heads=8, ffn=28672, vocab=128256)


@dataclass(frozen=True)
class Pass:
    """One pass of one model: its work (modelled) and its time (measured)."""

    model: str
    phase: str
    batch: int  # sequences at once
    work: roofline.Work
    seconds: float  # median
    ratio: float  # paired: the first model's time over this one's, above 1 is faster
    least: float  # seconds that the roof allows
    others: float = 0.0  # share of the cores' time that other programs took meanwhile

    @property
    def tokens(self) -> int:
        """Tokens that go through the model at once."""
        return self.batch * (PROMPT if self.phase == "prefill" else 1)

    @property
    def speed(self) -> float:
        """Operations per second, measured."""
        return self.work.flops / self.seconds

    @property
    def rate(self) -> float:
        """Tokens per second, measured."""
        return self.tokens / self.seconds


class Bench:
    """Several models on this machine: each pass is timed when it is first asked for, all models in turns."""

    def __init__(self, models: Mapping[str, object], roof: roofline.Roofline, rounds: int = 5):
        if not models:
            raise ValueError("Bench needs at least one model: Bench({'fp32': lm}, roofline.measure()).")
        self.models, self.roof, self.rounds = dict(models), roof, rounds
        self.dtype = dtype(next(iter(models.values())))
        self._shapes = {name: roofline.Shape.of(lm) for name, lm in models.items()}
        self._known: dict[tuple[str, int], dict[str, Pass]] = {}
        self._lock = threading.Lock()  # a slider's worker and the notebook's own thread may ask at once

    def untimed(self, phase: str, batch: int) -> bool:
        """Whether these passes have still to be timed."""
        return (phase, batch) not in self._known

    def passes(self, phase: str, batch: int) -> dict[str, Pass]:
        """Each model's pass of ``batch`` sequences: a decode step, or a prefill of ``PROMPT`` tokens."""
        if phase not in PHASES:
            raise ValueError(f"phase = {phase!r} is not allowed: it must be one of {', '.join(PHASES)}.")
        found = self._known.get((phase, batch))
        if found is None:
            # In this order: a slider's worker holds the first one already.
            with timing.alone(f"{phase} at batch {batch}"), self._lock:
                found = self._known.get((phase, batch)) or self._time(phase, batch)
                self._known[phase, batch] = found
        return found

    def forget(self) -> None:
        """Drop what was timed: each pass is timed anew when it is next asked for."""
        with self._lock:
            self._known.clear()

    def works(self, phase: str, batch: int) -> dict[str, roofline.Work]:
        """The operations and bytes of a pass of each model (modelled)."""
        return {name: work_of(lm, phase, batch, shape=self._shapes[name]) for name, lm in self.models.items()}

    def sweep(self, batches: Sequence[int], phase: str = "decode") -> go.Figure:
        """Tokens per second against the batch size, timed where that is still to do; dashed: what the roof allows."""
        for batch in track(batches, f"timing {phase}", show=False):
            self.passes(phase, batch)
        rows = [self._known[phase, b] for b in batches]
        series = {}
        for name in self.models:
            series[f"{name}, measured"] = (batches, [row[name].rate for row in rows])
        for name in self.models:
            series[f"{name}, at best (modelled)"] = (batches, [row[name].tokens / row[name].least for row in rows])
        figure = plots.lines(series, "sequences at once", "tokens/s", f"{phase.title()}", logx=True, logy=True)
        for trace in figure.data[len(self.models) :]:
            trace.line.dash, trace.mode = "dot", "lines"
        for trace, best in zip(figure.data[: len(self.models)], figure.data[len(self.models) :]):
            best.line.color = trace.line.color
        return figure

    def ratios(self, batches: Sequence[int], phase: str = "decode") -> Table:
        """Each batch size with each model's milliseconds, measured, and the least that the roof allows."""
        head = ["batch"]
        for name in self.models:
            head += [f"{name}, ms", "at best, ms"]
        names = list(self.models)
        head += [f"{name} speed, {names[0]} = 1" for name in names[1:]]
        rows = []
        for batch in batches:
            row = self.passes(phase, batch)
            cells = [str(batch)]
            for p in row.values():
                cells += [words.short(1e3 * p.seconds), words.short(1e3 * p.least)]
            rows.append((*cells, *(words.ratio(row[name].ratio) for name in names[1:])))
        return Table(tuple(head), tuple(rows), f"{phase}: measured, and at best under this roof (modelled)")

    def view(self, phase: str, batch: int) -> tuple[go.Figure, str]:
        """The roofline with these passes as dots, and what they say."""
        now = self.passes(phase, batch)
        return roof_figure(self.roof, self.dtype, now.values(), self._seen(phase, batch)), sentence(
            self.roof, self.dtype, list(now.values())
        )

    def _seen(self, phase: str, batch: int) -> list[Pass]:
        return [p for (ph, b), row in list(self._known.items()) if ph == phase and b != batch for p in row.values()]

    def _time(self, phase: str, batch: int) -> dict[str, Pass]:
        make = decode_step if phase == "decode" else prefill
        device = next(iter(self.models.values())).device
        tokens = batch * (PROMPT if phase == "prefill" else 1)
        rounds = max(2, min(self.rounds, 512 // tokens))  # a long pass is steadier, and need not be repeated as often
        calls = {name: make(lm, batch) for name, lm in self.models.items()}
        timed = timing.compare(calls, rounds=rounds, warmup=1, device=device, min_seconds=0.1)
        found = {}
        for name, work in self.works(phase, batch).items():
            seconds, ratio = timed.timings[name].median, timed.ratio[name]
            least = self.roof.seconds(work, self.dtype)
            found[name] = Pass(name, phase, batch, work, seconds, ratio, least, timed.busy or 0.0)
        return found


# --- one pass, ready to be timed -----------------------------------------------------------------


def decode_step(lm, batch: int, context: int = CONTEXT):
    """A function that decodes one token for each of ``batch`` sequences, always at the same length of the cache."""
    ids = _ids(lm, batch, context)
    with torch.inference_mode():
        out = lm.model(ids, use_cache=True, logits_to_keep=1)
    cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)

    @torch.inference_mode()
    def run():
        if (grown := cache.get_seq_length() - context) > 0:
            cache.crop(-grown)
        lm.model(token, past_key_values=cache, use_cache=True)

    return run


def prefill(lm, batch: int, tokens: int = PROMPT):
    """A function that reads ``batch`` prompts at once, and computes the logits of their last tokens."""
    ids = _ids(lm, batch, tokens)

    @torch.inference_mode()
    def run():
        lm.model(ids, use_cache=True, logits_to_keep=1)

    return run


def _ids(lm, batch: int, tokens: int) -> torch.Tensor:
    vocabulary = lm.model.get_input_embeddings().weight.shape[0]
    return (torch.arange(batch * tokens, device=lm.device) * 7 % vocabulary).view(batch, tokens)


def dtype(lm) -> str:
    """The roofline's name for the numbers that this model multiplies in: "fp32", "bf16"."""
    return NAMES[lm.model.get_output_embeddings().weight.dtype]


def full_bits(lm) -> int:
    """Bits of a weight that was not compressed."""
    return 8 * lm.model.get_output_embeddings().weight.element_size()


# --- figures and sentences -----------------------------------------------------------------------


def roof_figure(roof, dtype: str, now: Iterable[Pass], seen: Iterable[Pass] = ()) -> go.Figure:
    """Measured dots under the roof, each with its place on the roof above it, and those measured before in the background."""
    points = []
    for p in now:
        place = {"intensity": p.work.intensity, "dtype": dtype}
        note = f"{p.phase}, batch {p.batch}: {1e3 * p.seconds:,.1f} ms, {p.rate:,.0f} tokens/s"
        points.append(place | {"name": p.model, "speed": p.speed, "group": f"{p.model}, measured", "note": note})
    for p in now:
        best = {"intensity": p.work.intensity, "speed": p.work.flops / p.least, "dtype": dtype}
        note = f"{1e3 * p.least:,.1f} ms, {p.tokens / p.least:,.0f} tokens/s at best"
        points.append(best | {"name": "", "group": "at best (modelled)", "note": note})
    figure = plots.roofline(roof, points, dtypes=[dtype])
    earlier = list(seen)
    if earlier:  # small and pale, so that the eye stays on the dots of now
        figure.add_scatter(
            x=[p.work.intensity for p in earlier],
            y=[p.speed / 1e9 for p in earlier],
            mode="markers",
            name="measured before",
            marker={"size": 5, "color": "#8c8c8c"},
            hovertext=[f"{p.model}, {p.phase}, batch {p.batch}: {p.rate:,.0f} tokens/s" for p in earlier],
            hoverinfo="text",
        )
    return figure


def sentence(roof, dtype: str, passes: Sequence[Pass]) -> str:
    """What the dots say: where they stand, how much of the roof they reach, and who is faster."""
    first, *others = passes
    times = [f"{p.model} takes {words.short(1e3 * p.seconds)} ms ({words.short(p.rate)} tokens/s)" for p in passes]
    text = f"{first.phase.title()}, batch {first.batch}: {words.listed(times)}."
    for p in others:
        best = words.ratio(first.least / p.least)
        text += (
            f" {p.model} is {words.ratio(p.ratio)} as fast as {first.model} (measured); "
            f"the roof would allow {best} (modelled)."
        )
    places = [
        f"{p.model} does {words.short(p.work.intensity)} FLOP per byte, where the roof is "
        f"{roof.bound(p.work.intensity, dtype)}-bound, and reaches {words.percent(p.least / p.seconds)} of it"
        for p in passes
    ]
    text += f" Under the roof {'; '.join(places)}."
    if first.others > timing.BUSY:
        text += (
            f" Other programs took {words.percent(first.others)} of the cores meanwhile, so these times are too long: "
            "close them, and bench.forget()."
        )
    if any(p.least > 1.05 * p.seconds for p in passes):
        text += (
            " A dot over the roof means that the machine was busier when the roof was measured: "
            "roofline.measure(refresh=True) measures it again."
        )
    return text


def work_of(lm, phase: str, batch: int, tokens: int = PROMPT, shape: roofline.Shape | None = None) -> roofline.Work:
    """The operations and bytes of one pass (modelled): packed linear layers at their true bits, the output layer as it is."""
    head, bits = full_bits(lm), memory.bits_per_weight(lm)
    how = {"head_bits": head, "activation_bytes": head / 8}
    shape = shape or roofline.Shape.of(lm)
    if phase == "decode":
        return roofline.decode_work(shape, batch, CONTEXT, bits, **how)
    return roofline.prefill_work(shape, batch, tokens, bits, **how)


def intensities(models: Mapping[str, object], batches: Sequence[int] = (1, 8, 64), prompt: int = 512) -> Table:
    """Operations, bytes and operations per byte of a decode step and of a prefill, for each model; all modelled."""
    passes = [(f"decode, batch {b}", "decode", b) for b in batches] + [(f"prefill, {prompt} tokens", "prefill", 1)]
    rows = []
    for what, phase, batch in passes:
        for name, lm in models.items():
            w = work_of(lm, phase, batch, prompt)
            rows.append((what, name, words.short(w.flops / 1e9), words.short(w.bytes / 1e6), words.short(w.intensity)))
    return Table(("pass", "weights", "GFLOP", "MB moved", "FLOP per byte"), tuple(rows), "modelled")


# --- machines you may not have -------------------------------------------------------------------


def weight_bytes(bits: float, shape: roofline.Shape = LLAMA_70B) -> float:
    """Bytes of all weights at ``bits`` each: linear layers, output layer, and an embedding as large as that."""
    matrices = [*shape.linears, shape.head, shape.head]
    return sum(out * inputs for out, inputs in matrices) * bits / 8


def step_seconds(roof, bits: float, batch: int = 1, context: int = 1000, shape: roofline.Shape = LLAMA_70B) -> float:
    """The least seconds of a decode step (modelled): weights at ``bits``, 16-bit activations, KV cache and arithmetic."""
    work = roofline.decode_work(shape, batch, context, bits, activation_bytes=2)
    best = compute_dtype(roof)
    return roof.seconds(work, best) if best else work.bytes / roof.bandwidth


def compute_dtype(roof) -> str | None:
    """What weight-only quantization multiplies in: bf16 where the machine has it, whatever the weights are stored in."""
    return next((d for d in ("bf16", "fp16", "fp32") if d in roof.peaks), None)


def elsewhere(machine: str, bits: int, batch: int) -> tuple[go.Figure, str]:
    """A 70B model's decode and prefill under the roof of another machine; all modelled."""
    roofs = roofline.catalogue()
    if machine not in roofs:
        raise ValueError(f"machine = {machine!r} is not in the catalogue: {', '.join(roofs)}.")
    roof = roofs[machine]
    dtype = compute_dtype(roof)
    works = {
        "decode": roofline.decode_work(LLAMA_70B, batch, 1000, bits, activation_bytes=2),
        "prefill, 1,000 tokens": roofline.prefill_work(LLAMA_70B, 1, 1000, bits, activation_bytes=2),
    }
    points = [
        {
            "name": n,
            "intensity": w.intensity,
            "speed": roof.attainable(w.intensity, dtype),
            "group": "at best (modelled)",
        }
        | ({"dtype": dtype} if dtype else {})
        for n, w in works.items()
    ]
    others = {name: r for name, r in roofs.items() if name != machine and dtype in r.peaks}
    figure = plots.roofline(roof, points, others, dtypes=[dtype] if dtype else None)
    need_gb, has_gb = weight_bytes(bits) / 1e9, roof.memory / 1e9
    seconds = step_seconds(roof, bits, batch)
    fits = (
        f"the weights take {need_gb:.0f} GB and fit into its {has_gb:.0f} GB"
        if need_gb < has_gb
        else f"the weights take {need_gb:.0f} GB and do not fit into its {has_gb:.0f} GB, so this is a thought experiment"
    )
    what = f"A 70B model at {bits} bits on {roof.name} (modelled): {fits}."
    bound = roof.bound(works["decode"].intensity, dtype) if dtype else "memory"
    return figure, (
        f"{what} A decode step of batch {batch} takes at least {words.short(1e3 * seconds)} ms: at most "
        f"{words.short(1 / seconds)} tokens/s for each sequence, {words.short(batch / seconds)} for all together. "
        f"It is {bound}-bound"
        + (f"; the ridge is at {roof.ridge(dtype):.0f} FLOP per byte in {dtype}." if dtype else ".")
    )


def catalogue_bars(bits: Sequence[int] = (16, 8, 4)) -> go.Figure:
    """Tokens/s of a 70B model at batch 1 on the catalogue's machines (modelled); no bar where its weights do not fit."""
    roofs = roofline.catalogue()
    values = {
        f"{b} bits": {name: 1 / step_seconds(roof, b) for name, roof in roofs.items() if weight_bytes(b) < roof.memory}
        for b in bits
    }
    shown = [name for name in roofs if any(name in row for row in values.values())]
    figure = plots.bars(values, "tokens/s at best", "Decode of a 70B model, batch 1 (modelled)", height=340)
    figure.update_xaxes(categoryorder="array", categoryarray=shown)
    return figure
