"""Give memory to modules built on the meta device, one module at a time, so that no rank ever holds the full model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lit_zero.comm.exchange import Exchange
from lit_zero.core.errors import UnsupportedError


def on_meta(model: nn.Module) -> set[str]:
    """Return the names of the parameters that have no memory yet."""
    return {name for name, param in model.named_parameters(remove_duplicate=False) if param.is_meta}


def materialize(
    model: nn.Module, device: torch.device, exchange: Exchange, sink: Callable[[str, torch.Tensor], None]
) -> None:
    """Initialise every module that has parameters or buffers on the meta device.

    Modules are initialised in order of registration by their own ``reset_parameters``, from rank 0's random state on
    every rank. That order is the order of construction in the usual module, so the values equal those of an eager build
    with the same seed, as far as a module's constructor draws what its ``reset_parameters`` draws.

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
    for name, module in model.named_modules():
        own = {key: p for key, p in module._parameters.items() if p is not None and p.is_meta}
        buffers = {key: b for key, b in module._buffers.items() if b is not None and b.is_meta}
        if not own and not buffers:
            continue
        _materialize_module(name, module, own, buffers, device)
        for key in own:
            made = module._parameters[key]
            assert made is not None
            sink(f"{name}.{key}" if name else key, made.data)
            made.data = torch.empty(0, dtype=made.dtype, device=device)  # its place in a flat buffer comes later


def _materialize_module(
    name: str, module: nn.Module, own: dict[str, nn.Parameter], buffers: dict[str, torch.Tensor], device: torch.device
) -> None:
    title = f"Module {name!r} ({type(module).__name__})"
    reset = getattr(module, "reset_parameters", None)
    if not callable(reset):
        raise UnsupportedError(
            f"{title} is on the meta device and has no reset_parameters() to initialise it. Add one, or build the "
            "module on a real device."
        )
    _refuse_lost_values(title, own, reset)
    unset: dict[str, torch.Tensor] = {}
    for key, param in own.items():
        # swap_tensors keeps the object, which optimizers and other modules may hold
        torch.utils.swap_tensors(param, nn.Parameter(_unset_like(param, device), requires_grad=param.requires_grad))
        unset[key] = param
    for key, buffer in buffers.items():
        module._buffers[key] = unset[key] = _unset_like(buffer, device)
    with torch.no_grad():
        reset()
    for key in unset:
        value: torch.Tensor | None = module._parameters.get(key)
        value = module._buffers.get(key) if value is None else value
        if value is not None and value.is_floating_point() and bool(value.isnan().any()):
            raise UnsupportedError(
                f"{title} is on the meta device and its reset_parameters() does not set {key!r}. Set it there, or "
                "build the module on a real device."
            )


def _refuse_lost_values(title: str, own: dict[str, nn.Parameter], reset: Callable[[], None]) -> None:
    """Refuse parameters that something else than the constructor has initialised: there is no memory to remember it."""
    written = {key: param._version for key, param in own.items()}
    with torch.no_grad():
        reset()  # on meta tensors this costs nothing and only counts how often each is written
    for key, param in own.items():
        if written[key] > param._version - written[key]:
            raise UnsupportedError(
                f"{title} is on the meta device, but {key!r} has been initialised again after it was constructed, and "
                "that value would be lost. "
                "Initialise it in the module's reset_parameters(), or build the module on a real device."
            )


def _unset_like(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return memory like ``tensor`` that shows whether it has been set: NaN, or zero where there is no NaN."""
    fill = float("nan") if tensor.is_floating_point() else 0
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
