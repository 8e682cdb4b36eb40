"""What a decoder computes, read off its modules: the parts that one graph needs, and what each family does differently.

There is no file per architecture. Llama, Qwen2, Qwen3, Mistral and Gemma share one skeleton; where they differ (biases,
norms on q and k, a sliding window, 1 + w in the norms, a scaled embedding, the gate's activation) the module itself
tells. Every shape comes from a tensor, not from the config, for a pruned model has fewer heads, channels or layers than
its config first said, and not the same number in every layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from labkit import cache
from labkit.walk import blocks, is_linear

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma")
GATES = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh", "GELUActivation": "gelu", "GELU": "gelu"}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
HEAD = 16  # onnxruntime's attention turns heads of a multiple of 16 channels (widths from 2 to 512 tried with its 1.32)


class NotCompilable(ValueError):
    """This model has no single graph: it runs eagerly, through transformers, as before."""

    def __init__(self, what: str):
        super().__init__(f"{what}, so it cannot be compiled and runs eagerly.")


@dataclass
class Block:
    """One decoder block. Linears are modules (dense or packed); norms are the factors that multiply x / rms(x)."""

    norm: torch.Tensor  # (hidden,)
    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None  # tokens a query sees, itself included; None: all
    q_norm: torch.Tensor | None  # (head_dim,)
    k_norm: torch.Tensor | None
    mlp_norm: torch.Tensor
    gate: nn.Module
    up: nn.Module
    down: nn.Module


@dataclass
class Decoder:
    """A whole model, as the graph builder wants it."""

    embedding: torch.Tensor  # (vocabulary, hidden)
    embedding_scale: float
    blocks: list[Block]
    norm: torch.Tensor
    head: nn.Module
    tied: bool  # the head's weight is the embedding
    epsilon: float
    gate: str  # "silu", "gelu" or "gelu_tanh"
    rotary: nn.Module
    context: int  # positions the model was made for


def read(model) -> Decoder:
    """Take a transformers model apart. Raises :class:`NotCompilable`, saying why, when it is none of the families."""
    family = getattr(model.config, "model_type", type(model).__name__)
    if family not in FAMILIES:
        raise NotCompilable(f"{type(model).__name__} is not of the {', '.join(FAMILIES[:-1])} or {FAMILIES[-1]} family")
    plain_cache(model)
    _untouched(model)
    base, head = model.base_model, model.get_output_embeddings()
    fixed_rotary(model)
    found = [_block(b, i) for i, b in enumerate(blocks(model))]
    if len({b.head_dim for b in found}) != 1:
        raise NotCompilable("Its layers have heads of different widths")
    if found[0].head_dim % HEAD:
        width = f"Its heads have {found[0].head_dim} channels"
        raise NotCompilable(f"{width}, and onnxruntime's attention takes multiples of {HEAD}")
    embedding = base.embed_tokens
    return Decoder(
        embedding=embedding.weight,
        embedding_scale=float(getattr(embedding, "embed_scale", 1.0)),
        blocks=found,
        norm=_gain(base.norm),
        head=head,
        tied=getattr(head, "weight", None) is embedding.weight,
        epsilon=_epsilon(base.norm),
        gate=_gate(blocks(model)),
        rotary=base.rotary_emb,
        context=model.config.max_position_embeddings,
    )


def fixed_rotary(model) -> None:
    """A graph holds one angle per position and channel; some rotary embeddings choose theirs by the length of the text."""
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    every = [parameters, *(p for p in parameters.values() if isinstance(p, dict))]  # of all layers, or by kind of layer
    for kind in {p.get("rope_type", "default") for p in every}:
        if "dynamic" in kind or kind == "longrope":
            raise NotCompilable(f"Its rotary embedding ({kind}) changes with the length of the text")


def plain_cache(model) -> None:
    """A graph keeps every token: it has no place for methods that evict or round what is in the cache."""
    if methods := cache.methods_of(model):
        names = " and ".join(type(m).__name__ for m in methods)
        raise NotCompilable(f"{names} hooked into its cache, and a graph's cache keeps every token")


def _untouched(model) -> None:
    """Hooks and replaced forwards change what a module computes in a way that no graph of its tensors shows."""
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise NotCompilable(f"{name or type(model).__name__} is computed with a hook or a forward of its own")


def _block(block: nn.Module, index: int) -> Block:
    attention, mlp = getattr(block, "self_attn", None), getattr(block, "mlp", None)
    for module, names in zip((attention, mlp), PROJECTIONS):
        for name in names:
            if not is_linear(getattr(module, name, None) or nn.Identity()):
                raise NotCompilable(f"Block {index} has no linear {name} where its family has one")
    width = attention.head_dim
    heads, kv_heads = attention.q_proj.out_features // width, attention.k_proj.out_features // width
    if heads % kv_heads or attention.v_proj.out_features != kv_heads * width:
        raise NotCompilable(
            f"Block {index} has {heads} query heads on {kv_heads} key heads, not a whole number on each"
        )
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    config = attention.config
    window = getattr(attention, "sliding_window", config.sliding_window if config.model_type == "mistral" else None)
    return Block(
        norm=_gain(block.input_layernorm),
        q=attention.q_proj,
        k=attention.k_proj,
        v=attention.v_proj,
        o=attention.o_proj,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width,
        scale=float(attention.scaling),
        window=window,
        q_norm=None if q_norm is None else _gain(q_norm),
        k_norm=None if k_norm is None else _gain(k_norm),
        mlp_norm=_gain(block.post_attention_layernorm),
        gate=mlp.gate_proj,
        up=mlp.up_proj,
        down=mlp.down_proj,
    )


def _epsilon(norm: nn.Module) -> float:
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", None)))


@torch.no_grad()
def _gain(norm: nn.Module) -> torch.Tensor:
    """The factor of an RMS norm, found by using it: w in most families, 1 + w in Gemma."""
    weight = norm.weight.detach().float()
    x = torch.linspace(-2, 3, len(weight), dtype=torch.float64)
    plain = x / (x.square().mean() + _epsilon(norm)).sqrt()
    given = norm(x.to(norm.weight)).double().cpu()
    for gain in (weight, 1 + weight):
        if torch.allclose(given, plain * gain.cpu().double(), rtol=1e-2, atol=1e-2):  # bf16 norms are that coarse
            return gain
    raise NotCompilable(f"{type(norm).__name__} is not an RMS norm")


def _gate(stack: nn.ModuleList) -> str:
    names = {type(block.mlp.act_fn).__name__ for block in stack}
    name = names.pop()
    if names or name not in GATES:
        raise NotCompilable(f"Its gate {name} is none of {', '.join(GATES)}")
    return GATES[name]


@torch.no_grad()
def rotary_tables(decoder: Decoder, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin per position, each (positions, head_dim / 2): the model's own module computes them."""
    like = torch.zeros(1, dtype=torch.float32, device=decoder.embedding.device)
    cos, sin = decoder.rotary(like, torch.arange(positions, device=like.device)[None])
    half = cos.shape[-1] // 2
    return cos[0, :, :half].cpu(), sin[0, :, :half].cpu()
