"""Methods that round weights."""

from labkit.quantize.rtn import RTN

__all__ = ["RTN"]
