"""What is wrong with a command line is said in one line: the key, what was expected, and the nearest valid name."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from lit_zero.config import validate
from lit_zero.core.errors import ConfigError
from tests.config.support import EXAMPLES, composed, refusal, run

STAGES = "Choose one of: none, stage1, stage2, stage3."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["zero=stge3"], f"zero=stge3 is not known. Did you mean 'stage3'? {STAGES}"),
        (["zero=3"], f"zero=3 is not known. Did you mean 'stage3'? {STAGES}"),
        (["-m", "zero=stage1,stge3"], f"zero=stge3 is not known. Did you mean 'stage3'? {STAGES}"),
        (
            ["zro=stage3"],
            "zro=stage3: there is no group or key 'zro'. Did you mean 'zero'? Choose one of: activation, callbacks, ",
        ),
        (
            ["zero.stgae=stage1"],
            "zero.stgae=stage1: 'zero' has no key 'stgae' here. Did you mean 'stage'? Choose one of: stage, units",
        ),
        (
            ["optimizer._target_=torch.optim.AdamW"],
            "optimizer.fused=auto is a word of lit_zero.optim's classes, and optimizer._target_=torch.optim.AdamW "
            "would take any word for True. Use optimizer.fused=null, and for fused kernels strategy.fused=auto.",
        ),
        (["zero.stage=two"], f"zero.stage='two' is not known. {STAGES}"),
        (["zero.slots=3"], "zero.slots=3: 'zero' has no key 'slots' here. It exists with zero=stage3."),
        (
            ["-m", "zero=stage1,stage3", "zero.slots=3"],
            "zero.slots=3: 'zero' has no key 'slots' here. It exists with zero=stage3.",
        ),
        (["zero=stage3", "zero.slots=0"], "zero.slots=0 is not valid: expected an integer of at least 1."),
        (["zero=stage3", "zero.slots=many"], "zero.slots=many is not valid: expected a whole number or null."),
        (["zero=stage3", "zero.slots=3", "zero.stage=stage1"], "zero.slots=3 has no effect with zero.stage='stage1'"),
        (["+zero.slot=3"], "zero: Zero.__init__() got an unexpected keyword argument 'slot'"),
        (
            ["precision.lower=all"],
            "precision.lower=all: 'precision' has no key 'lower' here. It exists with precision=16-mixed and",
        ),
        (["precision=bf16-mixed", "precision.lower=some"], "precision.lower='some' is not known."),
        (
            ["precision=bf16-mixed", "precision.moments=int9"],
            "precision.moments='int9' is not known. Did you mean 'int8'? Choose one of: float32, bfloat16, int8.",
        ),
        (
            ["precision=32-true", "precision.master=split"],
            "precision.master=split: 'precision' has no key 'master' here. It exists with precision=bf16-mixed.",
        ),
        (
            ["precision=bf16-mixed", "precision.step=backward"],
            "trainer.gradient_clip_val=1.0 does not go with precision.step=backward: the norm of all gradients",
        ),
        (
            [
                "precision=32-true",
                "precision.step=backward",
                "trainer.gradient_clip_val=null",
                "trainer.accumulate_grad_batches=4",
            ],
            "trainer.accumulate_grad_batches=4 does not go with precision.step=backward: gradients of several",
        ),
        (
            ["precision=bf16-mixed", "precision.master=split", "offload=cpu"],
            "precision.master=split does not go with offload.where='cpu': small forms lie on the device",
        ),
        (
            ["trainer.precision=bf16-mixed"],
            "trainer.precision=bf16-mixed does not fit the settings of the precision group (moments, step)",
        ),
        (
            ["precision=16-mixed"],
            "precision=16-mixed needs a GPU: on trainer.accelerator=cpu, Lightning would silently compute in bf16",
        ),
        (["offload=dsk"], "offload=dsk is not known. Did you mean 'disk'? Choose one of: cpu, disk, none."),
        (
            ["offload.ratio=0.5"],
            "offload.ratio=0.5: 'offload' has no key 'ratio' here. It exists with offload=cpu and offload=disk.",
        ),
        (["offload=cpu", "offload.folder=x"], "offload.folder=x: 'offload' has no key 'folder' here. It exists with"),
        (["offload=cpu", "offload.ratio=2"], "offload.ratio=2.0 is not valid: expected a number above 0 and at most 1"),
        (["offload=cpu", "offload.limit=1GB"], "offload.limit=1GB is not valid: expected a whole number or null."),
        (["offload=disk", "offload.folder=s3://bucket"], "offload.folder=s3://bucket is an address, but lit_zero"),
        (
            ["pipeline=1f1c"],
            "pipeline=1f1c is not known. Did you mean '1f1b'? Choose one of: 1f1b, gpipe, interleaved, none, zbv, zer",
        ),
        (
            ["pipeline.stages=4"],
            "pipeline.stages=4: 'pipeline' has no key 'stages' here. It exists with pipeline=1f1b and pipeline=gpipe ",
        ),
        (
            ["pipeline=1f1b", "pipeline.stages_per_rank=2"],
            "pipeline.stages_per_rank=2: 'pipeline' has no key 'stages_per_rank' here. It exists with pipeline=interl",
        ),
        (
            ["pipeline=1f1b", "pipeline.stage=4"],
            "pipeline.stage=4: 'pipeline' has no key 'stage' here. Did you mean 'stages'?",
        ),
        (["pipeline=1f1b", "pipeline.stages=two"], "pipeline.stages=two is not valid: expected a whole number."),
        (
            ["pipeline=1f1b", "pipeline.boundaries=[a]"],
            "pipeline.boundaries=['a'] is not valid: expected a list, each item a whole number.",
        ),
        (
            ["pipeline=1f1b", "pipeline.schedule=1f1c"],
            "pipeline.schedule='1f1c' is not known. Did you mean '1f1b'? Choose one of: none, gpipe, 1f1b, ",
        ),
        (["comm.overlap=maybe"], "comm.overlap=maybe is not valid: expected true or false."),
        (
            ["checkpoint.format=fll"],
            "checkpoint.format='fll' is not known. Did you mean 'full'? Choose one of: full, sharded.",
        ),
        (["optimizer.lr=abc"], "optimizer.lr=abc is not valid: expected a number."),
        (["optimizer.lr=-1"], "optimizer.lr=-1.0 is not valid: expected a number of at least 0."),
        (["-m", "optimizer.lr=1e-3,abc"], "optimizer.lr=abc is not valid: expected a number."),
        (["optimizer.lr=null"], "optimizer.lr=null is not valid: expected a number."),
        (["optimizer.betas=[a,b]"], "optimizer.betas=['a', 'b'] is not valid: expected a list, each item a number."),
        (
            ["optimizer.momentum=0.9"],
            "optimizer.momentum=0.9: 'optimizer' has no key 'momentum' here. It exists with optimizer=muon and ",
        ),
        (["optimizer.lr"], "'optimizer.lr' cannot be read as key=value: missing EQUAL"),
        (
            ["trainer.devices=two"],
            "trainer.devices='two' is not valid: expected a whole number of at least 1, a list of devices, or 'auto'.",
        ),
        (["trainer.devices=0"], "trainer.devices=0 is not valid: expected a whole number of at least 1"),
        (["trainer.devices=100000"], "trainer.devices=100000 is more than this machine can run: expected at most "),
        (["trainer.max_steps=1.5"], "trainer.max_steps=1.5 is not valid: expected a whole number."),
        (
            ["trainer.fast_dev_run=true"],
            "trainer.fast_dev_run=true: 'trainer' has no key 'fast_dev_run' here. lightning.pytorch.Trainer takes it: "
            "add it with +trainer.fast_dev_run=true.",
        ),
        (
            ["trainer.limit_train_batch=3"],
            "trainer.limit_train_batch=3: 'trainer' has no key 'limit_train_batch' here. Did you mean 'limit_train_",
        ),
        (["data.path=nowhere.txt"], "data.path=nowhere.txt does not exist: expected a text file or a folder"),
        (["ckpt_path=nowhere.ckpt"], "ckpt_path=nowhere.ckpt does not exist: expected a checkpoint"),
        (["data.batch_size=0"], "data.batch_size=0 is not valid: expected a number of at least 1."),
        (
            ["model.block_size=64"],
            "data.block_size=128 does not fit model.block_size=64: expected sequences of at most 64 tokens.",
        ),
        (
            ["model.vocab_size=7"],
            "data.vocab_size=1024 does not fit model.vocab_size=7: expected at most 7 different tokens.",
        ),
        (["model.heads=3"], "model.dim=128 cannot be split over model.heads=3: expected a multiple of 3."),
        (["seed=abc"], "seed='abc' is not valid: expected a whole number from 0 to 4294967295."),
        (
            ["experiment=gpt_30"],
            "experiment=gpt_30 is not known. Did you mean 'gpt_30m'? Choose one of: activations, gpt_30m, offload, p",
        ),
        (["foo/bar=baz"], "foo/bar=baz: there is no config group 'foo/bar'."),
        (["hydra.rn.dir=here"], "Could not override 'hydra.rn.dir'."),
    ],
)
def test_refusal_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    said = refusal(monkeypatch, *arguments)
    assert said is not None, "it was not refused"
    assert said.startswith(message)
    assert "\n" not in said


@pytest.mark.parametrize(
    ("argument", "plugin"),
    [
        ("hydra/sweeper=optuna", "hydra-optuna-sweeper"),
        ("hydra/launcher=joblib", "hydra-joblib-launcher"),
        ("hydra/launcher=submitit_local", "hydra-submitit-launcher"),
        ("hparams_search=optuna", "hydra-optuna-sweeper"),
    ],
)
def test_plugin_is_missing(monkeypatch: pytest.MonkeyPatch, argument: str, plugin: str) -> None:
    Plugins.instance()  # which puts there what is installed
    monkeypatch.setattr(ConfigStore.instance(), "repo", without_plugins(ConfigStore.instance().repo))
    said = refusal(monkeypatch, "-m", argument)
    option = "hydra/sweeper=optuna" if argument.startswith("hparams") else argument
    assert said == (
        f"{option} needs the package {plugin}, which is not installed. Install it with 'pip install lit_zero[sweep]'."
    )


def without_plugins(repo: dict[str, Any]) -> dict[str, Any]:
    """Hydra's store of configurations, without those that plugins have put there."""
    hydra = dict(repo["hydra"])
    for group in ("sweeper", "launcher"):
        hydra[group] = {name: node for name, node in hydra[group].items() if name == "basic.yaml"}
    return {**repo, "hydra": hydra}


