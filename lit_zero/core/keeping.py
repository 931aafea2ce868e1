"""Where the shards of a rank live between uses: what the ZeRO engine asks for, and the answer without offload.

Three small objects. A :class:`Kept` is one flat array of a shard: a master, a state of the optimizer, the parameters'
2-byte copy. A :class:`Keeper` is a place and a form: it makes arrays, and walks through several of them in portions. A
:class:`Keeping` says which keeper a lane's arrays go to. Here all three stand for the device's own memory, as it is.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch

from lit_zero.core.forms import Form, Origin
from lit_zero.core.ticket import DONE, Failed, Ticket


class Content(enum.Enum):
    """What an optimizer's state holds for each element, as far as it matters to how it may be kept."""

    SIGNED = "signed"  # a moment of gradients
    POSITIVE = "positive"  # one that is never negative: of squares, of magnitudes
    WEIGHTS = "weights"  # it follows the parameter itself


class Kept:
    """A flat array in memory.

    Args:
        tensor: the elements, shape ``[n]``.
    """

    live = True  # ``read`` gives the elements themselves: writing to them writes the array

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.tensor.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the elements."""
        return self.tensor.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.numel * self.dtype.itemsize

    def part(self, first: int, last: int) -> Kept:
        """Return elements ``[first, last)`` as an array; what is written to one is written to the other."""
        return Kept(self.tensor[first:last])

    def read(self) -> torch.Tensor:
        """Return the elements, shape ``[n]``: themselves where they are ``live``, else a copy."""
        return self.tensor

    def write(self, first: int, values: torch.Tensor) -> None:
        """Overwrite the elements from ``first`` on with ``values`` (shape ``[m]``, any dtype and device)."""
        self.tensor[first : first + values.numel()].copy_(values)

    def fetch(self, out: torch.Tensor) -> Ticket:
        """Begin to fill ``out`` (shape ``[n]``) with the elements."""
        out.copy_(self.tensor, non_blocking=True)
        return DONE

    def stand_in(self) -> torch.Tensor:
        """Return what an optimizer holds: the elements, or where they lie elsewhere or in another form a tensor of no
        memory with the same shape and dtype.
        """
        return self.tensor

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors that it lies in."""
        return [self.tensor]

    def form(self) -> Form | None:
        """Return how it lies on the device; ``None`` if only portions of it can be stepped."""
        return Form("plain", self.tensor) if self.tensor.dtype == torch.float32 else None


class Keeper:
    """The device's own memory, and elements as they are. Base class of the places that shards are moved to, and of the
    forms that they are kept in.

    Attributes:
        place: ``device``, ``host`` or ``file``.
        walks: masters are stepped portion by portion.
        away: masters and optimizer states lie apart from what the device computes with, and the step runs on the CPU.
        params: so do sharded parameters.
        streams: gradients are copied to where the step reads them; else the device's memory is the host's.
        splits: a master with a 2-byte copy is kept as that copy and a remainder.
    """

    place = "device"
    walks = False
    away = False
    params = False
    streams = False
    splits = False

    def keep(self, numel: int, dtype: torch.dtype, content: Content = Content.WEIGHTS) -> Kept:
        """Return an array of zeros.

        Raises:
            LitZeroError: if there is no room; the message names the knob.
        """
        raise NotImplementedError

    def beside(self, copy: torch.Tensor) -> Kept:
        """Return a master of which ``copy`` (shape ``[n]``) is a part, where it ``splits``."""
        raise NotImplementedError

    def gradient_dtype(self, stored: torch.dtype, master: torch.dtype) -> torch.dtype:
        """Return the dtype in which the optimizer is handed gradients that are stored in ``stored``."""
        return master

    def gradient(self, arrived: torch.Tensor) -> torch.Tensor:
        """Return a reduced gradient (shape ``[n]``, on the device) where the step reads it; it may still be on its way
        until :meth:`Keeping.settle`.
        """
        return arrived

    def walk(
        self, arrays: Mapping[str, Kept], to_come: int, origin: Origin
    ) -> Iterator[tuple[int, int, dict[str, torch.Tensor]]]:
        """Yield ``(first, last, elements)``, portion by portion: of each array its elements ``[first, last)``, where
        the step runs. What is written to them is written to the array when the next portion is asked for, or the end
        is reached.

        Args:
            arrays: all of one length.
            to_come: bytes for each element that the caller is going to add as further arrays.
            origin: of the arrays.
        """
        raise NotImplementedError


class Keeping:
    """Which lanes' arrays live where: everything on the device.

    Attributes:
        apart: shards lie apart from what the device computes with, so even a rank that is alone has shards.
        walks: some lanes are stepped portion by portion.
        early: they are stepped inside the backward, each as soon as its gradients are complete.
        align: elements at whose multiples parameters and shards begin.
        knobs: the settings for which they are, in words.
    """

    apart = walks = early = False
    align = 1
    knobs = ""

    def run(self, job: Callable[[], None]) -> Ticket:
        """Do ``job``, a part of a step, at once or behind those before it while the computation goes on. What it
        raises, waiting for the ticket raises.
        """
        try:
            job()
        except Exception as error:
            return Failed(error)
        return DONE

    def keeper(self, numel: int, used: bool, sharded: bool) -> Keeper:
        """Return the place of a new lane's arrays.

        Args:
            numel: elements of a shard.
            used: the master is stepped, or is apart from the parameters anyway, so that moving it frees memory.
            sharded: the parameters are sharded, so that they may leave the device too.
        """
        return Keeper()

    def accept(self, optimizer: str, contents: Collection[Content], lowered: bool) -> None:
        """Make sure that there is something to do with an optimizer's states, and with masters.

        Args:
            optimizer: its name.
            contents: of all its states in fp32.
            lowered: there are parameters that are lowered to 2 bytes when they are trained, on some rank.

        Raises:
            ConfigError: for a setting that has no effect on any.
        """

    def check(self, needs: Mapping[str, int], to_come: Sequence[int]) -> None:
        """Make sure, before training starts or goes on, that there is room for all that lives elsewhere.

        Args:
            needs: bytes of it by kind: ``masters``, ``parameters``, ``optimizer state``, and the ``gradients`` that
                wait for the step.
            to_come: bytes of those arrays among the states that are still to be made.

        Raises:
            ConfigError: for a setting that leaves too little room, or has no effect.
        """

    def settle(self) -> None:
        """Return when the gradients that are on their way have come."""

    def close(self) -> None:
        """Give back what arrays lie in; nothing reads them any more."""
