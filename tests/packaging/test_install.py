"""Install lit_zero from a wheel and as an editable checkout, each into its own environment, and look around there.

Nothing is downloaded: the new environments borrow the packages of the one that runs the tests through a ``.pth`` file.
Such a file adds folders and does not run the ``.pth`` files in them, so an editable lit_zero of the borrowed
environment stays invisible.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "lit_zero/_version.py").read_text()).group(1)  # type: ignore[union-attr]
PARTS = ("lit_zero", "conf", "kernels", "tests", "examples", "pyproject.toml", "README.md", "LICENSE")

PROBE = """
    import importlib.metadata, importlib.resources, importlib.util, json, os, sys
    import lit_zero, lit_zero.config
    early = sorted(name for name in sys.modules if name.split(".")[0] in ("hydra", "omegaconf"))
    conf = importlib.resources.files("lit_zero.conf")
    import lit_zero.conf, lit_zero.kernels
    import kernels
    from hydra import compose, initialize_config_dir
    with initialize_config_dir(config_dir=os.getcwd(), version_base="1.3"):
        zero = compose(overrides=["+zero=stage3"]).zero  # as an app of the user's that has no such group of its own
    print(json.dumps({
        "versions": [lit_zero.__version__, importlib.metadata.version("lit-zero")],
        "folders": [os.path.dirname(each.__file__) for each in (lit_zero, lit_zero.conf, lit_zero.kernels)],
        "yaml": sorted(str(path.relative_to(str(conf))) for path in conf.rglob("*.yaml")),
        "stage": zero.stage,
        "imported early": early,
        "other_kernels": kernels.WHOSE,
        "strays": [str(spec) for name in ("conf", "tests", "examples") if (spec := importlib.util.find_spec(name))],
    }))
"""


@dataclass(frozen=True)
class Install:
    kind: str  # wheel | editable
    python: Path
    source: Path  # a copy of the checkout
    added: set[str]  # what the installation added to the top level of site-packages

    def run(self, *command: str | Path, cwd: Path) -> str:
        return _run([str(part) for part in command], cwd)


def _run(command: list[str], cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _copy_checkout(to: Path) -> Path:
    """Copy what an installation reads or could wrongly take: building inside the checkout would leave files there."""
    to.mkdir()
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, to / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, to / part)
    return to


@pytest.fixture(scope="module", params=["wheel", "editable"])
def install(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Install]:
    folder = tmp_path_factory.mktemp(request.param)
    source = _copy_checkout(folder / "checkout")
    _run([sys.executable, "-m", "venv", "--without-pip", "env"], folder)
    python = folder / "env/bin/python"
    (site,) = (folder / "env/lib").glob("python*/site-packages")
    borrowed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    (site / "kernels").mkdir()  # a package of this name is on the registry
    (site / "kernels/__init__.py").write_text("WHOSE = 'somebody else'\n")
    before = {path.name for path in site.iterdir()}
    what = [str(source)] if request.param == "wheel" else ["--editable", str(source)]
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed", "--no-compile", "--quiet"]
    _run([str(python), "-m", "pip", "install", *flags, *what], folder)
    yield Install(request.param, python, source, {path.name for path in site.iterdir()} - before)
    shutil.rmtree(folder)


def _yaml_files(conf: Path) -> list[str]:
    return sorted(str(path.relative_to(conf)) for path in conf.rglob("*.yaml"))


def test_what_an_installation_puts_where(install: Install) -> None:
    expected = {
        "wheel": {"lit_zero"},
        "editable": {
            f"__editable__.lit_zero-{VERSION}.pth",
            f"__editable___lit_zero_{VERSION.replace('.', '_')}_finder.py",
        },
    }
    assert install.added == expected[install.kind] | {f"lit_zero-{VERSION}.dist-info"}


def test_imports_resources_and_neighbors(install: Install, tmp_path: Path) -> None:
    if install.kind == "editable":  # what is added after the installation counts
        (install.source / "conf/zero/added_later.yaml").write_text("stage: stage1\n")
    seen: dict[str, Any] = json.loads(install.run(install.python, "-c", textwrap.dedent(PROBE), cwd=tmp_path))
    assert seen["versions"] == [VERSION, VERSION]
    if install.kind == "editable":
        folders = [install.source / "lit_zero", install.source / "conf", install.source / "kernels"]
    else:
        (site,) = install.python.parents[1].glob("lib/python*/site-packages")
        folders = [site / "lit_zero", site / "lit_zero/conf", site / "lit_zero/kernels"]
    assert [Path(folder) for folder in seen["folders"]] == folders
    assert (folders[0] / "py.typed").exists()
    assert seen["yaml"] == _yaml_files(install.source / "conf")
    assert "zero/stage3.yaml" in seen["yaml"]
    assert seen["stage"] == "stage3"
    assert seen["imported early"] == [], "importing lit_zero leaves Hydra alone until it is used"
    assert seen["other_kernels"] == "somebody else"
    # The borrowed environment may hold badly packaged distributions; ours must not add to them.
    assert not [spec for spec in seen["strays"] if str(install.source.parent) in spec]


def test_console_script(install: Install, tmp_path: Path) -> None:
    script = install.python.parent / "lit-zero"
    assert os.access(script, os.X_OK) and "from lit_zero.cli import main" in script.read_text()
    if install.kind == "wheel":  # the same few lines in both, which import for seconds
        assert "consolidate" in install.run(script, "--help", cwd=tmp_path)


def test_every_package_is_listed() -> None:
    found = set()
    for folder, name in (
        (ROOT / "lit_zero", "lit_zero"),
        (ROOT / "conf", "lit_zero.conf"),
        (ROOT / "kernels", "lit_zero.kernels"),
    ):
        for init in folder.rglob("__init__.py"):
            found.add(".".join([name, *init.parent.relative_to(folder).parts]))
    assert sorted(PYPROJECT["tool"]["setuptools"]["packages"]) == sorted(found), (
        "edit tool.setuptools.packages in pyproject.toml"
    )


def test_metadata_needs_neither_torch_nor_lit_zero_itself(tmp_path: Path) -> None:
    source = _copy_checkout(tmp_path / "checkout")
    (source / "lit_zero/__init__.py").write_text("raise ImportError('the build must not import the package')\n")
    script = "import setuptools.build_meta as b, sys; b.prepare_metadata_for_build_wheel(sys.argv[1])"
    _run([sys.executable, "-c", script, str(tmp_path)], source)
    (metadata,) = tmp_path.glob("lit_zero-*.dist-info")
    text = (metadata / "METADATA").read_text()
    assert f"\nVersion: {VERSION}\n" in text
    assert "\nLicense-Expression: Apache-2.0\n" in text
    assert "\nRequires-Python: >=3.11\n" in text
    assert (metadata / "licenses/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
