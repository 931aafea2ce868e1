"""In which dtype parameters are computed, kept, and reduced."""

from lit_zero.precision.policy import Lowering, Precision

__all__ = ["Lowering", "Precision"]
