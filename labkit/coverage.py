"""Which of the decoder's weights were compressed, and which are as they were.

The decoder's weights are the matrices in its blocks: linears, experts (3-D in transformers 5, one matrix each), routers
and convolutions. Embedding and head are outside by definition; norms, biases and other vectors are not counted. A method
that walks linears passes over experts without an error, so what it left is found out afterwards: it shares every tensor
that it did not touch with the model that came in.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from dataclasses import dataclass, field

from labkit._share import address, storage_address
from labkit.linear import STORED
from labkit.walk import Matrix, blocks, matrices, path_of

ENOUGH = 0.95  # with a smaller share compressed there is a warning
NAMED = 4  # names in that warning, those with the most weights first


class LeftUncompressed(UserWarning):
    """A method left more than a twentieth of the decoder's weights as they were."""


@dataclass(frozen=True)
class Coverage:
    """How much of a model the methods that work on weights have reached, all of them together.

    ``total``: weights in the decoder's matrices before the first of them; 0 where there was none yet (or only methods for
    the KV cache), and then nothing counts as left. ``untouched``: those that no method touched, {path of the matrix:
    number of weights}. A matrix is touched when it was replaced, even by one of the same values (0 % zeros, say).
    """

    total: int = 0
    untouched: dict[str, int] = field(default_factory=dict)

    @property
    def compressed(self) -> int:
        """Weights that were touched."""
        return self.total - sum(self.untouched.values())

    @property
    def share(self) -> float:
        """The share of the decoder's weights that were touched, 0 to 1; 1 where there was nothing to do."""
        return self.compressed / self.total if self.total else 1.0

    @property
    def left(self) -> list[str]:
        """What was not touched, the most weights first: ``"model.layers.*.mlp.experts.down_proj (30 blocks, 56 %)"``."""
        kinds = defaultdict(list)
        for path, count in self.untouched.items():
            kinds[re.sub(r"\.\d+(?=\.|$)", ".*", path)].append(count)
        ranked = sorted(kinds.items(), key=lambda kind: -sum(kind[1]))
        return [
            f"{name} ({len(counts)} block{'s' * (len(counts) > 1)}, {percent(sum(counts) / self.total)})"
            for name, counts in ranked
        ]


def percent(share: float) -> str:
    """A share in whole percent, in which neither a little nor nearly all is rounded away."""
    if 0 < share < 0.01:
        return "under 1 %"
    if 0.99 < share < 1:
        return "over 99 %"
    return f"{share:.0%}".replace("%", " %")


def decoder_weights(lm) -> list[Matrix]:
    """The matrices in the decoder's blocks, by their paths in the model: what compression is about."""
    stack = blocks(lm.model)
    return list(matrices(stack, path_of(stack, lm.model)))


def nbytes(lm) -> int:
    """Bytes held by the decoder's weights, each storage once: codes, scales and zeros, and copies that kernels keep."""
    found = decoder_weights(lm)
    tensors = [t for m in found for t in ([m.tensor] if m.tensor is not None else m.module.buffers())]
    storages = {storage_address(t): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()) + sum(getattr(m.module, "runtime_nbytes", 0) for m in found)


def bits_per_weight(lm) -> float:
    """Stored bits per weight over all of the decoder's weights: codes, scales and zeros; copies of kernels apart."""
    found = decoder_weights(lm)
    return 8 * sum(m.nbytes for m in found) / sum(m.count for m in found)


def coverage(lm, before) -> Coverage:
    """What of the decoder's weights has been compressed in ``lm``, which a method made of ``before``.

    A weight that an earlier method had touched counts, whatever this one did with it. Both models must still be as the
    method left them: after a save and a load they share nothing, and ``lm.coverage`` is what was found at the time.
    """
    known, old = before.coverage, decoder_weights(before)
    now = {m.path: _place(m) for m in decoder_weights(lm) if not isinstance(m.module, STORED)}
    path_at = {place: path for path, place in now.items()}
    untouched = {}
    for m in old:
        if isinstance(m.module, STORED) or (known.total and m.path not in known.untouched):
            continue
        place = _place(m)
        path = m.path if now.get(m.path) == place else path_at.get(place)  # blocks before it may have been removed
        if path is not None:
            untouched[path] = m.count
    return Coverage(known.total or sum(m.count for m in old), untouched)


def _place(m: Matrix) -> tuple:
    return address(m.tensor), m.tensor.shape, m.tensor.stride(), m.tensor.dtype


def tell(method, found: Coverage) -> None:
    """Warn where less than ``ENOUGH`` of the decoder's weights have been compressed, and name what was left."""
    if found.share >= ENOUGH:
        return
    named = found.left[:NAMED]
    more = f" and {len(found.left) - NAMED} more" if len(found.left) > NAMED else ""
    text = f"After {method.typed()}, {percent(1 - found.share)} of the decoder's weights are as they were: "
    warnings.warn(f"{text}{', '.join(named)}{more}.", LeftUncompressed, stacklevel=3)
