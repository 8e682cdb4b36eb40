"""What makes a model this model: a hash over every byte of its weights, and over what else decides its outputs.

Nothing is remembered between two calls. A weight can be written to without a trace (through ``.data``, through NumPy, as
an inference tensor), and in a lab on compression that is what people do; so all of it is read each time, at about the
speed of memory: 0.04 s for the embedded model's 538 MB.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Iterator

import torch
import xxhash

from labkit import cache
from labkit._share import address, raw

# What decides a model's outputs and does not show in the shapes of its weights. Not the whole config: each version of
# transformers writes other fields, and a model must be the same one under all of them.
CONFIG = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "num_experts_per_tok",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "rope_parameters",
    "sliding_window",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
)

# Of all other fields of a config those count whose value is not their class's own default. These never do: shapes, which
# the weights show, and what leaves the logits as they are.
COSMETIC = re.compile(
    r"vocab_size|hidden_size|intermediate_size|num_hidden_layers|head_dim|max_position_embeddings|tie_word_embeddings"
    r"|use_cache|pretraining_tp|initializer_.*|init_.*|.*_init|.*_init_.*|gradient_checkpointing"  # training, and its start
    r"|.*dropout.*|.*pdrop|.*_loss.*|.*jitter_noise|output_.*"
    r"|.*_token_id|.*_token_ids|.*_token_index"
)


def fingerprint(model) -> str:
    """16 hex digits that change with any weight of a transformers model, whatever changed it.

    They cover each parameter and persistent buffer (name, dtype, shape, bytes), how packed layers read theirs, the cache
    methods that are installed, the fields of :data:`CONFIG`, and every other field of the config that is not as its class
    has it by default (multipliers, kinds of layers, routing, …). They do not depend on the machine or the device.
    """
    parts = {
        "weights": sorted(_weights(model)),
        "layers": {name: m.spec() for name, m in model.named_modules() if hasattr(m, "spec")},
        "cache": [[type(m).__name__, m.key()] for m in cache.methods_of(model)],
        "config": _config(model),
    }
    if own := _settings(
        model
    ):  # left out when empty, as it is for the embedded model: keys from before it came still hold
        parts["settings"] = own
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def digest(tensor: torch.Tensor) -> str:
    """dtype, shape and a 128-bit hash (XXH3) of all bytes of a tensor on any device."""
    flat = tensor.detach().cpu().reshape(-1)
    if flat.stride() != (1,):  # a single number may keep any stride
        flat = flat.clone(memory_format=torch.contiguous_format)
    return f"{tensor.dtype} {tuple(tensor.shape)} {xxhash.xxh3_128_hexdigest(raw(flat))}"


def _weights(model) -> Iterator[tuple[str, str]]:
    """(name, digest) of each parameter and persistent buffer, tied ones under each of their names."""
    known: dict[tuple, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        released = dict(getattr(module, "released", {}))  # what a kernel's runtime has in our place
        kept = {name: t for name, t in module._buffers.items() if name not in module._non_persistent_buffers_set}
        for name, tensor in (module._parameters | kept).items():
            full = f"{path}.{name}" if path else name
            if tensor is None:
                if name in released:
                    yield full, released[name]
                continue
            place = address(tensor), tensor.dtype, tensor.shape, tensor.stride(), tensor.device
            if place not in known or not tensor.numel():
                known[place] = digest(tensor)
            yield full, known[place]


def _text_config(model):
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _config(model) -> dict:
    config = _text_config(model)
    return {name: plain for name in CONFIG if (plain := _plain(getattr(config, name, None))) is not None}


def _settings(model) -> dict:
    """The fields of the config that are not as its class has them by default: name -> value.

    What the class derives from shapes (the kind of each of so many layers) it derives here from the same shapes. Fields
    that the class does not know change nothing, since its model does not read them.
    """
    config = _text_config(model)
    if not hasattr(config, "to_dict"):
        return {}
    ours, default = config.to_dict(), _default(config)
    common = {own: name for name, own in getattr(config, "attribute_map", {}).items()}  # GPT-2's n_embd: hidden_size
    found = {}
    for name, value in ours.items():
        other = name in default and _plain(value) != _plain(default[name])
        if other and not _elsewhere(common.get(name, name)):
            found[common.get(name, name)] = _plain(value)
    rotary = ours.get("rope_parameters") or {}  # for all layers, or by kind of layer
    kinds = {p.get("rope_type", "default") for p in (rotary, *rotary.values()) if isinstance(p, dict)}
    if kinds != {"default"}:
        found["max_position_embeddings"] = _plain(
            getattr(config, "max_position_embeddings", None)
        )  # what stretches them
    return found


def _default(config) -> dict:
    """The same config with all fields that are not shown elsewhere as its class has them by default."""
    from transformers import PretrainedConfig

    cls, base = type(config), PretrainedConfig().to_dict()
    common = {own: name for name, own in getattr(config, "attribute_map", {}).items()}
    known = inspect.signature(cls.__init__).parameters
    given = {n: v for n, v in config.to_dict().items() if n in known and _elsewhere(common.get(n, n))}
    for fields in (given, {}):
        try:
            made = cls(**fields).to_dict()
        except Exception:  # not all allowed together, as a pruned model's
            continue
        return {n: v for n, v in made.items() if n not in base}
    return {}


def _elsewhere(name: str) -> bool:
    """Whether a field is in the key already, as a part of the config or in the weights, or is cosmetic."""
    return name in CONFIG or COSMETIC.fullmatch(name) is not None


def _plain(value):
    """Without what says nothing, and with numbers to six digits: a GGUF holds 1e-5 as 9.99999975e-06."""
    if isinstance(value, dict):
        return {str(k): plain for k, v in value.items() if (plain := _plain(v)) is not None} or None
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (bool, type(None))):
        return value
    return f"{value:.6g}" if isinstance(value, (int, float)) else str(value)
