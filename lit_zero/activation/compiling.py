"""Blocks inside of what is compiled as a whole.

[Note: who watches] ``torch.compile`` of a whole model watches every Python frame that runs inside it, and compiles
those that it can. A block's forward is such a frame, and must be when it is computed again, or it would save other
tensors: but that is in the backward, where nobody watches. So who watches the block's call is noted, and put back for
the repetition. What this package does itself, in between, nobody is to look at.

Torch's names for this are private, though they have long been the same. In a release without them, blocks inside of
what is compiled as a whole may save other tensors when they are computed again, an error; nothing else is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._C import _dynamo
from torch._dynamo import decorators

UNTRACED = "lit_zero decides what becomes of the tensors that a block saves"  # the reason that torch.compile tells

_F = TypeVar("_F", bound=Callable[..., Any])


def _nobody(*_: Any) -> None:
    """Stand for a name that torch does not have."""


# Who watches the frames of this thread. As it is, since a function of our own would be watched.
watcher: Callable[[], Any] = getattr(_dynamo.eval_frame, "get_eval_frame_callback", _nobody)
_watch: Callable[[Any], Any] = getattr(_dynamo.eval_frame, "set_eval_frame", _nobody)
_skip: Callable[[Any], Any] = getattr(decorators, "skip", lambda function: function)


def unseen(function: _F) -> _F:
    """Let nobody look at a function; what it calls is looked at."""
    hidden: _F = torch.compiler.disable(_skip(function), recursive=False, reason=UNTRACED)
    return hidden


def watched(by: Any, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run something under the eyes of ``by``."""
    before = _watch(by)
    try:
        return run(*args, **kwargs)
    finally:
        _watch(before)
