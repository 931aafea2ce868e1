"""What the optimizers share: which parameters a kernel steps, the states it needs, and what is left to torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import nn

from lit_zero.core.errors import ConfigError, UnsupportedError, check_choice
from lit_zero.core.forms import Form, Formed
from lit_zero.core.owing import owed_in
from lit_zero.kernels import Segment, Tables, runs_kernel
from lit_zero.kernels.noise import seed_of
from lit_zero.kernels.segments import STEPPED
from lit_zero.kernels.small import DITHERED, PLAIN, ROUNDED, SIGNED, SPLIT, UNSIGNED, Array, SmallSegment, small_step
from lit_zero.optim.direct import Gathered, gather
from lit_zero.optim.loss_scale import as_factor, as_verdict

FUSED = ("auto", "none")
_TORCHS = {True: "auto", False: "none", None: "none"}  # what torch's classes take, in our words
_OTHERS = ("foreach", "capturable", "differentiable")  # other ways to step that torch's classes have


class Flat(torch.optim.Optimizer):
    """Comes before torch's class among the bases of an optimizer, and steps where a kernel can.

    The step reads nothing back from the device. Which way it takes is asked anew in each step, since a checkpoint or a
    strategy may have put other tensors in the groups: a kernel of ours where all parameters lie on a GPU, in fp32, bf16
    or fp16; torch's own fused kernels else.

    Args:
        params: as of torch's class.
        args: as of torch's class.
        fused: ``auto``, or ``none`` for what torch's class does by default; ``True``, ``False`` and ``None``, as torch
            has it, mean the one and the other. With ``auto`` a loss scaler gives the step its scale, and for such an
            optimizer Lightning refuses ``gradient_clip_val`` outside of lit_zero's strategies (as ``ddp`` with
            ``precision="16-mixed"``): take ``none`` there.
        kwargs: as of torch's class.

    Raises:
        ConfigError: for an unknown choice, or a setting of torch's that has no effect beside it.
    """

    plain: ClassVar[type[torch.optim.Optimizer]]  # torch's class
    rule: ClassVar[str]  # of the kernels, by name
    counts: ClassVar[bool] = True  # there is a number of steps among the states
    _fused: str
    _tables: Tables
    _copies: Mapping[nn.Parameter, torch.Tensor] = MappingProxyType({})
    has_copied = False

    def __init__(self, params: Any, *args: Any, fused: str | bool | None = "auto", **kwargs: Any) -> None:
        self._choose(fused, kwargs)
        super().__init__(params, *args, fused=self._fused == "auto" or None, **kwargs)  # type: ignore[call-arg]

    def _choose(self, fused: Any, settings: dict[str, Any]) -> None:
        fused = _TORCHS[fused] if fused is None or isinstance(fused, bool) else fused
        check_choice("optimizer.fused", fused, FUSED)
        if fused == "auto":
            refuse_other_ways(type(self).__name__, settings)
        self._fused, self._tables = fused, Tables()
        self._step_supports_amp_scaling = fused == "auto"  # a loss scaler gives the step its scale and its verdict

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_fused": self._fused}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        vars(self).setdefault("_fused", "auto")
        vars(self).setdefault("_tables", Tables())
        vars(self).setdefault("_step_supports_amp_scaling", self._fused == "auto")

    def take_copies(self, copies: Mapping[nn.Parameter, torch.Tensor]) -> None:
        """See :class:`~lit_zero.core.copying.TakesCopies`."""
        self._copies, self.has_copied = copies, False

    @property
    def may_pay(self) -> bool:
        """See :class:`~lit_zero.core.owing.Pays`."""
        return self._fused == "auto"

    def pays(self, param: torch.Tensor, gradient: torch.dtype) -> bool:
        """See :class:`~lit_zero.core.owing.Pays`: where a kernel of ours steps."""
        return self.may_pay and runs_kernel(param) and param.dtype in STEPPED and gradient in STEPPED

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As of torch's class."""
        if set_to_none:
            owed_in(self.param_groups).forgive()  # else to ask whether there is a gradient would multiply it
        super().zero_grad(set_to_none)

    def step_forms(self, parts: Sequence[Formed], factor: torch.Tensor | None = None) -> bool:
        """See :class:`~lit_zero.core.forms.StepsForms`: in one launch, where kernels run and know the states."""
        if self._fused == "none" or not parts:
            return False
        if not all(runs_kernel(part.grad) and part.grad.dtype in STEPPED for part in parts):
            return False
        groups = {param: group for group in self.param_groups for param in group["params"]}
        segments, numbers = list[SmallSegment](), dict[Any, int]()
        for part in parts:
            keys = self._keys(groups[part.param])
            if set(keys) != set(part.states) or len(keys) > 2 or part.master.kind not in ("plain", "split"):
                return False
            number = numbers.setdefault(self._numbers(groups[part.param], False), len(numbers))
            step = self._count(self.state[part.param], part.grad.device) if self.counts else None
            arrays = tuple(_array(part, key, 0 if self.counts else part.origin.step) for key in keys)
            master = Array(_FORMS[part.master.kind], part.master.values, part.master.partner)
            segments.append(SmallSegment(number, master, part.grad, arrays, step))
        small_step(self.rule, segments, [group.numbers() for group in numbers], self._tables, factor)
        return True

    # ---- what an optimizer says of itself

    def _keys(self, group: dict[str, Any]) -> Sequence[str]:
        """Return the names of the states that have an element for each of a parameter's."""
        raise NotImplementedError

    def _numbers(self, group: dict[str, Any], begins: bool) -> Any:
        """Return the hyper-parameters of a group as the kernel takes them; ``begins``: its states are new."""
        raise NotImplementedError

    def _kernel(self) -> Callable[..., None]:
        """Return the function of ``lit_zero.kernels`` that steps segments."""
        raise NotImplementedError

    def _first_value(self, group: dict[str, Any]) -> float:
        """Return what new states hold."""
        return 0.0

    def _needs_walk(self, group: dict[str, Any]) -> bool:
        """Return whether torch's fused kernels cannot step the group's parameters as its class does."""
        return False

    def _call_torchs(self, group: dict[str, Any], held: Gathered, grad_scale: torch.Tensor | None) -> None:
        """Call torch's fused kernel for a CPU; the step is counted already.

        Args:
            group: whose hyper-parameters are taken.
            held: what is stepped.
            grad_scale: what gradients are divided by, 0-d fp32.
        """
        raise NotImplementedError

    # ---- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient; return what ``closure``, which is called first, has returned."""
        if self._fused == "none":
            return self._plain_step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.has_copied = False
        owed = owed_in(self.param_groups)
        if not owed and self._step_directly():
            return loss
        with owed.lent() as factor:
            held = list(self._held())
            walks = self._walks(held)
            if walks:
                self._walk(held, factor)
        if held and not walks:  # with none held, somebody has stepped with the gradients, and may bring them back
            owed.settle()
            self._leave_to_torch(held)
        return loss

    def _walks(self, held: Sequence[tuple[dict[str, Any], nn.Parameter]]) -> bool:
        """Return whether :meth:`_walk` steps what is held, and not torch; tell torch's class in each group whether its
        fused kernels can.
        """
        for group in self.param_groups:
            if "fused" in self.defaults:  # the groups of a checkpoint may have been of another mind
                group["fused"] = not self._needs_walk(group) and all(map(is_torchs_own, group["params"]))
        own = any(self._needs_walk(group) or _is_mixed(param) for group, param in held)
        own = own and all(_is_flat(param) for _, param in held)
        return bool(held) and (own or all(_is_kernels(param) for _, param in held))

    def _step_directly(self) -> bool:
        """Step by torch's kernels for a CPU, if all parameters lie as those expect and have been stepped before; return
        whether it was done. See [Note: what stands around a kernel].
        """
        found = list[tuple[dict[str, Any], Gathered]]()
        for group in self.param_groups:
            if self._needs_walk(group):
                return False
            gathered = gather(group["params"], self.state, self._keys(group), self.counts)
            if gathered is None or (gathered.params and runs_kernel(gathered.params[0])):
                return False
            found.append((group, gathered))
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None and bool(found_inf):
            return True
        scale = None if grad_scale is None else grad_scale.to("cpu", torch.float32)
        for group, gathered in found:
            if "fused" in self.defaults:
                group["fused"] = True
            if gathered.params:
                gathered.count()
                self._call_torchs(group, gathered, scale)
        return True

    def _held(self) -> Iterator[tuple[dict[str, Any], nn.Parameter]]:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    yield group, param

    def _leave_to_torch(self, held: Sequence[tuple[dict[str, Any], nn.Parameter]]) -> None:
        """Step by torch's fused kernels, or what it has where those cannot."""
        fused = all(group.get("fused") for group, _ in held)
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        # torch's kernels see for themselves, but leave a momentum without values behind if the first step is skipped.
        if found_inf is not None and (found_inf.device.type == "cpu" or not fused) and bool(found_inf):
            return
        for group, param in held:
            if not self._needs_walk(group):  # else how a step begins is torch's affair
                self._prepare(group, param)
        if fused or (grad_scale is None and found_inf is None):
            self._plain_step(None)
            return
        for _, param in held:
            if grad_scale is not None and param.grad is not None:
                param.grad.div_(grad_scale.to(param.device))
        vars(self).update(found_inf=None, grad_scale=None)  # which torch's other ways do not know
        try:
            self._plain_step(None)
        finally:
            vars(self).update(found_inf=found_inf, grad_scale=grad_scale)

    def _plain_step(self, closure: Callable[[], Any] | None) -> Any:
        """Step as torch's class does."""
        step: Any = self.plain.step
        # Hooks run around our own step. torch puts them around the class's the first time it is instantiated.
        return (step.__wrapped__ if getattr(step, "hooked", False) else step)(self, closure)

    def _walk(self, held: Sequence[tuple[dict[str, Any], nn.Parameter]], factor: torch.Tensor | None = None) -> None:
        """Step segments, all of a device together, with their gradients times ``factor``."""
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        numbers: dict[Any, int] = {}
        segments: dict[torch.device, list[Segment]] = {}
        for group, param in held:
            begins = self._begins(group, param)
            if begins and self._needs_walk(group) and found_inf is not None and bool(found_inf):
                return  # skipped, it must not leave states behind that make the next step a later one
            self._prepare(group, param)
            number = numbers.setdefault(self._numbers(group, begins), len(numbers))
            segments.setdefault(param.device, []).append(self._segment(number, group, param))
        for device, each in segments.items():
            scale = as_factor(grad_scale, device)
            if factor is not None:
                scale = factor.to(device) if scale is None else factor.to(device) * scale
            self._kernel()(each, list(numbers), scale, as_verdict(found_inf, device), self._tables)
        self.has_copied = True

    def _begins(self, group: dict[str, Any], param: nn.Parameter) -> bool:
        state = self.state.get(param, {})
        return any(state.get(key) is None for key in self._keys(group))

    def _prepare(self, group: dict[str, Any], param: nn.Parameter) -> None:
        """Make what is missing of a parameter's states, and bring the count of steps to where kernels expect it."""
        keys = self._keys(group)
        if not self.counts and not keys:
            return
        state = self.state[param]
        if self.counts:
            self._count(state, param.device)
        for key in keys:
            value = state.get(key)
            if value is None:
                state[key] = torch.full_like(param, self._first_value(group), memory_format=torch.preserve_format)
            elif not same_order(value, param):
                state[key] = _like(value, param)

    @staticmethod
    def _count(state: dict[str, Any], device: torch.device) -> torch.Tensor:
        """Return the number of steps where and as kernels expect it."""
        count = state.get("step", 0.0)
        if not isinstance(count, torch.Tensor) or count.dtype != torch.float32 or count.device != device:
            state["step"] = count = torch.as_tensor(count, dtype=torch.float32, device=device)
        return count

    def _segment(self, number: int, group: dict[str, Any], param: nn.Parameter) -> Segment:
        assert param.grad is not None
        return Segment(
            number,
            _flattened(param.detach()),
            _flattened(_like(param.grad, param)),
            tuple(_flattened(self.state[param][key]) for key in self._keys(group)),
            self.state[param]["step"] if self.counts else None,
            self._copies.get(param),
        )


