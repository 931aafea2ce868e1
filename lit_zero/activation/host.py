"""Tensors on their way to host memory and back.

[Note: order on a GPU] Copies run on a stream of their own. A copy out begins when what the compute stream has been
given so far is done, so it reads a finished tensor; the tensor's memory is not used again before the copy has ended
(``record_stream``). A copy back is waited for, on the compute stream, where the tensor is used. On a CPU a copy is over
when it returns, and all else is the same.

Source: Rhu et al., "vDNN: Virtualized Deep Neural Networks for Scalable, Memory-Efficient Neural Network Design", 2016,
section III.
"""

from __future__ import annotations

import time
import warnings
import weakref
from collections import deque
from typing import Any

import torch


class Copies:
    """Copies between a device and host memory, each over when it returns: a CPU's."""

    overlaps = False

    def out(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Copy to host memory; return the copy and what ``wait`` takes."""
        return torch.empty_like(tensor, requires_grad=False).copy_(tensor), None

    def back(self, host: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, Any]:
        """Copy to the device; return the copy and what ``arrive`` takes."""
        return torch.empty_like(host, device=device).copy_(host), None

    def wait(self, ticket: Any) -> None:
        """Return when a copy out is over."""

    def arrive(self, tensor: torch.Tensor, ticket: Any) -> None:
        """Let what is computed next see a tensor that has come back."""


class StreamCopies(Copies):
    """Copies on a stream of their own, to and from pinned memory.

    Args:
        device: a CUDA device.
    """

    overlaps = True

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pinned = True

    def _host(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._pinned:
            try:
                return torch.empty_like(tensor, device="cpu", requires_grad=False, pin_memory=True)
            except RuntimeError as error:
                self._pinned = False
                warnings.warn(
                    f"activation=offload: the host gives no more pinned memory ({str(error).splitlines()[0]}). Ordinary"
                    " memory is used from now on; copies wait for it. Raise the limit of locked memory (ulimit -l).",
                    stacklevel=2,
                )
        return torch.empty_like(tensor, device="cpu", requires_grad=False)

    def out(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Begin to copy to host memory."""
        host = self._host(tensor)
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)
        return host, self._stream.record_event()

    def back(self, host: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, Any]:
        """Begin to copy to the device."""
        tensor = torch.empty_like(host, device=device)
        self._stream.wait_stream(torch.cuda.current_stream(device))  # which may still be using this memory
        with torch.cuda.stream(self._stream):
            tensor.copy_(host, non_blocking=True)
        tensor.record_stream(self._stream)
        return tensor, self._stream.record_event()

    def wait(self, ticket: Any) -> None:
        """Return when a copy out is over."""
        ticket.synchronize()

    def arrive(self, tensor: torch.Tensor, ticket: Any) -> None:
        """Let the compute stream wait for a copy back."""
        torch.cuda.current_stream(tensor.device).wait_event(ticket)


