"""What users of sharded training suffer from, by the numbers of their complaints, and where we show that it is over.

PL is Lightning-AI/pytorch-lightning, DS deepspeedai/DeepSpeed. Complaints about pipelines, offload and compression come
with those parts.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
README = TESTS.parent / "README.md"

# Complaint: (numbers, names of tests as "file::test", or a sentence of the README's limits).
COMPLAINTS = {
    "ranks that diverge hang": (
        "DS#8262 DS#4966 DS#7844 DS#860",
        [
            "strategy/test_launch.py::test_a_rank_that_fails_ends_all_with_its_traceback",
            "strategy/test_refusals.py::test_timeout",
        ],
        "In `stage3` all ranks must run the same modules in the same order.",
    ),
    "overlap corrupts": (
        "DS#7188 DS#5347 DS#8061 DS#7965 DS#5545 DS#6351",
        ["zero/test_equality.py::test_settings_that_change_memory_or_time_change_no_bit"],
    ),
    "the loss is not DDP's, stages differ": (
        "PL#17204 PL#19246 DS#4815 DS#4298",
        [
            "strategy/test_fit.py::test_equals_one_device",
            "zero/test_equality.py::test_losses_and_weights_equal_one_process",
        ],
    ),
    "16-mixed is something else": (
        "PL#18016",
        ["strategy/test_precision_modes.py::test_forced_overflows_on_one_rank_equal_one_process_bit_for_bit"],
    ),
    "the number of GPUs cannot change, checkpoints are folders that nobody can load": (
        "DS#2898 DS#3810 DS#6441 DS#7628 PL#19585 DS#6691 DS#7546 DS#5822 DS#6470 PL#20453 PL#17704 PL#15834",
        [
            "strategy/test_checkpoints.py::test_resuming_in_place_is_bit_equal",
            "strategy/test_checkpoints.py::test_plain_checkpoints_resume_in_every_stage",
            "strategy/test_checkpoints.py::test_a_full_checkpoint_is_a_plain_one",
            "checkpoint/test_sharded.py::test_real_ranks_load_what_other_ranks_saved",
        ],
    ),
    "making one file of a folder": (
        "DS#1896 DS#1317 DS#1793 PL#17425 PL#20643",
        [
            "checkpoint/test_consolidate.py::test_ckpt_holds_everything",
            "checkpoint/test_consolidate.py::test_lightning_loads_and_resumes",
            "strategy/test_checkpoints.py::test_tied_weights_are_written_once",
        ],
    ),
    "frozen parameters are lost": (
        "DS#3090 DS#3437 PL#20949 peft#453",
        [
            "models/test_peft.py::test_equals_one_process",
            "zero/test_odd_models.py::test_a_model_that_is_all_frozen_passes_gradients_through",
        ],
    ),
    "parameter groups": (
        "OpenRLHF#1225 DS#6878 DS#5063",
        [
            "zero/test_binding.py::test_parameters_in_no_optimizer_stay_and_empty_groups_are_no_trouble",
            "models/test_peft.py::test_splitting_groups_changes_nothing",
            "models/test_peft.py::test_a_learning_rate_for_each_group",
        ],
    ),
    "clipping": (
        "PL#19235 PL#21928",
        [
            "strategy/test_fit.py::test_equals_one_device",
            "strategy/test_nonfinite_norm.py::test_ends_the_run_before_a_weight_is_changed",
        ],
    ),
    "gradients and their norm cannot be seen": (
        "PL#7490 DS#7255 DS#7237 DS#4555 DS#7837",
        ["zero/test_access.py::test_whole_values_are_read_and_written"],
    ),
    "one optimizer only": (
        "PL#19773 DS#1229",
        ["strategy/test_manual.py::test_two_optimizers_equal_one_device"],
    ),
    "no moving average": (
        "PL#21414 DS#2056",
        ["callbacks/test_averaging.py::test_equals_one_process"],
    ),
    "settings are to be said twice": (
        "PL#17472 PL#19891 PL#19460 DS#6914 DS#3982",
        ["strategy/test_running.py::test_accumulation_that_changes_over_epochs"],
    ),
    "accumulation": (
        "PL#19350 PL#6170 DS#6793",
        ["strategy/test_running.py::test_hooks_around_the_optimizer", "strategy/test_fit.py::test_equals_one_device"],
    ),
    "operators that must be compiled": (
        "DS#1846 DS#3094 DS#5677 DS#1077 PL#12607",
        ["packaging/test_install.py::test_imports_resources_and_neighbors"],
    ),
    "ports and clusters": (
        "gpt-neox#849 DS#3916 PL#18466",
        [
            "strategy/test_clusters.py::test_a_port_that_another_job_has",
            "strategy/test_launch.py::test_torchrun_inside_slurm",
        ],
    ),
    "sweeps": (
        "hydra#2070 PL#18175 PL#16694 PL#2691 lightning-hydra-template#393",
        ["config/test_multirun.py::test_sweep_of_stages_and_devices_ends_with_a_correct_row_for_every_job"],
    ),
    "torch.compile": (
        "pytorch#115484 pytorch#140091 PL#21357",
        ["compile/test_compile.py::test_same_losses_and_one_graph_for_a_block"],
    ),
    "memory while saving and loading": (
        "PL#20312 DS#3938 DS#1111 transformers#12587",
        [
            "checkpoint/test_consolidate.py::test_one_tensor_at_a_time_in_memory",
            "strategy/test_deferred.py::test_no_rank_ever_holds_the_whole_model",
        ],
    ),
    "tied weights": (
        "pytorch#176076 accelerate#4171 torchtitan#1524",
        [
            "models/test_transformers.py::test_equals_one_process",
            "zero/test_units.py::test_tied_between_units_goes_to_the_root_with_all_its_names",
        ],
    ),
    "evaluation and pretrained weights": (
        "PL#17523 PL#14090 PL#15247 DS#2449 PL#19259 PL#18648",
        ["strategy/test_running.py::test_one_after_the_other", "models/test_transformers.py::test_from_pretrained"],
    ),
    "settings without effect": (
        "DS#5704 DS#3779",
        ["config/test_groups.py::test_precision_sets_lightnings_mode_and_only_keys_with_an_effect"],
    ),
    "uneven data hangs": ("PL#20561", ["evaluation/test_uneven.py::test_two_ranks_measure_what_one_process_measures"]),
    "a resumed epoch has another order": (
        "PL#21938",
        ["strategy/test_resumed_order.py::test_a_resumed_epoch_is_shuffled_as_itself"],
    ),
}


@pytest.mark.parametrize("complaint", COMPLAINTS)
def test_what_answers_a_complaint_is_there(complaint: str) -> None:
    _, tests, *limits = COMPLAINTS[complaint]
    for test in tests:
        file, _, name = test.partition("::")
        found = {node.name for node in ast.parse((TESTS / file).read_text()).body if isinstance(node, ast.FunctionDef)}
        assert name in found, f"{file} has no {name}"
    readme = " ".join(README.read_text().split())
    for limit in limits:
        assert limit in readme
