"""Sentences about a method and its measurements: plain strings, true in both directions.

"Faster" is said only when the paired ratio leaves the spread of the timing; "grows" only when the divergence leaves
its standard error. Everything here is a pure function of its arguments.
"""

from __future__ import annotations

import html
import math

# A knob's value in a sentence. Knobs that are not listed read "name value".
PHRASES = {
    "bits": "{} bits",
    "group_size": "groups of {}",
    "sparsity": "{:.0%} zeros",
    "pattern": "{} pattern",
    "keep": "{:.0%} kept",
    "budget": "a budget of {} tokens",
    "steps": "{} steps",
    "density": "{:.0%} of the neurons active",
}

# What to predict, by the kind of technique.
QUESTIONS = {
    "quantize": "will decode get faster or slower, and by how much? And where will KL end up?",
    "prune": "will the model get smaller? Will it get faster? And which of the two texts will suffer more?",
    "structure": "will prefill or decode gain more? And where will perplexity end up?",
    "train": "will KL fall, and on which of the two texts more?",
    "cache": "how much will the KV cache shrink, and will decode feel it?",
    "conditional": "how much of the skipped work will show up as time saved?",
}
OTHERWISE = "what will change most: accuracy, memory or latency?"


def percent(share: float) -> str:
    """``0.1437 -> "14 %"``, with a decimal below 10 %."""
    return f"{100 * share:.1f} %" if 0 < abs(share) < 0.0995 else f"{100 * share:.0f} %"


def short(x: float) -> str:
    """A number with the digits worth reading: ``0.0042``, ``0.30``, ``15.3``, ``586``."""
    if not math.isfinite(x):
        return "not a number" if math.isnan(x) else "infinite"
    size = abs(x)
    if size < 0.00005:
        return "0"
    digits = 4 if size < 0.01 else 3 if size < 0.0995 else 2 if size < 9.95 else 1 if size < 99.5 else 0
    return f"{x:,.{digits}f}"


def ratio(x: float) -> str:
    """A speed ratio: ``2.6x``, with two decimals near one, where the second one matters."""
    return f"{x:.2f}x" if x < 1.945 else f"{x:.1f}x"


def the(text: str) -> str:
    """How a text is called in a sentence."""
    return f"the {text}" if text in ("manual", "prose") else text


def value(knob, setting) -> str:
    """A knob's setting as a slider shows it; None reads as what it means, such as ``"per row"``."""
    if setting is None:
        return knob.none or "none"
    if isinstance(setting, bool):
        return "yes" if setting else "no"
    return f"{setting:g}" if isinstance(setting, float) else str(setting)


def describe(method) -> str:
    """A method's settings in words: ``"4 bits with groups of 64"``; a recipe's steps joined by "then"."""
    if getattr(method, "methods", None):
        return ", then ".join(
            f"{type(m).__name__} ({describe(m)})" if m.knobs() else type(m).__name__ for m in method.methods
        )
    parts = []
    for name, knob in method.knobs().items():
        setting = getattr(method, name)
        label = name.replace("_", " ")
        if setting is None:
            parts.append(knob.none)
        elif isinstance(setting, bool):
            parts += [label] if setting else []
        elif name == "format":
            parts += [] if setting == knob.default else [f"format {setting}"]
        elif name in PHRASES:
            parts.append(PHRASES[name].format(setting))
        else:
            parts.append(f"{label} {value(knob, setting)}")
    if not parts:
        return type(method).__name__
    return parts[0] + (" with " + ", ".join(parts[1:]) if parts[1:] else "")


def question(method, moved: str | None = None, upward: bool | None = None) -> str:
    """What to predict before the next move: one step further on the knob that was ``moved`` last.

    Without ``moved``, the first knob that has a next position, downwards (towards fewer bits, fewer tokens).
    """
    ask = QUESTIONS.get(method.kind, OTHERWISE)
    for name, knob in method.knobs().items():
        stops = knob.positions()
        if (moved and name != moved) or len(stops) < 2 or getattr(method, name) not in stops:
            continue
        at = stops.index(getattr(method, name))
        step = 1 if upward else -1
        if not 0 <= at + step < len(stops):
            step = -step
        here, there = value(knob, stops[at]), value(knob, stops[at + step])
        return f"Predict: if you move {name} from {here} to {there}, {ask}"
    return f"Predict: {ask}"


def waiting(method) -> str:
    """What to predict while ``method`` is being measured."""
    return f"Predict, before the answer comes: {at(method)[0].lower()}{at(method)[1:]}, {QUESTIONS.get(method.kind, OTHERWISE)}"


def at(method) -> str:
    """How a sentence about a method starts: ``"At 4 bits with groups of 64"``, ``"With <name>"``."""
    named = not method.knobs() or getattr(method, "methods", None)
    return f"{'With' if named else 'At'} {describe(method)}"


def memory(method, baseline, current) -> str:
    """What happened to the bytes of the linear layers and, where it changed, of the KV cache."""
    before, after = baseline.memory, current.memory
    share = after.linears / before.linears
    bits = f"({short(after.bits_per_weight)} bits per weight, metadata included)"
    if share < 0.995:
        text = f"the linear layers shrink to {percent(share)} of their bytes {bits}"
    elif share > 1.005:
        text = f"the linear layers grow to {percent(share)} of their bytes {bits}"
    else:
        text = f"the linear layers take as many bytes as before {bits}"
    if after.kv_per_token != before.kv_per_token:
        text += (
            f", and the KV cache grows by {percent(after.kv_per_token / before.kv_per_token)} of the bytes per token"
        )
    return f"{at(method)}, {text}."


