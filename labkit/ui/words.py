"""Sentences about a method and its measurements: plain strings, true in both directions.

"Faster" is said only when both quartiles of the paired ratio are above 1; "grows", "better" and "worse" only when the
interval of the difference, window by window, leaves 0. Everything here is a pure function of its arguments.
"""

from __future__ import annotations

import html
import math

from labkit.measure.paired import UNSURE, WORSE, between

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
SHORT = 16  # tokens of context at which most methods decode; a longer one is said
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
    bits = f"at {short(after.bits_per_weight)} bits per weight, metadata included"
    if 0.995 <= share <= 1.005:
        text = f"the linear layers take as many bytes as before, {bits}"
    else:
        way = "shrink" if share < 1 else "grow"
        of = "of their bytes"
        if before.bits_before > 16:  # the field's baseline: modelled, for nothing is loaded in 16 bits
            halved = percent(share * before.bits_before / 16)
            of = f"of their bytes in {precision(before.bits_before)}, or {halved} of those in 16 bits (modelled)"
        text = f"the linear layers {way} to {percent(share)} {of}, {bits}"
    return f"{at(method)}, {text}{_cache(before, after)}."


def precision(bits: int) -> str:
    """``32 -> "fp32"``: what weights of that many bits are called here."""
    return "fp32" if bits == 32 else f"{bits}-bit"


def _cache(before, after) -> str:
    """What the KV cache holds, where that is not what the uncompressed model's holds at the same length."""
    if not (after.kv_tokens and before.kv_bytes):  # a model whose cache could not be weighed, or that has none
        return ""
    held = f", and the KV cache of {after.kv_tokens:,} tokens holds {short(after.kv_bytes / 1e6)} MB"
    if after.kv_tokens != before.kv_tokens:
        return f"{held} (the uncompressed model's was weighed at {before.kv_tokens:,} tokens)"
    if after.kv_bytes == before.kv_bytes:
        return ""
    return f"{held}, {percent(after.kv_bytes / before.kv_bytes)} of the uncompressed model's"


def left(method, current) -> str:
    """Which of the decoder's weights a method for weights has left alone, where that is more than 5 %; else ""."""
    m, parts = current.memory, getattr(method, "methods", None) or (method,)
    if m.compressed >= 0.95 or all(part.kind == "cache" for part in parts):
        return ""
    names = f"; left as they were: {listed(m.left)}" if m.left else ""
    return f"Only {percent(m.compressed)} of the decoder's weights were compressed{names}."


def pace(phase: str, t, than: str = "uncompressed model") -> str:
    """One phase's speed (of a Latency) against the uncompressed model run the same way: faster, slower, or neither.

    Judged by the quartiles of the paired ratio; a row without them has to leave 1 by 3 %.
    """
    speed, spread = getattr(t, f"{phase}_ratio"), getattr(t, f"{phase}_spread")
    if speed is None:
        unit = "ms per token" if phase == "decode" else "ms"
        return f"{phase} takes {short(getattr(t, f'{phase}_ms'))} {unit} (not timed beside the {than})"
    low, high = spread or (speed - 0.03, speed + 0.03)
    if low > 1 and speed >= 1.005:  # what reads 1.00x is no gain
        return f"{phase} is {ratio(speed)} as fast as the {than}"
    if high < 1 and speed < 0.995:
        return f"{phase} is slower: {ratio(speed)} the speed of the {than}"
    quartiles = f" (quartiles {low:.2f} to {high:.2f})" if spread else ""
    return f"{phase} is no faster than the {than}: {ratio(speed)}{quartiles}"


def latency(current) -> str:
    """Decode and prefill in one sentence, and decode as one graph; says so when nothing was measured."""
    t, e = current.latency, current.engine
    if t is None:
        return "Latency was not measured."
    after = f"after {t.context:,} tokens, " if t.context > SHORT else ""
    parts = [f"run eagerly, {after}{pace('decode', t)}", pace("prefill", t)]
    if e is not None:
        parts.append("run as one graph, " + pace("decode", e, "uncompressed graph"))
    return sentence("; ".join(parts))


