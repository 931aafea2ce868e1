"""Arithmetic over flat shards. Each function is plain torch; fast kernels stand beside it and must agree with it."""

from lit_zero.kernels.adagrad import AdagradGroup, adagrad_step
from lit_zero.kernels.adamw import AdamGroup, adamw_step
from lit_zero.kernels.choice import runs_kernel
from lit_zero.kernels.lion import LionGroup, lion_step
from lit_zero.kernels.reductions import sum_of_powers
from lit_zero.kernels.segments import Segment
from lit_zero.kernels.sgd import SGDGroup, sgd_step
from lit_zero.kernels.table import Tables

__all__ = [
    "AdagradGroup",
    "AdamGroup",
    "LionGroup",
    "SGDGroup",
    "Segment",
    "Tables",
    "adagrad_step",
    "adamw_step",
    "lion_step",
    "runs_kernel",
    "sgd_step",
    "sum_of_powers",
]
