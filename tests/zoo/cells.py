"""What labkit does with one family: each check compares with an oracle that does not use what is checked.

A cell of the table is YES (for the share of the weights that is reached), or the sentence with which labkit refuses.
Everything else is a fault.
"""

from __future__ import annotations

import inspect
import tempfile
import warnings
from pathlib import Path

import torch

import labkit
from labkit.coverage import ENOUGH, percent
from labkit.linear import exact
from labkit.talk import Talk
from zoo.families import ids, make

YES, WRONG = "yes", "wrong:"
WEIGHTS = {name: cls for name, cls in labkit.methods().items() if cls.kind != "cache"}
CACHE = {name: cls for name, cls in labkit.methods().items() if cls.kind == "cache"}


@torch.inference_mode()
def logits(lm, x: torch.Tensor, **how) -> torch.Tensor:
    """In floating point, as papers on weight-only methods have it: (rows, tokens, vocabulary), fp32."""
    with exact():
        return lm.model(x, **how).logits.float()


def kl(before: torch.Tensor, after: torch.Tensor) -> float:
    """Mean KL in nats per token."""
    before, after = before.double().log_softmax(-1), after.double().log_softmax(-1)
    return max(0.0, (before.exp() * (before - after)).sum(-1).mean().item())


def refusal(error: Exception) -> str:
    return str(error).split("\n")[0]


# ------------------------------------------------------------------------------------------------ weights


def lossless(cls, lm):
    """At the end of its knobs where it changes next to nothing."""
    if cls is labkit.FewerKVHeads:  # that is as many as there are
        config = lm.model.config
        return cls(kv_heads=getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 1))
    return cls(**cls.lossless)


def weights(family: str, cls) -> str:
    """A method for weights: lossless at that end of its knobs in fp32 and bf16, the same after a save and a load, the same
    for a padded batch as for each row alone, and generating what whole forwards say."""
    calib, x = ids(4, 32, 2), ids(2, 24)
    lm = make(family)
    before = logits(lm, x)
    ruined = kl(before, logits(labkit.Magnitude(sparsity=0.5)(lm, progress=False), x))
    assert ruined > 1e-3, "this model hardly looks at its blocks: nothing would show"
    try:
        made = lossless(cls, lm)(lm, calib, progress=False)
    except ValueError as error:
        return refusal(error)
    assert torch.equal(logits(lm, x), before), "the model that came in has changed"
    after = logits(made, x)
    assert kl(before, after) <= 0.05 * ruined + rounded(cls), "at its lossless end it changes the model"
    same_after_save(made, x, after)
    same_when_padded(lm, made, cls)
    same_generated(made, x[:1, :6])
    low = lm.copy()
    low.model.to(torch.bfloat16)
    made = lossless(cls, lm)(low, calib, progress=False)
    rounding = kl(before, logits(low, x))
    assert kl(logits(low, x), logits(made, x)) <= 0.05 * ruined + rounded(cls) + 4 * rounding, (
        "in bf16 it changes the model"
    )
    return YES if made.coverage.share >= ENOUGH else f"{YES}, of {percent(made.coverage.share)} of the weights"


def same_after_save(made, x: torch.Tensor, expected: torch.Tensor) -> None:
    with tempfile.TemporaryDirectory() as folder:
        again = labkit.load(made.save(Path(folder) / "model"))
        assert torch.equal(logits(again, x), expected), "after a save and a load it says something else"


def placed(lm, positions: torch.Tensor) -> dict:
    """Positions (rows, tokens) as an argument, for the families that take them."""
    return {"position_ids": positions} if "position_ids" in inspect.signature(lm.model.forward).parameters else {}


def padded(lm, x: torch.Tensor, pads: int) -> torch.Tensor:
    """Logits of the real tokens of x (1, tokens) in a batch in which it has ``pads`` tokens of padding on its left."""
    tokens = x.shape[1]
    batch = torch.cat([torch.ones_like(x[:, :1]).expand(1, pads), x], 1)
    other = ids(1, tokens + pads, 5)
    mask = torch.ones(2, tokens + pads, dtype=torch.long)
    mask[0, :pads] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    how = {"attention_mask": mask} | placed(lm, positions)
    return logits(lm, torch.cat([batch, other]), **how)[:1, pads:]


def rounded(cls) -> float:
    """KL that rounding activations to 8 bits costs, for the methods that always do."""
    return cls.lossless_kl if cls.lossless_kl > 1e-2 else 1e-6


def same_when_padded(lm, made, cls) -> None:
    """As far from the row alone as the uncompressed model is: families without a mask move, whatever labkit does."""
    x = ids(1, 12, 6)
    moved = (padded(lm, x, 5) - logits(lm, x)).norm() / logits(lm, x).norm()
    found = (padded(made, x, 5) - logits(made, x)).norm() / logits(made, x).norm()
    assert found <= 3 * moved + 2 * rounded(cls) + 1e-4, "a padded row is read otherwise than alone"