def test_refusal_reaches_the_terminal_as_one_line_and_nothing_starts(tmp_path: Path) -> None:
    done = run(EXAMPLES / "train.py", "zero=stge3", cwd=tmp_path)
    assert done.code == 1
    assert done.output == f"zero=stge3 is not known. Did you mean 'stage3'? {STAGES}\n"
    assert list(tmp_path.iterdir()) == []


def test_right_command_line_starts_the_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        refusal(monkeypatch, "zero=stage3", "zero.slots=3", "precision=bf16-mixed", "+trainer.fast_dev_run=true")
        is None
    )


def test_more_gpus_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    validate(composed("trainer=gpu", "trainer.devices=2"))
    validate(composed("trainer=gpu", "trainer.devices=auto"))
    validate(composed("trainer=gpu", "precision=16-mixed"))
    with pytest.raises(ConfigError, match="trainer.devices=3 is more than this machine has: expected at most 2 GPUs."):
        validate(composed("trainer=gpu", "trainer.devices=3"))
    with pytest.raises(ConfigError, match="trainer.devices=3 is more than"):
        validate(composed("trainer=gpu", "trainer.devices=[0,1,2]"))


def test_no_gpu_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="torch finds no GPU on this machine. Use trainer=cpu."):
        validate(composed("trainer=gpu", "trainer.accelerator=cuda"))


def test_tensorboard_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="logger=tensorboard needs the package tensorboard.*or use logger=csv"):
        validate(composed())
    validate(composed("logger=csv"))


def test_reference_to_a_key_that_does_not_exist() -> None:
    cfg = composed()
    OmegaConf.set_struct(cfg, False)
    del cfg["data"]
    with pytest.raises(ConfigError, match="model.vocab_size: Interpolation key 'data.vocab_size' not found"):
        validate(cfg)


def test_value_that_only_the_job_knows_is_not_refused() -> None:
    validate(composed("data.path='${hydra:runtime.cwd}/text'", "zero.stage='${hydra:job.name}'"))


def test_groups_of_other_classes_are_left_alone() -> None:
    cfg = composed()
    OmegaConf.set_struct(cfg, False)
    cfg.data = {"_target_": "theirs.Data", "path": "a name in some catalogue", "batch_size": 0}
    cfg.model = {"_target_": "theirs.Model", "dim": 3, "heads": 2}
    validate(cfg)


def test_validate_takes_any_part_of_the_groups() -> None:
    cfg = composed()
    OmegaConf.set_struct(cfg, False)
    for key in ("trainer", "model", "data", "logger", "zero", "precision", "optimizer"):
        del cfg[key]
        validate(cfg)
