"""What onnxruntime-genai binds: the engine's graph with the names and the mask it knows, and the file that tells so."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from onnx import TensorProto, helper

from labkit import bos
from labkit.engine.families import Decoder
from labkit.engine.graph import Graph
from labkit.engine.weights import rows
from labkit.generation import Settings, told

SEARCH = (
    "repetition_penalty",
    "no_repeat_ngram_size",
    "min_length",
)  # what onnxruntime-genai does as transformers does it
ROOM = 2048  # the cache is taken whole and ahead, so by default it is not made for every position of a long context


class GenAIGraph(Graph):
    """input_ids (batch, tokens), attention_mask (batch, total) and the cache go in; logits (batch, 1, rows) come out.

    Only the last token of a text has logits, as when the engine generates; a runtime that checks drafted tokens would
    need them all. Texts of a batch that are shorter than the longest are padded at their end, and the mask is 0 there.
    """

    ids, past, present = "input_ids", "past_key_values", "present"
    aligned_from = 1 << 20  # the file is copied about, so only large tensors are worth a gap

    def entrance(self) -> None:
        ints = TensorProto.INT64
        self.inputs += [
            helper.make_tensor_value_info(self.ids, ints, ["batch", "tokens"]),
            helper.make_tensor_value_info("attention_mask", ints, ["batch", "total"]),
        ]
        one = self.weights.add("one", torch.tensor([1]))
        seen = self.node("ReduceSum", ["attention_mask", one], "seen", keepdims=0)  # (batch,)
        last = self.node("Sub", [seen, one], "mask.last")
        total = self.node("Shape", ["attention_mask"], "mask.total", start=1, end=2)
        for name, count in (("last", last), ("total", total)):
            self.node("Cast", [count], name, to=TensorProto.INT32)
        # Where among these tokens is a text's last one? In a padded prompt not at the end; after it each has one token.
        tokens = self.node("Shape", [self.ids], "tokens", start=1, end=2)
        before = self.node("Sub", [total, tokens], "before")
        row = self.node("Sub", [last, before], "row")
        row = self.node("Max", [row, self.weights.add("zero", torch.tensor([0]))], "row.clipped")
        self.node("Unsqueeze", [row, self.weights.add("axes", torch.tensor([1, 2]))], "rows")  # (batch, 1, 1)

    def wanted(self, x: str) -> tuple[str, str | int]:
        return self.node("GatherND", [x, "rows"], "wanted", batch_dims=1), 1


def settings(lm, decoder: Decoder, context: int) -> dict:
    """genai_config.json, with the ends and those penalties of the model's generation_config that it has a place for; a
    warning names the others. Raises ValueError for a model that names no token to end a text with."""
    ends = special(lm, "eos_token_id")
    if ends is None:
        raise ValueError(f"{lm.name} names no token that ends a text (eos_token_id), which onnxruntime-genai needs.")
    first = ends[0] if isinstance(ends, list) else ends
    generation = Settings.of(lm.model)
    for sentence in _differences(lm, generation, first):
        warnings.warn(sentence, stacklevel=3)
    search = {name: value for name, value in generation.applied.items() if name in SEARCH}
    if "min_new_tokens" in generation.applied:
        search.pop("min_length", None)  # transformers does not look at it then
    start, pad = special(lm, "bos_token_id"), special(lm, "pad_token_id")
    keys = ("key", "value")
    return {
        "model": {
            "type": lm.model.config.model_type,
            "context_length": context,
            "vocab_size": rows(decoder.head),  # may be more than the tokenizer's words
            "bos_token_id": first if start is None else start,
            "eos_token_id": ends,
            "pad_token_id": first if pad is None else pad,
            "decoder": {
                "filename": "model.onnx",
                "session_options": {"provider_options": []},
                "hidden_size": decoder.embedding.shape[1],
                "head_size": decoder.blocks[0].head_dim,
                "num_attention_heads": decoder.blocks[0].heads,  # of layers that differ, the graph's shapes tell
                "num_key_value_heads": decoder.blocks[0].kv_heads,
                "num_hidden_layers": len(decoder.blocks),
                "inputs": {"input_ids": "input_ids", "attention_mask": "attention_mask"}
                | {f"past_{what}_names": f"past_key_values.%d.{what}" for what in keys},
                "outputs": {"logits": "logits"} | {f"present_{what}_names": f"present.%d.{what}" for what in keys},
            },
        },
        "search": {"do_sample": False, "max_length": min(context, ROOM), "past_present_share_buffer": True} | search,
    }


def _differences(lm, generation: Settings, first: int) -> Iterator[str]:
    """In what onnxruntime-genai's answers will not be those of ``lm.generate``, in sentences."""
    asked = generation.applied | generation.unapplied
    if left := {name: value for name, value in asked.items() if name not in SEARCH}:
        yield f"onnxruntime-genai will not apply {told(left)} of the generation_config of {lm.name}: answers may differ."
    if not generation.ends:
        yield f"onnxruntime-genai needs a token that ends a text and gets {first}; lm.generate of {lm.name} has none."
    if begin := bos.beginning(lm.tokenizer):
        text = lm.tokenizer.decode(begin)
        how = "its Tokenizer.update_options(add_special_tokens='true') does"
        yield f"Texts for {lm.name} begin with {text!r}, which onnxruntime-genai does not write by itself: {how}."


def special(lm, name: str):
    """A special token's id (for the end also a list of them): where the model's generation finds it, then elsewhere."""
    for source in (getattr(lm.model, "generation_config", None), lm.model.config, lm.tokenizer):
        if (found := getattr(source, name, None)) is not None:
            return found
    return None
