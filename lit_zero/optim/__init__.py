"""Optimizers that step flat: on a GPU all parameters in one launch, on a CPU by torch's fused kernels if it has them.

Each takes the arguments of torch's class of its name, where there is one, and keeps the same states under the same
names, so a checkpoint of one loads into the other. They work on any parameters, with or without a strategy.
"""

from lit_zero.optim.adagrad import Adagrad
from lit_zero.optim.adam import Adam, AdamW
from lit_zero.optim.fusing import fuse
from lit_zero.optim.lamb import LAMB
from lit_zero.optim.lion import Lion
from lit_zero.optim.muon import Muon
from lit_zero.optim.sgd import SGD

__all__ = ["LAMB", "SGD", "Adagrad", "Adam", "AdamW", "Lion", "Muon", "fuse"]