def pace(phase: str, ms: float, iqr: float, speed: float | None, unit: str) -> str:
    """One phase's speed against the uncompressed model: faster, slower, or neither."""
    if speed is None:
        return f"{phase} takes {short(ms)} {unit} (not timed beside the uncompressed model)"
    spread = max(0.03, iqr / ms if ms else 0.0)
    if speed > 1 + spread:
        return f"{phase} is {ratio(speed)} as fast"
    if speed < 1 - spread:
        return f"{phase} is slower: {ratio(speed)} the speed of the uncompressed model"
    return f"{phase} is no faster: {ratio(speed)}, within the spread of the timing"


def latency(current) -> str:
    """Decode and prefill in one sentence, and decode as one graph; says so when nothing was measured."""
    t = current.latency
    if t is None:
        return "Latency was not measured."
    parts = [
        pace("decode", t.decode_ms, t.decode_iqr, t.decode_ratio, "ms per token"),
        pace("prefill", t.prefill_ms, t.prefill_iqr, t.prefill_ratio, "ms"),
    ]
    if current.engine is not None:
        e = current.engine
        parts.append("run as one graph, " + pace("decode", e.decode_ms, e.decode_iqr, e.decode_ratio, "ms per token"))
    return sentence("; ".join(parts))


def accuracy(baseline, current) -> str:
    """KL, perplexity and top-1 agreement on every text; KL is left out where it was not measured."""
    out = []
    diverging = {name: q for name, q in current.quality.items() if q.kl is not None}
    if diverging:
        worst = max(diverging.values(), key=lambda q: q.kl)
        where = [f"{short(q.kl)} on {the(name)}" for name, q in diverging.items()]
        if worst.kl > max(0.0005, 2 * (worst.kl_se or 0.0)):
            out.append(f"KL grows from 0 to {listed(where)} (nats per token)")
        else:
            out.append(f"KL stays near 0 ({listed(where)}): these texts cannot tell the two models apart")
    moves, broken = [], []
    for name, q in current.quality.items():
        if not math.isfinite(q.perplexity):
            broken.append(f"{short(q.perplexity)} on {the(name)}")
        elif name in baseline.quality:
            moves.append(f"from {short(baseline.quality[name].perplexity)} to {short(q.perplexity)} on {the(name)}")
    if moves:
        out.append(f"perplexity goes {listed(moves)}")
    if broken:
        out.append(f"perplexity is {listed(broken)}: the model is broken at this setting")
    agreeing = [q.top1 for q in current.quality.values() if q.top1 is not None]
    if agreeing:
        shown = sorted({percent(t) for t in agreeing}, key=lambda p: float(p.split()[0]))
        out.append(
            f"the most likely next token is the same in {' to '.join([shown[0], shown[-1]][: len(shown)])} of places"
        )
    return sentence("; ".join(out)) if out else "Accuracy was not measured."


def step(method, baseline, current, earlier_method, earlier) -> str:
    """The move itself, before → after: what the last change of a knob did."""
    parts = []
    for name, q in current.quality.items():
        old = earlier.quality.get(name)
        if q.kl is not None and old is not None and old.kl is not None:
            parts.append(f"KL on {the(name)} {short(old.kl)} → {short(q.kl)}")
    size = baseline.memory.linears
    parts.append(f"linear layers {percent(earlier.memory.linears / size)} → {percent(current.memory.linears / size)}")
    now, then = current.latency, earlier.latency
    if now and then and now.decode_ratio and then.decode_ratio:
        parts.append(f"decode {ratio(then.decode_ratio)} → {ratio(now.decode_ratio)}")
    return f"Compared with {describe(earlier_method)}: {', '.join(parts)}."


def drift(baseline, current) -> str:
    """A warning when the two runs behind the latency bars disagree with a paired ratio by more than 15 %."""
    old, new = baseline.latency, current.latency
    if old is None or new is None:
        return ""
    pairs = ((old.decode_ms, new.decode_ms, new.decode_ratio), (old.prefill_ms, new.prefill_ms, new.prefill_ratio))
    if all(not speed or not now or abs(then / now / speed - 1) <= 0.15 for then, now, speed in pairs):
        return ""
    return (
        "The machine ran at another pace when the uncompressed model was timed: the times come from two runs, "
        "the ratios from one interleaved run. Trust the ratios."
    )


def source(found, machine: str, label: str = "measured") -> str:
    """Where the numbers come from. ``found``: the store's row, None for one measured just now on ``machine``."""
    label = label.capitalize()
    if found is None or (found.here and not found.shipped):
        return f"{label} here."
    if found.key.machine == machine:
        if found.shipped:
            return f"{label} on a machine like this one, shipped with labkit."
        return f"{label} on this machine with other versions ({found.key.versions})."
    shipped = ", shipped with labkit" if found.shipped else ""
    return (
        f"{label} on another machine ({found.key.machine}){shipped}. "
        "Accuracy and bytes carry over to this machine; times need not."
    )


def listed(parts: list[str]) -> str:
    """``["a", "b", "c"] -> "a, b and c"``"""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def sentence(text: str) -> str:
    """Capital letter and full stop, the rest untouched."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "?", "!")) else ".")


def small(text: str) -> str:
    """Quiet HTML for help and status lines."""
    return f"<span class='labkit-small'>{html.escape(text)}</span>"