class Host:
    """Host memory, to which the blocks of a model move what they save.

    Args:
        device: on which they compute.
        threshold: bytes below which a tensor stays.
        in_flight: bytes that may be on their way there at a time, and as many that come back before they are asked for;
            a larger tensor goes alone.

    Attributes:
        held: bytes that lie there now.
        moved: bytes that have been moved there so far.
        ahead: bytes that have come back, or are on their way, and have not been asked for.
        most: bytes that have been on their way at a time, at most, in either direction.
    """

    def __init__(self, device: torch.device, threshold: int, in_flight: int) -> None:
        self._device, self._threshold, self._limit = device, threshold, in_flight
        self._copies = StreamCopies(device) if device.type == "cuda" else Copies()
        self._flying: deque[tuple[Any, int]] = deque()
        self._out = 0
        self.held = self.moved = self.ahead = self.most = 0
        self.last: weakref.ref[Shelf] | None = None

    @property
    def frees(self) -> bool:
        """Whether host memory is another one than the device's."""
        return self._device.type != "cpu"

    @property
    def overlaps(self) -> bool:
        """Whether copies run beside the computation."""
        return self._copies.overlaps

    def takes(self, tensor: torch.Tensor) -> bool:
        """Return whether a saved tensor is worth a copy, and plain enough."""
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
            return False
        expanded = tensor.nbytes > tensor.untyped_storage().nbytes()  # its copy would take more than it does
        return tensor.device.type == self._device.type and tensor.nbytes >= max(1, self._threshold) and not expanded

    def move(self, tensor: torch.Tensor, shelf: Shelf) -> Moved:
        """Copy a tensor to host memory; wait first for older copies if too much is on its way."""
        size = tensor.nbytes
        while self._flying and self._out + size > self._limit:
            ticket, freed = self._flying.popleft()
            self._copies.wait(ticket)
            self._out -= freed
        with torch.no_grad():
            host, ticket = self._copies.out(tensor.detach())
        self._flying.append((ticket, size))
        self._out += size
        self.held += size
        self.moved += size
        self.most = max(self.most, self._out)
        return Moved(self, host, tensor.device, shelf)

    def bring(self, moved: Moved) -> None:
        """Begin to copy a tensor back."""
        with torch.no_grad():
            moved.tensor, moved.ticket = self._copies.back(moved.host, moved.device)
        self.ahead += moved.size

    def take(self, moved: Moved) -> torch.Tensor:
        """Return a tensor that has come back, and begin to copy what will probably be asked for next."""
        if moved.tensor is None:
            self.bring(moved)
        tensor, ticket = moved.tensor, moved.ticket
        assert tensor is not None
        moved.tensor = moved.ticket = None
        moved.taken = True
        self.ahead -= moved.size
        self._copies.arrive(tensor, ticket)
        for other in moved.shelf.before(moved):
            if other.tensor is None and not other.taken:
                if self.ahead + other.size > self._limit:
                    break
                self.bring(other)
                self.most = max(self.most, self.ahead)
        return tensor

    def link(self) -> int:
        """Return how many bytes per second go to host memory, measured."""
        sample = torch.zeros(1 << 23, dtype=torch.uint8, device=self._device)
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            _, ticket = self._copies.out(sample)
            self._copies.wait(ticket)
            best = min(best, time.perf_counter() - start)
        return max(1, int(sample.nbytes / best))


class Moved:
    """A tensor in host memory; it stands in the graph for the one that was saved.

    Attributes:
        tensor: the copy that has come back, until it is taken.
        taken: it has been asked for before, by a backward that keeps its graph.
    """

    def __init__(self, home: Host, host: torch.Tensor, device: torch.device, shelf: Shelf) -> None:
        self.home, self.host, self.device, self.shelf = home, host, device, shelf
        self.size = host.nbytes
        self.tensor: torch.Tensor | None = None
        self.ticket: Any = None
        self.taken = False

    def __del__(self) -> None:
        self.home.held -= self.size
        if self.tensor is not None:  # it came back for nothing
            self.home.ahead -= self.size


class Shelf:
    """What one call of a block has moved, in order.

    Args:
        home: where.
    """

    def __init__(self, home: Host) -> None:
        self._moved: list[weakref.ref[Moved]] = []
        self._previous, home.last = home.last, weakref.ref(self)

    def add(self, moved: Moved) -> None:
        """Put a tensor on the shelf."""
        self._moved.append(weakref.ref(moved))

    def before(self, moved: Moved) -> list[Moved]:
        """Return what was moved before, last first: the rest of this call and the call before it."""
        own = [each() for each in self._moved]
        place = next((number for number, each in enumerate(own) if each is moved), len(own))
        previous = self._previous() if self._previous is not None else None
        older = [] if previous is None else [each() for each in previous._moved]
        return [each for each in (*reversed(own[:place]), *reversed(older)) if each is not None]
