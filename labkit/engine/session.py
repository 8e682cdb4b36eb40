"""CompiledModel: the graph in a runtime session, with a cache that stays where it is from step to step."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from labkit import bos, heap
from labkit.engine import kv_scales
from labkit.engine import threads as policy
from labkit.engine.families import NotCompilable, read
from labkit.engine.graph import DenseGraph, build
from labkit.generation import Greedy, Settings
from labkit.paths import own

PREFILLS = ("packed", "dense", "auto")
STALE = 3600  # seconds after which a folder left behind by a killed process is removed


def compile(
    lm,
    context: int = 2048,
    head_bits=8,
    embedding_bits=8,
    threads: int | None = None,
    prefill: str = "packed",
    kv_bits: int | None = None,
    calib: torch.Tensor | None = None,
) -> CompiledModel:
    """One graph for a whole model: see :class:`CompiledModel`. The model itself is not changed and not kept.

    ``context``: the most tokens, prompt and answer together. ``head_bits``, ``embedding_bits``: 8, 4 or None (fp32) for
    a head and an embedding that are not packed yet. ``threads``: None takes what was measured to be fastest here
    (:mod:`labkit.engine.threads`; ``CompiledModel.threads`` is what was taken). On a GPU it is a
    :class:`labkit.engine.cuda_graph.GraphedModel`, for which only ``context`` counts.
    ``prefill``: "packed" reads prompts with the weights that decode; "dense" also holds them as fp32, for prompts that are
    long enough; "auto" measures whether and from how many tokens on that is faster here, and else lets go of them.
    ``kv_bits``: 8 or 4 keep the KV cache as codes, for long texts: a step reads a quarter or an eighth of it, while a
    prompt is read more slowly. Their steps come from ``calib``, LongTensor (windows, length); None: 512 tokens of the manual.
    Raises :class:`NotCompilable` for a model that one graph cannot compute, ValueError for a bad argument.
    """
    check(head_bits, embedding_bits, context=context, threads=threads)
    if kv_bits not in (None, *kv_scales.BITS):
        raise ValueError(f"kv_bits = {kv_bits!r} is not allowed: it must be 8, 4 or None (fp32).")
    if prefill not in PREFILLS:
        raise ValueError(f"prefill = {prefill!r} is not allowed: it must be one of {', '.join(PREFILLS)}.")
    if lm.device.type == "cuda":
        from labkit.engine.cuda_graph import GraphedModel

        if kv_bits is not None:
            raise ValueError(f"kv_bits = {kv_bits!r} is not allowed on a GPU: the cache of its graph is not packed.")
        return GraphedModel(lm, context)
    started = time.perf_counter()
    decoder = read(lm.model)
    context = min(context, decoder.context)
    kv = None if kv_bits is None else kv_scales.find(lm, kv_bits, calib)
    with _scratch() as folder:
        graph = build(decoder, folder, context, head_bits, embedding_bits, kv=kv)

        def built(count: int) -> CompiledModel:
            with refused(kv):
                model = CompiledModel(lm, decoder, graph, folder / "model.onnx", context, count)
                model.logits(torch.zeros(1, 1, dtype=torch.long))  # what can be built need not run
            return model

        model = built(threads) if threads else policy.fastest(built, graph.weights.nbytes)
    if prefill != "packed":
        read_densely(model, decoder, head_bits, embedding_bits, kv, measured=prefill == "auto")
    heap.trim()  # the runtime has repacked each weight
    model.seconds = time.perf_counter() - started
    return model


def read_densely(model: CompiledModel, decoder, head_bits, embedding_bits, kv, measured: bool) -> None:
    """Give a model a second graph, of dense weights, for prompts. ``measured``: only from where, and if, it is faster."""
    with _scratch() as folder:
        graph = build(decoder, folder, model.context, head_bits, embedding_bits, DenseGraph, kv)
        session = _open(folder / "model.onnx", policy.cores())
    least = 2
    if measured:
        least = policy.crossover(model, session, graph.weights.nbytes)
        if least is None:
            return
    model.reader, model.reads_from = session, least
    size = graph.weights.nbytes
    model.nbytes, model.parts = model.nbytes + size, model.parts | {"dense, for prompts": size}
    text = f"Prompts of {least} tokens or more are multiplied by dense weights, held beside the packed ones"
    model.notes = (*model.notes, f"{text} ({size / 1e6:.0f} MB).")


def check(head_bits, embedding_bits, **counts) -> None:
    """Raise ValueError for bits that a head or an embedding cannot have, or a count that is neither None nor 1 or more."""
    for name, bits in (("head_bits", head_bits), ("embedding_bits", embedding_bits)):
        if bits not in (8, 4, None):
            raise ValueError(f"{name} = {bits!r} is not allowed: it must be 8, 4 or None (fp32).")
    for name, number in counts.items():
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise ValueError(f"{name} = {number!r} is not allowed: it must be a whole number, 1 or more.")


@contextlib.contextmanager
def refused(kv=None):
    """What onnxruntime cannot load or run becomes a :class:`NotCompilable`, in its own words. ``kv``: of a packed cache."""
    try:
        yield
    except Exception as error:
        ours = isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime")
        said = str(error).split("Status Message: ")[-1].strip().rstrip(".")
        if not ours or "alloc" in said:  # memory is missing, not an operator
            raise
        if kv is not None and "GroupQueryAttention" in str(error):
            text = f"This onnxruntime's attention takes no cache of codes ({said}): kv_bits must be None here."
            raise ValueError(text) from error
        raise NotCompilable(f"onnxruntime cannot run its graph ({said})") from error


def encoded(model, prompt: str, max_new_tokens: int) -> torch.Tensor:
    """A prompt's ids (1, tokens); ValueError where it is empty, or does not fit ``model.context`` with its answer."""
    ids = torch.tensor([bos.encode(model.tokenizer, prompt)], dtype=torch.long)
    if ids.shape[1] == 0:
        raise ValueError("The prompt is empty: generate() needs at least one token to continue.")
    if ids.shape[1] + max_new_tokens > model.context:
        raise ValueError(
            f"{ids.shape[1]} tokens of prompt and {max_new_tokens} new ones do not fit into the context of "
            f"{model.context}: compile with a larger one."
        )
    return ids


