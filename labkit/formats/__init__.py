"""Number formats: encode a weight matrix into codes and metadata, decode it, and count its true bits."""

from labkit.formats.affine import Affine
from labkit.formats.base import Encoded, Format, Params
from labkit.formats.integer import Integer, Quantized
from labkit.formats.pack import pack, unpack
from labkit.formats.registry import FORMATS, by_name, restore, settings

__all__ = [
    "Format",
    "Encoded",
    "Params",
    "Integer",
    "Affine",
    "Quantized",
    "FORMATS",
    "by_name",
    "settings",
    "restore",
    "pack",
    "unpack",
]
