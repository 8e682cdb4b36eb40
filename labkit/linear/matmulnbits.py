"""onnxruntime's MatMulNBits as a function: 2-, 4- and 8-bit weights, int8 activations, at the memory roof of a CPU.

With ``accuracy_level=4`` the kernel rounds activations to int8, block by block, and multiplies integers; other levels
are far slower. It repacks the weights at load into an order of its own. Real-valued zero points would be slow too: an
affine weight goes in with the nearest whole ones, and what is left is a small product of its own.

Each session gets one thread: sessions own their thread pools, and a hundred spinning pools hang a machine. Many rows
are shared out over the cores instead: one session may run in several threads at once.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import torch

from labkit.formats import Encoded, Quantized, integers, pack

BLOCKS = (256, 128, 64, 32, 16)  # columns that share a scale, as the operator takes them
SHARE = 16  # rows that are worth a thread of their own


@functools.cache
def widths() -> tuple[int, ...]:
    """The bits that the installed onnxruntime multiplies by: none without it, 2 bits since 1.24."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError:
        return ()
    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    return (2, 4, 8) if version >= (1, 24) else (4, 8)


def takes(weight, device: torch.device) -> bool:
    """True when the kernel can multiply by such a weight: codes of 2, 4 or 8 bits in groups of 16, 32, … columns."""
    return device.type == "cpu" and weight.form.bits in widths() and whole(weight) is not None


def whole(weight: Encoded) -> tuple[Quantized, torch.Tensor | None] | None:
    """A weight as integers, and their rest (:func:`labkit.formats.integers`); None where the operator takes no such groups."""
    found = integers(weight)
    return found if found and found[0].group_size % BLOCKS[-1] == 0 else None


def layout(weight: Quantized) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix as the operator wants it.

    Returns the block size; codes uint8 (out, blocks, bytes); scales fp32 (out, blocks); zeros, packed uint8 (out, bytes).
    """
    size = next(b for b in BLOCKS if weight.group_size % b == 0)
    blocks = -(-weight.columns // size)
    repeat = weight.group_size // size  # one scale per group, and here one per block
    scales = weight.scale.float().repeat_interleave(repeat, 1)[:, :blocks].contiguous()
    zeros = pack(weight.zeros().repeat_interleave(repeat, 1)[:, :blocks].contiguous(), weight.bits)
    short = blocks * size * weight.bits // 8 - weight.packed.shape[1]
    codes = torch.nn.functional.pad(weight.packed, (0, short)) if short else weight.packed
    return size, codes.view(len(codes), blocks, -1), scales, zeros


class Kernel:
    """One matrix, ready to multiply: ``kernel(x)`` for x (rows, in) gives (rows, out), computed in fp32."""

    def __init__(self, encoded: Encoded):
        import onnxruntime as ort
        from onnx import TensorProto, helper

        weight, rest = integers(encoded)
        self.rest, self.group_size = None if rest is None else rest.T.contiguous(), weight.group_size
        size, codes, scales, zeros = layout(weight)
        rows = len(codes)
        initializers = [
            ("B", TensorProto.UINT8, codes.shape, codes),
            ("scales", TensorProto.FLOAT, (scales.numel(),), scales),
            ("zeros", TensorProto.UINT8, (zeros.numel(),), zeros),
        ]
        node = helper.make_node(
            "MatMulNBits",
            ["x", "B", "scales", "zeros"],
            ["y"],
            domain="com.microsoft",
            K=weight.columns,
            N=rows,
            bits=weight.bits,
            block_size=size,
            accuracy_level=4,
        )
        graph = helper.make_graph(
            [node],
            "linear",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", weight.columns])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", rows])],
            [helper.make_tensor(n, kind, dims, t.numpy().tobytes(), raw=True) for n, kind, dims, t in initializers],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = False  # each of hundreds of sessions would keep the largest output it ever made
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        # The runtime keeps the codes in its own order, a scale and a sum per block, and the zeros.
        self.nbytes = codes.numel() + 2 * 4 * scales.numel() + zeros.numel() + (0 if rest is None else rest.nbytes)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        parts = min(torch.get_num_threads(), max(1, len(x) // SHARE))
        if parts == 1:
            return self._run(x)
        return torch.cat(list(_pool(parts).map(self._run, x.tensor_split(parts))))

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().float().contiguous()
        y = torch.from_numpy(self.session.run(["y"], {"x": x.numpy()})[0])
        if self.rest is None:
            return y
        sums = torch.nn.functional.pad(x, (0, -x.shape[1] % self.group_size)).unflatten(1, (-1, self.group_size)).sum(2)
        return y.addmm_(sums, self.rest)

    def __deepcopy__(self, memo) -> Kernel:
        return self  # it never changes, and a session cannot be copied


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="matmulnbits")
