"""Bytes that are really held: tensors, kernels' own copies, the KV cache, and the process's peak."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from labkit import cache
from labkit._share import storage_address
from labkit.coverage import bits_per_weight  # noqa: F401  (of the same family as what is here)
from labkit.linear import exact
from labkit.walk import blocks, is_linear

KV_TOKENS = 1000  # the length at which a cache is weighed
CACHES = ("past_key_values", "cache_params", "state")  # what families call what they keep of a text


def held(module: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, each storage once, and of the copies that kernels' runtimes keep."""
    storages = {}
    for tensor in (*module.parameters(), *module.buffers()):
        storages[storage_address(tensor)] = tensor.untyped_storage().nbytes()
    return sum(storages.values()) + sum(getattr(m, "runtime_nbytes", 0) for m in module.modules())


def linear_layers(lm) -> list[torch.nn.Module]:
    """The decoder's linear layers, which compression is about (the embedding and the head are not among them)."""
    return [m for m in blocks(lm.model).modules() if is_linear(m)]


def kv_per_token(lm, tokens: int | None = None) -> int:
    """Bytes by which the KV cache grows with one token, measured on a real cache: the difference of two lengths.

    ``tokens``: the shorter length; the other is twice as long. None takes 16, and 256 for a model under cache methods,
    which evict or round nothing before that.
    """
    if tokens is None:
        room = getattr(lm.model.config, "max_position_embeddings", None) or 512
        tokens = min(256 if cache.methods_of(lm.model) else 16, room // 2)
    ids = torch.ones(1, tokens, dtype=torch.long, device=lm.device)
    with torch.inference_mode():
        kept = cache_of(lm.model(ids, use_cache=True))
        short = cache_bytes(*kept.values())
        kept = cache_of(lm.model(ids, use_cache=True, **kept))
    return (cache_bytes(*kept.values()) - short) // tokens


def kv_bytes(lm, tokens: int = KV_TOKENS) -> tuple[int, int]:
    """(bytes that the KV cache holds after a prompt, its tokens): weighed on a real cache, batch 1.

    ``tokens``: of the prompt, or as many as the model has positions for. What a budgeted or rounded cache holds is not
    what it grows by times its length: of a prompt of 1,000 tokens a budget of 256 keeps 256.
    """
    tokens = min(tokens, getattr(lm.model.config, "max_position_embeddings", None) or tokens)
    vocabulary = lm.model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(tokens, device=lm.device)[None] * 7 % vocabulary
    with torch.inference_mode(), exact():  # no kernels are built for this one forward
        return cache_bytes(*cache_of(lm.model(ids, use_cache=True, logits_to_keep=1)).values()), tokens


def cache_of(out) -> dict[str, object]:
    """What a model's output keeps of the text that was read, under the name by which the next call takes it; or nothing."""
    return {name: kept for name in CACHES if (kept := getattr(out, name, None)) is not None}


def cache_bytes(*kept) -> int:
    """Bytes that transformers' caches hold: keys and values, states, what a policy or a quantizer keeps beside them.

    Whole storages are counted, each once: a tensor that is a view of a larger one holds all of that.
    """
    storages = {}
    for layer in (layer for one in kept for layer in getattr(one, "layers", [one])):
        tensors = layer.held() if hasattr(layer, "held") else _inside(getattr(layer, "__dict__", layer))
        for storage in (t.untyped_storage() for t in tensors if t is not None):
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _inside(x) -> Iterator[torch.Tensor]:
    """The tensors in dictionaries and lists."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, (Mapping, list, tuple)):
        for part in x.values() if isinstance(x, Mapping) else x:
            yield from _inside(part)


class Peak:
    """The highest resident set (or CUDA allocation) seen while the block ran, in bytes."""

    bytes: int | None = None


@contextmanager
def peak(device: torch.device, every: float = 0.02):
    """Watch memory while the block runs: ``with peak(lm.device) as p: ...``; then ``p.bytes`` (None where unknown)."""
    seen = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield seen
        seen.bytes = torch.cuda.max_memory_allocated(device)
        return
    done = threading.Event()

    def watch():
        while True:
            now = resident()
            if now is not None:
                seen.bytes = max(seen.bytes or 0, now)
            if done.wait(every):
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


def resident() -> int | None:
    """The resident set of this process in bytes."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        import resource

        return int(statm.read_text().split()[1]) * resource.getpagesize()
    try:
        import psutil
    except ImportError:
        return None
    return psutil.Process().memory_info().rss
