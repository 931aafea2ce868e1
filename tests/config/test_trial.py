"""What only the classes know that take a setting is known before the job: they are built on trial."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from lit_zero.config import validate
from lit_zero.core.errors import ConfigError
from tests.config.support import EXAMPLES, composed, refusal, run

STAGE3 = ("trainer.devices=1", "zero=stage3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["strategy.nonfinite_loss=skip"],
            "strategy.nonfinite_loss='skip' is not known. Choose one of: error, ignore.",
        ),
        (["strategy.timeout=-1"], "strategy.timeout=-1 is not valid: expected seconds, more than 0, or a timedelta."),
        (["+strategy.tiemout=3"], "strategy: "),
        (["trainer.accelerator=tpux"], "trainer: You selected an invalid accelerator name: `accelerator='tpux'`."),
        (["trainer.limit_val_batches=1.5"], "trainer: You have passed invalid value 1.5 for limit_val_batches, it has"),
        (
            ["trainer.gradient_clip_val=-1"],
            "trainer.gradient_clip_val=-1.0 is not valid: expected a number of at least 0",
        ),
        (["trainer.precision=8-true"], "trainer.precision=8-true has no precision group. Did you mean"),
        (["model.dropout=3"], "model.dropout=3.0 is not a probability: expected 0 <= dropout < 1."),
        (["optimizer.betas=[0.9,2]"], "optimizer: Invalid beta parameter at index 1: 2.0"),
        (["optimizer.eps=-1"], "optimizer: Invalid epsilon value: -1.0"),
        (["optimizer=sgd", "optimizer.momentum=-1"], "optimizer: Invalid momentum value: -1.0"),
        (["+optimizer.amsgrd=true"], "optimizer: "),
        (["optimizer.fused=atuo"], "optimizer.fused='atuo' is not known. Did you mean 'auto'? Choose one of: auto, "),
        (["+optimizer.foreach=true"], "optimizer.foreach=True of AdamW has no effect with optimizer.fused='auto'"),
        (["scheduler=constant", "scheduler.factor=7"], "scheduler: Constant multiplicative factor expected to be"),
        (["scheduler.warmup_steps=-1"], "scheduler.warmup_steps=-1 is not valid: expected a number of at least 0."),
        (["data.vocab_size=100"], "data.vocab_size=100 is not possible: expected 256 (one token per byte) to 65,536."),
        (["data.val_fraction=2"], "data.val_fraction=2.0 is not possible: expected a number between 0 and 1."),
        (["data.num_workers=-1"], "data.num_workers=-1 is not valid: expected a number of at least 0."),
        (["data.path=s3://bucket/text"], "data.path=s3://bucket/text does not exist: expected a text file or a folder"),
        (
            ["zero.units=[Blok]"],
            "zero.units names 'Blok', but no module of that class or name exists. Did you mean 'Block'",
        ),
        (
            ["activation=selective", "activation.operators=[matmull]"],
            "activation.operators names 'matmull', which is no operator of torch. Did you mean 'aten.matmul'?",
        ),
        (
            ["activation=full", "activation.blocks=[Blok]"],
            "activation.blocks names 'Blok', but no module of that class or name exists. Did you mean 'Block'",
        ),
        (
            ["layers=fused", "layers.replace=[rotary]"],
            "layers.variant='fused' has no effect on rotary: LitGPT has none of what is known. Looked for: attention",
        ),
        (["layers=fused", "layers.replace=[norm]"], "layers.replace='norm' is not known. Did you mean 'norms'?"),
        (["model.loss=whole"], "model.loss='whole' is not known. Choose one of: plain, fused."),
        (["activation=budget"], "activation.variant='budget' needs activation.budget: the bytes on each rank that"),
        (["activation=partition"], "activation.variant='partition' shares a block's inputs out over ranks that hold"),
        (["activation=every_n", "activation.n=1"], "activation.n=1 is not valid: expected an integer of at least 2."),
        (
            ["zero=none", "offload=cpu"],
            "offload.where='cpu' moves shards of optimizer state, and with zero.stage='none' there are none: every",
        ),
        (
            ["offload=cpu", "offload.params=true"],
            "offload.params=True has no effect with zero.stage='stage2': every rank keeps all parameters on its device",
        ),
        (["offload=disk", "offload.folder=/dev/null/x"], "offload.folder='/dev/null/x' cannot be used: no file can be"),
        (
            ["pipeline=1f1b", "pipeline.stages=1"],
            "pipeline.stages=1 does not fit pipeline.schedule='1f1b', which runs 1 stage on every rank: expected a "
            "multiple of 1, and at least 2. pipeline=none trains without a pipeline.",
        ),
        (
            ["pipeline=1f1b", "pipeline.stages=3"],
            "pipeline.stages makes pipelines of 3 ranks, into which the 2 ranks of this run (trainer.devices times "
            "trainer.num_nodes) cannot be divided. Start a multiple of 3 ranks, or choose pipeline.stages so that a "
            "pipeline takes 1 or 2 ranks.",
        ),
        (
            ["pipeline=1f1b", "trainer.devices=3", "trainer.num_nodes=3"],
            "pipeline.stages makes pipelines of 2 ranks, into which the 9 ranks of this run (trainer.devices times",
        ),
        (["pipeline=1f1b", "pipeline.micro_batches=0"], "pipeline.micro_batches=0 is not valid: expected an integer"),
        (
            ["pipeline=1f1b", "pipeline.stages=4", "trainer.devices=4"],
            "pipeline.stages=4 is more than the 3 blocks of the block list; every stage needs one. Use fewer stages, "
            "or name a longer list with pipeline.blocks.",
        ),
        (
            ["pipeline=1f1b", "pipeline.blocks=gpt.block"],
            "pipeline.blocks='gpt.block' is not the path of a ModuleList or Sequential of the model. Did you mean "
            "'gpt.blocks'?",
        ),
        (
            ["pipeline=1f1b", "pipeline.boundaries=[3]"],
            "pipeline.boundaries=[3] leaves a stage empty or is out of order: expected increasing numbers of blocks "
            "from 1 to 2, the first block of every stage but the first.",
        ),
        (["pipeline=1f1b", "pipeline.boundaries=[0]"], "pipeline.boundaries=[0] leaves a stage empty or is out of"),
        (["pipeline=1f1b", "pipeline.boundaries=[1,2]"], "pipeline.boundaries=[1, 2] makes 3 stages, but pipeline."),
        (
            ["pipeline=1f1b", "pipeline.balance=[1,1]"],
            "pipeline.balance has 2 costs, but the block list has 3 blocks: expected one each.",
        ),
        (["pipeline=1f1b", "pipeline.balance=flop"], "pipeline.balance='flop' is not known. Did you mean 'flops'?"),
        (
            ["pipeline=1f1b", "pipeline.balance=3"],
            "pipeline.balance=3 is not valid: expected one of parameters, activations, flops, time, or a number for",
        ),
        (["pipeline=1f1b", "pipeline.blocks=7"], "pipeline.blocks=7 is not valid: expected 'auto', the path of a list"),
        (["pipeline=1f1b", "pipeline.split=rows"], "pipeline.split='rows' is not valid: expected a function (batch, "),
        (
            ["pipeline=zero_bubble", "zero=stage3", "zero.slots=2", "trainer.devices=4"],
            "zero.slots=2 does not go with pipeline.schedule='zero_bubble': the gradients of weights are computed long",
        ),
        (
            ["pipeline=1f1b", "zero=stage3", "zero.slots=2"],
            "zero.slots=2 has no effect: the pipeline takes all 2 ranks, so no two share the parameters of a stage. "
            "Remove zero.slots, or raise trainer.devices.",
        ),
        (["callbacks.model_checkpoint.mode=up"], "callbacks.model_checkpoint: `mode` can be "),
        (
            ["callbacks.model_checkpoint.monitor=val_los"],
            "callbacks.model_checkpoint.monitor='val_los' is not known. Did you mean 'val_loss'?",
        ),
        (
            ["callbacks.model_checkpoint.dirpath=s3://bucket"],
            "callbacks.model_checkpoint.dirpath=s3://bucket is an address",
        ),
        (["optimized_metric=val_los"], "optimized_metric='val_los' is not known. Did you mean 'val_loss'?"),
        (
            ["trainer.limit_val_batches=0"],
            "optimized_metric=val_loss is not measured with trainer.limit_val_batches=0. Set "
            "optimized_metric=train_loss or optimized_metric=null, or raise trainer.limit_val_batches.",
        ),
        (
            ["trainer.limit_val_batches=0", "optimized_metric=null"],
            "callbacks.model_checkpoint.monitor=val_loss is not measured with trainer.limit_val_batches=0.",
        ),
        (
            ["zero.accumulate=hold"],
            "zero.accumulate=hold has no effect with trainer.accumulate_grad_batches=1: a step has one micro-batch. "
            "Remove zero.accumulate, or raise trainer.accumulate_grad_batches.",
        ),
        (
            [*STAGE3, "zero.slots=3"],
            "zero.slots=3 has no effect with trainer.devices=1: one process exchanges nothing. Remove zero.slots, or "
            "raise trainer.devices.",
        ),
        ([*STAGE3, "zero.poison=true"], "zero.poison=true has no effect with trainer.devices=1"),
        (["trainer.devices=1", "comm=plain"], "comm.overlap=false has no effect with trainer.devices=1"),
        (["ckpt_path=s3://bucket/x.ckpt"], "ckpt_path=s3://bucket/x.ckpt is an address, but lit_zero reads and writes"),
    ],
)
def test_refusal_says_what_is_wrong(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(composed(*arguments))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_the_folder_of_a_job_that_is_not_yet_known_stops_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    said = refusal(monkeypatch, "callbacks.model_checkpoint.mode=up")
    assert said is not None and said.startswith("callbacks.model_checkpoint: `mode` can be min, max but got up")


@pytest.mark.parametrize(("flags", "key"), [([], "hydra.run.dir"), (["-m"], "hydra.sweep.dir")])
def test_the_last_checkpoint_of_a_new_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: list[str], key: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal(monkeypatch, *flags, "ckpt_path=last") == (
        f"ckpt_path=last is looked for in this job's own output folder, which is new: its name, {key}, holds the time, "
        f"so nothing would be loaded. Name a checkpoint, or the folder of the job to go on with: {key}=FOLDER."
    )
    if not flags:
        assert refusal(monkeypatch, "ckpt_path=last", f"{key}=there") is None


SCHEDULED = "{_target_: lightning.pytorch.callbacks.GradientAccumulationScheduler, scheduling: {4: 2}}"


@pytest.mark.parametrize(
    "arguments",
    [
        list(STAGE3),
        ["zero.accumulate=hold", "trainer.accumulate_grad_batches=2"],
        ["zero.accumulate=hold", f"+callbacks.more={SCHEDULED}"],
        ["trainer.limit_val_batches=0", "optimized_metric=null", "callbacks.model_checkpoint.monitor=null"],
        ["callbacks=none", "logger=none", "scheduler=constant", "optimizer=sgd"],
        ["+trainer.deterministic=true", "zero.units=[Block]"],
        ["pipeline=1f1b", "pipeline.micro_batches=100"],  # more than a batch has rows: as many as rows
        ["pipeline=1f1b", "zero.accumulate=reduce"],  # a step has micro-batches without accumulation too
        ["pipeline=1f1b", "trainer.devices=4", "zero=stage3", "zero.slots=2", "pipeline.boundaries=[2]"],
        ["pipeline=interleaved", "trainer.devices=2", "model.layers=4"],
        ["experiment=pipeline_2x2"],
        ["trainer.devices=1", "offload=cpu", "comm=plain"],  # the step then ends before the next forward begins
    ],
)
def test_what_is_right_is_not_refused(arguments: list[str]) -> None:
    validate(composed(*arguments))


def test_a_trial_changes_nothing() -> None:
    cfg = composed("+trainer.deterministic=true")
    before = OmegaConf.to_yaml(cfg), torch.get_rng_state()
    validate(cfg)
    assert OmegaConf.to_yaml(cfg) == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert not torch.are_deterministic_algorithms_enabled()
    assert logging.root.manager.disable == 0


TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x",
    "WORLD_SIZE": "2",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "GROUP_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29999",
}


@pytest.mark.parametrize(
    ("variables", "starter"),
    [(TORCHRUN, "torchrun"), ({"SLURM_STEP_NUM_TASKS": "2"}, "srun")],
)
def test_ranks_that_others_start_share_one_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str], starter: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert refusal(monkeypatch) == (
        f"{starter} has started 2 processes, and each would make an output folder of its own: the name of the folder, "
        "hydra.run.dir, holds the time. Give them one: hydra.run.dir=FOLDER."
    )
    assert refusal(monkeypatch, "hydra.run.dir=there") is None


@pytest.mark.thorough
def test_the_main_job_without_validation(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    small = ["model.dim=16", "model.layers=1", "model.heads=2", "data.block_size=32", "data.vocab_size=256"]
    places = [f"data.path={text}", f"paths.cache_dir={tmp_path}/cache", f"hydra.run.dir={tmp_path}/run"]
    without = ["trainer.limit_val_batches=0", "optimized_metric=train_loss", "callbacks.model_checkpoint.monitor=null"]
    short = ["trainer.devices=1", "trainer.max_steps=2", "callbacks.report.sample_tokens=3", "logger=none"]
    done = run(EXAMPLES / "train.py", *small, *places, *without, *short, "data.val_fraction=0.2", cwd=tmp_path)
    assert done.code == 0, done.output
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "completed"
    assert "train_loss" in result and "val_loss" not in result
