#!/usr/bin/env bash
# A value too large for float8_e4m3fn becomes another value in each library. Its largest number is 448. torch 2.13.0 gives
# that for everything above; ml_dtypes 0.6.0 gives NaN from 465 on; onnxruntime 1.32.0, told not to saturate (Cast with
# saturate=0), gives NaN from 465 to 479, 448 again from 480 to 495, and NaN from 496 on. (464 is half way to the next
# code, and goes down in all three.) So weights that were scaled with one of them can be NaN, or not, in another.
#
# Seen for 464, 465, 479, 480, 495, 496: torch 448 for all; ml_dtypes 448, then NaN; onnxruntime 448, NaN, NaN, 448, 448, NaN.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy ml_dtypes==0.6.0 onnxruntime==1.32.0 onnx==1.23.2
"$work/venv/bin/python" - <<'PY'
import ml_dtypes
import numpy as np
import onnxruntime as ort
import torch
from onnx import TensorProto, helper

values = np.array([464, 465, 479, 480, 495, 496], np.float32)
theirs = {"torch": torch.from_numpy(values).to(torch.float8_e4m3fn).float().numpy()}
theirs["ml_dtypes"] = values.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
nodes = [
    helper.make_node("Cast", ["x"], ["small"], to=TensorProto.FLOAT8E4M3FN, saturate=0),
    helper.make_node("Cast", ["small"], ["y"], to=TensorProto.FLOAT),
]
ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [6]) for name in "xy"]
graph = helper.make_graph(nodes, "cast", ends[:1], ends[1:])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
theirs["onnxruntime"] = session.run(["y"], {"x": values})[0]
for name, found in theirs.items():
    print(name, dict(zip(values.tolist(), found.tolist())))
nan = np.nan
expected = {"torch": [448] * 6, "ml_dtypes": [448] + [nan] * 5, "onnxruntime": [448, nan, nan, 448, 448, nan]}
for name, wanted in expected.items():
    assert np.array_equal(theirs[name], np.array(wanted, np.float32), equal_nan=True), f"{name} does otherwise now"
PY
