"""Heads that share keys and values: MHA -> GQA -> MQA -> MLA, in bytes, in a layer to read, and on this model."""

from labkit.cache.sharing.fewer import FewerKVHeads
from labkit.cache.sharing.mla import MultiHeadLatentAttention
from labkit.cache.sharing.shapes import AttentionShape, catalogue, kv_bytes

__all__ = ["AttentionShape", "FewerKVHeads", "MultiHeadLatentAttention", "catalogue", "kv_bytes"]
