"""Models that leave the lab: folders and files that other runtimes load."""

from labkit.export.onnx import onnx

__all__ = ["onnx"]
