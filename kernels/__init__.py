"""Arithmetic over flat shards. Each function is plain torch; fast kernels stand beside it and must agree with it."""

from lit_zero.kernels.pack import pack, unpack
from lit_zero.kernels.quantize import Quantized, Scheme, dequantize, quantize
from lit_zero.kernels.reductions import sum_of_powers
from lit_zero.kernels.signs import Signs, pack_signs, unpack_signs
from lit_zero.kernels.unscale import unscale

__all__ = [
    "Quantized",
    "Scheme",
    "Signs",
    "dequantize",
    "pack",
    "pack_signs",
    "quantize",
    "sum_of_powers",
    "unpack",
    "unpack_signs",
    "unscale",
]
