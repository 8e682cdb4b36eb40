"""Methods that round weights."""

from labkit.quantize.awq import AWQ
from labkit.quantize.gptq import GPTQ
from labkit.quantize.rtn import RTN

__all__ = ["RTN", "GPTQ", "AWQ"]
