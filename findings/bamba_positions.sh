#!/usr/bin/env bash
# transformers 5.23.0, Bamba (attention with rotary keys beside Mamba layers): a token that is read after a cache, with no
# position_ids given, comes out otherwise than in a whole forward. With position_ids it is the same to rounding. Llama is
# the same either way.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy transformers==5.23.0
"$work/venv/bin/python" - <<'PY'
import os

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
import torch
import transformers

common = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
    "vocab_size": 96, "max_position_embeddings": 256,
}
families = {
    "Bamba": common | {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8},
    "Llama": common,
}
off = {}
for family, settings in families.items():
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.mul_(5)
    ids = torch.randint(1, 96, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(ids).logits[:, -1]
        for given in (False, True):
            cache = model(ids[:, :-1], use_cache=True).past_key_values
            more = {"position_ids": torch.tensor([[23]])} if given else {}
            after = model(ids[:, -1:], past_key_values=cache, use_cache=True, **more).logits[:, -1]
            off[family, given] = ((after - whole).norm() / whole.norm()).item()
            print(f"{family}, position_ids {'given' if given else 'not given'}: {off[family, given]:.1e} off")
assert off["Bamba", False] > 1e-3, "Bamba counts positions itself now"
assert max(off["Bamba", True], off["Llama", False], off["Llama", True]) < 1e-4, "something else is off now"
PY
