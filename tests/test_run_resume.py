"""Interruptions: killed runs end with the bits of whole ones; Ctrl-C, full disk, second process: one line.

The long version with a hundred kills is `python tests/run_kill_harness.py`.
"""

import errno
import importlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from her2 import run, run_errors
from her2.run_errors import UserError, atomic_write, command
from run_kill_harness import LOOPS, command_line, differences, half_pictures, in_process, interrupt

ROOT = Path(__file__).resolve().parents[1]
# One kill of each kind that is cheap to hit, spread over the loops; the harness takes all kinds for each.
AIMS = {"autoencoder": ["checkpoint"], "diffusion": ["training"], "GAN": ["checkpoint"],
        "segmentation": ["sample"], "generate": ["training"]}


@pytest.mark.parametrize("name", LOOPS)
def test_a_killed_run_ends_with_the_same_bits(root, name):
    hit, wrong = interrupt(name, root, f"{name}-killed", AIMS[name], 120, random.Random(0))
    assert hit.total() >= 1 and "start-up" not in hit and not wrong
    assert in_process(command_line(name, root, f"{name}-killed")) == 0
    assert differences(root / name, root / f"{name}-killed") == []


def test_the_comparison_can_fail(root):
    """Another seed gives another outcome, in everything that is compared."""
    line = [*command_line("segmentation", root, "other"), "--seed", "1"]
    assert in_process(line) == 0
    assert ({"log.jsonl", "model.pt", "samples/step000004.png"}
            <= set(differences(root / "segmentation", root / "other")))
    picture = root / "other" / "samples" / "step000004.png"
    picture.write_bytes(picture.read_bytes()[:-20])
    assert len(half_pictures(root / "other")) == 1


class Failing:
    """An open file that takes `room` bytes and then raises `error` for each further one."""

    def __init__(self, file, room, error):
        self.file, self.room, self.error = file, room, error

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise self.error
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *reason):
        self.file.close()


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("name, file, number, room, error", [
    ("diffusion", "last.new.pt", 2, 100_000, FULL), ("GAN", "model.pt", 2, 0, FULL),
    ("segmentation", "curves.png", 2, 10, FULL), ("generate", "000005.png", 1, 10, FULL),
    ("autoencoder", "last.new.pt", 3, 100_000, KeyboardInterrupt())])
def test_a_write_that_ends_halfway_loses_nothing(root, name, file, number, room, error, monkeypatch, capsys):
    """Writing number `number` of `file` ends after `room` bytes. What was there stays, the run goes on."""
    out, count, opened = f"{name}-halfway", 0, open

    def opening(path, *mode):
        nonlocal count
        count += Path(path).name.startswith(file)
        hit = Path(path).name.startswith(file) and count >= number
        return Failing(opened(path, *mode), room, error) if hit else opened(path, *mode)

    monkeypatch.setattr(run_errors, "open", opening, raising=False)
    line = command_line(name, root, out)
    status, start_of_line, words = ((2, "error:", "No space left") if error is FULL
                                    else (130, "interrupted:", "goes on"))
    assert in_process(line) == status
    told = [text for text in capsys.readouterr().err.splitlines() if text.startswith(start_of_line)]
    assert len(told) == 1 and words in told[0] and (file in told[0] or error is not FULL)
    monkeypatch.undo()
    assert not list((root / out).rglob("*.tmp"))
    whole = list((root / out).glob("last*.pt"))
    assert len(whole) == min(number - 1, 2) or name in ("generate", "segmentation")
    for path in whole:
        run.load_file(path)
    assert in_process(line) == 0
    assert differences(root / name, root / out) == []


