"""The types of the configuration groups: an unknown key or a value of the wrong type is refused while Hydra composes.

Every field is missing here and gets its value in the YAML file of its group, so each default stands in one place. A
setting that has no effect in an option of a group is no field there: ``zero.slots`` exists for ``zero=stage3`` only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Union

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class Target:
    """Anything that Hydra builds."""

    _target_: str = MISSING


@dataclass
class ZeroNone(Target):
    """``zero=none``."""

    stage: str = MISSING
    units: Any = MISSING


@dataclass
class ZeroSharded(ZeroNone):
    """``zero=stage1`` and ``zero=stage2``."""

    accumulate: str | None = MISSING


@dataclass
class ZeroStage3(ZeroSharded):
    """``zero=stage3``."""

    slots: int | None = MISSING
    poison: bool = MISSING


@dataclass
class PipelineNone(Target):
    """``pipeline=none``."""

    schedule: str = MISSING


@dataclass
class PipelineSchema(PipelineNone):
    """``pipeline=gpipe``, ``1f1b``, ``zero_bubble`` and ``zbv``."""

    stages: int = MISSING
    micro_batches: int | None = MISSING
    blocks: Any = MISSING
    boundaries: list[int] | None = MISSING
    balance: Any = MISSING
    split: Any = MISSING


@dataclass
class PipelineInterleaved(PipelineSchema):
    """``pipeline=interleaved``."""

    stages_per_rank: int | None = MISSING


@dataclass
class ActivationNone(Target):
    """``activation=none``."""

    variant: str = MISSING


@dataclass
class ActivationFull(ActivationNone):
    """``activation=full``."""

    blocks: Any = MISSING


@dataclass
class ActivationEveryN(ActivationFull):
    """``activation=every_n``."""

    n: int = MISSING


@dataclass
class ActivationSelective(ActivationFull):
    """``activation=selective``."""

    operators: list[str] = MISSING


@dataclass
class ActivationOffload(ActivationFull):
    """``activation=offload``."""

    threshold: int = MISSING
    in_flight: int = MISSING


@dataclass
class ActivationBudget(ActivationOffload):
    """``activation=budget``."""

    budget: int | None = MISSING


@dataclass
class ActivationPartition(ActivationFull):
    """``activation=partition``."""

    ranks: int | None = MISSING


@dataclass
class LayersPlain(Target):
    """``layers=plain``."""

    variant: str = MISSING


@dataclass
class LayersFused(LayersPlain):
    """``layers=fused``."""

    replace: Any = MISSING


@dataclass
class OffloadNone(Target):
    """``offload=none``."""

    where: str = MISSING


@dataclass
class OffloadCpu(OffloadNone):
    """``offload=cpu``."""

    params: bool = MISSING
    ratio: float = MISSING
    limit: int | None = MISSING


@dataclass
class OffloadDisk(OffloadCpu):
    """``offload=disk``."""

    folder: str = MISSING
    chunk: int | None = MISSING


@dataclass
class PrecisionTrue64(Target):
    """``precision=64-true``: one dtype everywhere, so nothing to choose."""


@dataclass
class PrecisionTrue32(Target):
    """``precision=32-true``: the optimizer's moments may be in another form, and the step may come early."""

    moments: str = MISSING
    step: str = MISSING


@dataclass
class PrecisionTrue16(Target):
    """``precision=bf16-true`` and ``precision=16-true``: only the sum over ranks may be in another dtype."""

    reduce_dtype: str = MISSING


@dataclass
class PrecisionMixed(PrecisionTrue16):
    """``precision=16-mixed``."""

    gradient_dtype: str = MISSING
    lower: str = MISSING
    moments: str = MISSING


@dataclass
class PrecisionMixedBf16(PrecisionMixed):
    """``precision=bf16-mixed``."""

    master: str = MISSING
    step: str = MISSING


@dataclass
class CheckpointSchema(Target):
    """``checkpoint=full`` and ``checkpoint=sharded``."""

    format: str = MISSING


@dataclass
class CommSchema(Target):
    """``comm=overlap`` and ``comm=plain``."""

    overlap: bool = MISSING


@dataclass
class Factory(Target):
    """Something that the model builds later."""

    _partial_: bool = MISSING


@dataclass
class OptimizerSchema(Factory):
    """What every optimizer has."""

    _convert_: str = MISSING
    lr: float = MISSING
    weight_decay: float = MISSING


@dataclass
class FusedSchema(OptimizerSchema):
    """What an optimizer has that steps by fused kernels or not."""

    fused: str | None = MISSING


@dataclass
class AdamSchema(FusedSchema):
    """``optimizer=adamw`` and ``adam``."""

    betas: list[float] = MISSING
    eps: float = MISSING