_FORMS = {
    "plain": PLAIN,
    "split": SPLIT,
    "rounded": ROUNDED,
    "dithered": DITHERED,
    "signed": SIGNED,
    "unsigned": UNSIGNED,
}


def _array(part: Formed, key: str, step: int | torch.Tensor) -> Array:
    form: Form = part.states[key]
    seed = seed_of(part.origin.stream(key), step, part.origin.first)
    assert isinstance(seed, int), "an optimizer that does not count has no number of steps on the device"
    return Array(_FORMS[form.kind], form.values, form.partner, seed)


def refuse_other_ways(name: str, settings: dict[str, Any]) -> None:
    """Refuse another way to step, beside ``fused="auto"``.

    Raises:
        ConfigError: naming it.
    """
    for key in _OTHERS:
        if settings.get(key):
            raise ConfigError(
                f"optimizer.{key}={settings[key]} of {name} has no effect with optimizer.fused='auto', which steps by "
                f"fused kernels. Remove it, or use optimizer.fused='none'."
            )


def _is_flat(param: nn.Parameter) -> bool:
    """Return whether a parameter and its gradient can be walked through as flat memory."""
    return param.grad is not None and param.grad.layout == torch.strided and is_dense(param)


def _is_mixed(param: nn.Parameter) -> bool:
    """Return whether the gradient has another dtype, which no step of torch's takes."""
    return param.grad is not None and param.grad.dtype != param.dtype


