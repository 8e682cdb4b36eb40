"""One ONNX graph for a whole decoder: ids and the cache go in, logits come out, and the cache grows in place.

    ids (batch, tokens) → embedding → [norm → q k v → attention → o → norm → gate, up → down] × blocks → norm → head

Operators of onnxruntime's own set (domain ``com.microsoft``) each do what takes a framework many: attention with rotary
positions and the cache, a residual sum with the norm after it, a product with packed weights. About ten per block.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from onnx import ModelProto, TensorProto, helper
from torch import nn

from labkit.engine import weights as w
from labkit.engine.families import Block, Decoder, rotary_tables
from labkit.engine.kv_scales import KVScales

MICROSOFT = "com.microsoft"


def build(
    decoder: Decoder,
    folder: Path,
    context: int,
    head_bits,
    embedding_bits,
    kind: type[Graph] | None = None,
    kv: KVScales | None = None,
):
    """Write ``model.onnx`` and ``weights.bin`` for a decoder into a folder.

    ``kind``: a Graph that other runtimes bind. ``kv``: the steps of a packed cache; None keeps keys and values as fp32.
    """
    kind = kind or Graph
    graph = kind(w.Weights(folder / "weights.bin", kind.aligned_from), decoder, kv)
    try:
        graph.decoder_into(context, head_bits, embedding_bits)
    finally:
        graph.weights.close()
    (folder / "model.onnx").write_bytes(graph.model().SerializeToString())
    return graph


class Graph:
    """Nodes in the order in which they are added, the initializers they read, and notes on what could not stay packed."""

    ids, past, present = "ids", "past", "present"  # how inputs and outputs are called
    aligned_from = 0  # bytes from which on a tensor begins where a mapping may

    def __init__(self, weights: w.Weights, decoder: Decoder, kv: KVScales | None = None):
        self.weights, self.d, self.kv = weights, decoder, kv
        self.nodes: list = []
        self.inputs: list = []
        self.outputs: list = []
        self.dense: dict[str, list[str]] = {}  # why a packed linear is dense here -> which ones
        self.plain_embedding = False  # whether an embedding that was to be packed is not
        self.widened: dict[tuple[int, int], set[int]] = {}  # bits of a code, bits that it takes here -> which linears

    def node(self, kind: str, inputs: list[str], name: str, domain: str = "", outputs: int = 1, **attributes):
        """Add an operator; returns the name of its output, or their names."""
        names = [name] if outputs == 1 else [f"{name}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name=name, domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    @property
    def vocabulary(self) -> int:
        return self.d.embedding.shape[0]

    @property
    def head_rows(self) -> int:
        return w.rows(self.d.head)

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of the embedding, the blocks, the head and the rotary tables."""
        found = {"embedding": 0, "blocks": 0, "head": 0, "rotary": 0}
        for name, size in self.weights.sizes.items():
            first = name.split(".")[0]
            found[first if first in found else "blocks"] += size
        return found

    @property
    def notes(self) -> tuple[str, ...]:
        """What the graph computes otherwise than the source, in sentences."""
        said = [
            f"{len(names)} linears of {kind} are dense fp32 here: the operator takes integers in groups of 16, 32, 64, "
            "128 or 256 columns."
            for kind, names in self.dense.items()
        ]
        said += [
            f"Codes of {bits} bits take {width} here, the next width of the operator ({len(which)} of the linears)."
            for (bits, width), which in self.widened.items()
        ]
        if self.plain_embedding:
            said.append(
                f"The embedding is fp32 here: of {self.d.embedding.shape[1]} columns no groups of 16 can be made."
            )
        if any(n.op_type == "MatMulNBits" for n in self.nodes):
            said.append("Products with packed weights round activations to 8 bits, block by block.")
        if self.kv:
            said.append(
                f"The KV cache holds codes of {self.kv.bits} bits, with a step per channel from calibration text."
            )
        return tuple(said)

    # --- the decoder ---

    def decoder_into(self, context: int, head_bits: int | None, embedding_bits: int | None) -> None:
        d = self.d
        self.entrance()
        for name, table in zip(("cos", "sin"), rotary_tables(d, context)):
            self.weights.add(f"rotary.{name}", table)
        head = self._head_weight(head_bits)
        x, residual = self.embedding(embedding_bits, head), ""
        for i, block in enumerate(d.blocks):
            x, residual = self.block(f"{i}", block, x, residual)
        x, _ = self.norm("norm", d.norm, x, residual)
        x, rows = self.wanted(x)
        logits = self.head(x, head)
        self.nodes[-1].output[0] = "logits"
        assert logits
        shape = ["batch", rows, w.rows(d.head)]
        self.outputs.insert(0, helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape))

    def entrance(self) -> None:
        """Declare the inputs but the cache. Attention reads ``last`` and ``total``."""
        ints, ints32 = TensorProto.INT64, TensorProto.INT32
        self.inputs += [
            helper.make_tensor_value_info(self.ids, ints, ["batch", "tokens"]),
            helper.make_tensor_value_info("rows", ints, ["rows"]),  # the tokens whose logits are wanted
            helper.make_tensor_value_info("last", ints32, ["batch"]),  # position of the last token
            helper.make_tensor_value_info("total", ints32, [1]),  # tokens, those in the cache included
        ]

    def wanted(self, x: str) -> tuple[str, str | int]:
        """The tokens whose logits are wanted, (batch, rows, hidden), and what their dimension is called."""
        return self.node("Gather", [x, "rows"], "wanted", axis=1), "rows"

    def block(self, at: str, b: Block, x: str, residual: str) -> tuple[str, str]:
        x, residual = self.norm(f"{at}.norm", b.norm, x, residual)
        qkv = self.linear(f"{at}.qkv", [b.q, b.k, b.v], x)
        x = self.attention(at, b, qkv)
        (x,) = self.linear(f"{at}.o", [b.o], x)
        x, residual = self.norm(f"{at}.mlp_norm", b.mlp_norm, x, residual)
        gate_up = self.linear(f"{at}.gate_up", [b.gate, b.up], x)
        if len(gate_up) == 1:
            half = self.weights.add(f"{at}.half", torch.tensor([w.rows(b.gate), w.rows(b.up)]))
            gate_up = self.node("Split", [gate_up[0], half], f"{at}.split", outputs=2, axis=-1)
        x = self.node("Mul", [self.gate(f"{at}.act", gate_up[0]), gate_up[1]], f"{at}.gated")
        (x,) = self.linear(f"{at}.down", [b.down], x)
        return x, residual

    def norm(self, name: str, gain: torch.Tensor, x: str, residual: str) -> tuple[str, str]:
        """RMS norm of x + residual: the normed value, and the sum, which is the next residual."""
        gain = self.weights.add(f"{name}.gain", gain.float())
        if not residual:
            normed = self.node("SimplifiedLayerNormalization", [x, gain], name, epsilon=self.d.epsilon, axis=-1)
            return normed, x
        names = [name, "", "", f"{name}.sum"]
        node = helper.make_node(
            "SkipSimplifiedLayerNormalization",
            [x, residual, gain],
            names,
            name=name,
            domain=MICROSOFT,
            epsilon=self.d.epsilon,
        )
        self.nodes.append(node)
        return names[0], names[3]

    def attention(self, at: str, b: Block, qkv: list[str]) -> str:
        """Rotary positions, the cache, scores, softmax and values in one operator. qkv: three, or one with all rows."""
        if b.q_norm is not None:
            qkv = self.norm_heads(at, b, qkv)
        qkv = qkv + [""] * (3 - len(qkv))
        width, dtype = self.cached(b)
        kind, shape = helper.np_dtype_to_tensor_dtype(dtype), ["batch", b.kv_heads, "room", width]
        for what in ("key", "value"):
            for names, way in ((self.inputs, self.past), (self.outputs, self.present)):
                names.append(helper.make_tensor_value_info(f"{way}.{at}.{what}", kind, shape))
        inputs = [*qkv, f"{self.past}.{at}.key", f"{self.past}.{at}.value", "last", "total", "rotary.cos", "rotary.sin"]
        more = {} if b.window is None else {"local_window_size": b.window}
        if self.kv:
            steps = {"key_step": self.kv.keys[int(at)], "value_step": self.kv.values[int(at)]}
            inputs += ["", "", "", *(self.weights.add(f"{at}.{name}", step) for name, step in steps.items())]
            more |= {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": self.kv.bits}
        names = [f"{at}.attention", f"{self.present}.{at}.key", f"{self.present}.{at}.value"]
        node = helper.make_node(
            "GroupQueryAttention",
            inputs,
            names,
            name=names[0],
            domain=MICROSOFT,
            num_heads=b.heads,
            kv_num_heads=b.kv_heads,
            scale=b.scale,
            do_rotary=1,
            **more,
        )
        self.nodes.append(node)
        return names[0]

    def cached(self, b: Block) -> tuple[int, np.dtype]:
        """What the cache of a block holds for one head and token: how many numbers, and of which type."""
        if self.kv is None:
            return b.head_dim, np.dtype(np.float32)
        return (b.head_dim, np.dtype(np.int8)) if self.kv.bits == 8 else (b.head_dim // 2, np.dtype(np.uint8))

    def norm_heads(self, at: str, b: Block, qkv: list[str]) -> list[str]:
        """Norms over each head of q and k, before they are turned. On CPU the attention operator does not take them."""
        if len(qkv) == 1:
            sizes = self.weights.add(f"{at}.sizes", torch.tensor([w.rows(m) for m in (b.q, b.k, b.v)]))
            qkv = self.node("Split", [qkv[0], sizes], f"{at}.split_qkv", outputs=3, axis=-1)
        normed = []
        for name, x, gain, heads in (("q", qkv[0], b.q_norm, b.heads), ("k", qkv[1], b.k_norm, b.kv_heads)):
            apart = self.weights.add(f"{at}.{name}_apart", torch.tensor([0, 0, heads, b.head_dim]))
            together = self.weights.add(f"{at}.{name}_together", torch.tensor([0, 0, heads * b.head_dim]))
            x = self.node("Reshape", [x, apart], f"{at}.{name}_heads")
            x, _ = self.norm(f"{at}.{name}_norm", gain, x, "")
            normed.append(self.node("Reshape", [x, together], f"{at}.{name}_normed"))
        return [*normed, qkv[2]]

    def gate(self, name: str, x: str) -> str:
        if self.d.gate == "silu":  # x · sigmoid(1 · x)
            return self.node("QuickGelu", [x], name, MICROSOFT, alpha=1.0)
        if self.d.gate == "gelu":
            return self.node("Gelu", [x], name, MICROSOFT)
        return self.node("Gelu", [x], name, approximate="tanh")

    # --- products ---

    def linear(self, name: str, modules: list[nn.Module], x: str) -> list[str]:
        """Products of x with one or more linears: fused into one output where their weights are alike, else one each."""
        found = [self.packed(m) for m in modules]
        if w.alike(found):
            return [self.plus_rest(name, modules, x, self.product_packed(name, found, self.bias(modules), x))]
        if len(modules) > 1 and any(f is not None for f in found):
            return [self.linear(f"{name}.{i}", [m], x)[0] for i, m in enumerate(modules)]
        for i, m in enumerate(modules):
            if not isinstance(m, nn.Linear):
                self.dense.setdefault(w.kind_of(m), []).append(f"{name}.{i}")
        weight = torch.cat([m.weight.detach().float() for m in modules])
        y = self.product_dense(name, weight, x)
        bias = self.bias(modules)
        return [y if bias is None else self.node("Add", [y, self.weights.add(f"{name}.bias", bias)], f"{name}.biased")]

    def packed(self, module: nn.Module):
        """The codes of a linear that stays packed in this graph, or None."""
        found = w.packed(module)
        if found is not None and found.bits != module.quantized.form.bits:
            self.widened.setdefault((module.quantized.form.bits, found.bits), set()).add(id(module))
        return found

    def bias(self, modules: list[nn.Module]) -> torch.Tensor | None:
        if all(m.bias is None for m in modules):
            return None
        return torch.cat([torch.zeros(w.rows(m)) if m.bias is None else m.bias.detach().float() for m in modules])

    def product_dense(self, name: str, weight: torch.Tensor, x: str) -> str:
        return self.node("MatMul", [x, self.weights.add(f"{name}.weight", weight.T)], name)

    def product_packed(self, name: str, found: list, bias: torch.Tensor | None, x: str) -> str:
        size, codes, scales, zeros = w.layout(found)
        inputs = [x, self.weights.add(f"{name}.codes", codes), self.weights.add(f"{name}.scales", scales)]
        self.weights.sizes[f"{name}.sums"] = 4 * scales.numel()  # the kernel makes one per block, and keeps it
        if zeros is not None or bias is not None:
            inputs.append("" if zeros is None else self.weights.add(f"{name}.zeros", zeros))
        if bias is not None:
            inputs += ["", self.weights.add(f"{name}.bias", bias)]
        return self.node(
            "MatMulNBits",
            inputs,
            name,
            MICROSOFT,
            K=found[0].columns,
            N=codes.shape[0],
            bits=found[0].bits,
            block_size=size,
            accuracy_level=4,
        )

    def plus_rest(self, name: str, modules: list[nn.Module], x: str, y: str) -> str:
        """y, and for affine weights what their whole zero points left out: sums of the inputs' groups times the rest."""
        rest = w.rest(modules)
        if rest is None:
            return y
        whole, _ = w.whole(modules[0])
        which = f"sums.{whole.columns}.{whole.group_size}"
        if which not in self.weights.sizes:  # one for all linears of this width
            self.weights.add(which, w.sums(whole.columns, whole.group_size))
        added = self.node("MatMul", [x, which], f"{name}.added")
        added = self.node("MatMul", [added, self.weights.add(f"{name}.rest", rest)], f"{name}.left")
        return self.node("Add", [y, added], f"{name}.whole")

    # --- the two ends ---

    def _head_weight(self, bits: int | None):
        """The head as it will be computed: packed codes, or None for dense."""
        own = w.packed(self.d.head)
        if own is not None or bits is None:
            return own
        return w.encode(self.d.head.weight, bits, group(self.d.embedding.shape[1]))

    def head(self, x: str, packed) -> str:
        if packed is not None:
            y = self.product_packed("head", [packed], self.bias([self.d.head]), x)
            return self.plus_rest("head", [self.d.head], x, y)
        (y,) = self.linear("head", [self.d.head], x)
        return y

    def embedding(self, bits: int | None, head) -> str:
        d = self.d
        width = d.embedding.shape[1]
        if bits is not None and width % group(width):  # this operator, unlike the products, takes whole groups only
            bits, self.plain_embedding = None, True
        if bits is None:
            x = self.node("Gather", [self.weights.add("embedding.weight", d.embedding.float()), self.ids], "embedding")
        else:
            same = d.tied and head is not None and head.bits == bits
            codes = head if same else w.encode(d.embedding, bits, group(width))
            size, data, scales, zeros = w.layout([codes])
            inputs = [
                self.weights.add("embedding.codes", data.reshape(len(data), -1)),
                self.ids,
                self.weights.add("embedding.scales", scales),
            ]
            if zeros is not None:
                inputs.append(self.weights.add("embedding.zeros", zeros))
            x = self.node(
                "GatherBlockQuantized",
                inputs,
                "embedding",
                MICROSOFT,
                bits=bits,
                block_size=size,
                gather_axis=0,
                quantize_axis=1,
            )
        if d.embedding_scale == 1:
            return x
        return self.node("Mul", [x, self.weights.add("embedding.scale", torch.tensor(d.embedding_scale))], "scaled")

    def model(self) -> ModelProto:
        graph = helper.make_graph(self.nodes, "decoder", self.inputs, self.outputs, self.weights.initializers)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="labkit")


def group(hidden: int) -> int:
    """The group size for an embedding and a head: 64 columns where that divides, for fewer scales; else 32 or 16."""
    return next((size for size in (64, 32) if hidden % size == 0), 16)


class DenseGraph(Graph):
    """The same decoder with every linear of its blocks as fp32: on most CPUs it reads a long prompt faster."""

    def packed(self, module: nn.Module) -> None:
        return None
