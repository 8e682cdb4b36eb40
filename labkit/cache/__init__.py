"""Methods for the KV cache: which tokens it forgets, and in how many bits it keeps the rest."""

from labkit.cache.base import CacheMethod, CachePolicy, install, methods_of
from labkit.cache.baselines import RandomKV, RecentKV
from labkit.cache.h2o import H2O
from labkit.cache.kivi import KIVI
from labkit.cache.reading import read
from labkit.cache.scissorhands import Scissorhands
from labkit.cache.snapkv import SnapKV
from labkit.cache.streaming import StreamingLLM

__all__ = [
    "H2O",
    "KIVI",
    "CacheMethod",
    "CachePolicy",
    "RandomKV",
    "RecentKV",
    "Scissorhands",
    "SnapKV",
    "StreamingLLM",
    "install",
    "methods_of",
    "read",
]
