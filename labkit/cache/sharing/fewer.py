"""Fewer KV heads: what GQA does in training, done to a trained model by pooling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from labkit.cache.base import check_weights
from labkit.linear import STORED, exact
from labkit.method import Method, knob
from labkit.walk import blocks, is_linear, weight_of


@dataclass(frozen=True)
class FewerKVHeads(Method):
    """Merge KV heads into fewer: the heads of each group become their mean, and more query heads share them.

    The cache shrinks in proportion, and so do the matrices that make keys and values. The paper trains the merged model
    on, with 5 % of the original compute; without that, heads that learned different things are averaged away.
    """

    kind: ClassVar[str] = "cache"
    paper: ClassVar[str] = "Ainslie et al., GQA, EMNLP 2023, section 2.1"
    lossless: ClassVar[dict] = {"kv_heads": 3}  # as many as the embedded model has

    kv_heads: int = knob(
        1, low=1, high=1024, stops=(1, 3), help="KV heads of each layer afterwards; it must divide what the model has."
    )
    pool: str = knob(
        "mean", choices=("mean", "first"), help="A group's new head: the mean of its heads, or the first of them."
    )

    def apply(self, lm, calib, progress: bool) -> None:
        check_weights(lm.model)
        stack, counts = blocks(lm.model), {}
        for index, block in enumerate(stack):
            for attention in filter(_makes_heads, block.modules()):  # none in some blocks of hybrid stacks
                counts[attention] = before = attention.k_proj.out_features // attention.head_dim
                if before % self.kv_heads:
                    raise ValueError(
                        f"FewerKVHeads.kv_heads = {self.kv_heads} is not allowed for {lm.name}, block {index}: "
                        f"it must divide its {before} KV heads."
                    )
        if not counts:
            raise ValueError(f"{type(lm.model).__name__} has no KV heads that several query heads could share.")
        before = max(counts.values())
        for attention in (m for m in stack.modules() if hasattr(m, "num_key_value_groups")):
            if _makes_heads(attention):
                self.merge(attention, counts[attention])
            else:  # it reads the keys of another block
                attention.num_key_value_groups *= before // self.kv_heads
        if before != self.kv_heads:
            lm.model.config.get_text_config().num_key_value_heads = self.kv_heads
            self.check(lm.model)

    def merge(self, attention: nn.Module, before: int) -> None:
        """Give an attention module with ``before`` KV heads fewer, in place: their matrices, norms and number."""
        if before == self.kv_heads:
            return
        for name in ("k_proj", "v_proj"):
            linear = getattr(attention, name)
            setattr(attention, name, self.pooled(linear, linear.out_features // before))
        for name, norm in attention.named_children():
            if name.startswith("k_") and not is_linear(norm):
                self.merge_norm(norm, before, attention.head_dim)
        for name in ("num_key_value_heads", "num_kv_heads"):
            if getattr(attention, name, None) == before:
                setattr(attention, name, self.kv_heads)
        attention.num_key_value_groups *= before // self.kv_heads

    def merge_norm(self, norm: nn.Module, before: int, head_dim: int) -> None:
        """The same for the keys' norm, where it has numbers for each head: in one vector (OLMo 2), one row for each head
        (Cohere) or a list of norms (StableLM). A norm of ``head_dim`` numbers is all heads' and stays."""
        for name, tensor in norm.named_parameters(recurse=False):
            if tensor.numel() == before * head_dim and before > 1:
                pooled = self.pool_rows(tensor.flatten(), self.kv_heads, head_dim)
                setattr(norm, name, _fixed(pooled.view(-1, *tensor.shape[1:])))
        for name, each in norm.named_children():
            if isinstance(each, nn.ModuleList) and len(each) == before:
                setattr(norm, name, nn.ModuleList(self.one_norm(g) for g in _groups(list(each), self.kv_heads)))

    def one_norm(self, norms: list[nn.Module]) -> nn.Module:
        """One norm in place of several, with their pooled numbers."""
        for name, tensor in list(norms[0].named_parameters(recurse=False)):
            stacked = torch.cat([getattr(norm, name) for norm in norms])
            setattr(norms[0], name, _fixed(self.pool_rows(stacked, 1, len(tensor))))
        return norms[0]

    def pooled(self, linear: nn.Module, head_dim: int) -> nn.Linear:
        """A dense linear with ``kv_heads * head_dim`` rows in place of all heads' rows."""
        weight = weight_of(linear)
        dtype = linear.dtype if isinstance(linear, STORED) else weight.dtype
        made = nn.Linear(linear.in_features, self.kv_heads * head_dim, bias=False, device="meta")
        made.weight = _fixed(self.pool_rows(weight, self.kv_heads, head_dim).to(dtype))
        if linear.bias is not None:
            made.bias = _fixed(self.pool_rows(linear.bias, self.kv_heads, head_dim).to(dtype))
        return made

    def pool_rows(self, rows: torch.Tensor, groups: int, width: int) -> torch.Tensor:
        """Rows (heads * width, ...) of all heads to (groups * width, ...): one head for each group of neighbours."""
        heads = rows.detach().float().unflatten(0, (groups, -1, width))
        one = heads.mean(1) if self.pool == "mean" else heads[:, 0]
        return one.flatten(0, 1).to(rows.dtype)

    def check(self, model) -> None:
        """Raise ValueError where the merged model does not run, or would be built in another shape from its configuration."""
        named = type(model).__name__
        try:
            with torch.no_grad(), exact():  # no kernels are built for a few tokens
                ids = torch.ones(2, 3, dtype=torch.long, device=model.device)
                model(ids, attention_mask=ids.tril(1), use_cache=False)  # padded: without a mask some mistakes run
            with torch.device("meta"):
                again = type(model)(model.config)
        except Exception as error:  # whatever the family's code raises
            raise ValueError(f"{named} does not run with its KV heads merged ({str(error)[:120]}).") from error
        for path, module in model.named_modules():
            if _makes_heads(module):
                new = again.get_submodule(path)
                if (new.num_key_value_groups, new.k_proj.out_features) != (
                    module.num_key_value_groups,
                    module.k_proj.out_features,
                ):
                    raise ValueError(
                        f"{named} keeps its numbers of KV heads where they cannot be set, so none are merged."
                    )


def _makes_heads(module: nn.Module) -> bool:
    """Whether this is an attention whose keys and values are made apart, for heads that several query heads can share."""
    parts = (getattr(module, name, None) for name in ("k_proj", "v_proj"))
    return hasattr(module, "num_key_value_groups") and all(part is not None for part in parts)


def _groups(items: list, count: int) -> list[list]:
    size = len(items) // count
    return [items[start : start + size] for start in range(0, len(items), size)]


def _fixed(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
