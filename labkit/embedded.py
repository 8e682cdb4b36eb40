"""The model that needs no hub: SmolLM2-135M-Instruct out of a PyPI wheel, dequantized once and un-snapped.

The wheel carries a GGUF whose linear layers lie exactly on the Q4_1 grid (blocks of 32, a real-valued minimum). A 4-bit
format with the same grid would lose nothing, a false miracle, so an exact rescaling dissolves the grid: see :func:`unsnap`.

The weights are the same on every machine, bit for bit: stored results are found by a hash of them. Dequantizing and
rescaling are single IEEE operations. The factors are not (a normal draw and exp() end in another bit with another
libm or version of torch), so they were drawn once and ship.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch

from labkit import assets, paths, shipped
from labkit._files import alone, set_aside, whole_folder, write_text

ASSET = "smollm2-135m-instruct"
NAME = "SmolLM2-135M-Instruct"
VERSION = 1  # of the conversion below; a new number makes a new cache folder
FILES = ("config.json", "model.safetensors", "tokenizer.json")
MADE = "labkit-made.json"  # written last: each file of the folder with its size and sha256


def place() -> Path:
    """Where the converted model lies or will lie."""
    return paths.cache() / f"{NAME}-v{VERSION}"


def complete() -> bool:
    """Whether the converted model is there, every file with its size. Quick: nothing but the record is read."""
    try:
        folder = place()
        record = _record(folder)
        return all((folder / name).stat().st_size == size for name, (size, _) in record.items())
    except (FileNotFoundError, NotADirectoryError, ValueError):  # what may not be read is no damage, and says so itself
        return False


def intact() -> bool:
    """Whether every file of the converted model is, byte for byte, what the conversion wrote. Reads all of it (1 s)."""
    folder = place()
    try:
        record = _record(folder)
        return complete() and all(_sha256(folder / name) == digest for name, (_, digest) in record.items())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False


def folder(progress: bool = True) -> Path:
    """The converted model's folder in the cache; converts it at the first call (about 20 s).

    One process converts while others wait. A finished folder is only read, so it may lie in a cache that another user
    owns. What stands there and is not complete is set aside, never deleted. Raises OSError where it cannot be written.
    """
    target = place()
    if complete():
        return target
    gguf = Path(assets.fetch(ASSET, progress=progress))
    try:
        with alone(target, "Another process is converting the embedded model; waiting for it."):
            if complete():
                return target
            if target.exists():
                kept = set_aside(target, "incomplete")
                print(f"{target} is not complete; it is kept as {kept.name}, and made again.", flush=True)
            if progress:
                print("Converting the embedded model, once ...", flush=True)
            with whole_folder(target) as made:
                convert(gguf, made)
                seal(made)
    except OSError as error:
        raise OSError(
            f"The model could not be written to {target}: {error}. LABKIT_CACHE names another place."
        ) from error
    return target


def mend() -> Path | None:
    """Set the converted model aside if its bytes have changed, so that :func:`folder` makes it again.

    Returns where it is kept; None when nothing is wrong with it, or when another process has mended it meanwhile.
    """
    target = place()
    with alone(target, "Another process is converting the embedded model; waiting for it."):
        return set_aside(target, "damaged") if target.exists() and not intact() else None


def seal(folder: Path) -> None:
    """Write down the size and sha256 of every file in a folder that is complete now."""
    described = {file.name: [file.stat().st_size, _sha256(file)] for file in sorted(folder.iterdir())}
    write_text(folder / MADE, json.dumps(described, indent=1))


def _record(folder: Path) -> dict[str, tuple[int, str]]:
    """What the conversion wrote, file -> (size, sha256). Raises OSError or ValueError where there is no such record."""
    record = json.loads((folder / MADE).read_text(encoding="utf-8"))
    if not isinstance(record, dict) or not set(FILES) <= record.keys():
        raise ValueError(f"{folder / MADE} does not list the model's files.")
    return {str(name): (int(size), str(digest)) for name, (size, digest) in record.items()}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def convert(gguf: Path, target: Path) -> None:
    """Read a GGUF through transformers, un-snap it, and write fp32 safetensors and the tokenizer to ``target``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        source = {"gguf_file": gguf.name, "local_files_only": True, "trust_remote_code": False}
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    finally:
        logging.enable_progress_bar()
    # save_pretrained refuses a model that says it is quantized; the weights are plain fp32 by now.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = NAME
    unsnap(model, frozen(model))
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def sizes(model) -> list[int]:
    """How many factors each rescaling of a Llama takes, in the order of :func:`unsnap`: four for each block."""
    return [
        count
        for block in model.model.layers
        for count in (
            block.input_layernorm.weight.numel(),
            block.post_attention_layernorm.weight.numel(),
            block.self_attn.v_proj.out_features,
            block.mlp.up_proj.out_features,
        )
    ]


def drawn(model, sigma: float = 0.1, seed: int = 0) -> list[torch.Tensor]:
    """Factors exp(sigma * N(0, 1)) in double precision, one tensor (count,) for each of :func:`sizes`."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.exp(sigma * torch.randn(count, generator=draw, dtype=torch.float64)) for count in sizes(model)]


def frozen(model) -> list[torch.Tensor]:
    """What :func:`drawn` gave for the embedded model once: data/embedded/unsnap.safetensors."""
    from safetensors.torch import load_file

    (path,) = shipped.shipped()["unsnap"].paths
    if not shipped.intact("unsnap"):
        raise OSError(f"{path} is damaged: install the package again, or `git checkout data`.")
    return list(load_file(path)["factors"].split(sizes(model)))


@torch.no_grad()
def unsnap(model, factors: Iterable[torch.Tensor]) -> None:
    """Rescale a Llama in place, exactly preserving its function, so that its weights leave their grid.

    A factor per channel goes into a norm's gain and out of the columns that read it; out of v's rows and into o's
    columns (the same factor for all query heads of a KV head); out of up's rows and into down's columns. ``factors``:
    those of :func:`frozen` or :func:`drawn`.
    """
    factors = iter(factors)

    def scale(weight: torch.Tensor, by: torch.Tensor) -> None:
        weight.copy_((weight.double() * by).to(weight.dtype))

    config = model.config
    queries_per_kv = config.num_attention_heads // config.num_key_value_heads
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for norm, readers in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            s = next(factors)
            scale(norm.weight, 1 / s)
            for linear in readers:
                scale(linear.weight, s)
        s = next(factors)
        scale(attention.v_proj.weight, 1 / s[:, None])
        per_head = s.view(config.num_key_value_heads, 1, -1).expand(-1, queries_per_kv, -1)
        scale(attention.o_proj.weight, per_head.reshape(-1))
        s = next(factors)
        scale(mlp.up_proj.weight, 1 / s[:, None])
        scale(mlp.down_proj.weight, s)
