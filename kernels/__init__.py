"""Arithmetic over flat shards. Each function is plain torch; fast kernels stand beside it and must agree with it."""

from lit_zero.kernels.reductions import sum_of_powers

__all__ = ["sum_of_powers"]