@dataclass
class LambSchema(OptimizerSchema):
    """``optimizer=lamb``."""

    betas: list[float] = MISSING
    eps: float = MISSING


@dataclass
class MuonSchema(LambSchema):
    """``optimizer=muon``."""

    momentum: float = MISSING
    nesterov: bool = MISSING
    adjust_lr_fn: str = MISSING
    ns_steps: int = MISSING
    ns_dtype: str = MISSING


@dataclass
class SGDSchema(FusedSchema):
    """``optimizer=sgd``."""

    momentum: float = MISSING
    nesterov: bool = MISSING


@dataclass
class LionSchema(FusedSchema):
    """``optimizer=lion``."""

    betas: list[float] = MISSING


@dataclass
class AdagradSchema(FusedSchema):
    """``optimizer=adagrad``."""

    lr_decay: float = MISSING
    eps: float = MISSING
    initial_accumulator_value: float = MISSING


@dataclass
class CosineSchema(Factory):
    """``scheduler=cosine``."""

    warmup_steps: int = MISSING
    final_fraction: float = MISSING


@dataclass
class ConstantSchema(Factory):
    """``scheduler=constant``."""

    factor: float = MISSING


@dataclass
class ModelSchema(Target):
    """``model=gpt``."""

    vocab_size: int = MISSING
    block_size: int = MISSING
    dim: int = MISSING
    layers: int = MISSING
    heads: int = MISSING
    dropout: float = MISSING
    tied: bool = MISSING
    bias: bool = MISSING
    loss: str = MISSING
    optimizer: Any = MISSING
    scheduler: Any = MISSING


@dataclass
class DataSchema(Target):
    """``data=stdlib``."""

    path: str | None = MISSING
    vocab_size: int = MISSING
    block_size: int = MISSING
    batch_size: int = MISSING
    val_fraction: float = MISSING
    cache_dir: str | None = MISSING
    num_workers: int = MISSING


@dataclass
class TrainerSchema(Target):
    """``trainer=cpu`` and ``trainer=gpu``: the arguments of ``Trainer`` that they set; others are added with ``+``."""

    accelerator: str = MISSING
    devices: Any = MISSING
    num_nodes: int = MISSING
    precision: str = MISSING
    max_steps: int = MISSING
    max_epochs: int | None = MISSING
    accumulate_grad_batches: int = MISSING
    gradient_clip_val: float | None = MISSING
    # OmegaConf reads Union, not "int | float", as a choice of types
    val_check_interval: Union[int, float, None] = MISSING  # noqa: UP007
    check_val_every_n_epoch: int | None = MISSING
    limit_val_batches: Union[int, float, None] = MISSING  # noqa: UP007
    log_every_n_steps: int = MISSING
    enable_progress_bar: bool = MISSING
    default_root_dir: str | None = MISSING


SCHEMAS: dict[str, dict[str, type]] = {
    "zero": {"none": ZeroNone, "stage1": ZeroSharded, "stage2": ZeroSharded, "stage3": ZeroStage3},
    "pipeline": {"none": PipelineNone, "schedule": PipelineSchema, "interleaved": PipelineInterleaved},
    "activation": {
        "none": ActivationNone,
        "full": ActivationFull,
        "every_n": ActivationEveryN,
        "selective": ActivationSelective,
        "offload": ActivationOffload,
        "budget": ActivationBudget,
        "partition": ActivationPartition,
    },
    "layers": {"plain": LayersPlain, "fused": LayersFused},
    "offload": {"none": OffloadNone, "cpu": OffloadCpu, "disk": OffloadDisk},
    "precision": {
        "64-true": PrecisionTrue64,
        "32-true": PrecisionTrue32,
        "16-true": PrecisionTrue16,
        "mixed": PrecisionMixed,
        "bf16-mixed": PrecisionMixedBf16,
    },
    "optimizer": {
        "adam": AdamSchema,
        "sgd": SGDSchema,
        "lion": LionSchema,
        "adagrad": AdagradSchema,
        "lamb": LambSchema,
        "muon": MuonSchema,
    },
    "scheduler": {"cosine": CosineSchema, "constant": ConstantSchema},
    "": {
        "checkpoint": CheckpointSchema,
        "comm": CommSchema,
        "model": ModelSchema,
        "data": DataSchema,
        "trainer": TrainerSchema,
    },
}


def store() -> None:
    """Make the schemas known to Hydra, as ``lit_zero/schema/...``."""
    config_store = ConfigStore.instance()
    for group, options in SCHEMAS.items():
        for name, node in options.items():
            path = "lit_zero/schema" + (f"/{group}" if group else "")
            config_store.store(group=path, name=name, node=node, provider="lit_zero")
