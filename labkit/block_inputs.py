"""What a decoder's blocks take besides hidden states: masks, rotary tables, embeddings of the tokens for each layer.

They are recorded for every batch of the calibration, in a pass in which no block runs: each hands on what it was given,
so such a pass costs an embedding and a mask. That is right where they depend on the tokens alone, which is found out by
one pass in which the blocks do run. What blocks leave for later ones in a dictionary (keys and values that layers share)
is right too, since each batch keeps a dictionary of its own. A model that hands on anything else between its blocks is
refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from enum import Enum

import torch
from torch import nn

Call = tuple[tuple, dict]  # a block's arguments without the hidden states
PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, Enum)  # equal for all tokens


class _Stop(Exception):
    """Ends a forward pass as soon as nothing more of it is needed."""


class BlockInputs:
    """The arguments of all blocks, for each batch of windows (windows, length) that is added.

    ``calls``: of each batch, for each block. ``axis``: the one of the hidden states along which the windows lie. Raises
    ValueError for a model whose blocks cannot be run one by one.
    """

    def __init__(self, model, stack: nn.ModuleList, calib: torch.Tensor):
        """``calib``: what the batches will be of, for a look at its first window, once and twice."""
        self.model, self.stack = model, stack
        self.windows: list[int] = []  # in each batch
        self.calls: list[list[Call]] = []
        self.tuples, seen = self._look(calib[:1])
        first, one = self._record(calib[:1])
        self._compare(seen, one)
        two, both = self._record(calib[:1].expand(2, -1))
        self.axis = self._axis(first, two, "the first block's hidden states")
        self.axes = [self._axes(index, *calls) for index, calls in enumerate(zip(one, both))]

    def add(self, ids: torch.Tensor) -> torch.Tensor:
        """The first block's input for one more batch of windows, whose arguments are kept."""
        hidden, calls = self._record(ids)
        self.windows.append(len(ids))
        self.calls.append(_shared(calls, self.calls[0]) if self.calls else calls)
        return hidden

    def pieces(self, index: int, windows: int) -> Iterator[tuple[int, Call]]:
        """(a number of windows, a block's arguments for them), piece by piece for the first windows of the calibration.

        One piece where the arguments fit any windows. What a block writes to its arguments is not kept.
        """
        if not self._of_windows(index):
            yield windows, self.calls[0][index]
            return
        for batch, calls in zip(self.windows, self.calls):
            if windows <= 0:
                return
            count = min(batch, windows)
            yield count, self._cut(index, calls[index], batch, count)
            windows -= count

    def _of_windows(self, index: int) -> bool:
        """Whether any of a block's arguments has a part for each window, or may be written to."""
        return any(axis is not None for axis in self.axes[index].values()) or any(_mutable(self.calls[0][index]))

    def _cut(self, index: int, call: Call, windows: int, count: int) -> Call:
        """A block's arguments for the first ``count`` of so many windows."""

        def cut(path: tuple, leaf):
            if not isinstance(leaf, torch.Tensor):
                return leaf
            axis = self.axes[index].get(path, 0)  # what other blocks left there, such as keys: windows first
            if axis is None:
                return leaf
            if leaf.dim() == 0 or leaf.shape[axis] % windows:
                raise self._refused(f"block {index} takes {_name(path)}, which cannot be divided into windows")
            return leaf.narrow(axis, 0, leaf.shape[axis] // windows * count)

        return mapped(call, cut)

    # ------------------------------------------------------------------------------------------ recording

    def _look(self, ids: torch.Tensor) -> tuple[list[int | None], list[dict[tuple, object]]]:
        """Run the blocks on a window. For each the number of its outputs (None: no tuple), and its arguments' leaves."""
        tuples: list[int | None] = []
        seen: list[dict[tuple, object]] = []
        before: list[torch.Tensor] = []  # the last block's output

        def enter(index: int, hidden: torch.Tensor, call: Call) -> None:
            if index != len(seen):
                done = f"block {index} runs " + ("twice" if index < len(seen) else f"before block {len(seen)}")
                raise self._refused(f"{done} in a pass")
            if before and not _same(before.pop(), hidden):
                raise self._refused(f"what block {index} reads is not what block {index - 1} puts out")
            seen.append(dict(_leaves(call)))

        def leave(index: int, out) -> None:
            tuples.append(len(out) if isinstance(out, (tuple, list)) else None)
            before.append(hidden_of(out))

        hooks = [
            block.register_forward_hook(lambda module, args, out, i=i: leave(i, out))
            for i, block in enumerate(self.stack)
        ]
        try:
            self._pass(ids, enter, stop=False)
        finally:
            for hook in hooks:
                hook.remove()
        return tuples, seen

    def _record(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[Call]]:
        """The first block's input and every block's arguments for windows ids (windows, length); no block runs."""
        hidden, calls = [], []

        def enter(index: int, states: torch.Tensor, call: Call) -> None:
            hidden[:] = hidden or [states]
            calls.append(call)

        was = [block.__dict__.get("forward") for block in self.stack]
        for block, count in zip(self.stack, self.tuples):
            block.forward = _hand_on(count)
        try:
            self._pass(ids, enter, stop=True)
        finally:
            for block, forward in zip(self.stack, was):
                if "forward" in block.__dict__:
                    del block.forward
                if forward is not None:
                    block.forward = forward
        return hidden[0], calls

    def _pass(self, ids: torch.Tensor, enter, stop: bool) -> None:
        """Run the model, at most to the last block's input, and call ``enter(index, hidden, call)`` before each block."""
        ran: set[int] = set()

        def hook(index: int):
            def before(module, args, kwargs):
                hidden, call = _split(args, kwargs)
                if hidden is None:
                    raise self._refused(f"block {index} is not handed hidden states")
                enter(index, hidden, call)
                ran.add(index)
                if stop and index == len(self.stack) - 1:
                    raise _Stop

            return before

        hooks = [b.register_forward_pre_hook(hook(i), with_kwargs=True) for i, b in enumerate(self.stack)]
        try:
            self.model.base_model(ids, use_cache=False)
        except _Stop:
            pass
        finally:
            for h in hooks:
                h.remove()
        for index in set(range(len(self.stack))) - ran:
            raise self._refused(f"block {index} does not run")

    # ------------------------------------------------------------------------------------------ what they depend on

    def _compare(self, seen: list[dict[tuple, object]], recorded: list[Call]) -> None:
        """Refuse a model whose blocks take what other blocks compute, but for what these left in a dictionary."""
        for index, (real, call) in enumerate(zip(seen, recorded)):
            without, open_ = dict(_leaves(call)), set(_mutable(call))
            for path in {**real, **without}:
                if path in real and path in without and _same(real[path], without[path]):
                    continue
                if path not in without and any(path[: len(at)] == at for at in open_):
                    continue
                raise self._refused(f"block {index} takes {_name(path)}, which other blocks compute")
            for path, leaf in real.items():
                if not isinstance(leaf, (torch.Tensor, *PLAIN)):
                    raise self._refused(f"block {index} takes {_name(path)}, a {type(leaf).__name__}")

    def _axes(self, index: int, one: Call, two: Call) -> dict[tuple, int | None]:
        """path of a tensor -> the axis along which its windows lie, None for one that fits any number of windows."""
        single, double = dict(_leaves(one)), dict(_leaves(two))
        return {
            path: self._axis(leaf, double.get(path), f"block {index}'s {_name(path)}")
            for path, leaf in single.items()
            if isinstance(leaf, torch.Tensor)
        }

    def _axis(self, one: torch.Tensor, two: torch.Tensor | None, what: str) -> int | None:
        """The axis that is twice as long for two windows as for one; None where the shapes are equal."""
        shapes = tuple(one.shape), () if two is None else tuple(two.shape)
        longer = [axis for axis, sizes in enumerate(zip(*shapes)) if sizes[0] != sizes[1]]
        if len(shapes[0]) != len(shapes[1]) or len(longer) > 1 or any(2 * one.shape[a] != two.shape[a] for a in longer):
            raise self._refused(f"{what} have the shape {shapes[0]} for one window and {shapes[1]} for two")
        return longer[0] if longer else None

    def _refused(self, why: str) -> ValueError:
        return ValueError(
            f"labkit cannot walk {type(self.model).__name__} block by block: {why}. Use a method without calibration."
        )


def _hand_on(count: int | None):
    """A forward that returns the hidden states as they came, alone or as the first of ``count`` outputs."""

    def forward(*args, **kwargs):
        hidden, _ = _split(args, kwargs)
        return hidden if count is None else (hidden, *[None] * (count - 1))

    return forward


def _split(args: tuple, kwargs: dict) -> tuple[torch.Tensor | None, Call]:
    """The hidden states of a block's call, and its other arguments."""
    if args:
        return args[0], (tuple(args[1:]), dict(kwargs))
    rest = dict(kwargs)
    return rest.pop("hidden_states", None), ((), rest)


def hidden_of(out) -> torch.Tensor:
    """The hidden states among what a block puts out: alone, or the first of several."""
    return out[0] if isinstance(out, (tuple, list)) else out


def _items(x) -> Iterator[tuple[object, object]] | None:
    """The parts of a container with their names; None for what is not one."""
    if isinstance(x, Mapping):
        return iter(x.items())
    return enumerate(x) if isinstance(x, (tuple, list)) else None


def _leaves(x, path: tuple = ()) -> Iterator[tuple[tuple, object]]:
    """(path, value) of all that is no container."""
    parts = _items(x)
    if parts is None:
        yield path, x
        return
    for name, part in parts:
        yield from _leaves(part, (*path, name))


def _mutable(call: Call) -> Iterator[tuple]:
    """The paths of the dictionaries inside a call: blocks may write to them."""

    def search(x, path: tuple) -> Iterator[tuple]:
        if len(path) > 1 and isinstance(x, MutableMapping):
            yield path
        for name, part in _items(x) or ():
            yield from search(part, (*path, name))

    return search(call, ())


def mapped(x, change, path: tuple = ()):
    """The same with ``change(path, value)`` in place of every value; containers are new, so what blocks share is not."""
    if isinstance(x, Mapping):
        new = copy.copy(x)
        for name, part in x.items():
            new[name] = mapped(part, change, (*path, name))
        return new
    if isinstance(x, (tuple, list)):
        parts = [mapped(part, change, (*path, i)) for i, part in enumerate(x)]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    return change(path, x)


def _shared(calls: list[Call], first: list[Call]) -> list[Call]:
    """These calls with the first batch's tensors in place of equal ones, so that what fits any tokens is held once."""
    known: dict[tuple[int, int], bool] = {}

    def share(x, y):
        if isinstance(x, torch.Tensor):
            if (id(x), id(y)) not in known:
                known[id(x), id(y)] = _same(x, y)
            return y if known[id(x), id(y)] else x
        if type(x) is tuple and type(y) is tuple and len(x) == len(y):  # dictionaries stay: blocks may write to them
            return tuple(map(share, x, y))
        return x

    return [
        (share(args, args0), {name: share(x, kwargs0.get(name)) for name, x in kwargs.items()})
        for (args, kwargs), (args0, kwargs0) in zip(calls, first)
    ]


def _same(a, b) -> bool:
    if a is b:
        return True
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and (not isinstance(a, PLAIN) or a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    b = b.to(a.device)
    return torch.equal(a, b) or (a.is_floating_point() and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))


def _name(path: tuple) -> str:
    """``mask`` for a keyword argument, ``argument 2`` for a positional one (the hidden states are the first)."""
    where, what, *rest = path
    name = str(what) if where == 1 else f"argument {what + 2}"
    return name + "".join(f"[{part!r}]" for part in rest)
