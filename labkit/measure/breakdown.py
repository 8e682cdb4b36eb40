"""Where do the milliseconds of a decoded token go? A step in three parts that add up to it.

    steps = breakdown.decode({"fp32": lm, "4-bit": small}, roofline.measure())
    steps[0].reading + steps[0].kernels + steps[0].framework    # = steps[0].seconds: "fp32", run eagerly

- **reading** (modelled): the bytes of all weights that a token needs, over the bandwidth that was measured. What the
  step would take if memory were all that it waits for.
- **framework** (measured): the same step of the *hollow twin*, a model with the same layers, heads and operators whose
  matrices have shrunk until there is (almost) nothing to read and to compute. What it still takes is Python, the
  dispatch of operators, their outputs' allocation, and the calls of a runtime.
- **kernels** (measured, less a modelled part): the rest. Arithmetic, unpacking, attention, and reading that is slower
  than the bandwidth.

The hollow twin stands in for a profiler, which slows what it looks at, and which knows one runtime's operators but not
another's. It is timed in turns with the model itself, so that a machine that drifts slows both.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from labkit import formats, heap
from labkit.linear import PackedLinear
from labkit.measure import memory, timing
from labkit.measure.latency import decode_run, engine_decode_run
from labkit.method import reason_of
from labkit.model import LanguageModel
from labkit.progress import track
from labkit.walk import blocks, linears, weight_of

EAGER, GRAPH = "eager", "one graph"
WIDTH, HEAD = 32, 16  # of the hollow twin: features of its layers, and of one attention head
TOKENS = 64  # its vocabulary
SIZES = ("hidden_size", "intermediate_size", "ffn_dim", "word_embed_proj_dim", "n_inner")  # what configs call a width


@dataclass(frozen=True)
class Step:
    """One decoded token of one model, run in one way. Times are in seconds, medians; the three parts sum to ``seconds``."""

    model: str
    way: str  # "eager" or "one graph"
    seconds: float  # measured
    hollow: float  # measured: the hollow twin's step
    nbytes: int  # counted: weights that the token reads, as the runtime holds them
    bandwidth: float  # bytes/s, measured

    @property
    def framework(self) -> float:
        """Seconds of the hollow twin's step (measured), never more than the step itself."""
        return min(self.hollow, self.seconds)

    @property
    def reading(self) -> float:
        """Seconds to read the bytes at the measured bandwidth (modelled), never more than the framework leaves."""
        return min(self.nbytes / self.bandwidth, self.seconds - self.framework)

    @property
    def kernels(self) -> float:
        """The rest: never below zero, for the other two parts leave it at least that."""
        return self.seconds - self.framework - self.reading

    @property
    def cut(self) -> bool:
        """Whether reading had to be cut to fit: the roof was measured too low, or some weights came from a cache."""
        return self.nbytes / self.bandwidth + self.hollow > self.seconds

    @property
    def most_gain(self) -> float:
        """How many times as fast the step gets, at most, when compression takes away all but the framework's part."""
        return self.seconds / self.framework


def decode(
    models: Mapping[str, LanguageModel],
    roof,
    context: int = 16,
    tokens: int = 4,
    rounds: int = 5,
    graphs: Collection[str] | None = None,
) -> list[Step]:
    """Each model's decode step, eagerly and, where there is one for it, as one graph; the graphs' heads are not packed.

    ``roof``: a Roofline, for its bandwidth. ``context``: tokens in the cache. ``tokens``: decoded in a row, per sample.
    ``graphs``: which models are also timed as a graph, by default all. A graph takes as many bytes as the model that it
    is made of, and is built, timed and let go of before the next one. ValueError for a model without a hollow twin.
    """
    if not models:
        raise ValueError("decode needs at least one model: decode({'fp32': lm}, roofline.measure()).")
    graphs = models if graphs is None else graphs
    if unknown := [name for name in graphs if name not in models]:
        raise ValueError(f"graphs = {graphs!r} is not allowed: {unknown[0]!r} is not one of {', '.join(models)}.")
    twins = {name: hollow(lm) for name, lm in models.items()}
    ways = [(name, EAGER) for name in models] + [(name, GRAPH) for name in models if name in graphs]
    found = []
    for name, way in track(ways, "timing a step's parts", show=False):
        if way == GRAPH:
            release(*models.values())
        timed = (_eager if way == EAGER else _as_graph)(models[name], twins[name], context, tokens, rounds)
        if timed is not None:
            found.append(Step(name, way, *timed, roof.bandwidth))
    return found