def _is_kernels(param: nn.Parameter) -> bool:
    """Return whether a kernel of ours steps a parameter."""
    grad = param.grad
    known = grad is not None and param.dtype in STEPPED and grad.dtype in STEPPED
    return known and runs_kernel(param) and _is_flat(param)


def is_torchs_own(param: torch.Tensor) -> bool:
    """Return whether torch's fused kernels can step a parameter. Those for a CPU walk through memory as if parameter
    and gradient filled it in one order and in one dtype, and check nothing; those for a GPU refuse what does not.
    """
    grad = param.grad
    if grad is None:
        return True
    if not param.is_floating_point() or grad.layout != torch.strided or grad.dtype != param.dtype:
        return False
    return is_dense(param) and same_order(grad, param)


def is_dense(tensor: torch.Tensor) -> bool:
    """Return whether the elements of a tensor fill its memory without a gap, in whatever order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        if size != 1 and stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def same_order(tensor: torch.Tensor, param: torch.Tensor) -> bool:
    """Return whether the elements of two tensors of one shape lie in the same order."""
    if tensor.layout != torch.strided:
        return True  # it has none
    return (tensor.is_contiguous() and param.is_contiguous()) or tensor.stride() == param.stride()


def _like(tensor: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """Return a tensor with its elements in the order of ``param``'s, if those fill their memory."""
    if same_order(tensor, param) or not is_dense(param):
        return tensor
    return torch.empty_like(param, dtype=tensor.dtype, memory_format=torch.preserve_format).copy_(tensor)


def _flattened(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements of a dense tensor as they lie in memory.

    Raises:
        UnsupportedError: if there are others between them, or none.
    """
    if tensor.layout != torch.strided:
        raise UnsupportedError("A gradient is sparse, and this optimizer steps flat memory. Use sparse=False.")
    if tensor.is_contiguous():
        return tensor.view(-1)
    if not is_dense(tensor):
        raise UnsupportedError(
            f"A parameter of shape {tuple(tensor.shape)} and stride {tensor.stride()} has gaps in its memory, and this "
            "optimizer steps flat memory. Make the parameter contiguous."
        )
    return tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True)).view(-1)
