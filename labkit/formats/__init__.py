"""Number formats: encode a weight matrix into codes and metadata, decode it, and count its true bits."""

from labkit.formats.affine import Affine, integers
from labkit.formats.base import Encoded, Format, Params
from labkit.formats.integer import Integer, Quantized
from labkit.formats.minifloat import MINIFLOATS, Minifloat
from labkit.formats.mx import MXFP4, MXFP6, MXFP8
from labkit.formats.nf4 import NF4
from labkit.formats.nvfp4 import NVFP4
from labkit.formats.pack import pack, unpack
from labkit.formats.registry import FORMATS, by_name, restore, settings
from labkit.formats.scaled_float import FP4, FP6, Float8

__all__ = [
    "Format",
    "Encoded",
    "Params",
    "Integer",
    "Affine",
    "Quantized",
    "Float8",
    "FP6",
    "FP4",
    "MXFP8",
    "MXFP6",
    "MXFP4",
    "NVFP4",
    "NF4",
    "Minifloat",
    "MINIFLOATS",
    "FORMATS",
    "by_name",
    "settings",
    "restore",
    "integers",
    "pack",
    "unpack",
]
