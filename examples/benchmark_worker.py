"""One rank of one turn of the benchmark: builds a contender, trains it, and writes down what it measured.

Started by ``benchmark.py``; all contenders train the same ``GPT`` with ``AdamW(fused=True)`` on the same synthetic
tokens.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpt import GPT, Block
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

Step = Callable[[Tensor, Tensor], Tensor]  # trains on tokens and targets [B, T] and returns this rank's loss


@dataclass(frozen=True)
class Turn:
    """What one turn does; travels from ``benchmark.py`` to the worker as JSON.

    Attributes:
        contender: a key of ``CONTENDERS``.
        ranks: number of processes.
        model: arguments of ``GPT``.
        batch_size: sequences per rank and step.
        warmup: steps before the measured ones.
        steps: measured steps.
        device: ``cpu`` or ``cuda``.
        memory: measure peak memory instead of time; on CUDA both come from one run.
    """

    contender: str
    ranks: int
    model: dict[str, int]
    batch_size: int
    warmup: int
    steps: int
    device: str
    memory: bool


# ---- contenders: each takes a model on its device and returns how to train it for one step


def adamw(parameters: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def make_floor(model: nn.Module, turn: Turn) -> Step:
    """The ranks train side by side and never exchange anything: what the computation alone costs."""
    return _plain_step(model, adamw(model.parameters()))


def make_ddp(model: nn.Module, turn: Turn, bucket_view: bool) -> Step:
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=bucket_view)
    return _plain_step(wrapped, adamw(wrapped.parameters()))


def make_zero_redundancy(model: nn.Module, turn: Turn) -> Step:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(wrapped.parameters(), torch.optim.AdamW, lr=1e-3, fused=True)
    return _plain_step(wrapped, optimizer)


def make_fsdp2(model: nn.Module, turn: Turn, reshard: bool) -> Step:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(turn.device, (turn.ranks,))
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    return _plain_step(model, adamw(model.parameters()))


def make_fsdp1(model: nn.Module, turn: Turn, strategy: str) -> Step:
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    wrapped = FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        sharding_strategy=ShardingStrategy[strategy],
        device_id=_device(turn),
        use_orig_params=True,
    )
    return _plain_step(wrapped, adamw(wrapped.parameters()))


def make_deepspeed(model: nn.Module, turn: Turn, stage: int, **more: Any) -> Step:
    import deepspeed

    bucket = max(sum(p.numel() for p in block.parameters()) for block in model.blocks)  # type: ignore[union-attr]
    config = {
        "train_micro_batch_size_per_gpu": turn.batch_size,
        "gradient_clipping": 0.0,  # its default is 1.0; no other contender clips
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
            "stage3_max_live_parameters": 2 * bucket,
            "stage3_param_persistence_threshold": 0,
            **more,
        },
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw(model.parameters()), config=config)

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        loss = engine(tokens, targets)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


def make_lit_zero(model: nn.Module, turn: Turn, stage: str, slots: int | None = None, **more: Any) -> Step:
    from lit_zero.comm.open import open_exchange
    from lit_zero.comm.policy import Comm
    from lit_zero.zero.engine import Engine
    from lit_zero.zero.policy import Zero

    device = _device(turn)
    engine = Engine(
        model,
        [adamw(model.parameters())],
        zero=Zero(stage=stage, slots=slots),
        exchange=open_exchange(Comm(), device),
        device=device,
        **more,
    )

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        loss = model(tokens, targets)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


CONTENDERS: dict[str, Callable[[nn.Module, Turn], Step]] = {
    "floor": make_floor,
    "ddp": partial(make_ddp, bucket_view=False),
    "ddp-bucket-view": partial(make_ddp, bucket_view=True),
    "zero-redundancy": make_zero_redundancy,
    "fsdp2-keep": partial(make_fsdp2, reshard=False),
    "fsdp2-reshard": partial(make_fsdp2, reshard=True),
    "fsdp1-grad-op": partial(make_fsdp1, strategy="SHARD_GRAD_OP"),
    "fsdp1-full": partial(make_fsdp1, strategy="FULL_SHARD"),
    "deepspeed1": partial(make_deepspeed, stage=1),
    "deepspeed2": partial(make_deepspeed, stage=2),
    "deepspeed3": partial(make_deepspeed, stage=3),
    "lit-zero-none": partial(make_lit_zero, stage="none"),
    "lit-zero-stage1": partial(make_lit_zero, stage="stage1"),
    "lit-zero-stage2": partial(make_lit_zero, stage="stage2"),
    "lit-zero-stage3": partial(make_lit_zero, stage="stage3"),
    "lit-zero-stage3-one-slot": partial(make_lit_zero, stage="stage3", slots=1),
}


def _plain_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        loss = model(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


# ---- memory


class TensorMemory(TorchDispatchMode):
    """Counts the bytes of all tensor memory that is alive, after every operation of every Python thread.

    [Note: how peak tensor memory is measured on CPU]
    The storage of each operation's results is remembered by weak reference until it is freed, and the sizes of all
    live storages are added up after each operation, so memory that is resized in place (as FSDP does) counts as what
    it is at that time. Made before the model is built, so everything is seen except what a backend allocates for
    itself without a tensor operation (gloo's send buffers). It slows training several times over and therefore never
    runs together with the clock.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, Any] = {}
        self._lock = threading.RLock()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # a wrapper: it does its work by operations on plain tensors, which come here
        result = func(*args, **(kwargs or {}))
        with self._lock:
            self._remember(result)
            self.peak = max(self.peak, self.living())
        return result

    def follow(self, tensors: list[Tensor]) -> None:
        """Count tensors that are there already."""
        for tensor in tensors:
            self._remember(tensor.detach())

    def living(self) -> int:
        """Return the bytes that are alive now."""
        # Over a copy: reading a size can free a storage, whose callback changes the dictionary.
        alive = [reference() for reference in list(self._live.values())]
        return sum(storage.nbytes() for storage in alive if storage is not None)

    def _remember(self, result: Any) -> None:
        if isinstance(result, Tensor):
            if result.device.type == "meta" or type(result) not in (Tensor, nn.Parameter):
                return  # without memory: a shape, a fake, or a wrapper of tensors that have come here themselves
            storage = result.untyped_storage()
            key = storage._cdata
            if key not in self._live or self._live[key]() is None:
                self._live[key] = weakref.ref(storage, partial(self._forget, key))
        elif isinstance(result, (list, tuple)):
            for item in result:
                self._remember(item)

    def _forget(self, key: int, reference: Any) -> None:
        with self._lock:
            if self._live.get(key) is reference:
                del self._live[key]

    def start(self) -> None:
        """Count from here on, in this thread and in every Python thread that is started later."""
        self.__enter__()
        run = threading.Thread.run
        memory = self

        def counted_run(thread: threading.Thread) -> None:
            with memory:
                run(thread)

        threading.Thread.run = counted_run  # type: ignore[method-assign, assignment]


