"""A choice at work on a module: its blocks' forwards are ours until it is removed."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lit_zero.activation.compiling import UNTRACED, unseen, watched, watcher
from lit_zero.activation.host import Host
from lit_zero.activation.operators import overloads
from lit_zero.activation.partition import Parted
from lit_zero.activation.plan import KEEP, OFFLOAD, RECOMPUTE, Choice, Facts, cheapest, every
from lit_zero.activation.policy import Activation
from lit_zero.activation.treatments import Offloaded, Recomputed, Treatment, Watched
from lit_zero.comm.exchange import Exchange
from lit_zero.core import blocks
from lit_zero.core.errors import ConfigError, UnsupportedError


class _Entry:
    """A block's forward, or its compiled call, from the outside. It stands in the module as an attribute of the
    instance, so that hooks, names and classes stay; in a copy of the module it does nothing.

    Args:
        module: the block.
        treatment: what it does when gradients are needed.
        owner: lives as long as the block does.
    """

    def __init__(self, module: nn.Module, treatment: Treatment, owner: Any) -> None:
        # ``block.compile()`` compiles the call, forward included, so that is what must run again.
        self._key = "forward" if module._compiled_call_impl is None else "_compiled_call_impl"
        self.module, self.treatment, self.owner = module, treatment, owner
        self._before = vars(module).get(self._key)
        self._run: Callable[..., Any] = getattr(module, self._key)
        self._placed = _placed(self, self._before)
        vars(module)[self._key] = self._placed

    @unseen
    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block."""
        if not torch.is_grad_enabled():  # an evaluation, or the first pass of a reentrant checkpoint
            return self._run(*args, **kwargs)
        return self._treat(watcher(), args, kwargs)

    @torch.compiler.disable(reason=UNTRACED)
    def _treat(self, by: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.treatment(partial(watched, by, self._run), args, kwargs)

    def remove(self) -> None:
        """Give the module its own forward back; where something else stands on top by now, do nothing from now on."""
        self.treatment = Treatment(self.treatment.title, self.module)
        if vars(self.module).get(self._key) is self._placed:
            del vars(self.module)[self._key]
            if self._before is not None:
                vars(self.module)[self._key] = self._before


def _placed(entry: _Entry, before: Callable[..., Any] | None) -> types.MethodType:
    """Return what stands in the module: a method, since a copy of the module gets one of its own."""

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if module is entry.module:
            return entry.run(args, kwargs)
        return type(module).forward(module, *args, **kwargs) if before is None else before(*args, **kwargs)

    hidden: Any = unseen(forward)
    hidden.entry = entry
    return types.MethodType(hidden, entry.module)


class Applied:
    """What a choice does to a module, until it is removed.

    Args:
        module: the whole module.
        policy: the user's choice.
        units: what ``blocks="auto"`` means.
        device: where the module computes.
        group: ranks that hold the same activations, for ``partition``.

    Attributes:
        choices: what every block does, by name; with ``budget``, from the end of the first step's forward on.
        host: host memory, if anything may be moved there.

    Raises:
        ConfigError: if the choice does not fit the module.
    """

    def __init__(
        self,
        module: nn.Module,
        policy: Activation,
        units: blocks.Choice,
        device: torch.device,
        group: Exchange | None = None,
    ) -> None:
        self.module, self.policy, self._device = module, policy, device
        self.choices: dict[str, Choice] = {}
        self.host: Host | None = None
        names = check_fit(module, policy, units)
        if policy.variant in ("offload", "budget"):
            self.host = Host(device, policy.setting("threshold"), policy.setting("in_flight"))
        self._makes: dict[Choice, Callable[[str, nn.Module], Treatment]] = {
            KEEP: Treatment,
            RECOMPUTE: self._recomputed(group),
        }
        if self.host is not None:
            self._makes[OFFLOAD] = partial(Offloaded, host=self.host)
        first = partial(Watched, host=self.host) if policy.variant == "budget" else None  # type: ignore[arg-type]
        if first is None:
            self.choices = dict(zip(names, _choices(policy, len(names)), strict=True))
        self._entries: dict[str, _Entry] = {}
        for name in names:
            block = module.get_submodule(name)
            make = first or self._makes[self.choices[name]]
            self._entries[name] = _Entry(block, make(name, block), self)

    def _recomputed(self, group: Exchange | None) -> Callable[[str, nn.Module], Treatment]:
        if self.policy.variant == "partition":
            assert group is not None
            return partial(Recomputed, keep=partial(Parted, group))
        if self.policy.variant == "selective":
            return partial(Recomputed, operators=overloads(self.policy.setting("operators")))
        return Recomputed

    def step_is_over(self, peers: Exchange, micro_batches: int = 1, alive: int = 1) -> None:
        """With ``budget``: choose by what the first step has shown; call it before the first weight is changed.

        Args:
            peers: ranks that run the same blocks, and must choose alike.
            micro_batches: that the step has run.
            alive: how many of them were between their forward and their backward at a time, at most.

        Raises:
            ConfigError: if nothing fits the budget.
        """
        if self.policy.variant != "budget" or self.choices:
            return
        assert self.host is not None
        seen = {n: e.treatment for n, e in self._entries.items() if isinstance(e.treatment, Watched)}
        facts = [each.found.shared(micro_batches) for each in seen.values()]
        agreed, link = self._agree(peers, facts, self.host.link() if self.host.frees else 0)
        ran = [number for number, each in enumerate(agreed) if each.forward]
        if not ran:  # on no rank: this backward goes through something else
            return
        budget = self.policy.setting("budget")
        flight = 2 * self.policy.setting("in_flight")
        chosen = cheapest([agreed[n] for n in ran], budget, alive, link, self.host.overlaps, flight)
        found = dict(zip(ran, chosen, strict=True))
        for number, (name, first) in enumerate(seen.items()):
            choice = found.get(number, RECOMPUTE)  # what has not run yet must not add to the bytes
            self.choices[name] = choice
            self._entries[name].treatment = self._makes[choice](name, first.module)

    def _agree(self, peers: Exchange, facts: Sequence[Facts], link: int) -> tuple[list[Facts], int]:
        """Return the largest of what the ranks have found, and the slowest link: all must choose alike."""
        rows = [[f.kept, f.inputs, f.small, f.moved, f.forward] for f in facts] + [[-link, 0, 0, 0, 0]]
        table = peers.maximum(torch.tensor(rows, dtype=torch.int64, device=self._device)).tolist()
        return [Facts(*row) for row in table[:-1]], -table[-1][0]

    def remove(self) -> None:
        """Leave the module as it was."""
        for entry in reversed(self._entries.values()):
            entry.remove()


def release(module: nn.Module) -> None:
    """Take off a module what an earlier run has left on it."""
    for each in module.modules():
        for value in list(vars(each).values()):
            entry = getattr(getattr(value, "__func__", None), "entry", None)
            if isinstance(entry, _Entry):
                entry.remove()


def check_fit(module: nn.Module, policy: Activation, units: blocks.Choice) -> list[str]:
    """Return the names of the blocks, in order of registration; the module may be on the meta device.

    Raises:
        ConfigError: if ``policy`` names a module or an operator that does not exist.
        UnsupportedError: if a block hides from ``policy`` what it would have to see.
    """
    if policy.variant == "none":
        return []
    auto = policy.blocks == "auto"
    chosen = blocks.choose_modules(
        module, units if auto else policy.blocks, "zero.units" if auto and units != "auto" else "activation.blocks"
    )
    names = [name for name, _ in module.named_modules() if name in chosen]
    if not names:
        raise ConfigError(
            f"activation.variant={policy.variant!r} has no effect: {type(module).__name__} repeats no class of module "
            "in a ModuleList or Sequential, so it is not known what its blocks are. Name them with activation.blocks."
        )
    if policy.variant == "selective":
        overloads(policy.setting("operators"))
        for name in names:
            _refuse_compiled(name, module.get_submodule(name))
    return names


def _refuse_compiled(name: str, block: nn.Module) -> None:
    compiled = block._compiled_call_impl is not None or isinstance(block, torch._dynamo.OptimizedModule)
    if compiled or hasattr(vars(block).get("forward"), "_torchdynamo_orig_callable"):
        raise UnsupportedError(
            f"Block {name!r} is compiled, which makes one operator of it: activation='selective' cannot keep the "
            "results of some inside. Use activation='full', which computes the compiled block again, or do not "
            "compile."
        )


def _choices(policy: Activation, count: int) -> list[Choice]:
    if policy.variant == "every_n":
        return every(policy.setting("n"), count)
    return [OFFLOAD if policy.variant == "offload" else RECOMPUTE] * count
