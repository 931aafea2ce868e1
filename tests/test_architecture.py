"""The architecture as tests: who may import whom, which door leads outside, and what the repository looks like."""

from __future__ import annotations

import ast
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lit_zero.zero.policy import ROWS

ROOT = Path(__file__).parents[1]
LINES = 400  # of a file; what does not fit has two subjects

# Package: what it may import of ours, a package or single modules. Everything points down; a component sees of another
# only its frozen choices or the interface it is given.
ALLOWED: dict[str, set[str]] = {
    "lit_zero._version": set(),
    "lit_zero.core": set(),
    "lit_zero.kernels": set(),
    "lit_zero.conf": set(),
    "lit_zero.comm": {"lit_zero.core"},
    "lit_zero.precision": {"lit_zero.core", "lit_zero.kernels"},
    "lit_zero.activation": {"lit_zero.core", "lit_zero.comm.exchange"},
    "lit_zero.zero": {
        "lit_zero.core",
        "lit_zero.kernels",
        "lit_zero.comm.exchange",  # the interface; which exchange it is, the strategy decides
        "lit_zero.precision.policy",
    },
    "lit_zero.checkpoint": {"lit_zero.core", "lit_zero.comm.world", "lit_zero._version"},
    "lit_zero.pipeline": {
        "lit_zero.core",
        "lit_zero.comm.messages",
        "lit_zero.comm.transport",
        "lit_zero.comm.graph_cut",
    },
    "lit_zero.offload": {"lit_zero.core"},
    "lit_zero.layers": {"lit_zero.core", "lit_zero.kernels"},
    "lit_zero.optim": {"lit_zero.core", "lit_zero.kernels"},
    "lit_zero.config": {"lit_zero.core"},
    "lit_zero.strategy": {
        "lit_zero.core",
        "lit_zero.comm",
        "lit_zero.precision",
        "lit_zero.zero",
        "lit_zero.checkpoint",
        "lit_zero.pipeline",
        "lit_zero.activation",
        "lit_zero.layers",
        "lit_zero.offload",
        "lit_zero.optim",
        "lit_zero.config.jobs",  # the command line that a rank is launched with depends on the Hydra job it belongs to
        "lit_zero.config.validate",  # one check of the number of processes, for Hydra users and for Trainer users
    },
    "lit_zero.callbacks": {
        "lit_zero.core",
        "lit_zero.comm.world",
        "lit_zero.checkpoint.files",  # a file of predictions appears whole or not at all, as a checkpoint does
        "lit_zero.checkpoint.together",
        "lit_zero.strategy.flavour",
    },
    "lit_zero.cli": {"lit_zero.core", "lit_zero.checkpoint", "lit_zero.pipeline", "lit_zero._version"},
    "lit_zero": {  # lit_zero/__init__.py, the shop window
        "lit_zero._version",
        "lit_zero.activation",
        "lit_zero.checkpoint",
        "lit_zero.comm",
        "lit_zero.config.search_path",
        "lit_zero.layers",
        "lit_zero.offload",
        "lit_zero.optim",
        "lit_zero.pipeline",
        "lit_zero.precision",
        "lit_zero.strategy",
        "lit_zero.zero",
    },
}

# Third party: the modules that may import it, with the reason for every one that is not a whole package.
DOORS: dict[str, dict[str, str]] = {
    "torch.distributed": {
        "lit_zero.comm": "the door",
        "lit_zero.checkpoint.dcp": "torch.distributed.checkpoint is a file format there; nothing is sent",
    },
    "lightning": {"lit_zero.strategy.flavour": "the door; the strategy takes everything from here"},
    "pytorch_lightning": {"lit_zero.strategy.flavour": "the door, where only this package is installed"},
    "lightning_fabric": {"lit_zero.strategy.flavour": "the door, where only this package is installed"},
    "hydra": {"lit_zero.config": "the door", "examples.train": "the example's entry"},
    "omegaconf": {"lit_zero.config": "the door", "examples.train": "the example's entry"},
    "triton": {"lit_zero.kernels": "the door"},
}
# Examples are users: they may import Lightning, and the benchmark's contenders are torch.distributed's own.
USERS = {
    "lightning": ("examples.",),
    "torch.distributed": ("examples.benchmark_worker", "examples.benchmark_pipeline_worker"),
}


