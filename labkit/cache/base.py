"""What a method for the KV cache is: it changes no weight, but what the model remembers of a text while it reads it.

    small = SnapKV(budget=256)(lm)    # small.generate, small.model.generate and small.model(...) keep 256 tokens

The methods hang on the transformers model as one forward pre-hook, on the module that runs the blocks. Whenever a text
begins, the hook hands the model a fresh cache under these methods (:mod:`labkit.cache.layer`), and an attention function
(:mod:`labkit.cache.attend`) shows each layer's queries to the policy. So every way of running the model uses them, and
two texts never share a state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from labkit.method import Method, knob
from labkit.walk import blocks, check_finite, linears, path_of, weight_of

MOST = 1_000_000  # the largest budget in tokens: longer than any text here, so that nothing is evicted


@dataclass(frozen=True)
class CacheMethod(Method):
    """A method that acts on the KV cache; the weights stay as they are."""

    kind: ClassVar[str] = "cache"
    lossless_kl: ClassVar[float] = 1e-6  # a text read in pieces, not at once: sums in another order

    def apply(self, lm, calib, progress: bool) -> None:
        check_weights(lm.model)
        install(lm.model, self)

    def keeps(self, prompt: int) -> int:
        """Tokens of a prompt of ``prompt`` tokens that stay as they are: of a shorter one, all do."""
        raise NotImplementedError

    def check_prompt(self, prompt: int) -> None:
        """Raise a ValueError where a prompt is so short that this method leaves it as it is: there is nothing to measure.

        A method at the lossless end of its knobs is meant to change nothing, and is let through.
        """
        if prompt > self.keeps(prompt) or all(getattr(self, n) == v for n, v in self.lossless.items()):
            return
        raise ValueError(
            f"{self.typed()} keeps {self.keeps(prompt)} tokens, so it leaves a prompt of {prompt} as it is: KL would be 0 "
            "and say nothing. Choose longer windows (half of each is the prompt, unless prompt=… says otherwise), or "
            "keep fewer tokens."
        )


def check_weights(model) -> None:
    """Raise a ValueError that names the layer where a linear of the decoder holds NaN or infinity."""
    stack = blocks(model)
    prefix = path_of(stack, model)
    for name, module in linears(stack):
        check_finite(weight_of(module), f"{prefix}.{name}")


@dataclass(frozen=True)
class CachePolicy(CacheMethod):
    """Evicts tokens from the KV cache. A policy is one scoring function, :meth:`scores`, and its knobs.

    - ``at_prefill``, ``at_decode``: when it acts: after the first forward of a text, after every later one, or both.
    - ``rerotates``: keys are turned as if what is left were the whole text; otherwise they keep their true positions.
    - ``least``: the smallest budget that the knobs in ``room`` leave room for, and ``why``, what takes that room.
    """

    lossless: ClassVar[dict] = {"budget": MOST}
    at_prefill: ClassVar[bool] = True
    at_decode: ClassVar[bool] = True
    rerotates: ClassVar[bool] = False
    room: ClassVar[tuple[str, ...]] = ()
    why: ClassVar[str] = ""

    budget: int = knob(
        256,
        low=1,
        high=MOST,
        stops=(64, 128, 256, 512, 1024),
        help="Tokens that each KV head of each layer keeps. Where the text is shorter, nothing is evicted.",
    )
    share: float | None = knob(
        None,
        low=0.01,
        high=1.0,
        stops=(None, 0.1, 0.25, 0.5, 0.75),
        none="budget in tokens",
        help="The budget as a share of the prompt's tokens, in place of a number of tokens.",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.budget < self.least:
            knobs = self.knobs()
            beside = ", ".join(f"{name} = {getattr(self, name)}" for name in self.room)
            allowed = ", ".join(f"{name}: {knobs[name].allowed}" for name in self.room)
            raise ValueError(
                f"{type(self).__name__}.budget = {self.budget} is not allowed{beside and ' with '}{beside}: it must be "
                f"{knobs['budget'].allowed}, here {self.least} or more for {self.why}{allowed and f' ({allowed})'}."
            )

    @property
    def least(self) -> int:
        return 1

    def keeps(self, prompt: int) -> int:
        return self.budget if self.share is None else max(self.least, round(self.share * prompt))

    def scores(self, step) -> torch.Tensor:
        """How much each token deserves to stay, (batch, kv_heads, tokens); infinity: it stays in any case.

        ``step`` is a :class:`labkit.cache.attend.Step`: the queries, keys and positions of one layer after one forward.
        Of equal scores the newer token stays.
        """
        raise NotImplementedError

    def budgets(self, step, scores: torch.Tensor) -> int | torch.Tensor:
        """Tokens to keep: one number, or one for each row and head, (batch, kv_heads)."""
        return step.budget


class CacheHook:
    """The forward pre-hook of the module that runs the blocks: each text that begins gets a cache under these methods."""

    def __init__(self):
        self.methods: tuple[CacheMethod, ...] = ()
        self.found = None  # what they know of the model, labkit.cache.examine.Findings

    def __call__(self, model, args, kwargs):
        from labkit.cache.layer import KVCache

        past, use = kwargs.get("past_key_values"), kwargs.get("use_cache")
        if past is None and not (model.config.use_cache if use is None else use):
            return None
        if past is None or (not isinstance(past, KVCache) and past.get_seq_length() == 0):
            if len(self.found.layers) != model.config.num_hidden_layers:  # blocks were taken out since
                self.examine(model, model, blocks(model))
            past = KVCache(self.methods, model, self.found)
        elif getattr(past, "methods", None) != self.methods:
            named = " and ".join(type(m).__name__ for m in self.methods)
            raise ValueError(
                f"This cache was not made under {named}: begin the text with this model and its own cache."
            )
        ids = args[0] if args else kwargs.get("input_ids")
        ids = kwargs["inputs_embeds"] if ids is None else ids
        positions = past.begin(ids, kwargs.get("attention_mask"))
        kwargs = {**kwargs, "past_key_values": past, "kv": past}
        if positions is not None:
            kwargs["position_ids"] = positions
        return args, kwargs

    def examine(self, model, decoder, stack) -> None:
        """Find out what these methods must know of a model. Raises ValueError where they cannot work on it."""
        from labkit.cache.examine import examine

        self.found = examine(model, decoder, stack, self.methods)


def hook_of(model) -> CacheHook | None:
    """The hook that holds a transformers model's cache methods, or None."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return next((hook for hook in hooks if isinstance(hook, CacheHook)), None)