class _scratch:
    """A folder in the cache for the graph while it is read. What killed processes left there is removed."""

    def __enter__(self) -> Path:
        home = own() / "engine"
        home.mkdir(exist_ok=True)
        for old in home.iterdir():
            if old.is_dir() and time.time() - old.stat().st_mtime > STALE:
                shutil.rmtree(old, ignore_errors=True)
        self.path = Path(tempfile.mkdtemp(prefix="graph-", dir=home))
        return self.path

    def __exit__(self, *_):
        shutil.rmtree(self.path, ignore_errors=True)


class CompiledModel:
    """A decoder as one graph. ``logits`` and ``generate`` as LanguageModel's; ``prefill``, ``decode`` step by step.

    Every thread that uses it has a cache of its own, so calls do not mix. ``nbytes``: weights as the runtime holds
    them. ``notes``: what is not as it was in the source, in sentences.
    """

    def __init__(self, lm, decoder, graph, path: Path, context: int, threads: int):
        self.name, self.history, self.tokenizer = lm.name, lm.history, lm.tokenizer
        self.settings = Settings.of(lm.model)
        self.context, self.threads = context, threads
        self.notes = (*graph.notes, self.settings.note) if self.settings.note else graph.notes
        self.nbytes, self.parts = graph.weights.nbytes, graph.parts
        self.seconds = 0.0
        self._caches = [(b.kv_heads, *graph.cached(b)) for b in decoder.blocks]  # heads, numbers in one, their type
        self._vocabulary, self._head_rows = graph.vocabulary, graph.head_rows
        self._session = _open(path, threads)
        self.reader, self.reads_from = None, 0  # a second session for prompts, and from how many tokens on it is used
        self._own = threading.local()

    # --- whole texts ---

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of every token: LongTensor (batch, tokens) -> fp32 (batch, tokens, vocabulary). No cache is kept."""
        ids = self._ids(ids)
        return _Run(self, len(ids), 0).several(ids, np.arange(ids.shape[1]))

    def read(self, ids: torch.Tensor, step: int = 128) -> Iterator[torch.Tensor]:
        """The logits of a text (1, tokens), ``step`` tokens at a time, (1, step, vocabulary): all at once would be large."""
        ids = self._ids(ids)
        run = _Run(self, 1, ids.shape[1])
        for start in range(0, ids.shape[1], step):
            part = ids[:, start : start + step]
            yield run.several(part, np.arange(part.shape[1]))

    def generate(self, prompt: str, max_new_tokens: int = 32) -> str:
        """The greedy continuation of a prompt, without the prompt."""
        tokens = list(self.stream(prompt, max_new_tokens))
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def stream(self, prompt: str, max_new_tokens: int = 32) -> Iterator[int]:
        """The greedy continuation, token id by token id, as they are found: the tokens of ``LanguageModel.generate``."""
        ids = encoded(self, prompt, max_new_tokens)
        run = _Run(self, 1, self.context)  # of its own: two streams do not mix
        greedy = Greedy(self.settings, ids, max_new_tokens, self.tokenizer)
        logits = run.begin(self._ids(ids))
        for left in range(max_new_tokens, 0, -1):
            token = greedy(logits)
            yield token
            if greedy.over or left == 1:
                return
            logits = run.next(token)

    # --- step by step ---

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """Start a text: fill this thread's cache with LongTensor (1, tokens). Gives the last logits, (1, vocabulary)."""
        return self._cache().begin(self._ids(ids))

    def decode(self, token: int) -> torch.Tensor:
        """Add one token to the text. Returns its logits (1, vocabulary), a view that the next step overwrites."""
        return self._cache().next(int(token))

    @property
    def ends(self) -> set[int]:
        """The tokens at which its texts end."""
        return set(self.settings.ends)

    @property
    def length(self) -> int:
        """Tokens in this thread's cache."""
        return self._cache().length

    def rewind(self, length: int) -> None:
        """Forget all but the first ``length`` tokens of this thread's text."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length = {length!r} is not allowed: the cache holds {self.length} tokens.")
        self._cache().length = length

    @property
    def kv_nbytes(self) -> int:
        """Bytes of one thread's cache when it is full. Memory is taken as it fills."""
        return sum(2 * heads * width * kind.itemsize for heads, width, kind in self._caches) * self.context

    def __repr__(self) -> str:
        done = " -> ".join(self.history) or "uncompressed"
        size = f"{self.nbytes / 1e6:.1f} MB + {self.kv_nbytes / 1e6:.1f} MB cache for {self.context} tokens"
        return f"CompiledModel({self.name!r}, {done}, {size}, {self.threads} thread{'s' * (self.threads > 1)})"

    # --- inside ---

    def _cache(self) -> _Run:
        if not hasattr(self._own, "run"):
            self._own.run = _Run(self, 1, self.context)
        return self._own.run

    def _ids(self, ids) -> np.ndarray:
        ids = np.ascontiguousarray(torch.as_tensor(ids).cpu().numpy(), dtype=np.int64)
        if ids.ndim != 2 or ids.size == 0:
            raise ValueError(f"ids has the shape {ids.shape}: it must be (batch, tokens) with at least one token.")
        if ids.shape[1] > self.context:
            raise ValueError(
                f"{ids.shape[1]} tokens do not fit into the context of {self.context}: compile(lm, context=…)."
            )
        if ids.min() < 0 or ids.max() >= self._vocabulary:
            raise ValueError(
                f"ids has values outside of the vocabulary: they must be from 0 to {self._vocabulary - 1}."
            )
        return ids


