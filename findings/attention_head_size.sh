#!/usr/bin/env bash
# onnxruntime 1.32.0, CPU: GroupQueryAttention takes heads of a multiple of 8 channels, but with do_rotary=1 only of a multiple
# of 16. A graph with heads of 8, 24, 40, 72 or 104 channels loads all the same, and only its first run fails ("head_size
# shall be a multiple of 16"): who builds graphs has to try them out.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check numpy onnxruntime==1.32.0 onnx==1.23.2
"$work/venv/bin/python" - <<'PY'
import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

HEADS, KV_HEADS, TOKENS = 4, 2, 3


def said(width: int, rotary: int) -> str:
    """"runs", or when and why not."""
    names = ["q", "k", "v", "pk", "pv", "seqlens", "total", "cos", "sin"][: 9 if rotary else 7]
    node = helper.make_node(
        "GroupQueryAttention", names, ["y", "nk", "nv"], domain="com.microsoft", num_heads=HEADS, kv_num_heads=KV_HEADS,
        do_rotary=rotary,
    )
    f, i = TensorProto.FLOAT, TensorProto.INT32
    shapes = {
        "q": (f, [1, TOKENS, HEADS * width]), "k": (f, [1, TOKENS, KV_HEADS * width]), "v": (f, [1, TOKENS, KV_HEADS * width]),
        "pk": (f, [1, KV_HEADS, 0, width]), "pv": (f, [1, KV_HEADS, 0, width]), "seqlens": (i, [1]), "total": (i, []),
        "cos": (f, [8, width // 2]), "sin": (f, [8, width // 2]),
    }
    inputs = [helper.make_tensor_value_info(n, *shapes[n]) for n in names]
    output = helper.make_tensor_value_info("y", f, None)
    graph = helper.make_graph([node], "attention", inputs, [output])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        return f"does not load: {str(error)[-90:]}"
    feeds = {n: np.ones(shapes[n][1], np.float32 if shapes[n][0] == f else np.int32) for n in names}
    feeds |= {"seqlens": np.array([TOKENS - 1], np.int32), "total": np.array(TOKENS, np.int32)}
    try:
        session.run(["y"], feeds)
    except Exception as error:
        return f"fails at its first run: {str(error)[-90:]}"
    return "runs"


for width in (8, 16, 24, 32, 40, 48, 64, 72, 80, 96, 104, 128):
    plain, rotary = said(width, 0), said(width, 1)
    print(f"heads of {width}: without rotary {plain}; with rotary {rotary}")
    assert plain == "runs", "without rotary something else now"
    assert (rotary == "runs") == (width % 16 == 0), "with rotary something else now"
    assert rotary == "runs" or "first run" in rotary, "it fails at another time now"
PY
