"""What several test files build on, made once."""

import pytest
import torch
from run_kill_harness import LOOPS, command_line, in_process, prepare


@pytest.fixture(scope="session")
def whole_runs(tmp_path_factory):
    """A dataset and uninterrupted runs of all loops, at one thread as in the processes that are killed."""
    folder, before = tmp_path_factory.mktemp("runs"), torch.get_num_threads()
    prepare(folder)
    torch.set_num_threads(1)
    for name in LOOPS:
        assert in_process(command_line(name, folder, name)) == 0
    torch.set_num_threads(before)
    return folder


@pytest.fixture
def root(whole_runs):
    """The same for a test that runs loops of its own in new folders there."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield whole_runs
    torch.set_num_threads(before)