def sources() -> dict[str, Path]:
    """Return every module of the package, the kernels, the configuration and the examples by its import name."""
    found = {}
    for folder, prefix in (("lit_zero", ""), ("kernels", "lit_zero."), ("conf", "lit_zero."), ("examples", "")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = prefix + ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = path
    return found


SOURCES = sources()


def imports(name: str) -> Iterator[tuple[int, str]]:
    """Yield ``(line, dotted name)`` for everything that a module imports, or reaches through ``torch.distributed``."""
    for node in ast.walk(ast.parse(SOURCES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: write imports in full"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed"):
            yield node.lineno, ast.unparse(node)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def home(name: str) -> str:
    """Return the package of ``ALLOWED`` that a module belongs to: the longest that fits."""
    return max((package for package in ALLOWED if within(name, package)), key=len)


def test_sources_are_found():
    for name in ("lit_zero", "lit_zero.zero.engine", "lit_zero.comm", "lit_zero.kernels.reductions", "examples.train"):
        assert name in SOURCES


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith("lit_zero")])
def test_imports_point_down(name):
    own = home(name)
    assert name == own or own != "lit_zero", f"{name} is in no package of ALLOWED: say where it belongs"
    for line, imported in imports(name):
        if not within(imported, "lit_zero"):
            continue
        inside = within(imported, own) and own != "lit_zero"
        assert inside or any(within(imported, allowed) for allowed in ALLOWED[own]), (
            f"{SOURCES[name].relative_to(ROOT)}:{line} imports {imported}; {own} may import {sorted(ALLOWED[own])}"
        )


def test_packages_form_no_circle():
    order: list[str] = []
    left = {package: {home(name) for name in allowed} for package, allowed in ALLOWED.items()}
    while left:
        free = [package for package, needs in left.items() if not needs - set(order)]
        assert free, f"these import one another: {sorted(left)}"
        order += free
        left = {package: needs for package, needs in left.items() if package not in free}
    assert order[-1] == "lit_zero"


def test_every_allowed_arrow_is_used():
    """What nobody needs is not allowed: a rule must not grow holes."""
    unused = []
    for package, allowed in ALLOWED.items():
        used = {imported for name in SOURCES if home_or_none(name) == package for _, imported in imports(name)}
        unused += [f"{package} -> {each}" for each in allowed if not any(within(one, each) for one in used)]
    assert unused == []


def home_or_none(name: str) -> str | None:
    return home(name) if name.startswith("lit_zero") else None


@pytest.mark.parametrize("door", DOORS)
def test_the_outside_is_reached_through_its_door_only(door):
    offenders = []
    for name in SOURCES:
        if any(within(name, allowed) for allowed in DOORS[door]) or name.startswith(USERS.get(door, ("-",))):
            continue
        offenders += [
            f"{SOURCES[name].relative_to(ROOT)}:{line} imports {one}"
            for line, one in imports(name)
            if within(one, door)
        ]
    assert offenders == []


def test_core_knows_no_optimizer_and_kernels_know_nothing_of_ours():
    for name in SOURCES:
        if within(name, "lit_zero.core") or within(name, "lit_zero.kernels"):
            outside = {one.split(".")[0] for _, one in imports(name)}
            assert not outside & {"lightning", "hydra", "omegaconf", "numpy"}, name


def test_a_stage_is_a_row_of_data():
    """Nobody asks which stage it is: what differs stands in the row."""
    stages = {stage for stage in ROWS if stage != "none"}
    offenders = []
    for name, path in SOURCES.items():
        if not name.startswith("lit_zero") or within(name, "lit_zero.pipeline"):
            continue  # a stage of a pipeline is something else: the number of a piece of the model
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Compare | ast.Match):
                continue
            sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else [node.subject]
            named = {side.attr if isinstance(side, ast.Attribute) else getattr(side, "id", "") for side in sides}
            texts = {side.value for side in sides if isinstance(side, ast.Constant)}
            if "stage" in named or texts & stages:
                offenders.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert offenders == []


def test_files_are_short():
    lengths = {name: len(path.read_text().splitlines()) for name, path in SOURCES.items()}
    assert {name: length for name, length in lengths.items() if length > LINES} == {}


def test_the_top_level_is_what_it_is_said_to_be():
    if shutil.which("git") and (ROOT / ".git").exists():  # what is ignored is nobody's business
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    else:
        names = [path.name for path in ROOT.iterdir() if path.suffix != ".egg-info" and path.name != "build"]
    top = {name.split("/")[0] for name in names if name and not name.startswith(".")}
    top = {name for name in top if (ROOT / name).exists() and name != "__pycache__"}
    assert top == {"pyproject.toml", "README.md", "LICENSE", "lit_zero", "conf", "kernels", "tests", "examples"}