def test_torch_and_pillow_do_not_hide_that_the_disk_is_full(tmp_path):
    """Their own errors are of other kinds; what the file said is what counts."""
    if os.name != "posix":
        return                              # no limits on the size of files there
    program = ("import resource, signal, sys, torch, numpy as np\n"
               "from her2 import run, draw\nfrom her2.run_errors import command\n"
               "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
               "state = {'a': torch.rand(10000)}\n"
               "tensor = lambda argv: run.save_model(argv[0], 'gan', {}, state)\n"
               "image = np.random.default_rng(0).integers(0, 255, (99, 99, 3), dtype=np.uint8)\n"
               "picture = lambda argv: draw.save_png(argv[0] + '/a.png', image)\n"
               "command({'tensor': tensor, 'picture': picture}[sys.argv[1]], sys.argv[2:])\n")
    for kind, file in (("tensor", "model.pt"), ("picture", "a.png")):
        done = subprocess.run([sys.executable, "-c", program, kind, str(tmp_path)], cwd=ROOT,
                              capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert file in done.stderr and "File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_is_one_line_with_the_command_that_goes_on(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["train_seg.py"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    with pytest.raises(SystemExit) as stop:
        command(interrupted, ["--out", "my runs/a"])
    assert stop.value.code == 130
    assert capsys.readouterr().err.endswith("goes on: python train_seg.py --out 'my runs/a'\n")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", importlib.util.find_spec("her2.study"))
    with pytest.raises(SystemExit):
        command(interrupted, ["--seed", "1"])
    assert capsys.readouterr().err.endswith("goes on: python -m her2.study --seed 1\n")


def test_a_complete_run_is_left_alone(root, capsys):
    before = {path: path.stat().st_mtime_ns for path in (root / "segmentation").rglob("*")}
    assert in_process(command_line("segmentation", root, "segmentation")) == 0
    assert "complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (root / "segmentation").rglob("*")} == before


def test_a_run_does_not_go_on_with_other_data_or_another_model(root, capsys):
    table = root / "data" / "slides.csv"
    before = table.read_bytes()
    try:
        table.write_bytes(before.replace(b"s1,1,train", b"s1,1,test"))
        for name in LOOPS:
            assert in_process(command_line(name, root, name)) == 2
            told = capsys.readouterr().err.splitlines()[-1]
            assert "slides.csv" in told or "was trained on s1" in told
    finally:
        table.write_bytes(before)
    other = root / "autoencoder" / "model.pt"
    before = other.read_bytes()
    try:
        content = run.load_model(other, "autoencoder")
        content["step"] = 5
        atomic_write(other, lambda file: torch.save(content, file))
        assert in_process(command_line("diffusion", root, "diffusion")) == 2
        assert "is stale" in capsys.readouterr().err
    finally:
        other.write_bytes(before)


def test_two_processes_do_not_work_in_one_folder(root, tmp_path):
    """The first one holds the folder until it ends, however it ends."""
    program = ("import sys, time\nfrom her2 import run\nrun.hold(sys.argv[1])\n"
               "print('held', flush=True)\ntime.sleep(60)\n")
    config = {"out": str(tmp_path), "steps": 5}
    run.open_run("x", SimpleNamespace(**config), "cpu", [])
    run._held.pop((tmp_path / run.LOCK).resolve()).close()
    before = (tmp_path / "config.json").read_bytes()
    first = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE,
                             text=True)
    try:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is working in this folder"):
            run.hold(tmp_path)
        for steps in (5, 6):            # one that would be lengthened too, and its configuration stays
            with pytest.raises(UserError, match="another process is working in this folder"):
                run.open_run("x", SimpleNamespace(**config | {"steps": steps}), "cpu", [], longer="yes")
        assert (tmp_path / "config.json").read_bytes() == before
    finally:
        first.kill()
        first.communicate()
    run.open_run("x", SimpleNamespace(**config | {"steps": 6}), "cpu", [], longer="yes")
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["fields"]["steps"] == 6


STUDY = """
import pathlib, sys
from her2 import study
from her2.run_errors import command
def stages(config, seed, data_hash):
    made = []
    for name in ("one", "two", "report"):
        made.append(study.Stage(name, "segmentation", ("-m", "stage", name, config.out),
                                pathlib.Path(config.out) / name, tuple(made)))
    return made
study.stages = stages
command(study.main, sys.argv[1:])
"""
STAGE = """
import pathlib, sys, time
name, out = sys.argv[1:]
with open(pathlib.Path(out) / "journal.txt", "a") as file:
    file.write(name + "\\n")
if name == "two":
    time.sleep(1)
folder = pathlib.Path(out) / name
folder.mkdir(exist_ok=True)
(folder / "results.json").write_text("{}")
"""


def test_the_study_resumes_stage_by_stage(tmp_path):
    """Killed in its second stage of three: the first is not run again, the second is, the third follows."""
    (tmp_path / "stage.py").write_text(STAGE, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    line = [sys.executable, "-c", STUDY, "--seeds", "1", "--out", str(tmp_path / "out")]
    journal = tmp_path / "out" / "journal.txt"
    first = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL)
    while first.poll() is None and not (journal.exists() and "two" in journal.read_text(encoding="utf-8")):
        time.sleep(0.01)
    first.kill()
    first.wait()
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert journal.read_text(encoding="utf-8").split() == ["one", "two", "two", "report"]
