"""The guard that a test leaves no trace, and the summary of tests that did not run: pytest runs inside these tests."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

LEAKS = """
    import os
    import pytest
    import torch

    def test_process_group():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)

    def test_environment():
        os.environ["LEFT_BEHIND"] = "1"

    def test_dtype():
        torch.set_default_dtype(torch.float64)

    def test_threads():
        torch.set_num_threads(torch.get_num_threads() + 1)

    def test_gradients():
        torch.set_grad_enabled(False)

    def test_directory(tmp_path):
        os.chdir(tmp_path)

    def test_innocent(monkeypatch, tmp_path):
        assert not torch.distributed.is_initialized()
        assert "LEFT_BEHIND" not in os.environ
        assert torch.get_default_dtype() == torch.float32
        assert torch.is_grad_enabled()
        monkeypatch.setenv("LEFT_BEHIND", "1")
        monkeypatch.chdir(tmp_path)
        os.environ["LOCAL_RANK"] = "0"  # Lightning's launcher does this

    def test_lightning_is_forgotten():
        assert "LOCAL_RANK" not in os.environ
"""

GPU = """
    import pytest

    @pytest.mark.gpu
    @pytest.mark.parametrize("number", [1, 2, 3])
    def test_gpu(number):
        pass

    @pytest.mark.gpu
    def test_needs_more():
        pytest.skip("needs two")

    def test_cpu():
        pass
"""


THOROUGH = """
    import pytest

    @pytest.mark.thorough
    def test_whole():
        pass

    @pytest.mark.thorough("-4", "[b")
    @pytest.mark.parametrize("size", [2, 4])
    @pytest.mark.parametrize("name", ["a", "b"])
    def test_cases(name, size):
        pass

    def test_quick_4():
        pass
"""


@pytest.fixture(autouse=True)
def inner_run(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text())
    pytester.makeini(
        "[pytest]\nmarkers =\n  gpu\n  namespaces\n  thorough\naddopts = --strict-markers -p no:cacheprovider\n"
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("process_group", "a process group"),
        ("environment", "environment variables LEFT_BEHIND"),
        ("dtype", "default dtype torch.float64, was torch.float32"),
        ("threads", "torch threads, were"),
        ("gradients", "gradients disabled"),
        ("directory", "working directory"),
    ],
)
def test_a_trace_is_an_error_that_names_it_and_is_put_right(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    pytester.makepyfile(LEAKS)
    result = pytester.runpytest_inprocess("-k", f"{name} or innocent or lightning")
    result.assert_outcomes(
        passed=3, errors=1, deselected=5
    )  # the test itself passed, leaving the process as it was did not
    result.stdout.fnmatch_lines([f"The test left behind: *{words}*."])


@pytest.mark.parametrize(
    ("gpu", "arguments", "line"),
    [
        (False, [], "gpu tests: 4 not run (no GPU visible)"),
        (False, ["-m", "not gpu"], "gpu tests: 4 not run (no GPU visible)"),
        (True, [], "gpu tests: 3 run, 1 not run (skipped, deselected or not reached)"),
        (True, ["-k", "test_gpu"], "gpu tests: 3 run, 1 not run (skipped, deselected or not reached)"),
        (True, ["-m", "not gpu"], "gpu tests: 4 not run (skipped, deselected or not reached)"),
    ],
)
def test_the_summary_counts_gpu_tests(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, gpu: bool, arguments: list[str], line: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    pytester.makepyfile(GPU)
    result = pytester.runpytest_inprocess(*arguments)
    assert line in result.outlines
    assert result.ret == 0


def test_the_summary_speaks_without_gpu_tests_too(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_cpu():\n    pass\n")
    outlines = pytester.runpytest_inprocess("-q").outlines
    assert {"gpu tests: 0 run", "namespaces tests: 0 run"} <= set(outlines)


@pytest.mark.parametrize(
    ("obstacle", "line"),
    [("", "namespaces tests: 1 run"), ("no unshare", "namespaces tests: 1 not run (no unshare)")],
)
def test_the_summary_counts_namespace_tests(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, obstacle: str, line: str
) -> None:
    monkeypatch.setattr("tests.hosts.obstacle", lambda: obstacle)
    pytester.makepyfile("import pytest\n@pytest.mark.namespaces\ndef test_hosts():\n    pass\n")
    result = pytester.runpytest_inprocess("-q")
    assert line in result.outlines
    assert result.ret == 0


@pytest.mark.parametrize(
    ("arguments", "passed", "line"),
    [
        ([], 2, "thorough tests: 4 not run (ask for them with --thorough)"),
        (["--thorough"], 6, "thorough tests: 4 run"),
    ],
)
def test_thorough_tests_are_asked_for(pytester: pytest.Pytester, arguments: list[str], passed: int, line: str) -> None:
    pytester.makepyfile(THOROUGH)
    result = pytester.runpytest_inprocess(*arguments)
    result.assert_outcomes(passed=passed, skipped=6 - passed)
    assert line in result.outlines
