"""The door to a Hydra app that trains: ``hydra.main``, with every job of the command line checked before the first."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lit_zero.config import job_process, jobs, search_path
from lit_zero.config.trial import check_folder
from lit_zero.config.validate import validate
from lit_zero.core.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

Task = Callable[["DictConfig"], Any]


def main(
    config_name: str = "train", config_path: str = "pkg://lit_zero.conf", version_base: str = "1.3"
) -> Callable[[Task], Callable[[], None]]:
    """Decorate the function that runs one job, as ``hydra.main`` does.

    Before anything starts, the configuration of every job on the command line, of a sweep too, is composed and given to
    :func:`lit_zero.config.validate`. What is wrong with it is said in one line, and the program ends with exit code 1.
    Every job of a sweep runs in processes of its own, see the note in ``lit_zero.config.job_process``.

    Args:
        config_name: the root config.
        config_path: where it is: ``pkg://package``, an absolute folder, or a folder relative to the decorated
            function's file.
        version_base: Hydra's compatibility level.
    """
    search_path.register()
    import hydra

    def decorate(task: Task) -> Callable[[], None]:
        run = hydra.main(config_path=config_path, config_name=config_name, version_base=version_base)(_Job(task))

        @functools.wraps(task)
        def entry() -> None:
            if jobs.TEAM not in os.environ and job_process.REPORT not in os.environ:  # nobody has checked it yet
                try:
                    _check_command_line(task, config_path, config_name)
                except ConfigError as error:
                    sys.exit(str(error))  # prints it on stderr; exit code 1
            run()

        return entry

    return decorate


class _Job:
    """What Hydra calls for every job.

    A launcher plugin may send it to a worker process. The copy there leaves the task behind: it only starts the
    processes of a job of a sweep, and the worker need not find the modules that the user's script imports.

    Attributes:
        takes_up: a sweep can be taken up again with it; what ``SweepTable`` asks for.
    """

    takes_up = True

    def __init__(self, task: Task | None) -> None:
        self._task = task
        if task is not None:
            functools.update_wrapper(self, task)  # Hydra looks for the file of what is wrapped

    def __call__(self, cfg: DictConfig) -> Any:
        validate(cfg)  # a sweeper may have drawn values that no command line shows
        return job_process.run(self._task, cfg)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Job, (None,)


def _check_command_line(task: Task, config_path: str, config_name: str) -> None:
    """Compose and validate every job of the command line.

    Raises:
        ConfigError: for the first thing that is wrong.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import (
        create_automatic_config_search_path,
        detect_calling_file_or_module_from_task_function,
        get_args_parser,
    )
    from hydra.core.config_search_path import SearchPathQuery
    from hydra.core.utils import setup_globals
    from hydra.types import RunMode

    arguments = get_args_parser().parse_args()
    asks = (
        arguments.help,
        arguments.hydra_help,
        arguments.info,
        arguments.shell_completion,
        arguments.experimental_rerun,
    )
    if any(asks):
        return
    file, module = detect_calling_file_or_module_from_task_function(task)
    setup_globals()
    paths = create_automatic_config_search_path(file, module, arguments.config_path or config_path)
    if arguments.config_dir is not None:
        folder = os.path.abspath(arguments.config_dir)
        paths.prepend(provider="command-line", path=f"file://{folder}", anchor=SearchPathQuery(provider="schema"))
    sources = ConfigLoaderImpl(config_search_path=paths)
    for config in _jobs(sources, arguments.config_name or config_name, arguments.overrides, arguments.multirun):
        check_folder(config, arguments.multirun or config.hydra.mode == RunMode.MULTIRUN)
        validate(config)


def _jobs(loader: Any, config_name: str, overrides: list[str], multirun: bool) -> list[DictConfig]:
    """Return the config of every job; of a sweep that draws its values, the config without them."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Override
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from lit_zero.config.explain import explain

    lines = list(overrides)
    try:
        config = loader.load_configuration(config_name, lines, RunMode.MULTIRUN, validate_sweep_overrides=False)
        if not multirun and config.hydra.mode != RunMode.MULTIRUN:
            return [loader.load_configuration(config_name, lines, RunMode.RUN)]
        _check_started_once()
        params = OmegaConf.select(config, "hydra.sweeper.params") or {}
        lines = [f"{key}={value}" for key, value in params.items()] + lines
        parsed = OverridesParser.create(config_loader=loader).parse_overrides(lines)
        own: list[Override] = []
        ours: list[Override] = []
        for override in parsed:
            (own if override.is_hydra_override() else ours).append(override)
        hydra_lines = [str(override.input_line) for override in own]
        if not str(config.hydra.sweeper.get("_target_", "")).endswith(".BasicSweeper"):
            ours = [override for override in ours if not override.is_sweep_override()]
        configs = []
        for job in BasicSweeper.split_arguments(ours, None)[0]:
            lines = [*hydra_lines, *job]
            configs.append(loader.load_configuration(config_name, lines, RunMode.RUN))
        return configs
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: a number as a group's option
        raise ConfigError(explain(loader, config_name, lines, error)) from error


def _check_started_once() -> None:
    """Refuse a sweep in several processes: each would run all of it, and draw values of its own.

    Raises:
        ConfigError: if torchrun or srun has started this program more than once.
    """
    for variable, starter in (("WORLD_SIZE", "torchrun"), ("SLURM_STEP_NUM_TASKS", "srun")):
        processes = os.environ.get(variable, "1")
        if processes.isdigit() and int(processes) > 1:
            raise ConfigError(
                f"A sweep must be started once, but {variable}={processes} says that {starter} has started it "
                f"{processes} times. Start it without {starter}: each job starts its own processes, as many as "
                f"trainer.devices says. Or start every job with {starter}, without -m."
            )
