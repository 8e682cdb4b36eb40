"""labkit: what is the bottleneck, and which compression technique shifts it?"""

from labkit import export, text
from labkit.cache import H2O, KIVI, RandomKV, RecentKV, Scissorhands, SnapKV, StreamingLLM
from labkit.cache.sharing import FewerKVHeads
from labkit.coverage import LeftUncompressed
from labkit.measure import Measurement, divergence, measure, perplexity, roofline, timing
from labkit.measure.paired import compare
from labkit.method import Method, Recipe, methods
from labkit.model import LanguageModel, load
from labkit.prune import Magnitude, SparseGPT, Wanda
from labkit.quantize import AWQ, AWQGPTQ, GPTQ, HQQ, RTN, BitsAndBytes, MixedPrecision, SmoothQuant
from labkit.record import record
from labkit.results import Store
from labkit.sweep import sweep

__all__ = [
    "RTN",
    "GPTQ",
    "AWQ",
    "AWQGPTQ",
    "SmoothQuant",
    "HQQ",
    "BitsAndBytes",
    "MixedPrecision",
    "Magnitude",
    "Wanda",
    "SparseGPT",
    "StreamingLLM",
    "H2O",
    "Scissorhands",
    "SnapKV",
    "KIVI",
    "RecentKV",
    "RandomKV",
    "FewerKVHeads",
    "LanguageModel",
    "LeftUncompressed",
    "Measurement",
    "Method",
    "Recipe",
    "Store",
    "check",
    "compare",
    "compile",
    "divergence",
    "export",
    "load",
    "measure",
    "methods",
    "panel",
    "perplexity",
    "record",
    "roofline",
    "sweep",
    "text",
    "timing",
]


def __getattr__(name: str):
    # What needs widgets or onnx, or is only for exercises, is imported when it is first asked for.
    if name == "panel":
        from labkit.ui.panel import panel

        return panel
    if name == "compile":
        from labkit.engine import compile

        return compile
    if name == "check":
        import labkit.check as check

        return check
    raise AttributeError(f"module 'labkit' has no attribute {name!r}")