# ---- the worker


def _device(turn: Turn) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if turn.device == "cuda" else torch.device("cpu")


def train(turn: Turn, rank: int) -> dict[str, Any]:
    """Train one rank; return ``seconds`` of measured steps, ``losses`` of all steps and ``peak_bytes`` (or None)."""
    device = _device(turn)
    meter = TensorMemory() if turn.memory and device.type == "cpu" else None
    if meter is not None:
        meter.start()
    torch.manual_seed(0)  # the same initial weights on every rank
    with torch.device(device):
        model = GPT(**turn.model)  # type: ignore[arg-type]
    step = CONTENDERS[turn.contender](model, turn)
    generator = torch.Generator().manual_seed(1000 + rank)
    shape = (turn.batch_size, turn.model["block_size"] + 1)
    seconds: list[float] = []
    losses: list[Tensor] = []
    for number in range(turn.warmup + turn.steps):
        # Squared, so that small token numbers are more frequent and there is something to learn.
        numbers = torch.rand(shape, generator=generator).square() * turn.model["vocab_size"]
        window = numbers.long().to(device)
        if number == turn.warmup:
            _synchronize(device)
            dist.barrier()  # the floor has nothing else that makes its ranks run at the same time
            if meter is not None:
                meter.peak = 0
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        losses.append(step(window[:, :-1], window[:, 1:]))
        _synchronize(device)
        if number >= turn.warmup:
            seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else meter.peak if meter is not None else None
    dist.barrier()
    return {"seconds": seconds, "losses": [float(loss) for loss in losses], "peak_bytes": peak}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(arguments: str, rank: int, folder: Path) -> None:
    """Run ``Turn(**arguments)`` as ``rank`` and leave the result in ``folder/<rank>.json``."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    turn = Turn(**json.loads(arguments))
    torch.set_num_threads(1)
    if turn.device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if turn.device == "cuda" else "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=turn.ranks,
        timeout=timedelta(seconds=120),
    )
    result = train(turn, rank)
    if not all(math.isfinite(loss) for loss in result["losses"]):
        raise RuntimeError(f"{turn.contender}: a loss is not finite: {result['losses']}")
    (folder / f"{rank}.json").write_text(json.dumps({"turn": asdict(turn), **result}))
    sys.stdout.flush()
    os._exit(0)  # everything is written down; no backend may spend a turn's time on its own teardown


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
