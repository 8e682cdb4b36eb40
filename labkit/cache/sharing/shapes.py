"""How large a KV cache is, from a model's shape alone: modelled, nothing is run."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import cache as remember

from labkit.method import brief
from labkit.paths import data

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5, "int2": 0.25}


@dataclass(frozen=True)
class AttentionShape:
    """What of a model decides the size of its cache. The fields are explained in ``data/attention_shapes.toml``."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int = 0
    window: int | None = None
    full_layers: int | None = None
    latent: int | None = None
    rope: int = 0
    source: str = ""
    label: str = "modelled"

    def __post_init__(self):
        for name in ("layers", "heads", "kv_heads", "head_dim", "window", "latent"):
            value = getattr(self, name)
            if value is None and name in ("window", "latent"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} = {brief(value)} is not allowed: it must be a whole number, 1 or more.")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads = {self.kv_heads} is not allowed: it must divide heads = {self.heads}.")
        if self.full_layers is not None and not 0 <= self.full_layers <= self.layers:
            raise ValueError(f"full_layers = {brief(self.full_layers)} is not allowed: it must be 0 to {self.layers}.")

    @classmethod
    def of(cls, lm) -> AttentionShape:
        """The shape of a loaded model, whose layers all see the whole text."""
        config = lm.model.config.get_text_config()
        return cls(
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            context=getattr(config, "max_position_embeddings", 0),
            source=lm.name,
        )

    @property
    def kind(self) -> str:
        """ "MHA", "GQA" (some query heads share), "MQA" (all share one) or "MLA" (a latent vector for all)."""
        if self.latent is not None:
            return "MLA"
        return "MHA" if self.kv_heads == self.heads else "MQA" if self.kv_heads == 1 else "GQA"

    @property
    def per_token(self) -> int:
        """Numbers that one layer keeps for one token."""
        return self.latent + self.rope if self.latent is not None else 2 * self.kv_heads * self.head_dim

    def shared(self, kv_heads: int) -> AttentionShape:
        """The same model with so many KV heads: its own number of heads for MHA, 1 for MQA."""
        return replace(self, kv_heads=kv_heads, latent=None, rope=0)


def kv_bytes(shape: AttentionShape, tokens: int, dtype: str = "bf16") -> int:
    """Bytes of the KV cache of one text of so many tokens; a layer with a sliding window keeps no more than that."""
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
        raise ValueError(f"tokens = {brief(tokens)} is not allowed: it must be a whole number, 0 or more.")
    if dtype not in BYTES:
        raise ValueError(f"dtype = {brief(dtype)} is not allowed: it must be one of {', '.join(BYTES)}.")
    full = shape.full_layers
    if full is None:
        full = 0 if shape.window else shape.layers
    kept = full * tokens + (shape.layers - full) * min(tokens, shape.window or tokens)
    return round(kept * shape.per_token * BYTES[dtype])


@remember
def _catalogue() -> dict[str, AttentionShape]:
    entries = tomllib.loads((data() / "attention_shapes.toml").read_text(encoding="utf-8"))
    return {name: AttentionShape(**entry) for name, entry in entries.items()}


def catalogue() -> dict[str, AttentionShape]:
    """Published models by name, from MHA to MLA (``data/attention_shapes.toml``)."""
    return dict(_catalogue())