def _eager(lm, twin, context: int, tokens: int, rounds: int) -> tuple[float, float, int]:
    """Seconds of a step, seconds of the hollow twin's, and the bytes that the step reads."""
    seconds = _time(decode_run(lm, context, tokens), decode_run(twin, context, tokens), tokens, rounds, lm.device)
    return *seconds, token_bytes(lm)


def _as_graph(lm, twin, context: int, tokens: int, rounds: int) -> tuple[float, float, int] | None:
    """The same for the graph, which lives no longer than this call; None where there is none."""
    graph = as_graph(lm)
    if graph is None:
        return None
    empty = engine_decode_run(as_graph(twin, graph.threads), twin, context, tokens)
    seconds = _time(engine_decode_run(graph, lm, context, tokens), empty, tokens, rounds, lm.device)
    return *seconds, graph.parts["blocks"] + graph.parts["head"]


def _time(run, empty, tokens: int, rounds: int, device) -> tuple[float, float]:
    timed = timing.compare({"step": run, "hollow": empty}, rounds=rounds, warmup=1, device=device)
    return timed.timings["step"].median / tokens, timed.timings["hollow"].median / tokens


def token_bytes(lm) -> int:
    """Bytes of the weights that one token reads, as they are held: every linear layer once, and the output layer.

    A packed layer counts with what its kernel holds, or with what is stored where it has none. Left out as small: norms,
    biases, one row of the embedding, and a short KV cache.
    """
    head = lm.model.get_output_embeddings()
    found = 0
    for layer in (*memory.linear_layers(lm), head):
        if isinstance(layer, PackedLinear):
            found += layer.runtime_nbytes or layer.stored_nbytes
        elif hasattr(layer, "stored_nbytes"):
            found += layer.stored_nbytes
        else:
            found += layer.weight.numel() * layer.weight.element_size()
    return found


def as_graph(lm, threads: int | None = None):
    """The model as one graph with the output layer as it is, so that it reads what it reads eagerly; None without one."""
    if lm.device.type != "cpu":
        return None
    try:
        from labkit.engine import NotCompilable, compile
    except ImportError:
        return None
    try:
        return compile(lm, context=64, head_bits=None, threads=threads)
    except NotCompilable:
        return None


def release(*models) -> None:
    """Make room for a graph: let go of the kernels of packed layers, which are built again when they are needed."""
    for lm in models:
        for layer in lm.model.modules():
            if isinstance(layer, PackedLinear):
                layer.take_back()
    heap.trim()


def hollow(lm) -> LanguageModel:
    """The hollow twin: the same class, layers, heads and formats, with random matrices of at most a few KB.

    ValueError for a model that is not as its config says, that has other widths than most, or whose layers are packed in a
    way that cannot be repeated.
    """
    config = copy.deepcopy(lm.model.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = type(lm.model)(_shrunk(config))
            model.to(device=lm.device, dtype=lm.model.get_input_embeddings().weight.dtype).eval().requires_grad_(False)
            with torch.inference_mode():
                model(torch.zeros(1, 2, dtype=torch.long, device=lm.device), use_cache=False)
        except Exception as error:  # whatever a family's constructor and forward make of such sizes
            raise ValueError(
                f"{type(lm.model).__name__} cannot be made small ({reason_of(error)}): its steps cannot be taken apart."
            ) from error
    twin = LanguageModel(model, lm.tokenizer, f"{lm.name}, hollow", lm.history)
    for block, empty in zip(blocks(lm.model), blocks(model), strict=True):
        for name, layer in linears(block):
            if hasattr(layer, "spec"):
                empty.set_submodule(name, _like(layer, empty.get_submodule(name)))
    return twin


def _shrunk(config):
    """The config with small widths, changed in place."""
    if hasattr(config, "head_dim"):  # free of the hidden size
        config.head_dim, hidden = HEAD, WIDTH
    else:
        hidden = config.num_attention_heads * HEAD
    for name in SIZES:
        size = getattr(config, name, None)
        if size is not None:
            setattr(config, name, [hidden] * len(size) if isinstance(size, (list, tuple)) else hidden)
    config.vocab_size, config.pad_token_id = TOKENS, None
    return config


def _like(layer, empty) -> PackedLinear:
    """The small dense layer ``empty`` in the format of ``layer``, with groups as long as its rows where they were longer."""
    if not isinstance(layer, PackedLinear):
        raise ValueError(
            f"{type(layer).__name__} cannot be made small: breakdown takes dense and packed linear layers."
        )
    how = {k: v for k, v in layer.format.items() if k not in ("format", "shape")}
    if how.get("group_size") is not None:
        how["group_size"] = min(how["group_size"], WIDTH)
    form = formats.by_name(layer.format["format"], **how)
    return PackedLinear(form.encode(weight_of(empty)), empty.bias, layer.dtype)
