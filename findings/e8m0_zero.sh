#!/usr/bin/env bash
# The scale format of MX blocks, E8M0, has no zero: 0 becomes 2^-127 in torch 2.13.0 and NaN in ml_dtypes 0.6.0, so that a
# block of zeros decodes to zeros in one and to NaN in the other. torch also drops the sign of a negative number, where
# ml_dtypes gives NaN.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy ml_dtypes==0.6.0
"$work/venv/bin/python" - <<'PY'
import ml_dtypes
import numpy as np
import torch

values = np.array([0.0, -4.0, 4.0], np.float32)
ours = torch.from_numpy(values).to(torch.float8_e8m0fnu).float().numpy()
other = values.astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)
print("torch", ours.tolist(), "ml_dtypes", other.tolist())
assert ours.tolist() == [2.0**-127, 4.0, 4.0], "torch does otherwise now"
assert np.isnan(other[:2]).all() and other[2] == 4.0, "ml_dtypes does otherwise now"
PY
