"""Give memory to modules built on the meta device, one module at a time, so that no rank ever holds the full model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lit_zero.comm.exchange import Exchange
from lit_zero.core.errors import UnsupportedError
from lit_zero.core.parameters import become


def on_meta(model: nn.Module) -> set[str]:
    """Return the names of the parameters that have no memory yet."""
    return {name for name, param in model.named_parameters(remove_duplicate=False) if param.is_meta}


def materialize(
    model: nn.Module, device: torch.device, exchange: Exchange, sink: Callable[[str, torch.Tensor], None]
) -> None:
    """Initialise every module that has parameters or buffers on the meta device.

    Modules are initialised in order of registration by their own ``reset_parameters``, from rank 0's random state on
    every rank. That order is the order of construction in the usual module, so the values equal those of an eager build
    with the same seed, as far as a module's constructor draws what its ``reset_parameters`` draws. A tied parameter
    gets the value that the first module with it draws.

    What was on a real device keeps its value. What was initialised again after its constructor is refused, as far as
    that leaves a trace: in-place functions such as ``nn.init`` do; ``param.data.normal_()`` and a parameter that was
    replaced do not.

    Args:
        model: the whole module. Its meta parameters become empty real ones; their values go to ``sink``.
        device: where values are made.
        exchange: shares rank 0's random state.
        sink: called with each parameter's name and full value.

    Raises:
        UnsupportedError: naming the module that has no ``reset_parameters``, or whose ``reset_parameters`` leaves
            something unset.
    """
    if not any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        return
    _share_random_state(device, exchange)
    made: dict[nn.Parameter, torch.Size] = {}  # full shapes of what has gone to the sink
    for name, module in model.named_modules():
        parameters: dict[nn.Parameter, str] = {}  # each with the first of its names
        for key, p in module._parameters.items():
            if p is not None:
                parameters.setdefault(p, key)
        own = {key: p for p, key in parameters.items() if p.is_meta}
        buffers = {key: b for key, b in module._buffers.items() if b is not None and b.is_meta}
        with _set_aside(module, [p for p in parameters if not p.is_meta], made, device):
            if own or buffers:
                _materialize_module(model, name, module, own, buffers, device)
            elif any(p in made for p in parameters):
                _draw_again(module)
        for key, param in own.items():
            sink(f"{name}.{key}" if name else key, param.data)
            made[param] = param.shape
            param.data = torch.empty(0, dtype=param.dtype, device=device)  # its place in a flat buffer comes later


def _draw_again(module: nn.Module) -> None:
    """Advance the random state past what the constructor drew before the module's parameters were tied to another's."""
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        with torch.no_grad():
            reset()


@contextlib.contextmanager
def _set_aside(
    module: nn.Module, real: Sequence[nn.Parameter], made: dict[nn.Parameter, torch.Size], device: torch.device
) -> Iterator[None]:
    """Inside, the module's real parameters and buffers may be overwritten: ``reset_parameters`` knows no exceptions."""
    parameters = [(param, param.data) for param in real]
    buffers = [(key, b, b.clone()) for key, b in module._buffers.items() if b is not None and not b.is_meta]
    for param, data in parameters:
        shape = made.get(param, data.shape)
        param.data = torch.empty(shape, dtype=data.dtype, device=device if param in made else data.device)
    try:
        yield
    finally:
        for param, data in parameters:
            param.data = data
        for key, buffer, value in buffers:
            buffer.copy_(value)
            module._buffers[key] = buffer


