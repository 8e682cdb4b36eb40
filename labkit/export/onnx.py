"""The engine's graph as a folder that onnxruntime-genai loads: it runs without labkit and without torch."""

from __future__ import annotations

import json
from pathlib import Path

from labkit import install
from labkit._files import whole_folder

CONFIG = "genai_config.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")  # without these onnxruntime-genai cannot read a text


def onnx(lm, folder, context: int | None = None, head_bits=8, embedding_bits=8, overwrite: bool = False) -> Path:
    """Write model.onnx, weights.bin, genai_config.json and the tokenizer to a new folder; all of it or nothing.

    ``context``: the most tokens, prompt and answer together; None: as many as the model was made for. ``head_bits``,
    ``embedding_bits``: 8, 4 or None (fp32) for a head and an embedding that are not packed yet. ``overwrite``: replace
    a folder that was exported before. Raises :class:`labkit.engine.NotCompilable` for a model that one graph cannot
    compute, FileExistsError for a folder in use, ValueError for a bad argument.
    """
    try:
        from labkit.engine import graph, session
        from labkit.engine.families import read
        from labkit.export.genai import GenAIGraph, settings
    except ModuleNotFoundError as error:
        raise install.missing(str(error.name), "kernels") from error
    session.check(head_bits, embedding_bits, context=context)
    target = Path(folder)
    vacant(target, overwrite)
    decoder = read(lm.model)
    context = decoder.context if context is None else context
    if context > decoder.context:
        raise ValueError(
            f"context = {context} is not allowed: {lm.name} was made for {decoder.context} positions, so it must be "
            f"from 1 to {decoder.context}."
        )
    described = settings(lm, decoder, context)
    with whole_folder(target) as made:
        lm.tokenizer.save_pretrained(made)
        if missing := [name for name in TOKENIZER if not (made / name).is_file()]:
            raise ValueError(
                f"The tokenizer of {lm.name} writes no {missing[0]}, without which onnxruntime-genai cannot read a text."
            )
        graph.build(decoder, made, context, head_bits, embedding_bits, GenAIGraph)
        session.try_out(made / "model.onnx")
        (made / CONFIG).write_text(json.dumps(described, indent=1), encoding="utf-8")
    return target


def vacant(target: Path, overwrite: bool) -> None:
    """Raise FileExistsError unless a folder can be made there; what is no export is never overwritten."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(
            f"{target} exists and is not an empty folder: name a new one, or say that it be replaced."
        )
    if not (target / CONFIG).is_file():
        raise FileExistsError(f"{target} is no exported model (it holds no {CONFIG}), so it is not replaced.")
