"""Methods that round weights."""

from labkit.quantize.awq import AWQ
from labkit.quantize.awq_gptq import AWQGPTQ
from labkit.quantize.bnb import BitsAndBytes
from labkit.quantize.gptq import GPTQ
from labkit.quantize.hqq import HQQ
from labkit.quantize.mixed import MixedPrecision
from labkit.quantize.rtn import RTN
from labkit.quantize.smoothquant import SmoothQuant

__all__ = ["RTN", "GPTQ", "AWQ", "AWQGPTQ", "SmoothQuant", "HQQ", "BitsAndBytes", "MixedPrecision"]
