"""One matrix times one vector, as in every step of decoding: what do fewer bits buy, and how near is the memory roof?

Caches are flushed before every sample, for in a model each layer's weights come from memory.
"""

import torch
from report import Row

from labkit.formats import Integer
from labkit.linear import PackedLinear
from labkit.measure import roofline, timing

TITLE = "Matrix times vector: dense fp32 and bf16, packed 8-, 4- and 2-bit"
TIMEOUT = 300
SHAPES = ((1536, 576), (4096, 4096), (14336, 4096))  # (out, in): this model's gate, Llama-2-7B's o, Llama-3-8B's up


@torch.inference_mode()
def run(quick: bool) -> list[Row]:
    roof = roofline.measure(seconds=0.3 if quick else 1.0)
    rows = []
    for out_features, in_features in SHAPES:
        weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0))
        x = torch.randn(1, in_features)
        half, x_half = weight.bfloat16(), x.bfloat16()
        layers = {bits: PackedLinear(Integer(bits, 64).encode(weight)) for bits in (8, 4, 2)}
        found = {"fp32": lambda w=weight, x=x: torch.mv(w, x[0]), "bf16": lambda w=half, x=x_half: torch.mv(w, x[0])}
        found |= {f"{bits}-bit": lambda layer=layer, x=x: layer(x) for bits, layer in layers.items()}
        timed = timing.compare(found, rounds=7 if quick else 31, device="cpu", flush=True)
        read = {"fp32": weight.nbytes, "bf16": half.nbytes} | {f"{b}-bit": m.runtime_nbytes for b, m in layers.items()}
        for name, t in timed.timings.items():
            share = read[name] / t.median / roof.bandwidth
            what = f"{out_features}×{in_features} {name}"
            rows.append(Row(what, 1e6 * t.median, "µs", "fp32", timed.ratio[name]))
            rows.append(Row(f"{what}, bytes read", read[name] / 1e6, "MB", "read bandwidth", share))
    return rows
