"""Text: two evaluation corpora, calibration windows disjoint from both, and fingerprints of token ids.

Convention: windows do not overlap, and a window's first token is context only. No BOS is prepended, unless the model's
own tokenizer puts one before every text (Gemma, Llama 3, …): then each window begins with it, and is as long as ever.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path

import torch

from labkit import bos, shipped
from labkit.method import brief, check_model
from labkit.progress import track

CORPORA = ("manual", "prose", "wikitext2", "c4")
MOST = 10**9  # windows, and tokens in one
CALIBRATION_SHARE = 0.6  # of the manual; the rest, its last part, is for evaluation


def evaluation(lm, windows: int = 8, length: int = 512, source=None) -> torch.Tensor:
    """Evaluation windows, LongTensor (windows, length), spread evenly over the text: neighbours would be alike.

    Where the tokenizer puts a BOS before every text by itself, each window begins with it and has one token of text less.
    ``source``: "manual" (the default: the last part of the manual of Python 3.11.7), "prose" (essays written for this project),
    "wikitext2" or "c4" (through the hub), or the path of a text file. Disjoint from every calibration.
    """
    source = "manual" if source is None else source
    _check_source(source)
    if source == "manual":
        ids = _manual(lm)
        ids = ids[int(len(ids) * CALIBRATION_SHARE) :]
    else:
        ids = _encode(lm, _read(source))
    check_size(windows, length)
    begin = _beginning(lm, length)
    return _begun(begin, _cut(ids, windows, length - len(begin), str(source)))


def calibration(lm, windows: int = 32, length: int = 512, seed: int = 0, source="mixed", progress: bool = True):
    """Calibration windows, LongTensor (windows, length); with a BOS as :func:`evaluation` has it.

    ``source``: "manual" (the manual's first part), "self" (what the model itself writes), "mixed" (half and half, the
    default: the manual alone over-fits), a corpus, or the path of a text file. ``seed`` picks which windows.

    "mixed" takes turns, manual, self, manual, …, so that the first few windows, which are all that AWQ's search and the
    probes look at, hold both texts. Four windows of either do for that search: it fits one number for each place, and near
    its best the error is flat (``benchmarks/calibration_order.py`` measures it).
    """
    check_size(windows, length)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63:
        raise ValueError(f"seed = {brief(seed)} is not allowed: it must be a whole number from 0 to 2**63 - 1.")
    _check_source(source)
    if source == "mixed":
        mixed = calibration(lm, windows - windows // 2, length, seed, "manual")
        if windows > 1:
            own = calibration(lm, windows // 2, length, seed, "self", progress)
            mixed = _interleaved(mixed, own)
        return mixed
    if source == "self":
        from labkit.selftext import self_samples

        return self_samples(lm, windows, length, seed, progress)
    begin = _beginning(lm, length)
    room = length - len(begin)
    if source == "manual":
        ids = _manual(lm)
        split = int(len(ids) * CALIBRATION_SHARE)
        available = _unseen(ids[:split], ids[split:], room)
    else:
        ids = _encode(lm, _read(source))
        available = ids[: len(ids) // room * room].view(-1, room)
    if len(available) < windows:
        raise ValueError(
            f"{source!r} has {len(available)} windows of {length} tokens, but {windows} were asked for: "
            "ask for fewer or shorter windows, or name a longer text."
        )
    order = torch.randperm(len(available), generator=torch.Generator().manual_seed(seed))[:windows]
    return _begun(begin, available[order])


def _beginning(lm, length: int) -> torch.Tensor:
    """What the tokenizer puts before a text, LongTensor (tokens,); ValueError for windows that it would fill."""
    check_model(lm, "tokenizer")
    begin = bos.beginning(lm.tokenizer)
    if length <= len(begin):
        raise ValueError(
            f"length = {length} is not allowed: each window begins with {len(begin)} special tokens of this model."
        )
    return torch.tensor(begin, dtype=torch.long)


def _begun(begin: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """The windows (windows, tokens), with the same beginning before each."""
    return torch.cat([begin.expand(len(windows), -1), windows], 1)


def _interleaved(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Rows (n, length) in turns, one of ``first`` and one of ``second``; ``first`` may have one more."""
    turns = first.new_empty(len(first) + len(second), first.shape[1])
    turns[::2], turns[1::2] = first, second
    return turns


def fingerprint(ids: torch.Tensor) -> str:
    """16 hex digits that stand for these token ids and their shape; part of every stored result."""
    data = ids.detach().to("cpu", torch.int64).contiguous()
    return hashlib.sha256(f"{tuple(data.shape)}".encode() + data.numpy().tobytes()).hexdigest()[:16]


