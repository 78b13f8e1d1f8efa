"""N processes make the step of one; --accumulate has the gradient of the whole batch; failures end all."""

import copy
import json
import shutil
import time

import pytest
import torch
from torch import nn

from her2 import run, run_distributed
from her2.losses import dice_cross_entropy
from her2.segmenter import UNet
from run_kill_harness import command_line, differences, in_process, one_thread, prepare
from run_processes import double_precision, start, together

# 5 patches: neither 2 nor 3 divides them.
THREE = ["--batch", "5", "--steps", "3", "--lr", "1e-3", "--log-every", "2", "--save-every", "3"]
MORE = {"autoencoder": ["--disc-start", "1", "--warmup", "1", "--schedule", "constant"],
        "diffusion": ["--warmup", "1", "--schedule", "constant"],
        "GAN": [], "segmentation": ["--warmup", "1", "--schedule", "constant", "--jitter", "0"]}
LOOPS = tuple(MORE)
CUT = ("autoencoder", "GAN", "segmentation")        # with sums over the batch; the diffusion's mean has none
GENERATE = [*"generate.py --method inpaint --device cpu --patch 32 --batch 2 --count 9 --steps 2".split()]


def line_of(name, root, out, *more):
    return [*command_line(name, root, out), *THREE, *MORE[name], *more]


def also(root, out):
    """generate.py and evaluate.py on what the loops have made."""
    data = ["--data", str(root / "data"), "--cache", str(root / "cache")]
    return [[*GENERATE, *data, "--model", str(root / "one" / "diffusion"), "--out", str(out / "synth")],
            ["evaluate.py", str(out / "segmentation"), *data, "--device", "cpu", "--out",
             str(out / "report")]]


