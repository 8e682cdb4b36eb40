"""What a change to a few layers costs, tried out and taken back: the KL divergence to the model as it was."""

from __future__ import annotations

import torch
from torch import nn

from labkit.linear import exact
from labkit.measure.quality import token_kl
from labkit.walk import set_weight


class Probe:
    """Keeps a model's predictions on windows (windows, length), and compares others with them.

    >>> Probe(lm, ids).cost({layer: pruned_weight})     # nats per token; lm is as before afterwards
    """

    def __init__(self, lm, ids: torch.Tensor):
        self.model, self.ids = lm.model, ids.to(lm.device)
        self.reference = self._predictions()

    def cost(self, weights: dict[nn.Module, torch.Tensor]) -> float:
        """KL(before ‖ after) per token, in nats, with these dense weights (out, in) in their layers."""
        before = {layer: layer.weight for layer in weights}
        try:
            for layer, weight in weights.items():
                set_weight(layer, weight)
            now = self._predictions()
        finally:
            for layer, weight in before.items():
                layer.weight = weight
        return token_kl(self.reference, now).mean().clamp(min=0).item()

    @exact()
    @torch.no_grad()
    def _predictions(self) -> torch.Tensor:
        """Log probabilities (tokens, vocabulary), window by window."""
        return torch.cat([self.model(row[None]).logits[0].float().log_softmax(-1) for row in self.ids])
