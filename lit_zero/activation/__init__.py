"""What lives between forward and backward: kept, recomputed, moved to host memory, or shared out over ranks.

A training step, from a block's side:

1. *Forward.* Autograd asks to keep a tensor (``torch.autograd.graph.saved_tensors_hooks``). A block that is recomputed
   keeps a number in its place and, once for the call, the arguments (``recompute``). One that is offloaded keeps the
   place in host memory to which the tensor is copied (``host``).
2. *Backward.* Autograd asks for the tensor. The first question makes the block run again, or waits for the copy back.

Which block does what is decided before, with integers (``plan``); blocks know nothing of one another.
"""

from lit_zero.activation.policy import Activation

__all__ = ["Activation"]