def check_windows(lm, ids: torch.Tensor) -> None:
    """Raise a ValueError when these are not token windows of this model."""
    check_model(lm, "tokenizer")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        got = f"{tuple(ids.shape)} {ids.dtype}" if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise ValueError(f"Windows must be a LongTensor (windows, length) of token ids, not {got}.")
    if ids.shape[0] < 1 or ids.shape[1] < 2:
        raise ValueError(f"Windows of shape {tuple(ids.shape)} are too short: at least 1 window of 2 tokens is needed.")
    vocabulary = lm.model.get_input_embeddings().weight.shape[0]
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise ValueError(
            f"Token id {int(ids.max())} is not in this model's vocabulary of {vocabulary}: "
            "the windows come from another tokenizer."
        )
    context = getattr(getattr(lm.model, "config", None), "max_position_embeddings", None)
    if context and ids.shape[1] > context:
        raise ValueError(
            f"Windows of {ids.shape[1]} tokens are longer than this model's context of {context}: ask for shorter ones."
        )


def check_size(windows: int, length: int) -> None:
    """Raise a ValueError for numbers of windows, or of tokens in one, that no text is cut into."""
    for name, value, least in (("windows", windows, 1), ("length", length, 2)):
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST:
            allowed = f"a whole number from {least} to {MOST:,}"
            raise ValueError(f"{name} = {brief(value)} is not allowed: it must be {allowed}.")


def _check_source(source) -> None:
    if not isinstance(source, (str, Path)):
        raise ValueError(f"source = {brief(source)} is not allowed: it must be a corpus or the path of a text file.")


def _cut(ids: torch.Tensor, windows: int, length: int, source: str) -> torch.Tensor:
    """``windows`` windows spread evenly over ``ids``; none overlaps another."""
    available = len(ids) // length
    if available < windows:
        raise ValueError(
            f"{source!r} has {len(ids)} tokens: too short for {windows} windows of {length}. "
            "Ask for fewer or shorter windows, or name a longer text."
        )
    starts = [i * available // windows * length for i in range(windows)]
    return torch.stack([ids[s : s + length] for s in starts])


def _unseen(ids: torch.Tensor, held_out: torch.Tensor, length: int, passage: int = 64) -> torch.Tensor:
    """The windows of ``ids`` that share no passage with the text held out: the manual repeats whole sections."""

    def passages(tokens: torch.Tensor) -> set[bytes]:
        data = tokens.to(torch.int32).numpy().tobytes()
        return {data[i : i + 4 * passage] for i in range(0, len(data) - 4 * passage + 1, 4)}

    known = passages(held_out)
    windows = ids[: len(ids) // length * length].view(-1, length)
    return windows[[i for i, w in enumerate(windows) if known.isdisjoint(passages(w))]]


@functools.lru_cache(maxsize=8)
def _tokens(tokenizer, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.long)


def whole(tokenizer, source: str = "manual") -> torch.Tensor:
    """All token ids of a corpus or text file, LongTensor (tokens,): what windows are cut from."""
    return _tokens(tokenizer, raw(source))


def _encode(lm, text: str) -> torch.Tensor:
    check_model(lm, "tokenizer")
    return _tokens(lm.tokenizer, text)


def _manual(lm) -> torch.Tensor:
    """The Python manual of one release, which ships with labkit: the interpreter's own is another with each release."""
    return _encode(lm, raw("manual"))


def raw(source="prose") -> str:
    """The whole text of a corpus or of a text file, as it was written."""
    _check_source(source)
    return _read(source)


def _read(source: str | os.PathLike) -> str:
    if source in ("manual", "prose"):
        return shipped.text(source)
    if source in ("wikitext2", "c4"):
        return _from_hub(source)
    path = Path(source)
    try:
        there = path.is_file()
    except OSError:  # a text in place of its path: too long for the name of a file
        there = False
    if not there:
        raise ValueError(
            f"There is no text {brief(str(source))}: name one of {', '.join(CORPORA)}, or a path to a text file."
        )
    data = path.read_bytes()
    if not data.strip():
        raise ValueError(f"The text file {str(path)!r} is empty.")
    try:
        if b"\0" in data:
            raise ValueError
        return data.decode("utf-8")
    except ValueError:
        raise ValueError(f"{str(path)!r} is not a UTF-8 text file.") from None


def _from_hub(source: str) -> str:
    """WikiText-2's test split joined by blank lines, as the papers do; or the first 2,000 validation documents of C4."""
    try:
        import datasets

        if source == "wikitext2":
            rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
            return "\n\n".join(rows["text"])
        rows = datasets.load_dataset("allenai/c4", "en", split="validation", streaming=True)
        return "\n\n".join(row["text"] for row in track(rows.take(2000), "reading C4", total=2000))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"The corpus {source!r} needs the package datasets and the hub, which did not answer ({reason}). "
            "Without a network use 'manual', 'prose' or a text file."
        ) from error
