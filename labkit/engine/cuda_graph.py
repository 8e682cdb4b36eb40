"""The same idea on a GPU: one decoding step is recorded as a CUDA graph and replayed, so Python launches nothing.

*Unverified*: no GPU has run the recording yet. What is recorded, a step on a cache of fixed size, is tested on the CPU.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import torch
from transformers import StaticCache

from labkit.engine.families import NotCompilable, fixed_rotary, plain_cache
from labkit.engine.session import encoded
from labkit.generation import Greedy, Settings
from labkit.measure.memory import held

WARM = 3  # steps before the recording: libraries choose their kernels and take their memory in these


class GraphedModel:
    """A LanguageModel whose decoding step replays from a CUDA graph; the same calls as :class:`CompiledModel`.

    Weights are the model's own, in its own layers: packed ones run on torch's int4 and int8 kernels. There is one cache,
    of ``context`` tokens, and it belongs to the thread that began the text.
    """

    def __init__(self, lm, context: int = 2048):
        started = time.perf_counter()
        self.name, self.history, self.tokenizer = lm.name, lm.history, lm.tokenizer
        self.model, self.device = lm.model, lm.device
        self.context = min(context, getattr(lm.model.config, "max_position_embeddings", context))
        self.threads = torch.get_num_threads()
        self.settings = Settings.of(lm.model)
        self.notes = (self.settings.note,) if self.settings.note else ()
        plain_cache(lm.model)
        fixed_rotary(lm.model)
        self.cache = _fixed_cache(lm.model, self.context)
        self.token = torch.zeros(1, 1, dtype=torch.long, device=lm.device)
        self.graph, self._text, self._owner = None, 0, None
        self._check()
        if lm.device.type == "cuda":
            self._record()
        self.rewind(0)
        self.nbytes, self.parts = lm.nbytes, _parts(lm)
        self.seconds = time.perf_counter() - started

    @torch.inference_mode()
    def _check(self) -> None:
        """Masks that are counted from the end of the cache, and what else goes wrong on a cache with room, show at once."""
        count = min(4, self.context)
        ids = torch.arange(count, device=self.device)[None] % self.model.get_input_embeddings().weight.shape[0]
        expected = self.model(ids, use_cache=False).logits[:, -1].float()
        try:
            found = self.prefill(ids[:, : max(1, count - 1)]).float()
            if count > 1:
                found = self.decode(int(ids[0, -1])).float()
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise NotCompilable(f"It does not run on a cache of fixed size ({error})") from error
        if not (found - expected).norm() <= 0.1 * expected.norm():
            raise NotCompilable("On a cache of fixed size it computes something else")

    @torch.inference_mode()
    def _record(self) -> None:
        """Run the step on a stream of its own, then record it. Whatever it reads and writes must stay where it is."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM):
                    self._step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.out = self._step()
        except RuntimeError as error:
            raise NotCompilable(f"Its step cannot be recorded as a CUDA graph ({error})") from error
        self.graph = graph

    @property
    def ends(self) -> set[int]:
        """The tokens at which its texts end."""
        return set(self.settings.ends)

    def _step(self) -> torch.Tensor:
        """The token in ``self.token`` after what is in the cache: logits (1, vocabulary)."""
        return self.model(self.token, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    # --- whole texts ---

    @torch.inference_mode()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of every token: LongTensor (batch, tokens) -> (batch, tokens, vocabulary). No cache is used."""
        return self.model(ids.to(self.device), use_cache=False).logits.float()

    def generate(self, prompt: str, max_new_tokens: int = 32) -> str:
        """The greedy continuation of a prompt, without the prompt."""
        return self.tokenizer.decode(list(self.stream(prompt, max_new_tokens)), skip_special_tokens=True)

    def stream(self, prompt: str, max_new_tokens: int = 32) -> Iterator[int]:
        """The greedy continuation, token id by token id, as they are found: the tokens of ``LanguageModel.generate``."""
        ids = encoded(self, prompt, max_new_tokens).to(self.device)
        greedy = Greedy(self.settings, ids, max_new_tokens, self.tokenizer)
        token = greedy(self.prefill(ids))
        text = self._text
        for left in range(max_new_tokens, 0, -1):
            yield token
            if greedy.over or left == 1:
                return
            if text != self._text:
                raise RuntimeError("Another text was begun on this model's only cache: compile one for each.")
            token = greedy(self.decode(token))

    # --- step by step ---

    @torch.inference_mode()
    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """Start a text with LongTensor (1, tokens). Gives the last logits, (1, vocabulary)."""
        if ids.shape[1] > self.context:
            raise ValueError(
                f"{ids.shape[1]} tokens do not fit into the context of {self.context}: compile(lm, context=…)."
            )
        self._text, self._owner = self._text + 1, threading.get_ident()
        self.rewind(0)
        out = self.model(ids.to(self.device), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]

    @torch.inference_mode()
    def decode(self, token: int) -> torch.Tensor:
        """Add one token to the text. Returns its logits (1, vocabulary); the next step may overwrite them."""
        if threading.get_ident() != self._owner:
            raise RuntimeError("This text was begun by another thread: compile a model for each thread.")
        if self.length >= self.context:
            text = f"The text has filled the context of {self.context} tokens"
            raise ValueError(f"{text}: rewind, or compile with a larger one.")
        self.token.fill_(token)
        if self.graph is None:
            return self._step()
        self.graph.replay()
        return self.out

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return int(self.cache.layers[0].cumulative_length)

    def rewind(self, length: int) -> None:
        """Forget all but the first ``length`` tokens: what lies behind them is masked, and overwritten."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length = {length!r} is not allowed: the cache holds {self.length} tokens.")
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(length)

    @property
    def kv_nbytes(self) -> int:
        """Bytes of the cache, which is allocated whole."""
        return sum(t.nbytes for layer in self.cache.layers for t in (layer.keys, layer.values))

    def __repr__(self) -> str:
        done = " -> ".join(self.history) or "uncompressed"
        how = "CUDA graph" if self.graph else "no graph: not on a GPU"
        return (
            f"GraphedModel({self.name!r}, {done}, {self.kv_nbytes / 1e6:.1f} MB cache for {self.context} tokens, {how})"
        )


def _fixed_cache(model, context: int) -> StaticCache:
    """A cache of fixed size, every layer of which keeps all tokens; :class:`NotCompilable` where one cannot."""
    try:
        cache = StaticCache(config=model.config, max_cache_len=context)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise NotCompilable(f"It has no cache of fixed size ({error})") from error
    if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
        raise NotCompilable("Its attention slides over a window, whose cache is not addressed by tensors alone")
    if not cache.layers or not all(hasattr(layer, "cumulative_length") for layer in cache.layers):
        raise NotCompilable("Some of its layers keep a state that is no cache of tokens")
    return cache


def _parts(lm) -> dict[str, int]:
    """Bytes of the embedding, the blocks (all else is counted there) and the head, which a tied embedding is part of."""
    embedding, head = lm.model.get_input_embeddings(), lm.model.get_output_embeddings()
    tied = getattr(head, "weight", None) is embedding.weight
    parts = {"embedding": 0 if tied else held(embedding), "blocks": 0, "head": held(head)}
    return parts | {"blocks": lm.nbytes - sum(parts.values())}
