"""Checkpoints in which the parallel layout never shows: names and global shapes, one plain file, or one folder.

No part of this package knows Lightning: plain dicts come in and go out. Who does what:

* ``policy``: the user's choice, ``Checkpoint``.
* ``files``: files and folders that appear whole or not at all, and reading a file with an error that says what to do.
* ``parts``: one optimizer's part on one rank; does what was saved fit what is loaded into.
* ``together``: all ranks succeed or all raise.
* ``full``: one plain ``.ckpt``, gathered to rank 0's host memory tensor by tensor.
* ``sharded``: a folder in the format of torch.distributed.checkpoint to which each rank writes what it holds.
* ``weights``: further state dicts in such a folder, beside ``state_dict``.
* ``header``: the ``lit_zero.json`` of such a folder.
* ``dcp``: the one door to torch.distributed.checkpoint, used as a file format.
* ``consolidate``: such a folder into one ``.ckpt`` or ``.safetensors``.
"""

from lit_zero.checkpoint.policy import Checkpoint

__all__ = ["Checkpoint"]
