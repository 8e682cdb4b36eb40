"""What a model's attention does with a cache, found by running the model on a few tokens when a method is applied.

Families differ in what no list could keep up with: whether their attention can be watched, what holds the state of each
layer, how far a layer looks back, how keys are turned. What does not fit is refused here, before a text is read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from labkit.cache.base import MOST, CacheMethod, CachePolicy
from labkit.cache.rotary import CLOSE, Turning, fit, frequencies, misfit
from labkit.linear import STORED, exact
from labkit.method import reason_of

PROMPT = 6  # tokens of the text that is read, whose last one comes through the cache
PLACES = (0, 1, 2, 3, 5, 11, 47, 180, 700, 2500)  # where one token is put to see how it is turned
FARTHEST = 4096  # of those, for a model that does not say how long a text may be
EXACT, ROUNDED = 1e-3, 0.1  # how far two ways of reading may differ: in fp32; in 16 bits or with rounded activations


@dataclass(frozen=True)
class Findings:
    """What was found of each layer; empty: every layer has keys and values, looks back all the way and turns nothing.

    ``layers``: None for a layer of keys and values alone; else what transformers keeps its state in (a recurrence, a
    convolution, both beside keys and values, or nothing), empty. ``windows``: tokens that a query sees, None: all.
    ``turning``: how keys and values are turned, since a layer may keep turned keys as its "values" (latent attention).
    """

    layers: tuple[object | None, ...] = ()
    windows: tuple[int | None, ...] = ()
    turning: tuple[tuple[Turning | None, Turning | None], ...] = ()

    def turned(self, device: torch.device) -> tuple[tuple[Turning | None, Turning | None], ...]:
        """``turning``, on a device; what layers share they still share there."""
        moved = {id(t): t.to(device) for pair in self.turning for t in pair if t is not None}
        return tuple(tuple(moved.get(id(t)) for t in pair) for pair in self.turning)


PLAIN = Findings()
_known: dict[tuple, Findings | str] = {}  # by what the answer depends on: a model's code and shape, not its weights


def examine(model, decoder, stack, methods: tuple[CacheMethod, ...]) -> Findings:
    """What cache methods must know of a model, whose attention is already computed by :mod:`labkit.cache.attend`.

    ``decoder``: the module that runs the blocks in ``stack``. Raises ValueError, naming the model's class and why, where
    these methods cannot work on it.
    """
    evicts = any(isinstance(m, CachePolicy) for m in methods)
    turns = any(isinstance(m, CachePolicy) and m.rerotates for m in methods)
    key = (evicts, turns, *signature(decoder))
    if key not in _known:
        training = decoder.training
        decoder.eval()
        try:
            with torch.inference_mode(False), torch.no_grad(), exact():  # no kernels are built for a few tokens
                _known[key] = _examine(decoder, stack, evicts, turns)
        except ValueError as error:
            _known[key] = str(error)
        finally:
            decoder.train(training)
    if isinstance(found := _known[key], str):
        named = " and ".join(type(m).__name__ for m in methods)
        raise ValueError(f"{named} cannot be applied to {type(model).__name__}: {found}.")
    return found


def signature(model) -> tuple:
    """Of a module, what its code runs by: the classes of its parts and the numbers and names that they hold."""
    parts = []
    for module in model.modules():
        plain = {n: v for n, v in vars(module).items() if isinstance(v, (str, int, float, type(None), dict))}
        names = (n for n in sorted(plain) if not n.startswith("_") and n != "training")
        parts.append((type(module), *((n, str(plain[n])) for n in names)))
        parts += [(n, *t.tolist()) for n, t in module.named_buffers(recurse=False) if n.endswith("inv_freq")]
    first = next(model.parameters())
    return model.config.to_json_string(use_diff=False), first.dtype, first.device, tuple(parts)


def _examine(decoder, stack, evicts: bool, turns: bool) -> Findings:
    found = Findings(*_kinds(decoder, evicts))
    ids = 1 + torch.arange(PROMPT, device=next(decoder.parameters()).device)[None]
    theirs, cache = DynamicCache(config=decoder.config), _watched(decoder, found, evicts)
    _states(decoder, ids[:, :-1], theirs)
    _states(decoder, ids[:, :-1], cache)
    held = [layer for layer in cache.layers if hasattr(layer, "waiting") and layer.seen]
    if not held:
        raise ValueError("it has no layer that keeps the keys and values of a text in a cache that can be replaced")
    if blind := [layer.index for layer in held if layer.waiting]:
        raise ValueError(
            f"its attention (block {blind[0]}) is not computed by a function of transformers that can be replaced, so no "
            "cache method can watch it"
        )
    if evicts and len(cache.seen) > len(held):
        raise ValueError("it computes more than one attention over the keys of a layer, which the first one may evict")
    for layer in held if evicts else ():
        layer.whole = False  # as after an eviction: from here on our masks count
    expected, last = (_states(decoder, ids[:, -1:], c) for c in (theirs, cache))
    if evicts and any(_biased(mask) for mask, _ in cache.seen):
        raise ValueError("it adds a bias to its attention that depends on where tokens are, which an eviction moves")
    dense = last.dtype == torch.float32 and not any(isinstance(m, STORED) for m in decoder.modules())
    if not float((last - expected).norm() / expected.norm()) < (EXACT if dense else ROUNDED):
        raise ValueError("read through a cache that keeps everything, it does not say what it says with its own")
    return replace(found, turning=_turning(decoder, stack, found)) if turns else found


def _kinds(decoder, evicts: bool) -> tuple[tuple[object | None, ...], tuple[int | None, ...]]:
    """What each layer's state is kept in, and its window, as transformers' own cache has it for this configuration."""
    config = decoder.config
    try:
        layers = DynamicCache(config=config).layers
    except Exception as error:  # a configuration for which transformers makes no such cache
        raise ValueError(
            f"transformers makes no cache of keys and values for it ({type(error).__name__}: {reason_of(error)})"
        ) from error
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    for layer in layers:
        if isinstance(layer, CacheLayerMixin) and type(layer) not in plain and not hasattr(layer, "conv_states"):
            raise ValueError(f"its layers keep more than keys and values ({type(layer).__name__})")
    kinds = getattr(config, "layer_types", None) or ()
    if evicts and ("chunked_attention" in kinds or (not kinds and getattr(config, "attention_chunk_size", None))):
        raise ValueError("its attention is cut into chunks of the text, whose borders an eviction moves")
    windows = tuple(getattr(layer, "sliding_window", None) for layer in layers)
    return tuple(None if type(layer) in plain else layer for layer in layers), windows


def _watched(decoder, found: Findings, evicts: bool):
    """An empty cache, whose ``seen`` gets the mask and the query of each attention. (Its policy will not evict.)"""
    from labkit.cache.baselines import RecentKV
    from labkit.cache.layer import KVCache

    cache = KVCache((RecentKV(budget=MOST),) if evicts else (), decoder, found)
    cache.seen = []
    return cache


def _biased(mask: torch.Tensor | None) -> bool:
    """Whether a mask does more than let a token be seen or not."""
    if mask is None or not mask.is_floating_point():
        return False
    return bool(((mask != 0) & (mask > torch.finfo(mask.dtype).min / 2)).any())


def _states(decoder, ids: torch.Tensor, cache, **more) -> torch.Tensor:
    """The last hidden states (batch, tokens, width) of ids (batch, tokens), read after what is in the cache."""
    if hasattr(cache, "begin"):
        cache.begin(ids, None)
        more |= {"kv": cache}
    try:  # not by a call: the hook of a forward that is under way would hand over a cache of its own
        return decoder.forward(input_ids=ids, past_key_values=cache, use_cache=True, **more)[0]
    except torch.OutOfMemoryError:  # of this machine, at this time
        raise
    except Exception as error:  # whatever its code raises
        raise ValueError(
            f"it does not run with a cache that can be replaced ({type(error).__name__}: {reason_of(error)})"
        ) from error


def _turning(decoder, stack, found: Findings) -> tuple[tuple[Turning | None, Turning | None], ...]:
    """How each layer turns what it keeps; empty where nothing is turned, or places are told by adding to the embeddings."""
    angles = frequencies(decoder)
    reach = getattr(decoder.config, "max_position_embeddings", None) or FARTHEST
    places = torch.tensor([p for p in PLACES if p < reach] + [reach - 1], device=next(decoder.parameters()).device)
    ids, cache = torch.ones_like(places)[:, None], _watched(decoder, found, True)
    entered: list[torch.Tensor] = []
    handle = stack[0].register_forward_pre_hook(
        lambda _, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    try:
        _states(decoder, ids, cache, position_ids=places[:, None])
    finally:
        handle.remove()
    streams = entered[0].movedim(entered[0].shape.index(len(places)), 0)  # Gemma 3n's blocks take several at once
    moved = misfit(streams.flatten(1)[:, None].float(), places, None)
    if moved > CLOSE:  # learned positions: what is cached cannot be turned
        return ()
    if any(misfit(query[:, :, 0].float().norm(dim=-1, keepdim=True), places, None) > CLOSE for _, query in cache.seen):
        raise ValueError("its queries grow with their true place in the text, so a shortened text is not read the same")
    known: list[Turning] = []
    turning = []
    for index, layer in enumerate(cache.layers):
        try:
            held = (layer.keys, layer.values) if getattr(layer, "seen", 0) else ()
            turning.append(tuple(fit(x[:, :, 0], places, angles, known) for x in held) or (None, None))
        except ValueError as error:
            raise ValueError(f"the keys of block {index} cannot be moved to new positions: {error}") from error
    return tuple(turning) if known else ()
