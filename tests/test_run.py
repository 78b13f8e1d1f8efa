"""Run folder, checkpoints, configuration, EMA: what must hold when a process dies or a file is damaged."""

import json
import math
import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch

from her2 import run_config as configuration
from her2 import run, run_log, run_training
from her2.run_errors import UserError, atomic_write


@dataclass
class Config:
    out: str = ""                   # run folder
    preset: Literal["tiny", "big"] = "tiny"  # sizes,
                                    # on two lines
    steps: int = 5                  # optimiser steps
    lr: float = 0.1                 # step size
    flips: bool = True              # mirror
    factor: Literal[4, 8] = 4       # halvings


PRESETS = {"tiny": {}, "big": dict(steps=50, lr=0.01)}


def parse(*argv):
    return configuration.parse(Config, PRESETS, argv, "Text.", "prog")


def test_dataclass_then_preset_then_flag():
    assert parse() == Config()
    assert parse("--preset", "big").steps == 50
    assert parse("--factor", "8").factor == 8
    assert (parse("--preset", "big", "--steps", "7", "--no-flips")
            == Config(preset="big", steps=7, lr=0.01, flips=False))


@pytest.mark.parametrize("argv", [["--steps", "0"], ["--steps", "many"], ["--lr", "nan"], ["--lr", "-1"],
                                  ["--preset", "huge"], ["--factor", "5"], ["--unknown", "1"],
                                  ["--step", "1"], ["stray"]])
def test_bad_flags_are_one_line(argv):
    with pytest.raises(UserError) as error:
        parse(*argv)
    assert "\n" not in str(error.value) and len(str(error.value)) > 10


