"""Every option of every group composes, has all its values, and builds what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ValidationError

import lit_zero
from lit_zero import Activation, Checkpoint, Comm, Layers, Offload, Pipeline, Precision, Zero, ZeroStrategy
from lit_zero.activation.policy import VARIANTS
from lit_zero.config.schema import SCHEMAS
from tests.config.support import APPS, composed, run

CONF = Path(lit_zero.__file__).parents[1] / "conf"
OPTIONS = [f"{file.parent.name}={file.stem}" for file in sorted(CONF.glob("*/*.yaml")) if file.parent.name != "hydra"]


def test_all_groups_are_there() -> None:
    groups = {option.split("=")[0] for option in OPTIONS} | {"hydra"}
    assert groups == {
        *(
            "zero",
            "pipeline",
            "activation",
            "layers",
            "offload",
            "precision",
            "checkpoint",
            "comm",
            "optimizer",
            "scheduler",
            "model",
            "data",
            "trainer",
        ),
        *("logger", "callbacks", "experiment", "hparams_search", "hydra", "paths"),
    }


@pytest.mark.parametrize("option", OPTIONS)
def test_option_composes_with_nothing_missing(option: str) -> None:
    cfg = composed(option)
    assert OmegaConf.missing_keys(cfg) == set()
    group = option.split("=")[0]
    if group in SCHEMAS or group in SCHEMAS[""]:
        assert OmegaConf.get_type(cfg, group) is not dict, f"{option} is not bound to a schema"


@pytest.mark.parametrize("stage", ["none", "stage1", "stage2", "stage3"])
def test_zero_builds_the_stage_with_its_own_defaults(stage: str) -> None:
    assert instantiate(composed(f"zero={stage}").zero) == Zero(stage)


@pytest.mark.parametrize("where", ["none", "cpu", "disk"])
def test_offload_builds_the_place_with_its_own_defaults(where: str) -> None:
    expected = Offload(where, folder=".") if where == "disk" else Offload(where)
    assert instantiate(composed(f"offload={where}").offload) == expected


@pytest.mark.parametrize(
    ("name", "stages"), [("gpipe", 2), ("1f1b", 2), ("interleaved", 4), ("zero_bubble", 2), ("zbv", 4)]
)
def test_pipeline_builds_the_schedule_with_its_own_defaults(name: str, stages: int) -> None:
    pipeline = instantiate(composed(f"pipeline={name}").pipeline)
    assert pipeline == Pipeline(name, stages)
    assert pipeline.ranks == 2, "what the default trainer.devices has"
    assert instantiate(composed().pipeline) == Pipeline()


@pytest.mark.parametrize("name", ["none", "full", "every_n", "selective", "offload"])
def test_activation_builds_the_variant_with_its_own_defaults(name: str) -> None:
    built, plain = instantiate(composed(f"activation={name}").activation), Activation(name)
    assert all(built.setting(key) == plain.setting(key) for key in VARIANTS[name])
    assert {key for key in composed(f"activation={name}").activation if not key.startswith("_")} == {
        *("variant", *VARIANTS[name], *(["blocks"] if name != "none" else []))
    }


@pytest.mark.parametrize("variant", ["plain", "fused"])
def test_layers_builds_the_variant_with_its_own_defaults(variant: str) -> None:
    assert instantiate(composed(f"layers={variant}").layers) == Layers(variant)


def test_pipeline_takes_lists_and_a_function() -> None:
    cfg = composed(
        "pipeline=1f1b",
        "pipeline.stages=3",
        "pipeline.boundaries=[1,2]",
        "pipeline.blocks=[gpt.blocks]",
        "pipeline.split={_target_: torch.tensor_split, _partial_: true}",
    )
    pipeline = instantiate(cfg.strategy).pipeline
    assert (pipeline.boundaries, pipeline.blocks) == ((1, 2), ("gpt.blocks",))
    assert [len(part) for part in pipeline.split(torch.zeros(5), 2)] == [3, 2]
    by_cost = instantiate(composed("pipeline=1f1b", "pipeline.balance=[1,2.5,1]").pipeline)
    assert by_cost.balance == (1, 2.5, 1)


@pytest.mark.parametrize(
    ("mode", "keys"),
    [
        ("64-true", set()),
        ("32-true", {"moments", "step"}),
        ("bf16-true", {"reduce_dtype"}),
        ("16-true", {"reduce_dtype"}),
        ("bf16-mixed", {"reduce_dtype", "gradient_dtype", "lower", "master", "moments", "step"}),
        ("16-mixed", {"reduce_dtype", "gradient_dtype", "lower", "moments"}),
    ],
)
def test_precision_sets_lightnings_mode_and_only_keys_with_an_effect(mode: str, keys: set[str]) -> None:
    cfg = composed(f"precision={mode}")
    assert cfg.trainer.precision == mode
    assert {key for key in cfg.precision if not key.startswith("_")} == keys
    assert instantiate(cfg.precision) == Precision()


def test_strategy_gets_every_group() -> None:
    cfg = composed(
        "zero=stage3",
        "zero.slots=3",
        "zero.units=[Block]",
        "comm=plain",
        "pipeline=interleaved",
        "pipeline.stages=6",
        "pipeline.stages_per_rank=3",
        "activation=selective",
        "activation.operators=[matmul]",
        "layers=fused",
        "layers.replace=[norms]",
        "offload=cpu",
        "offload.ratio=0.5",
        "checkpoint=sharded",
        "precision=bf16-mixed",
        "precision.lower=all",
    )
    strategy = instantiate(cfg.strategy)
    assert isinstance(strategy, ZeroStrategy)
    assert strategy.zero == Zero("stage3", units=["Block"], slots=3)
    assert strategy.comm == Comm(overlap=False)
    assert strategy.pipeline == Pipeline("interleaved", stages=6, stages_per_rank=3)
    assert strategy.activation == Activation("selective", operators=["matmul"])
    assert strategy.layers.policy == Layers("fused", ["norms"])
    assert strategy.offload == Offload("cpu", ratio=0.5)
    assert strategy.checkpoint_policy == Checkpoint("sharded")
    assert strategy.precision_policy == Precision(lower="all")


@pytest.mark.parametrize("fused", ["auto", "none"])
def test_optimizers_step_by_fused_kernels_unless_told_otherwise(fused: str) -> None:
    assert composed().optimizer.fused == "auto"
    for name in ("AdamW", "Adam", "SGD", "Lion", "Adagrad"):
        cfg = composed(f"optimizer={name.lower()}", f"optimizer.fused={fused}")
        optimizer = instantiate(cfg.optimizer)([torch.nn.Parameter(torch.ones(2))])
        assert type(optimizer) is getattr(lit_zero.optim, name)
        if name != "Lion":
            assert optimizer.param_groups[0]["fused"] is (True if fused == "auto" else None)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lion", "adagrad", "lamb", "muon"])
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_optimizer_and_scheduler_are_built_by_the_model(name: str, schedule: str) -> None:
    cfg = composed(f"optimizer={name}", f"scheduler={schedule}", "optimizer.lr=0.5")
    optimizer = instantiate(cfg.optimizer)([torch.nn.Parameter(torch.ones(2))])
    assert optimizer.param_groups[0]["lr"] == 0.5
    # a checkpoint must open without OmegaConf
    assert all(type(value).__module__ != "omegaconf.listconfig" for value in optimizer.param_groups[0].values())
    arguments = {"total_steps": 100} if schedule == "cosine" else {}
    scheduler = instantiate(cfg.scheduler)(optimizer, **arguments)
    for _ in range(30):
        optimizer.step()
        scheduler.step()
    assert (optimizer.param_groups[0]["lr"] == 0.5) is (schedule == "constant")


def test_model_and_data_are_built() -> None:
    cfg = composed("model.dim=64", "data.block_size=32", "data.vocab_size=256")
    model, data = instantiate(cfg.model), instantiate(cfg.data)
    assert model.hparams["block_size"] == data.block_size == 32
    assert model.hparams["vocab_size"] == data.vocab_size == 256
    assert model.hparams["dim"] == 64


def test_trainer_loggers_and_callbacks_are_built(tmp_path: Path) -> None:
    cfg = composed(
        "trainer.devices=1", "logger=csv", "trainer.enable_progress_bar=false", f"paths.output_dir={tmp_path}"
    )
    callbacks = [instantiate(node) for node in cfg.callbacks.values()]
    loggers = [instantiate(node) for node in cfg.logger.values()]
    trainer = instantiate(cfg.trainer, _partial_=True)(
        callbacks=callbacks, logger=loggers, strategy=instantiate(cfg.strategy)
    )
    assert trainer.max_steps == cfg.trainer.max_steps
    assert all(callback in trainer.callbacks for callback in callbacks)


def test_last_check_is_at_the_last_step() -> None:
    for option in ("trainer=cpu", "trainer=gpu", "experiment=stages", "experiment=gpt_30m", "experiment=pipeline_2x2"):
        trainer = composed(option).trainer
        assert trainer.max_steps % trainer.val_check_interval == 0


def test_experiment_pipeline_is_two_by_two() -> None:
    cfg = composed("experiment=pipeline_2x2")
    assert cfg.trainer.devices == 4
    assert instantiate(cfg.pipeline) == Pipeline("1f1b", stages=2, micro_batches=4)


def test_experiment_stages_is_a_sweep() -> None:
    cfg = composed("experiment=stages", hydra=True)
    assert cfg.hydra.mode.name == "MULTIRUN"
    assert cfg.hydra.sweeper.params.zero == "none,stage1,stage2,stage3"


def test_search_draws_keys_that_exist_and_minimizes_what_the_job_returns() -> None:
    cfg = composed("hparams_search=optuna", hydra=True)
    assert cfg.hydra.mode.name == "MULTIRUN"
    assert cfg.hydra.sweeper._target_.endswith(".OptunaSweeper")
    assert cfg.hydra.sweeper.sampler.seed is None
    assert cfg.optimized_metric == "val_loss"
    for key in cfg.hydra.sweeper.params:
        assert OmegaConf.select(cfg, key) is not None


def test_schemas_refuse_unknown_keys_and_wrong_types() -> None:
    cfg = composed("zero=stage3")
    with pytest.raises(ConfigAttributeError):
        cfg.zero.slot = 3
    with pytest.raises(ValidationError):
        cfg.zero.slots = "three"
    with pytest.raises(ValidationError):
        composed("pipeline=1f1b").pipeline.stages = "three"
    with pytest.raises(ValidationError):
        composed("pipeline=1f1b").pipeline.boundaries = ["a"]
    with pytest.raises(ValidationError):
        cfg.comm.overlap = "maybe"
    with pytest.raises(ValidationError):
        cfg.trainer.max_steps = 1.5


def test_app_that_does_not_import_lit_zero_composes_its_groups(tmp_path: Path) -> None:
    done = run(APPS / "bare.py", cwd=tmp_path)
    assert done.code == 0, done.output
    cfg = json.loads(done.output)
    assert cfg["zero"]["stage"] == "stage3"
    assert cfg["trainer"]["precision"] == "bf16-mixed"