class _Run:
    """One text on its way through the session: its cache, and every input and output bound to a place in memory.

    The graph reads and writes the cache in the same place, so a step copies nothing. ``room`` 0: no cache is kept.
    """

    def __init__(self, model: CompiledModel, batch: int, room: int):
        import onnxruntime as ort

        self.place = ort.OrtValue.ortvalue_from_numpy
        self.model = weakref.proxy(model)  # which holds this run
        self.room, self.length = room, 0
        self.last, self.total = np.zeros(batch, np.int32), np.zeros(1, np.int32)
        self.token, self.row = np.zeros((1, 1), np.int64), np.zeros(1, np.int64)
        self.out = np.zeros((1, 1, model._head_rows), np.float32)
        # calloc: pages that no token has reached yet take no memory.
        self.buffers = {
            f"{i}.{what}": self.place(np.zeros((batch, heads, room, width), kind))
            for i, (heads, width, kind) in enumerate(model._caches)
            for what in ("key", "value")
        }
        self.bindings = {}  # session -> its binding to these places, made when it is first used
        self.single = False  # whether the one-token arrays are bound

    def _bound(self, session):
        """A session's inputs and outputs, bound to this text's cache."""
        if session not in self.bindings:
            binding = self.bindings[session] = session.io_binding()
            binding.bind_ortvalue_input("last", self.place(self.last))
            binding.bind_ortvalue_input("total", self.place(self.total))
            for name, buffer in self.buffers.items():
                binding.bind_ortvalue_input(f"past.{name}", buffer)
                if self.room:
                    binding.bind_ortvalue_output(f"present.{name}", buffer)
        return self.bindings[session]

    def _step(self, session, ids: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
        """Run a session on ids (batch, tokens) after what is in the cache; the logits of ``rows`` are written to ``out``."""
        binding, single = self._bound(session), ids is self.token
        if not (single and self.single):
            binding.bind_ortvalue_input("ids", self.place(ids))
            binding.bind_ortvalue_input("rows", self.place(rows))
            binding.bind_ortvalue_output("logits", self.place(out))
        self.single = single
        self.last[:] = self.length + ids.shape[1] - 1
        self.total[:] = self.length + ids.shape[1]
        session.run_with_iobinding(binding)
        self.length += ids.shape[1]

    def several(self, ids: np.ndarray, rows: np.ndarray) -> torch.Tensor:
        """Add tokens (batch, tokens); returns the logits (batch, rows, vocabulary) of the tokens at ``rows``."""
        model, out = self.model, np.empty((len(ids), len(rows), self.out.shape[-1]), np.float32)
        long = model.reader is not None and ids.shape[1] >= model.reads_from
        self._step(model.reader if long else model._session, ids, rows, out)
        return torch.from_numpy(out)

    def begin(self, ids: np.ndarray) -> torch.Tensor:
        self.length = 0
        return self.several(ids, np.array([ids.shape[1] - 1]))[:, 0]

    def next(self, token: int) -> torch.Tensor:
        if self.length >= self.room:
            raise ValueError(
                f"The text has filled the context of {self.room} tokens: rewind, or compile with a larger one."
            )
        self.token[0, 0] = token
        self._step(self.model._session, self.token, self.row, self.out)
        return torch.from_numpy(self.out)[:, 0]


def try_out(path: Path) -> None:
    """Run one token through a graph with onnxruntime-genai's names; :class:`NotCompilable` where that cannot be done."""
    with refused():
        session = _open(path, 1, **{"session.disable_prepacking": "1"})  # weights stay in their file, mapped
        feeds = {"input_ids": np.zeros((1, 1), np.int64), "attention_mask": np.ones((1, 1), np.int64)}
        for place in session.get_inputs():
            if place.name not in feeds:  # the cache, empty
                feeds[place.name] = np.zeros((1, place.shape[1], 0, place.shape[3]), np.float32)
        session.run(["logits"], feeds)


def _open(path: Path, threads: int, **entries: str):
    import onnxruntime as ort

    options = ort.SessionOptions()
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # what goes wrong is raised, it need not be printed as well
    options.enable_cpu_mem_arena = False
    # Threads spin between the products of one step, where waking them would take as long as the product; they stop when
    # the step is done, so that torch's threads find the cores free.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
