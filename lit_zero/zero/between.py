"""Where a backward is: which units it has reached, and which it has left behind.

[Note: a backward goes back in time] Every node of a graph has a number, which grows as the forward makes nodes. The
autograd engine runs the nodes that are ready from the highest number down, and what makes a node ready has a higher
number than itself; so nodes run in the reverse of the order in which they were made. When a backward has come to a node
that is older than the moment at which a unit's forward began, it has left that forward behind for good: whoever else
reads the unit's inputs, whether they need gradients at all, whichever of its parameters are frozen or were not used.
Nothing has to be hung on the inputs or put in their place. Three limits: leaves run as soon as they can; the order is
that of one device, as every device has a thread of its own; and numbers belong to the thread that made the nodes, so
they are compared only within one backward (a reentrant checkpoint runs another one inside).

Source: ``Note [ Sequence Number ]`` in torch/csrc/autograd/function.h, ``CompareNodeTaskTime`` in engine.cpp.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def moment() -> int:
    """Return the number that the next node of a graph gets: a moment of the forward."""
    return torch.autograd._get_sequence_nr()


def present_backward() -> int:
    """Return the number of the backward that this runs in, the innermost one, -1 outside."""
    return torch._C._current_graph_task_id()


def backward_is_running() -> bool:
    """Return whether this runs inside a backward (a recomputation, seen from a module's forward)."""
    return present_backward() != -1


def moment_of_backward() -> int:
    """Return the moment of the forward to which the present backward has come."""
    return torch._C._current_autograd_node()._sequence_nr()


def when_reached(tensor: torch.Tensor, since: int, action: Callable[[], None]) -> None:
    """Call ``action`` each time a backward reaches what has made ``tensor``; not if that was before ``since``.

    Args:
        tensor: an output of a unit, which may have passed through it unchanged.
        since: moment at which the unit's forward began.
        action: what to do.
    """
    # A caller that changes a view in place puts a new node in its place, and the backward goes by the view's base.
    for one in (tensor, tensor._base) if tensor._is_view() else (tensor,):
        if one is None or one.grad_fn is None or one.grad_fn._sequence_nr() < since:
            continue
        one.grad_fn.register_prehook(lambda _: action())


def when_over(action: Callable[[], None]) -> None:
    """Call ``action`` at the end of the present backward, unless that fails."""
    torch.autograd.Variable._execution_engine.queue_callback(action)
