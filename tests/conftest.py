"""What several test files build on, made once; and the whole suite in two processes.

Most tests keep one core busy. `python -m pytest -q tests`, nothing else, therefore gives the tests of the runs
(test_run_*) to a second pytest, whose report follows the first one's; its failures count.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from run_kill_harness import LOOPS, command_line, in_process, one_thread, prepare

HERE, THREADS = Path(__file__).resolve().parent, max(1, (os.cpu_count() or 1) // 2)
second = None                                   # (process, its output) of the other half


def pytest_collection_modifyitems(config, items):
    global second
    paths = [Path(word).resolve() for word in config.invocation_params.args if word not in ("-q", "-v")]
    theirs = sorted({str(item.path) for item in items if item.path.name.startswith("test_run_")})
    if paths == [HERE] and (os.cpu_count() or 1) > 1:           # that command, and more than one core
        output = tempfile.TemporaryFile()
        second = subprocess.Popen([sys.executable, "-m", "pytest", "-q", *theirs], stdout=output,
                                  stderr=subprocess.STDOUT,
                                  env={**os.environ, "OMP_NUM_THREADS": str(THREADS)}), output
        torch.set_num_threads(THREADS)
        items[:] = [item for item in items if str(item.path) not in theirs]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    if second and second[0].wait():
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    if second:
        second[1].seek(0)
        terminalreporter.section("test_run_*, in a second process")
        terminalreporter.write(second[1].read().decode("utf-8", errors="replace"))


@pytest.fixture(scope="session")
def whole_runs(tmp_path_factory):
    """A dataset and uninterrupted runs of all loops."""
    folder = tmp_path_factory.mktemp("runs")
    prepare(folder)
    with one_thread():
        for name in LOOPS:
            assert in_process(command_line(name, folder, name)) == 0
    return folder


@pytest.fixture
def root(whole_runs):
    """The same for a test that runs loops of its own in new folders there."""
    with one_thread():
        yield whole_runs
