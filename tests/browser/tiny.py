"""A tiny random Llama, a method that rounds it, and a real if small measurement: what the browser tests look at.

Imported by the test notebooks; nothing here needs a download.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from labkit.coverage import Coverage
from labkit.measure.measurement import Latency, Measurement, Memory, Quality
from labkit.method import Method, knob
from labkit.progress import track
from labkit.results import Key

HASHES = {"manual": "0" * 15 + "1", "prose": "0" * 15 + "2"}
HOW = {"windows": 2, "length": 32, "latency": True}


class Tiny:
    """As much of a LanguageModel as the panel touches."""

    name, fingerprint, history = "tiny random Llama", "0123456789abcdef", ()
    coverage = Coverage()

    def __init__(self, model=None):
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(config).eval() if model is None else model

    def copy(self):
        twin = Tiny()
        twin.model.load_state_dict(self.model.state_dict())
        return twin


@dataclass(frozen=True)
class Rounding(Method):
    """Rounds every linear layer of a tiny model to a few levels per row or group."""

    kind = "quantize"
    bits: int = knob(4, low=2, high=8, help="bits of every rounded weight")
    group_size: int | None = knob(32, low=8, stops=(8, 16, 32, None), none="per row", help="weights that share a scale")
    symmetric: bool = knob(False, help="the same levels on both sides of zero")
    order: str = knob("rows", choices=("rows", "columns"), help="which way the groups run")

    def apply(self, lm, calib, progress):
        if self.bits == 7 and self.symmetric:
            raise ValueError("bits = 7 with symmetric = True is not allowed here: choose another number of bits.")
        lm.bits, lm.size = self.bits, self.group_size or 64
        for layer in track(list(lm.model.model.layers.modules()), "rounding layers", show=progress):
            if isinstance(layer, torch.nn.Linear):
                w = layer.weight.data.reshape(-1, self.group_size or layer.in_features)
                scale = w.abs().amax(1, keepdim=True) / (2 ** (self.bits - 1) - 0.5)
                layer.weight = torch.nn.Parameter((w / scale).round().mul(scale).reshape(layer.weight.shape))


@torch.inference_mode()
def measure(lm, against=None, texts=("manual", "prose"), windows=2, length=32, latency=True, progress=True):
    """Perplexity and KL on random tokens, bytes of the linears, seconds of a forward pass; slow enough to be seen."""
    quality = {}
    for seed, text in enumerate(texts):
        ids = torch.randint(256, (windows, length), generator=torch.Generator().manual_seed(seed))
        for _ in track(range(20), f"perplexity on {text}", show=progress):
            time.sleep(0.1)
        logp = lm.model(ids).logits[:, :-1].log_softmax(-1)
        by = {"nll": -logp.gather(-1, ids[:, 1:, None])[..., 0].mean(-1)}
        if against is not None:
            reference = against.model(ids).logits[:, :-1].log_softmax(-1)
            by["kl"] = (reference.exp() * (reference - logp)).sum(-1).mean(-1)
            by["top1"] = (reference.argmax(-1) == logp.argmax(-1)).float().mean(-1)
        mean = {name: float(values.mean()) for name, values in by.items()}
        error = {f"{name}_se": float(values.std()) / len(values) ** 0.5 for name, values in by.items()}
        known = {name: value for name, value in (mean | error).items() if not name.startswith("nll")}
        ppl = math.exp(mean["nll"])
        windowed = {name: values.tolist() for name, values in by.items()}
        quality[text] = Quality(ppl, ppl * error["nll_se"], ids[:, 1:].numel(), **known, per_window=windowed)
    total = sum(p.numel() for p in lm.model.parameters())
    linears = sum(m.weight.numel() for m in lm.model.model.layers.modules() if isinstance(m, torch.nn.Linear))
    bits = lm.bits + 16 / lm.size if against is not None else 32.0
    held = int(linears * bits / 8)
    start = time.perf_counter()
    lm.model(ids)
    ms = 1000 * (time.perf_counter() - start)
    speed = None if against is None else 32 / bits
    spread = speed and [0.95 * speed, 1.05 * speed]
    times = Latency(ms, ms / 10, length, ms / (speed or 1), ms / 20, 1, speed and 1.0, speed, decode_spread=spread)
    return Measurement(
        model=lm.name,
        method="uncompressed" if against is None else "Rounding",
        quality=quality,
        memory=Memory(4 * (total - linears) + held, held, bits, 512_000, 1000),
        latency=times if latency else None,
        device="cpu",
        texts=HASHES,
    )


def fill(store, bits=(8, 6, 4, 2)) -> None:
    """Put the uncompressed model and a few settings into the store, at full speed."""
    pause, time.sleep = time.sleep, lambda _: None
    try:
        lm = Tiny()
        store.put(Key.of(lm, None, HASHES), measure(lm, progress=False))
        for b in bits:
            method = Rounding(bits=b)
            store.put(Key.of(lm, method, HASHES), measure(method(lm, progress=False), lm, progress=False))
    finally:
        time.sleep = pause
