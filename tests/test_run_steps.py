"""A step waits for nothing: no number is read from the device but for the log; and what --compile changes."""

import importlib

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from her2 import data_patches, run_training
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

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "equal")
    METHODS = (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy)

    def __init__(self):
        super().__init__()
        self.count, reads = 0, self

        class Calls(TorchFunctionMode):             # methods that copy in one piece, below no operation
            def __torch_function__(self, function, types, args=(), kwargs=None):
                reads.count += function in reads.METHODS
                return function(*args, **(kwargs or {}))

        self.calls = Calls()

    def __enter__(self):
        self.calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.calls.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)] \
            if name in ("index", "index_put", "index_put_") else ()
        self.count += name in self.NAMES or bool(masks) or name == "repeat_interleave" and len(args) == 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("read", [
    lambda a: a.sum().item(), lambda a: float(a[0]), lambda a: bool(a[0] > 0), lambda a: a.tolist(), lambda a: a.nonzero(),
    lambda a: a[a > 0], lambda a: a.index_put_((a > 0,), torch.zeros(())), lambda a: a.unique(), lambda a: a.cpu(),
    lambda a: a.numpy(), lambda a: torch.equal(a, a), lambda a: a.masked_select(a > 0)])
def test_reads_are_seen(read):
    with Reads() as reads:
        torch.ones(3) + 1
        assert reads.count == 0
        read(torch.ones(3))
    assert reads.count > 0


def unseen(function):
    """The same function, with its reads not counted: it works on the host's own memory on every device."""
    def inner(*args, **kwargs):
        with torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction():
            return function(*args, **kwargs)
    return inner


def unseen_batches(batches):
    """The same for an iterator: a pool of latents lies in the host's memory."""
    batch = unseen(lambda: next(batches, None))
    return iter(batch, None)


@pytest.mark.parametrize("name", LOOPS)
def test_a_step_reads_nothing_from_the_device(root, name, monkeypatch):
    """Two steps more, neither logged nor saved, read not one number more."""
    pooled = data_patches.pooled_latents
    monkeypatch.setattr(data_patches, "pooled_latents", lambda *a: unseen_batches(pooled(*a)))
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