def accuracy(baseline, current) -> str:
    """KL, perplexity and top-1 agreement on every text; KL is left out where it was not measured."""
    out = [*_divergence(baseline, current)]
    moves, broken = [], []
    for name, q in current.quality.items():
        old = baseline.quality.get(name)
        if not math.isfinite(q.perplexity):
            broken.append(f"{short(q.perplexity)} on {the(name)}")
        elif old is not None and old.tokens != q.tokens:  # under a cache method: only what was read after the prompt
            moves.append(f"to {short(q.perplexity)} on {the(name)} (over {q.tokens:,} of its {old.tokens:,} tokens)")
        elif old is not None:
            judged = between(baseline, current, name, "nll")
            verdict = f" ({judged.verdict})" if judged.windows else ""  # KL has told that there are no values by window
            moves.append(f"from {short(old.perplexity)} to {short(q.perplexity)} on {the(name)}{verdict}")
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


def _divergence(baseline, current) -> list[str]:
    """KL from 0: where it grows, where it cannot be told from 0 and why, and what it is as run."""
    diverging = {name: q for name, q in current.quality.items() if q.kl is not None}
    grown, unsure = [], {}
    for name, q in diverging.items():
        found = between(baseline, current, name, "kl")
        if found.verdict == WORSE and short(q.kl) != "0":
            grown.append(f"{short(q.kl)} on {the(name)}")
        else:
            why = found.why or ("one window has no interval" if found.windows == 1 else "its interval reaches 0")
            unsure.setdefault(why if found.verdict == UNSURE else "", []).append(f"{short(q.kl)} on {the(name)}")
    out = [f"KL grows from 0 to {listed(grown)} (nats per token)"] if grown else []
    for why, where in unsure.items():
        out.append(f"KL is {listed(where)}" + (f": {UNSURE} whether it grows ({why})" if why else ""))
    as_run = [f"{short(q.kl_run)} on {the(name)}" for name, q in diverging.items() if q.kl_run is not None]
    if as_run:
        out.append(f"as run by one graph, with activations rounded to 8 bits too, KL is {listed(as_run)}")
    return out


def step(method, baseline, current, earlier_method, earlier) -> str:
    """The move itself, before → after: what the last change of a knob did, and whether it is better or worse."""
    parts = []
    for name, q in current.quality.items():
        old = earlier.quality.get(name)
        if q.kl is not None and old is not None and old.kl is not None:
            parts.append(f"KL on {the(name)} {short(old.kl)} → {short(q.kl)} ({between(earlier, current, name, 'kl')})")
    size, now, then = baseline.memory.linears, current.memory, earlier.memory
    parts.append(f"linear layers {percent(then.linears / size)} → {percent(now.linears / size)}")
    if now.kv_tokens == then.kv_tokens and now.kv_bytes != then.kv_bytes:
        parts.append(
            f"KV cache of {now.kv_tokens:,} tokens {short(then.kv_bytes / 1e6)} → {short(now.kv_bytes / 1e6)} MB"
        )
    for way, name in (("latency", "decode"), ("engine", "decode as one graph")):
        new, old = getattr(current, way), getattr(earlier, way)
        if new and old and new.decode_ratio and old.decode_ratio and new.context == old.context:
            parts.append(f"{name} {ratio(old.decode_ratio)} → {ratio(new.decode_ratio)}")
    return f"Compared with {describe(earlier_method)}: {', '.join(parts)}."


def drift(baseline, current) -> str:
    """A warning when the two runs behind the latency bars disagree with a paired ratio by more than 15 %."""
    old, new = baseline.latency, current.latency
    if old is None or new is None:
        return ""
    pairs = []
    if old.context == new.context:
        pairs.append((old.decode_ms, new.decode_ms, new.decode_ratio))
    if old.prefill_tokens == new.prefill_tokens:
        pairs.append((old.prefill_ms, new.prefill_ms, new.prefill_ratio))
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
