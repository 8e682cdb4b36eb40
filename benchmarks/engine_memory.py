"""What compiling takes, in a process that did nothing before: ``python engine_memory.py fp32|4-bit`` prints four numbers.

Seconds; bytes that the engine counts; the peak and the steady resident set above what it was with the source in memory
(every page of it read, for its file is mapped and counts only then).
"""

import gc
import json
import subprocess
import sys
from pathlib import Path


def measured(kind: str) -> list[float]:
    """Run this file in a process of its own."""
    made = subprocess.run([sys.executable, __file__, kind], capture_output=True, text=True, check=True)
    return json.loads(made.stdout.splitlines()[-1])


def main(kind: str) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import onnx  # noqa: F401  (libraries are no part of it)
    import onnxruntime  # noqa: F401
    import torch

    import labkit
    from labkit.engine import compile
    from labkit.measure import memory

    lm = labkit.load(device="cpu", dtype=torch.float32)
    options = {"threads": 2}
    if kind == "fp32":
        options |= {"head_bits": None, "embedding_bits": None}
    else:
        lm = labkit.RTN(bits=4, group_size=64)(lm, progress=False)
    for tensor in (*lm.model.parameters(), *lm.model.buffers()):
        tensor.sum()
    gc.collect()
    before = memory.resident()
    with memory.peak(lm.device, every=0.001) as peak:
        engine = compile(lm, **options)
    engine.prefill(torch.arange(16)[None])
    gc.collect()
    print(json.dumps([engine.seconds, engine.nbytes, peak.bytes - before, memory.resident() - before]))


if __name__ == "__main__":
    main(sys.argv[1])