def methods_of(model) -> tuple[CacheMethod, ...]:
    """The cache methods under which a transformers model runs."""
    hook = hook_of(model)
    return hook.methods if hook else ()


def install(model, method: CacheMethod) -> None:
    """Put a transformers model under a cache method, beside those it already has. Raises ValueError where it does not fit."""
    from labkit.cache import attend

    there = methods_of(model)
    group = CachePolicy if isinstance(method, CachePolicy) else type(method)
    if same := [m for m in there if isinstance(m, group)]:
        raise ValueError(
            f"This model's cache is already under {same[0]!r}: {type(method).__name__} cannot come on top of it."
        )
    check_pair([*there, method])
    stack = blocks(model)
    decoder = next(m for m in model.modules() if any(child is stack for child in m.children()))
    if not there:
        attend.take_over(model, decoder)
        decoder.register_forward_pre_hook(CacheHook(), with_kwargs=True)
    hook = hook_of(model)
    hook.methods = (*there, method)
    hook.examine(model, decoder, stack)


def check_pair(methods: list[CacheMethod]) -> None:
    """Raise a ValueError where a policy and a quantizer of the cache cannot work together."""
    for quantizer in methods:
        for policy in methods:
            if isinstance(policy, CachePolicy) and hasattr(quantizer, "check_policy"):
                quantizer.check_policy(policy)
