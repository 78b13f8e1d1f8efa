"""A step waits for nothing: no number is read from the device but for the log; and what --compile changes."""

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from her2 import run_training
from her2.data_patches import Sampler
from run_kill_harness import command_line, in_process, one_thread, prepare
from test_run_distributed import LOOPS, alone, apart, line_of


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    prepare(folder)
    with one_thread():
        assert in_process(command_line("autoencoder", folder, "autoencoder")) == 0
        yield folder


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: .item(), float(), bool(), .tolist(), nonzero, a[mask]."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "equal")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.count += name in self.NAMES
        return function(*args, **(kwargs or {}))


def unseen(function):
    """The same function, with its reads not counted: it works on the host's own memory on every device."""
    def inner(*args, **kwargs):
        with torch.utils._python_dispatch._disable_current_modes():
            return function(*args, **kwargs)
    return inner


@pytest.mark.parametrize("name", LOOPS)
def test_a_step_reads_nothing_from_the_device(root, name, monkeypatch):
    """Two steps more, neither logged nor saved, read not one number more."""
    monkeypatch.setattr(Sampler, "__getitem__", unseen(Sampler.__getitem__))
    for kind in (torch.optim.Adam, torch.optim.AdamW):      # Adam's step counts lie on the host
        monkeypatch.setattr(kind, "step", unseen(kind.step))
    one_hot = run_training.F.one_hot                        # on a GPU it does not check its input
    monkeypatch.setattr(run_training.F, "one_hot", unseen(one_hot))
    counts = []
    for steps in ("3", "5"):
        line = [*line_of(name, root, f"{name}-{steps}"), "--steps", steps, "--log-every", "50",
                "--save-every", "50"]
        with Reads() as reads:
            assert importlib.import_module(line[0][:-3]).main(line[1:]) in (0, None)
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


def test_compiled_networks_make_the_same_steps(root, monkeypatch):
    """With a backend that needs no compiler: what is traced is the same, names in files included."""
    monkeypatch.setattr(run_training, "BACKEND", "aot_eager")
    alone(line_of("autoencoder", root, "plain"))
    alone(line_of("autoencoder", root, "compiled", "--compile"))
    found = apart(root / "plain", root / "compiled")
    assert max(found.values(), default=0) < 1e-5, sorted(found.items(), key=lambda item: -item[1])[:5]


def test_where_nothing_compiles_it_says_so(root, monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no C++ compiler\nfound")

    monkeypatch.setattr(torch, "compile", broken)
    assert in_process(line_of("segmentation", root, "no-compiler", "--compile")) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "--compile" in told and "leave it out" in told
