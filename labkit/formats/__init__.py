"""Number formats: encode a weight matrix into codes and metadata, decode it, and count its true bits."""

from labkit.formats.integer import Integer, Quantized
from labkit.formats.pack import pack, unpack

__all__ = ["Integer", "Quantized", "pack", "unpack"]
