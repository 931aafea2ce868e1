"""The command line with which a rank is started."""

from __future__ import annotations

import os
import sys

import pytest

from lit_zero.config.jobs import Job


def test_an_app_that_imports_lit_zero_late_keeps_its_flags(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """As with ``hydra.searchpath`` and a strategy that Hydra instantiates: no plugin has looked at the command line."""
    monkeypatch.delenv("LIT_ZERO_PROGRAM", raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    flags = ["--config-path", "there", "--config-name", "other", "--config-dir", "more"]
    monkeypatch.setattr(sys, "argv", ["app.py", *flags, "a=1"])
    monkeypatch.chdir(tmp_path)  # hydra.job.chdir
    job = Job("out", None, overrides=("a=1",), cwd="/started/here", settings=("hydra.mode=RUN",), log_file=None)
    expected = [sys.executable, "/started/here/app.py", *flags, "hydra.mode=RUN", "a=1"]
    assert job.command(1) == expected
    monkeypatch.setattr(sys, "argv", ["worker"])
    assert job.command(2) == expected, "what is once known is kept"
    assert "LIT_ZERO_PROGRAM" in os.environ
