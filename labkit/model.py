"""LanguageModel: a transformers model and its tokenizer, with copies that share memory and packed weights that save."""

from __future__ import annotations

import copy
import json
import os
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from labkit import bos, cache, embedded, identity
from labkit._files import whole_folder
from labkit._share import address, take_over, twin
from labkit.coverage import Coverage, percent
from labkit.generation import Settings
from labkit.method import brief, methods, reason_of

GENERATION = "generation_config.json"  # transformers' name for it: ends, penalties
MANIFEST = "labkit.json"  # beside the safetensors of a saved model: packed layers, shared tensors, what was done to it


@dataclass
class LanguageModel:
    """A causal language model that can be compressed. ``model`` is the transformers model, so everything it does works."""

    model: Any
    tokenizer: Any
    name: str
    history: tuple[str, ...] = ()  # the repr of each technique applied, in order
    coverage: Coverage = Coverage()  # noqa: RUF009 (frozen) which of the decoder's weights they reached

    @property
    def device(self) -> torch.device:
        return next(t.device for t in _tensors(self.model))

    @property
    def nbytes(self) -> int:
        """Bytes of memory held by the weights, with every copy that a kernel's runtime keeps."""
        from labkit.measure.memory import held

        return held(self.model)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with any weight, whatever changed it. Reads all bytes each time: 0.04 s for 538 MB."""
        return identity.fingerprint(self.model)

    def encode(self, text: str) -> torch.Tensor:
        """Token ids of a text, LongTensor (1, tokens). No special token is added, but the BOS of a tokenizer that puts one
        before every text by itself (Gemma, Llama 3, …): it stands there once. An empty text has no tokens."""
        if not isinstance(text, str):
            raise ValueError(f"text = {brief(text)} is not allowed: it must be a string.")
        return torch.tensor([bos.encode(self.tokenizer, text)], dtype=torch.long, device=self.device)

    def generate(self, prompt: str, max_new_tokens: int = 32) -> str:
        """The greedy continuation of a prompt, without the prompt: it ends where the model's generation_config says, and
        follows the penalties there. What would not be greedy (beams, …) is left out, with a warning that names it."""
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            shown = brief(max_new_tokens)
            raise ValueError(f"max_new_tokens = {shown} is not allowed: it must be a whole number, 1 or more.")
        ids = self.encode(prompt)
        if ids.shape[1] == 0:
            raise ValueError("The prompt is empty: generate() needs at least one token to continue.")
        settings = Settings.of(self.model)
        if settings.note:
            warnings.warn(settings.note, stacklevel=2)
        how = {"do_sample": False, "return_dict_in_generate": False} | settings.neutral
        if settings.stop_strings:
            how["tokenizer"] = self.tokenizer
        with torch.inference_mode():
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **how)
        return self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    def copy(self) -> LanguageModel:
        """A model with modules and tensors of its own, whose memory is shared until one of the two is written to."""
        plain = (torch.Tensor, torch.nn.Parameter)  # a library's own kinds of tensors know how to copy themselves
        memo = {id(t): twin(t) for t in _tensors(self.model) if type(t) in plain}
        return LanguageModel(copy.deepcopy(self.model, memo), self.tokenizer, self.name, self.history, self.coverage)

    def save(self, path: str | os.PathLike) -> Path:
        """Write the model to a folder (config, tokenizer, safetensors with packed weights); all of it or nothing."""
        from safetensors.torch import save_file

        target = Path(path)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise FileExistsError(f"{target} exists and is not an empty folder: name a new one.")
        with whole_folder(target) as scratch:
            tensors, shared = _unshare(self.model.state_dict())
            save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt"})
            self.model.config.save_pretrained(scratch)
            if (generation := getattr(self.model, "generation_config", None)) is not None:
                # Not save_pretrained, which refuses what transformers itself would only warn of.
                generation.to_json_file(scratch / GENERATION, keys_to_pop=["compile_config"])
            self.tokenizer.save_pretrained(scratch)
            packed = {n: m.spec() for n, m in self.model.named_modules() if hasattr(m, "spec")}
            described = {"name": self.name, "history": self.history, "packed": packed, "shared": shared}
            described["coverage"] = asdict(self.coverage)
            if cached := cache.methods_of(self.model):
                described["cache"] = [[type(m).__name__, m.values()] for m in cached]
            described["class"] = type(self.model).__name__
            (scratch / MANIFEST).write_text(json.dumps(described, indent=1), encoding="utf-8")
        return target

    def __repr__(self) -> str:
        done = " -> ".join(self.history) or "uncompressed"
        if self.coverage.share < 1:
            done += f", {percent(self.coverage.share)} of the decoder's weights compressed"
        return f"LanguageModel({self.name!r}, {done}, {self.nbytes / 1e6:.1f} MB, {self.device})"


def load(name: str | os.PathLike | None = None, device=None, dtype=None) -> LanguageModel:
    """Load a model: ``None`` is the embedded SmolLM2-135M-Instruct; else a folder, or the id of a model on the hub.

    ``device``: the first GPU where there is one, else the CPU. ``dtype``: fp32 on CPU, bf16 on GPU, as stored for a
    folder that :meth:`LanguageModel.save` wrote. Raises ValueError with one sentence when there is no such model.
    """
    if not isinstance(name, (str, os.PathLike, type(None))):
        raise ValueError(f"name = {brief(name)} is not allowed: it must be a folder, a hub id, or None.")
    device = _device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = _dtype(dtype)
    if name is None:
        lm = _load_embedded(dtype)
    elif _is_dir(name):
        packed = (Path(name) / MANIFEST).is_file()
        lm = _load_saved(Path(name)) if packed else _from_pretrained(str(name), dtype)
    else:
        lm = _from_pretrained(str(name), dtype)
    lm.model.to(device).eval().requires_grad_(False)
    for tensor in _tensors(lm.model):  # while hardly a page of the file has been read
        take_over(tensor)
    return lm


def _device(device) -> torch.device:
    """The device, after a first byte has been put there."""
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"device = {brief(device)} cannot be used here ({reason_of(error)}): try 'cpu'.") from error
    return found


def _dtype(dtype) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise ValueError(f"dtype = {brief(dtype)} is not allowed: it must be one such as 'float32' or torch.bfloat16.")
    return found


def _is_dir(name: str | os.PathLike) -> bool:
    try:
        return Path(name).is_dir()
    except OSError:  # too long for the name of a folder
        return False


def _load_embedded(dtype) -> LanguageModel:
    folder = embedded.folder()
    try:
        lm = _from_pretrained(str(folder), dtype)
    except ValueError as error:
        if embedded.intact():  # a load can fail for many reasons; only changed bytes say that the model is damaged
            raise RuntimeError(
                f"The embedded model cannot be loaded, although its files in {folder} are intact: "
                f"{reason_of(error.__cause__ or error)}. `labkit doctor` looks at the rest."
            ) from error
        if kept := embedded.mend():
            print(f"The cached model in {folder} is damaged; it is kept as {kept.name}, and made again.", flush=True)
        lm = _from_pretrained(str(embedded.folder()), dtype)
    lm.name = embedded.NAME
    return lm


def _from_pretrained(name: str, dtype) -> LanguageModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    local = _is_dir(name)
    logging.disable_progress_bar()
    try:
        how = {"local_files_only": local, "trust_remote_code": False}
        model, info = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True, **how)
        if missing := sorted(info["missing_keys"]):  # transformers would draw them at random
            raise ValueError(f"{len(missing)} of its tensors are missing, such as {missing[0]}")
        tokenizer = AutoTokenizer.from_pretrained(name, **how)
    except (ImportError, MemoryError, torch.OutOfMemoryError):  # a package or memory is missing, not the model
        raise
    except Exception as error:
        if "can't allocate memory" in str(error):  # torch's own CPU allocator says it in a RuntimeError
            raise
        reason, shown = reason_of(error), brief(name)
        if "trust_remote_code" in str(error):
            reason = "it brings Python code of its own, which labkit never runs"
        where = f"The folder {shown} holds no model that can be read" if local else f"There is no model {shown} here"
        advice = (
            "check its config.json, tokenizer and safetensors files"
            if local
            else "check the hub id and the network, name a local folder, or use load() for the embedded model"
        )
        raise ValueError(f"{where} ({reason}); {advice}.") from error
    finally:
        logging.enable_progress_bar()
    return LanguageModel(model, tokenizer, name)


def _load_saved(folder: Path) -> LanguageModel:
    """Read what :meth:`LanguageModel.save` wrote: packed modules first, then every tensor where it belongs."""
    import transformers
    from safetensors.torch import load_file

    from labkit import linear

    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        tensors = load_file(folder / "model.safetensors")
        how = {"local_files_only": True, "trust_remote_code": False}
        config = transformers.AutoConfig.from_pretrained(folder, **how)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **how)
        model = _causal_class(manifest["class"])(config)
        for path, spec in manifest["packed"].items():
            model.set_submodule(path, linear.from_spec(spec))
        for name, tensor in tensors.items():
            _assign(model, name, tensor)
        for alias, original in manifest["shared"].items():
            _assign(model, alias, _tensor(model, original))
        tensors |= dict.fromkeys(manifest["shared"])
        if missing := sorted(model.state_dict().keys() - tensors.keys()):  # they would keep their random values
            raise ValueError(f"{len(missing)} of its tensors are missing, such as {missing[0]}")
        if getattr(config, "tie_word_embeddings", False):
            model.tie_weights()
        if (folder / GENERATION).is_file():
            said = json.loads((folder / GENERATION).read_text(encoding="utf-8"))
            model.generation_config = transformers.GenerationConfig.from_dict(said)
        for method, values in manifest.get("cache", []):
            cache.install(model, methods()[method](**values))
        coverage = Coverage(**manifest.get("coverage", {}))
        return LanguageModel(model, tokenizer, str(manifest["name"]), tuple(manifest["history"]), coverage)
    except (OSError, KeyError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"The folder {str(folder)!r} holds no complete labkit model: {reason_of(error)}.") from error
    except Exception as error:  # safetensors has an error class of its own
        raise ValueError(f"The folder {str(folder)!r} holds a damaged model: {reason_of(error)}.") from error


def _causal_class(name: str) -> type:
    """transformers' class of that name. A manifest is a file that anybody can write: it may name nothing but such a class."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known

    found = getattr(transformers, name, None) if isinstance(name, str) and name in known.values() else None
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise ValueError(f"class = {brief(name)} is not allowed: it must be a causal language model of transformers")
    return found


def _tensor(model, name: str) -> torch.Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


def _assign(model, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor at its place whatever shape stood there before: pruned models have other shapes than their config."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        known = isinstance(tensor, torch.nn.Parameter)  # of another place too: tied, they stay one
        module._parameters[leaf] = tensor if known else torch.nn.Parameter(tensor, requires_grad=False)
    elif leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        raise KeyError(f"the model has no place for the tensor {name}")


def _tensors(model):
    yield from model.parameters()
    yield from model.buffers()


def _unshare(state: dict) -> tuple[dict, dict]:
    """safetensors refuses tensors that share memory: keep the first of each, and name the others as aliases."""
    kept, shared, seen = {}, {}, {}
    for name, tensor in state.items():
        place = (address(tensor), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
        if place in seen:
            shared[name] = seen[place]
        else:
            seen[place] = name
            kept[name] = tensor.detach().contiguous()
    return kept, shared
