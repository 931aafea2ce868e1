"""Record one dry run of the user's step: which block runs when, who needs which parameter, and what crosses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lit_zero.pipeline.blocks import AUTO, block_lists, in_order
from lit_zero.pipeline.facts import BlockFacts, ModuleFacts, Recording, Slot, StateFacts
from lit_zero.pipeline.recorder import Recorder


def record(
    root: nn.Module,
    call: Callable[[], Any],
    blocks: str | Sequence[str] = AUTO,
    device: torch.device | None = None,
) -> Recording:
    """Run ``call`` without the values of parameters and return what it has done with which module.

    Nothing is changed: parameters, buffers, attributes, metrics, random states and logs stay as they are. Parameters
    may be on the meta device or have no values.

    Args:
        root: the module that owns all parameters.
        call: runs the user's step on one micro-batch, for example ``lambda: module.training_step(batch, 0)``.
        blocks: where to cut, see :func:`~lit_zero.pipeline.blocks.block_lists`.
        device: where the step will run, to which parameters and buffers will have moved; the CPU by default.

    Raises:
        ConfigError: if ``blocks`` names no list.
        UnsupportedError: if the blocks do not run once each and in order, and if there are none.
    """
    lists = block_lists(root, blocks)
    names = [name for entries in lists.values() for name in entries]
    device = device or torch.device("cpu")
    if blocks == AUTO and len(lists) > 1:
        ran = Recorder(root, names, device, ordered=False).run(call)
        names = in_order(lists, ran.ran) or names
    recorder = Recorder(root, names, device)
    recorder.run(call)
    return _recording(recorder)


def _recording(seen: Recorder) -> Recording:
    blocks = []
    for index, name in enumerate(seen.names):
        slots = tuple(
            Slot(
                s.number,
                tuple(s.paths),
                tuple(s.leaf.shape),
                str(s.leaf.dtype),
                s.leaf.requires_grad,
                s.made,
                s.written,
            )
            for s in seen.slots[index]
        )
        size = sum(s.leaf.numel() * s.leaf.element_size() for s in seen.slots[index])
        module = seen.root.get_submodule(name)
        shapes = [(key, tuple(p.shape)) for key, p in module.named_parameters()]
        blocks.append(
            BlockFacts(
                name,
                slots,
                size,
                seen.flops[index],
                seen.saved[index],
                f"{type(module).__qualname__} {shapes} {seen.signatures[index]}",
                index in seen.written_blocks,
            )
        )
    order = [name for name, _ in seen.root.named_modules() if name in seen.calls]
    return Recording(
        tuple(blocks),
        _states(seen, seen.parameters, seen.parameter_names),
        _states(seen, seen.buffers, seen.buffer_names),
        tuple(ModuleFacts(n, c.first, c.last, c.whole, c.written) for n, c in ((n, seen.calls[n]) for n in order)),
        tuple(seen.skips.values()),
        tuple(seen.returned),
        tuple(seen.logged),
    )


def _states(seen: Recorder, tensors: dict[str, Any], names: dict[int, list[str]]) -> tuple[StateFacts, ...]:
    """Return the facts of parameters or buffers. One that no operator uses goes to the region of the block that
    holds it, otherwise of the one registered before it, or else after it.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name in tensors:
        found[name] = tuple(sorted(seen.uses.get(name, ())))
        if not found[name]:
            inside = [i for i, block in enumerate(seen.names) if name.startswith(f"{block}.")]
            found[name] = tuple(inside[:1])
    order = list(found)
    regions = dict(found)
    for place, name in enumerate(order):
        if not regions[name]:
            before = next((regions[n] for n in reversed(order[:place]) if regions[n]), None)
            after = next((found[n] for n in order[place:] if found[n]), (0,))
            regions[name] = before[-1:] if before else after[:1]
    return tuple(
        StateFacts(
            name,
            tuple(names[id(tensor)][1:]),
            tensor.numel(),
            tensor.numel() * tensor.element_size(),
            regions[name],
            name in seen.uses,
            tuple(sorted(seen.writes.get(name, ()))),
        )
        for name, tensor in tensors.items()
    )