def _materialize_module(
    model: nn.Module,
    name: str,
    module: nn.Module,
    own: dict[str, nn.Parameter],
    buffers: dict[str, torch.Tensor],
    device: torch.device,
) -> None:
    title = f"Module {name!r} ({type(module).__name__})"
    reset = _reset_of(model, name, module, buffers_only=not own)
    if reset is None:
        raise UnsupportedError(
            f"{title} is on the meta device and has no reset_parameters() to initialise it. Add one, or build the "
            "module on a real device."
        )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        _refuse_lost_values(title, own, reset)
    unset: dict[str, torch.Tensor] = {}
    for key, param in own.items():
        try:
            become(module, param, nn.Parameter(_unset_like(param, device), requires_grad=param.requires_grad))
        except RuntimeError as error:
            raise UnsupportedError(
                f"{title} is on the meta device, and its {key!r} cannot be given memory: {error}. Build the module on "
                "a real device."
            ) from error
        unset[key] = param
    for key, buffer in buffers.items():
        module._buffers[key] = unset[key] = _unset_like(buffer, device)
    written = {key: value._version for key, value in unset.items()}
    with torch.no_grad():
        reset()
    for key, before in unset.items():
        value = module._parameters.get(key) if key in own else module._buffers.get(key)
        if key in own and value is not before:
            raise UnsupportedError(
                f"{title} is on the meta device and its reset_parameters() puts a new parameter in the place of "
                f"{key!r}, which optimizers do not know. Write to the one that is there (with nn.init), or build the "
                "module on a real device."
            )
        if value is None or not value.numel():
            continue
        # Integers have no value that says "not set"; whether something has been written is known of all.
        untouched = value is before and value._version == written[key]
        if untouched or ((value.is_floating_point() or value.is_complex()) and bool(value.isnan().any())):
            raise UnsupportedError(
                f"{title} is on the meta device and its reset_parameters() does not set {key!r}. Set it there, or "
                "build the module on a real device."
            )


def _reset_of(model: nn.Module, name: str, module: nn.Module, buffers_only: bool) -> Callable[[], Any] | None:
    """Return what initialises ``module``: its own ``reset_parameters``, or, where nothing but buffers is to be set, the
    ``_init_weights`` of the innermost module around it, as Hugging Face's models have it for tables of positions.
    """
    reset = getattr(module, "reset_parameters", None)
    if callable(reset) or not buffers_only:
        return reset if callable(reset) else None
    around = [name[:end] for end, letter in enumerate(f"{name}.") if letter == "."]
    for ancestor in (*(model.get_submodule(each) for each in reversed(around)), model):
        init = getattr(ancestor, "_init_weights", None)
        if callable(init):
            return partial(init, module)
    return None


def _refuse_lost_values(title: str, own: dict[str, nn.Parameter], reset: Callable[[], None]) -> None:
    """Refuse parameters that something else than the constructor has initialised: there is no memory to remember it."""
    written = {key: param._version for key, param in own.items()}
    # On meta tensors this costs nothing, and tells how often each is written.
    with torch.no_grad():
        reset()
    for key, param in own.items():
        if written[key] > param._version - written[key]:
            raise UnsupportedError(
                f"{title} is on the meta device, but {key!r} has been initialised again after it was constructed, and "
                "that value would be lost. "
                "Initialise it in the module's reset_parameters(), or build the module on a real device."
            )


def _unset_like(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return memory like ``tensor`` that shows whether it has been set: NaN, or zero where there is no NaN."""
    fill = float("nan") if tensor.is_floating_point() or tensor.is_complex() else 0
    return torch.full(tensor.shape, fill, dtype=tensor.dtype, device=device)


def _share_random_state(device: torch.device, exchange: Exchange) -> None:
    state = torch.get_rng_state()
    wire = state.to(device)
    exchange.broadcast(wire)
    torch.set_rng_state(wire.cpu())
    if device.type == "cuda":
        state = torch.cuda.get_rng_state(device).to(device)
        exchange.broadcast(state)
        torch.cuda.set_rng_state(state.cpu(), device)


# ---- values that come from elsewhere

_NOTHING = torch.zeros(2, dtype=torch.float64, device="cpu")  # as many bytes as any element has


def empty_like(param: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the host with ``param``'s shape and dtype and no memory: all its elements are one."""
    nothing = _NOTHING.view(param.dtype)[0].expand(param.shape)
    return nothing.data  # views of one tensor count their versions together


def is_empty(param: torch.Tensor) -> bool:
    """Return whether ``param`` is one that :func:`empty_like` has made."""
    return param.device.type == "cpu" and param.untyped_storage().data_ptr() == _NOTHING.data_ptr()
