"""A LanguageModel as one onnxruntime graph: decode at the memory roof."""

from labkit.engine.families import NotCompilable
from labkit.engine.session import CompiledModel, compile

__all__ = ["CompiledModel", "NotCompilable", "compile"]
