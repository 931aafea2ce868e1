"""A batch of the data that a run is about to read, to see what a step does with it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, IterableDataset

from lit_zero.core.errors import UnsupportedError
from lit_zero.core.randomness import random_states, set_random_states
from lit_zero.strategy.flavour import TrainerFn, pl

_LOOPS = {
    TrainerFn.FITTING: ("fit_loop", "training_step"),
    TrainerFn.VALIDATING: ("validate_loop", "validation_step"),
    TrainerFn.TESTING: ("test_loop", "test_step"),
    TrainerFn.PREDICTING: ("predict_loop", "predict_step"),
}


def sample_step(trainer: Any, prepare: Callable[[Any], Any]) -> Callable[[], Any]:
    """Return a function that runs the step of the coming run once, on the first batch of its data.

    The data loader is asked for once more than in a run without a pipeline, and an iterable dataset is begun once more
    (with its worker processes; of a stream that cannot be begun again, the first batch is lost). Otherwise no worker
    process is started. Random states stay as they are, but not that of a generator of the loader's own.

    Args:
        trainer: that is about to run.
        prepare: makes of a batch what the step is to see.

    Raises:
        UnsupportedError: if there is no batch.
    """
    loop, name = _LOOPS[trainer.state.fn]
    module, strategy = trainer.lightning_module, trainer.strategy
    states = random_states()
    try:
        loaders = getattr(trainer, loop)._data_source.dataloader()
        fitting = trainer.state.fn == TrainerFn.FITTING
        in_turn = not fitting
        if isinstance(loaders, pl.utilities.CombinedLoader):
            loaders, in_turn = loaders.iterables, loaders._mode == "sequential"
        batch = _first(next(iter(tree_leaves(loaders)))) if in_turn else tree_map(_first, loaders)
    except StopIteration:
        raise UnsupportedError(
            f"The data of {name} has no batch. A pipeline looks at one to see where the module can be cut."
        ) from None
    finally:
        set_random_states(states)
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    batch = prepare(strategy.batch_to_device(batch, dataloader_idx=0))
    further = _numbers(getattr(module, name), in_turn and not fitting and len(tree_leaves(loaders)) > 1)
    context = {"training_step": "train", "validation_step": "val", "test_step": "test", "predict_step": "predict"}[name]

    def call() -> Any:
        module.train(name == "training_step")
        with getattr(trainer.precision_plugin, f"{context}_step_context")():
            return getattr(module, name)(batch, *further)

    return call


def _numbers(step: Callable[..., Any], several: bool) -> list[int]:
    """Return what a step is given beside the batch, as Lightning does: its number, whatever that is called, if there is
    a place for it, and that of its loader if there are several.
    """
    kinds = [parameter.kind for parameter in inspect.signature(step).parameters.values()]
    places = sum(kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)
    numbered = places > 1 or inspect.Parameter.VAR_POSITIONAL in kinds
    return [0] * (numbered + several)


def _first(loader: Any) -> Any:
    """Return the first batch of a loader, in this process."""
    if (
        isinstance(loader, DataLoader)
        and loader.batch_sampler is not None
        and not isinstance(loader.dataset, IterableDataset)
    ):
        indices = next(iter(loader.batch_sampler))
        dataset: Any = loader.dataset
        rows = dataset.__getitems__(indices) if hasattr(dataset, "__getitems__") else [dataset[i] for i in indices]
        return loader.collate_fn(rows)
    return next(iter(loader))
