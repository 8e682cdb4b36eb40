"""Session fixtures: the real model, loaded once, and tiny random models of every family."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, tiny

import labkit
from labkit.model import LanguageModel

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(params=FAMILIES)
def each_family(request) -> LanguageModel:
    return tiny(request.param)


@pytest.fixture
def tiny_lm() -> LanguageModel:
    return tiny()


@pytest.fixture(scope="session")
def lm() -> LanguageModel:
    return labkit.load()


@pytest.fixture(scope="session")
def short_lm() -> LanguageModel:
    """The real model's tokenizer, embedding and first two blocks: real weights and shapes, quickly."""
    short = labkit.load()  # of its own: a module's fixture may be called lm too
    short.model.model.layers = short.model.model.layers[:2]
    short.model.config.num_hidden_layers = 2
    short.name = "two-blocks"
    return short