def alone(line):
    with double_precision():
        assert in_process(line) == 0


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The runs of one process, of two and of three; of two with --accumulate 2."""
    folder = tmp_path_factory.mktemp("processes")
    prepare(folder)
    with one_thread():
        alone(line_of("autoencoder", folder, "one/autoencoder"))
        shutil.copytree(folder / "one" / "autoencoder", folder / "autoencoder")     # what `diffusion` reads
        two, three = ([line_of(name, folder, f"{out}/{name}") for name in LOOPS] for out in ("two", "three"))
        two += [line_of(name, folder, f"two-cut/{name}", "--accumulate", "2") for name in CUT]
        two += [[*line_of("segmentation", folder, "back"), "--steps", "2"]]
        with together(two, 2, folder):                      # beside them, one thread each:
            for name in LOOPS[1:]:
                alone(line_of(name, folder, f"one/{name}"))
            for line in also(folder, folder / "one"):
                alone(line)
        with together(three + also(folder, folder / "three"), 3, folder):
            for name in LOOPS:
                alone(line_of(name, folder, f"cut/{name}", "--accumulate", "2"))
        yield folder


def flat(state, prefix=""):
    """{name: tensor} of everything with a value in a checkpoint: networks, EMA, moments of the optimisers."""
    found = {}
    for name, value in state.items() if isinstance(state, dict) else enumerate(state):
        if torch.is_tensor(value):
            found[f"{prefix}{name}"] = value.double()
        elif isinstance(value, (dict, list)):
            found |= flat(value, f"{prefix}{name}.")
    return found


def apart(one, other):
    """{name: largest difference over max(1, largest value)} of two checkpoints, as far as they differ."""
    one, other = (flat(run.load_file(folder / "last.pt")) for folder in (one, other))
    assert one.keys() == other.keys() and len(one) > 20
    return {name: float((one[name] - other[name]).abs().max() / one[name].abs().max().clamp(min=1))
            for name in one if one[name].numel() and not torch.equal(one[name], other[name])}


@pytest.mark.parametrize("other, name", [*((other, name) for other in ("two", "three") for name in LOOPS),
                                         *(("two-cut", name) for name in CUT)])
def test_processes_make_the_step_that_one_makes(root, name, other):
    """Weights, EMA, statistics, moments of all optimisers, codebook usage: to 1e-5 after three steps."""
    found = apart(root / ("cut" if "cut" in other else "one") / name, root / other / name)
    assert max(found.values(), default=0) < 1e-5, sorted(found.items(), key=lambda item: -item[1])[:5]
    a, b = (run.load_file(root / out / name / "model.pt")["step"] for out in ("one", other))
    records = [[json.loads(text) for text in (root / out / name / "log.jsonl").read_text().splitlines()]
               for out in ("cut" if "cut" in other else "one", other)]
    assert a == b == 3 and [r["step"] for r in records[0]] == [r["step"] for r in records[1]] == [2, 3]
    for mine, its in zip(*records):
        for key in mine.keys() - {"samples_per_s", "memory_mib"}:
            assert mine[key] == (its[key] if its[key] is None
                                 else pytest.approx(its[key], rel=1e-4, abs=1e-6)), key


def test_accumulated_pieces_make_the_step_of_the_whole_batch(root):
    """Without batch norm: the diffusion, and the autoencoder as long as nobody listens to its discriminator."""
    found = apart(root / "one" / "diffusion", root / "cut" / "diffusion")
    assert max(found.values(), default=0) < 1e-5, sorted(found.items(), key=lambda item: -item[1])[:5]
    for out, more in (("alone", []), ("alone-cut", ["--accumulate", "3"])):
        alone(line_of("autoencoder", root, out, "--disc-weight", "0", *more))
    found = apart(root / "alone", root / "alone-cut")
    assert max(found.values(), default=0) < 1e-5, sorted(found.items(), key=lambda item: -item[1])[:5]


def test_the_same_images_and_figures_whatever_the_number_of_processes(root):
    assert differences(root / "one" / "synth", root / "three" / "synth") == []
    one, it = ((root / out / "segmentation" / "metrics.json").read_text().splitlines()[1]
               for out in ("one", "three"))
    assert json.loads("{" + one.rstrip(",") + "}")["figures"]["dice"] == pytest.approx(
        json.loads("{" + it.rstrip(",") + "}")["figures"]["dice"], abs=1e-3)
    assert (root / "three" / "report" / "report.md").exists()


def test_a_run_goes_on_with_another_number_of_processes(root):
    """Two steps by two processes, the third by one: as three steps by one."""
    alone(line_of("segmentation", root, "back"))
    found = apart(root / "one" / "segmentation", root / "back")
    assert max(found.values(), default=0) < 1e-5


def test_a_killed_process_ends_all_with_one_line_and_loses_nothing(root):
    """Process 1 of 2 is killed after a checkpoint; the same command by one process ends as ever."""
    out = "killed"
    line = [*line_of("segmentation", root, out), "--steps", "2000", "--schedule", "constant", "--save-every",
            "5"]
    processes = start([line], 2, root)
    deadline = time.monotonic() + 120
    while not (root / out / "last.prev.pt").exists():
        assert time.monotonic() < deadline and processes[0].poll() is None
        time.sleep(0.01)
    processes[1].kill()
    assert processes[0].wait() == 2
    said = (root / "process2-rank0.txt").read_text(encoding="utf-8", errors="replace")
    assert "Traceback" not in said and said.count("another process of this run has ended") == 1
    step = run.load_file(root / out / "last.pt")["step"]
    assert step >= 5 and step % 5 == 0


def test_a_batch_smaller_than_the_processes_is_one_line(monkeypatch):
    monkeypatch.setattr(run_distributed, "world", lambda: 3)
    with pytest.raises(run_distributed.UserError, match="--batch: found 5; give 6 or more"):
        run_distributed.divide(type("", (), {"batch": 5, "accumulate": 2}))


@pytest.mark.parametrize("dice", ["soft", "generalised"])
def test_pieces_of_a_dice_loss_have_the_gradient_of_the_whole(dice):
    """Oracle: batch norm over each piece by hand, then the loss of all logits at once."""
    torch.manual_seed(0)
    network = UNet(width=8).train()
    image, target = torch.randn(5, 3, 32, 32), torch.randint(0, 2, (5, 32, 32))
    target[0], target[1, :, :7] = 0, 255                            # uneven shares of pixels that count
    twin, pieces = copy.deepcopy(network), (slice(0, 2), slice(2, 5))
    whole = dice_cross_entropy(torch.cat([twin(image[rows]) for rows in pieces]), target, dice)[0]
    whole.backward()

    found = []
    with torch.no_grad():
        for rows in pieces:
            dice_cross_entropy(network(image[rows]), target[rows], dice,
                               pool=lambda sums: found.append(sums) or sums)
    known = [found[0] + found[2], found[1] + found[3]]
    for rows, share in zip(pieces, (0.4, 0.6)):
        loss = dice_cross_entropy(network(image[rows]), target[rows], dice,
                                  pool=run_distributed.WholeSums(share, known))[0]
        assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
        (share * loss).backward()
    for ours, theirs in zip(network.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5 * float(theirs.grad.abs().max()))


def test_batch_norm_of_all_is_that_of_torch_where_all_samples_are_here(monkeypatch):
    """With a sum over 'two' processes that hold the same samples: statistics and gradients of one of them."""
    monkeypatch.setattr(run_distributed, "world", lambda: 2)
    monkeypatch.setattr(run_distributed, "total", lambda x: 2 * x.detach())
    ours, theirs = run_distributed.BatchNormOfAll(3), nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5) * 3 + 100
    both = torch.cat([x, x]).requires_grad_()
    one = x.clone().requires_grad_()
    weight = torch.randn(4, 3, 5, 5)
    y = ours(one)
    (y * weight).sum().backward()
    z = theirs(both)
    (z * torch.cat([weight, weight])).sum().backward()
    assert torch.allclose(y, z[:4], atol=1e-4)
    assert torch.allclose(ours.running_mean, theirs.running_mean, rtol=1e-5)
    assert torch.allclose(ours.running_var, theirs.running_var, rtol=1e-4)
    assert torch.allclose(one.grad, both.grad[:4], atol=1e-4)
