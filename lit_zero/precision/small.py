"""Small state: masters and moments that lie on the device in forms of few bytes.

A step on a lane, in phases, for each portion of it:

1. The portion's master and states are brought to fp32, its gradient too.
2. The optimizer's own class steps it, as it would step the whole.
3. What it has changed is put back into its form; moments that are never negative are rounded at random.

[Note: blocks lie alike everywhere] Quantisation has blocks of 256 elements. Parameters and shards begin at multiples of
256 elements of their lane (``align``), so that a block belongs to one parameter and one rank, and its elements are the
same ones in every stage, on any number of ranks, and after a checkpoint has been loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch

from lit_zero.core.errors import ConfigError
from lit_zero.core.forms import Origin
from lit_zero.core.keeping import Content, Keeper, Keeping, Kept
from lit_zero.kernels.moments import BLOCK
from lit_zero.precision.forms import Encoded, Quantized, Rounded, Split
from lit_zero.precision.policy import Precision

# Elements of a portion: on a CPU what its cache holds, on a GPU what keeps it busy while the next is launched. Portions
# begin where blocks do, and where a vectorised kernel would begin a row of its own.
CPU_PORTION, GPU_PORTION = 1 << 18, 1 << 24


class SmallKeeper(Keeper):
    """The device's memory, in few bytes.

    Args:
        precision: the user's choice of forms.
        device: the device.
    """

    walks = True

    def __init__(self, precision: Precision, device: torch.device) -> None:
        self.splits = precision.master == "split"
        self._moments, self._device = precision.moments, device
        self._portion = CPU_PORTION if device.type == "cpu" else GPU_PORTION

    def keep(self, numel: int, dtype: torch.dtype, content: Content = Content.WEIGHTS) -> Kept:
        if dtype != torch.float32 or content is Content.WEIGHTS or self._moments == "float32":
            return Kept(torch.zeros(numel, dtype=dtype, device=self._device))
        if self._moments == "int8":
            return Quantized.zeros(numel, self._device, content is Content.SIGNED)
        tensor = torch.zeros(numel, dtype=torch.bfloat16, device=self._device)
        return Rounded(tensor, content is Content.POSITIVE)

    def beside(self, copy: torch.Tensor) -> Kept:
        return Split(copy, torch.zeros(copy.numel(), dtype=torch.int16, device=self._device))

    def gradient_dtype(self, stored: torch.dtype, master: torch.dtype) -> torch.dtype:
        # fp16 is for the loss scaler, which divides by the scale and would leave the range of fp16.
        return stored if stored == torch.bfloat16 else master

    def walk(
        self, arrays: Mapping[str, Kept], to_come: int, origin: Origin
    ) -> Iterator[tuple[int, int, dict[str, torch.Tensor]]]:
        numel = next(iter(arrays.values())).numel
        room = {
            key: torch.empty(-(-min(self._portion, numel) // BLOCK) * BLOCK, device=self._device)
            for key, array in arrays.items()
            if isinstance(array, Encoded)
        }
        for first in range(0, numel, self._portion):
            last = min(first + self._portion, numel)
            parts = {key: array.part(first, last) for key, array in arrays.items()}
            views = {
                key: part.decode(room[key][: part.padded]) if isinstance(part, Encoded) else part.read()
                for key, part in parts.items()
            }
            yield first, last, views
            for key, part in parts.items():
                if isinstance(part, Encoded):
                    draw = origin.stream(key), origin.step, origin.first + first
                    part.encode(room[key][: part.padded], draw)


class Small(Keeping):
    """Keeps every lane that is stepped in small forms, and splits every master that has a 2-byte copy.

    Args:
        precision: the user's choice of forms.
        device: where the model computes.
    """

    walks = True

    def __init__(self, precision: Precision, device: torch.device) -> None:
        self._precision, self._keeper = precision, SmallKeeper(precision, device)
        self.early = precision.step == "backward"
        self.align = BLOCK if precision.moments == "int8" else 1
        self.knobs = " and ".join(precision.small)

    def keeper(self, numel: int, used: bool, sharded: bool) -> Keeper:
        return self._keeper if used else Keeper()

    def accept(self, optimizer: str, contents: Collection[Content], lowered: bool) -> None:
        if self._precision.master == "split" and not lowered:
            raise ConfigError(
                "precision.master='split' has no effect: no parameter has a 2-byte copy, because "
                f"precision.lower={self._precision.lower!r} lowers none of them. Remove precision.master, or use "
                "precision.lower='all'."
            )
        if self._precision.moments != "float32" and not {Content.SIGNED, Content.POSITIVE} & set(contents):
            raise ConfigError(
                f"precision.moments={self._precision.moments!r} has no effect: {optimizer} with these settings keeps "
                "no fp32 moments of gradients. Remove precision.moments, or use an optimizer that does (AdamW, SGD "
                "with momentum, ...)."
            )
