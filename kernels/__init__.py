"""Arithmetic over flat shards. Each function is plain torch; fast kernels stand beside it and must agree with it."""

from lit_zero.kernels.adagrad import AdagradGroup, adagrad_step
from lit_zero.kernels.adamw import AdamGroup, adamw_step
from lit_zero.kernels.choice import runs_kernel
from lit_zero.kernels.lion import LionGroup, lion_step
from lit_zero.kernels.pack import pack, unpack
from lit_zero.kernels.quantize import Quantized, Scheme, dequantize, quantize
from lit_zero.kernels.reductions import sum_of_powers
from lit_zero.kernels.segments import Segment
from lit_zero.kernels.sgd import SGDGroup, sgd_step
from lit_zero.kernels.signs import Signs, pack_signs, unpack_signs
from lit_zero.kernels.table import Tables
from lit_zero.kernels.unscale import unscale

__all__ = [
    "AdagradGroup",
    "AdamGroup",
    "LionGroup",
    "Quantized",
    "SGDGroup",
    "Scheme",
    "Segment",
    "Signs",
    "Tables",
    "adagrad_step",
    "adamw_step",
    "dequantize",
    "lion_step",
    "pack",
    "pack_signs",
    "quantize",
    "runs_kernel",
    "sgd_step",
    "sum_of_powers",
    "unpack",
    "unpack_signs",
    "unscale",
]