@torch.inference_mode()
def same_generated(made, prompt: torch.Tensor, tokens: int = 6) -> None:
    """transformers' generate with its cache, against whole forwards without one."""
    how = {"max_new_tokens": tokens, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    with exact():
        found = made.model.generate(prompt, **how)
        for at in range(prompt.shape[1], prompt.shape[1] + tokens):
            said = made.model(found[:, :at]).logits[0, -1].float()
            told = said[found[0, at]]
            assert told >= said.max() - 1e-3 * said.std(), "it generates other tokens than its forward says"
    words = " ".join(f"w{i}" for i in prompt[0].tolist())
    assert "".join(Talk(made, words, tokens)) == made.generate(words, tokens), "Talk and generate write other tokens"


# ------------------------------------------------------------------------------------------------ the KV cache


def settings(cls) -> dict:
    """Knobs at which it acts on 30 tokens."""
    wanted = {"budget": 12, "recent": 4, "window": 4, "sinks": 2, "bits": 8, "group_size": 8, "residual": 8}
    wanted |= {"kv_heads": 1}
    return {name: wanted[name] for name, knob in cls.knobs().items() if name in wanted and knob.type is int}


def cache(family: str, cls) -> str:
    """A method for the cache: at its lossless end the model reads as it does without; under a budget, a model of one layer
    says what attention over the kept tokens says (worked out by masking the others in the uncompressed model)."""
    lm, one, x = make(family), make(family, layers=1), ids(2, 30)
    try:
        made = lossless(cls, lm)(lm, progress=False)
        tight = cls(**settings(cls))(one, progress=False)
    except ValueError as error:
        return refusal(error)
    assert read_in_pieces(made, lm, x) <= 1e-5, "at its lossless end it changes the model"
    if issubclass(cls, labkit.cache.base.CachePolicy) and not cls.rerotates:
        assert masked(tight, one, x) <= 1e-4, "it attends to other tokens than it keeps"
    found = tight.model.generate(
        x[:1], attention_mask=torch.ones_like(x[:1]), max_new_tokens=8, do_sample=False, return_dict_in_generate=True
    )
    assert found.sequences.shape[1] == 38
    return YES


@torch.inference_mode()
def read_in_pieces(made, lm, x: torch.Tensor, prompt: int = 16, step: int = 4) -> float:
    kept = made.model(x[:, :prompt], use_cache=True).past_key_values
    said = []
    for at in range(prompt, x.shape[1], step):
        piece = x[:, at : at + step]  # Bamba is half a percent off when it counts positions itself
        here = placed(made, torch.arange(at, at + piece.shape[1])[None])
        out = made.model(piece, past_key_values=kept, use_cache=True, **here)
        kept = out.past_key_values
        said.append(out.logits)
    return kl(logits(lm, x)[:, prompt:], torch.cat(said, 1))


def window(config) -> int:
    """Tokens that the last layer looks back at."""
    kinds = getattr(config, "layer_types", None)
    slides = kinds[-1] == "sliding_attention" if kinds else True
    return (slides and getattr(config, "sliding_window", None)) or config.max_position_embeddings


@torch.inference_mode()
def masked(tight, lm, x: torch.Tensor) -> float:
    """KL of the token after a prompt, from an uncompressed model in which that token sees what is kept, for each head."""
    kept = tight.model(x[:, :-1], use_cache=True).past_key_values
    layer = next(layer for layer in kept.layers if getattr(layer, "position", None) is not None)
    heads, rows, tokens = lm.model.config.num_attention_heads, len(x), x.shape[1]
    assert layer.keys.shape[-2] <= 12, "it keeps more than its budget"
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(rows, heads, -1, -1).clone()
    position = layer.position.repeat_interleave(heads // layer.position.shape[1], 1)  # (rows, heads, kept), -1: empty
    last = torch.zeros(rows, heads, tokens + 1, dtype=torch.bool).scatter(-1, position % (tokens + 1), True)
    last[:, :, tokens - 1] = True  # itself
    last[:, :, : max(0, tokens - window(lm.model.config))] = False
    seen[:, :, -1] = last[:, :, :tokens]
    here = placed(tight, torch.tensor([[tokens - 1]]))
    said = tight.model(x[:, -1:], past_key_values=kept, use_cache=True, **here).logits[:, -1]
    seen = torch.where(seen, 0.0, torch.finfo(torch.float32).min)  # added to the scores
    return kl(logits(lm, x, attention_mask=seen, position_ids=torch.arange(tokens)[None])[:, -1], said)


# ------------------------------------------------------------------------------------------------ leaving


def engine(family: str) -> str:
    """The model as one graph, with nothing rounded: the same logits, and the same tokens generated."""
    from labkit.engine import NotCompilable

    lm, x = make(family), ids(1, 20)
    try:
        graph = labkit.compile(lm, context=64, threads=1, head_bits=None, embedding_bits=None)
    except NotCompilable as error:
        return refusal(error)
    expected = logits(lm, x)
    found = torch.as_tensor(graph.logits(x)).float()
    assert kl(expected, found.view_as(expected)) <= 1e-5, "the graph says something else"
    prompt = "w7 w30 w12 w55"
    assert graph.generate(prompt, 12) == lm.generate(prompt, 12), "the graph generates something else"
    return YES


def export(family: str) -> str:
    """The folder that onnxruntime-genai reads is written, with the graph in it."""
    from labkit.engine import NotCompilable

    with tempfile.TemporaryDirectory() as folder:
        try:
            out = labkit.export.onnx(make(family), Path(folder) / "model")
        except (NotCompilable, ValueError) as error:
            return refusal(error)
        assert {"genai_config.json", "model.onnx"} <= {f.name for f in out.iterdir()}
    return YES


def row(family: str) -> dict[str, str]:
    """Every cell of a family: technique -> YES, why labkit refuses, or WRONG and how."""

    def cell(check, *what) -> str:
        try:
            return check(family, *what)
        except Exception as error:  # a fault in one cell hides no other
            return f"{WRONG} {type(error).__name__}: {refusal(error)}"

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {name: cell(weights, cls) for name, cls in WEIGHTS.items()}
        found |= {name: cell(cache, cls) for name, cls in CACHE.items()}
        return found | {"engine": cell(engine), "export": cell(export)}
