"""How bytes travel. The only part of lit_zero that calls torch.distributed."""

from lit_zero.comm.policy import Comm

__all__ = ["Comm"]
