"""The ZeRO engine: parameters, gradients and optimizer state, each replicated or sharded over the data-parallel
ranks.
"""

from lit_zero.zero.policy import Placement, Row, Zero

__all__ = ["Placement", "Row", "Zero"]