def test_every_field_has_its_help(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "sizes, on two lines" in text and "optimiser steps [5; big: 50]" in text and "--no-flips" in text
    assert set(configuration.field_help(Config)) == set(vars(Config()))


def test_preset_with_an_unknown_key_is_a_defect():
    with pytest.raises(TypeError, match="stepz"):
        configuration.parse(Config, {"tiny": {"stepz": 1}}, [], "", "tool")


def test_run_folder_belongs_to_one_configuration(tmp_path):
    folder = run.open_run("a.py", Config(out=str(tmp_path / "r")), "cpu", ["a.py"])
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert written["fields"]["steps"] == 5 and written["versions"]["torch"] == torch.__version__
    run.open_run("a.py", Config(out=str(tmp_path / "r")), "cpu", ["a.py"])
    with pytest.raises(UserError, match=r"steps: 5 -> 6"):
        run.open_run("a.py", Config(out=str(tmp_path / "r"), steps=6), "cpu", ["a.py"])
    with pytest.raises(UserError, match="holds a run of a.py, not of b.py"):
        run.open_run("b.py", Config(out=str(tmp_path / "r")), "cpu", ["b.py"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(UserError, match="not empty"):
        run.open_run("a.py", Config(out=str(tmp_path / "other")), "cpu", ["a.py"])


def save(folder, step):
    net = torch.nn.Linear(300, 1, bias=False)
    torch.nn.init.constant_(net.weight, float(step))
    run.save_checkpoint(folder, {"net": net, "extra": torch.tensor([step, 7])}, step=step)


def load(folder) -> int:
    """The step of the checkpoint that is loaded (0: a new run), once all of it is seen to be of that step."""
    net = torch.nn.Linear(300, 1, bias=False)
    extra = torch.zeros(2, dtype=torch.long)
    step = run.load_checkpoint(folder, {"net": net, "extra": extra})
    if step:
        assert (net.weight == step).all() and extra.tolist() == [step, 7]
    return step


def test_checkpoint_survives_a_death_between_the_two_renames(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert load(tmp_path) == 2
    (tmp_path / "last.pt").unlink()                     # killed after last -> prev, before new -> last
    assert load(tmp_path) == 1
    assert load(tmp_path / "nothing here") == 0


def test_truncated_checkpoint_falls_back(tmp_path, capsys):
    save(tmp_path, 1)
    save(tmp_path, 2)
    whole = (tmp_path / "last.pt").read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "last.pt").write_bytes(whole[:length])
        assert load(tmp_path) == 1
        assert "last.pt" in capsys.readouterr().err
    assert not (tmp_path / "last.pt").exists()          # moved aside
    (tmp_path / "last.prev.pt").write_bytes(b"")
    with pytest.raises(UserError, match="no whole checkpoint"):
        load(tmp_path)


def test_every_flipped_bit_is_noticed_or_harmless(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    whole, rng, noticed = (tmp_path / "last.pt").read_bytes(), random.Random(0), 0
    # The one before stays whole throughout: a damaged last.pt is moved aside, never over it.
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        (tmp_path / "last.pt").write_bytes(damaged)
        step = load(tmp_path)
        assert step in (1, 2)
        noticed += step == 1
    assert noticed > 30                             # the flips in the tensor's 1200 bytes alone are that many


def test_newer_format_and_other_files_are_refused(tmp_path):
    atomic_write(tmp_path / "model.pt", lambda f: torch.save({"format": run.FORMAT + 1, "kind": "gan"}, f))
    with pytest.raises(UserError, match="newer version"):
        run.load_model(tmp_path, "gan")
    run.save_model(tmp_path, "segmenter", {}, {"w": torch.ones(1)})
    with pytest.raises(UserError, match="'segmenter', needed is 'gan'"):
        run.load_model(tmp_path, "gan")
    (tmp_path / "model.pt").write_bytes(b"\x80\x04not a model")
    with pytest.raises(UserError, match="damaged"):
        run.load_model(tmp_path, "gan")
    with pytest.raises(UserError, match="train_gan.py"):
        run.load_model(tmp_path / "absent", "gan")


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from a file was run')",))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    atomic_write(tmp_path / "model.pt", lambda f: torch.save({"format": 1, "x": Evil()}, f))
    with pytest.raises(UserError, match="plain tensors"):
        run.load_file(tmp_path / "model.pt")


def test_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    atomic_write(tmp_path / "a.txt", "old")

    def breaks(file):
        file.write(b"half of the n")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        atomic_write(tmp_path / "a.txt", breaks)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "old"


def test_log_is_cut_back_to_the_checkpoint(tmp_path):
    log = run_log.Log(tmp_path, 0)
    for step in (10, 20, 30):
        log.record(step, loss=1 / step, missing=None)
    with open(tmp_path / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 40, "lo')                  # killed while writing
    assert [r["step"] for r in run_log.Log(tmp_path, 20).records()] == [10, 20]
    assert run_log.Log(tmp_path, 20).records()[0] == {"step": 10, "loss": 0.1, "missing": None}


def test_ema_closed_form():
    """Constant weights p after start p0: mean = p + (p0 - p) * product of d_n = min(d, (1+n) / (10+n))."""
    net = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(net.weight, 5.0)
    ema = run_training.EMA(net, 0.3)
    torch.nn.init.constant_(net.weight, 2.0)
    for _ in range(6):
        ema.update(net)
    product = math.prod(min(0.3, (1 + n) / (10 + n)) for n in range(1, 7))
    assert float(ema.module.weight) == pytest.approx(2 + 3 * product, rel=1e-6)


def test_learning_rate_warms_up_then_follows_the_schedule():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0)

    def rate(step, schedule):
        config = SimpleNamespace(lr=2.0, warmup=10, steps=110, schedule=schedule)
        run_training.set_learning_rate(optimizer, config, step)
        return optimizer.param_groups[0]["lr"]

    assert [rate(s, "constant") for s in (0, 4, 9, 10, 109)] == pytest.approx([0.2, 1.0, 2.0, 2.0, 2.0])
    assert [rate(s, "cosine") for s in (4, 10, 60, 110)] == pytest.approx([1.0, 2.0, 1.0, 0.0], abs=1e-9)


def losses_of(tmp_path, scaler=None):
    net = torch.nn.Linear(2, 2)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    return net, run_log.Losses(tmp_path, {"net": net, "scaler": scaler})


def test_divergence_stops_the_run_with_a_diagnosis_of_the_first_bad_step(tmp_path):
    net, losses = losses_of(tmp_path)
    losses.end(3, ["a.png"], loss=torch.tensor(1.0), grad_norm=torch.tensor(2.0))
    losses.end(4, ["a.png"], loss=torch.tensor(0.5), grad_norm=torch.tensor(0.0))
    assert losses.read() == losses.read() == {"loss": 0.5, "grad_norm": 0.0}
    net.bias.grad[1] = math.nan
    losses.end(5, ["b.png"], loss=torch.tensor(1.0), grad_norm=torch.tensor(math.nan))
    losses.end(6, ["c.png"], loss=torch.tensor(math.nan), grad_norm=torch.tensor(math.nan))
    with pytest.raises(UserError, match="grad_norm not finite at step 5"):
        losses.read()
    told = json.loads((tmp_path / "diagnosis.json").read_text(encoding="utf-8"))
    assert (told["largest_gradient"]["parameter"] == "net.bias" and told["batch"] == ["b.png"]
            and told["step"] == 5)


def test_parts_of_a_step_add_up(tmp_path):
    _, losses = losses_of(tmp_path)
    losses.add(0.25, loss=torch.tensor(8.0))
    losses.add(0.75, loss=torch.tensor(4.0), late=torch.tensor(2.0))
    losses.end(7, ["a.png"], grad_norm=torch.tensor(1.0))
    assert losses.read() == {"loss": 5.0, "late": 1.5, "grad_norm": 1.0}


def test_weights_that_are_not_finite_are_never_saved_in_silence(tmp_path):
    """A finite gradient times a huge learning rate: losses and norms were fine up to here."""
    net, losses = losses_of(tmp_path)
    losses.end(3, ["a.png"], loss=torch.tensor(1.0))
    torch.nn.init.constant_(net.bias, math.inf)
    with pytest.raises(UserError, match="weights not finite at step 3"):
        losses.read()


def test_infinite_gradients_are_the_scalers_business_under_fp16(tmp_path):
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    _, losses = losses_of(tmp_path, scaler)
    losses.end(3, ["a.png"], loss=torch.tensor(1.0), grad_norm=torch.tensor(math.inf))
    assert losses.read()["grad_norm"] == math.inf
    losses.end(4, ["a.png"], loss=torch.tensor(math.inf), grad_norm=torch.tensor(math.inf))
    with pytest.raises(UserError, match="loss not finite at step 4"):
        losses.read()
    _, losses = losses_of(tmp_path, torch.amp.GradScaler("cpu", init_scale=0.5, enabled=True))
    losses.end(3, ["a.png"], loss=torch.tensor(1.0), grad_norm=torch.tensor(math.inf))
    with pytest.raises(UserError, match="grad_norm not finite at step 3"):
        losses.read()


def test_torch_keeps_32_bits_of_a_seed_and_numpy_all():
    """What run_seeds.py says about keys that share their numbers."""
    def drawn(seed):
        return torch.rand(4, generator=torch.Generator().manual_seed(seed)).tolist()

    assert drawn(2**40 + 5) == drawn(5) != drawn(6)
    assert np.random.default_rng(2**40 + 5).random() != np.random.default_rng(5).random()
