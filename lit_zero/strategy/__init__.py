"""The Lightning strategy: the only part of lit_zero that knows Lightning."""

from lit_zero.strategy.pretrained import load_pretrained
from lit_zero.strategy.strategy import ZeroStrategy

__all__ = ["ZeroStrategy", "load_pretrained"]
