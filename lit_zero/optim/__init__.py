"""Optimizers that step flat shards."""

from lit_zero.optim.lamb import LAMB
from lit_zero.optim.muon import Muon

__all__ = ["LAMB", "Muon"]
