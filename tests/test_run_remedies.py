"""What a message says to do is done to the letter, and then the command that was refused goes through.

Remedies for pictures, masks and class names are tried in test_data_formats, test_data_doubts and
test_data_annotations, those for slides under two names in test_data_duplicates, for moved and changed data in
test_run_provenance. Here are those of runs, networks and synthetic sets.
"""

import csv
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_factory import save, write_csv, write_dataset
from test_run_provenance import hint, quick, run_line, succeed

assert quick                                            # a fixture: presets of a step or two
pytestmark = pytest.mark.skipif(os.name == "nt", reason="the commands are taken apart as a POSIX shell does")
DATA = "my data"
GAN = ["train_gan.py", "--data", DATA]
PAINT = ["generate.py", "--method", "gan", "--data", DATA, "--out", "synth", "--count", "4"]
SEG = ["train_seg.py", "--data", DATA, "--synthetic", "synth", "--ratio", "0.1"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_dataset(DATA, slides=4, height=64, width=64)
    return tmp_path


def refused(words) -> str:
    status, _, err = run_line(words)
    assert status == 2, err
    return err.splitlines()[-1]


def command_in(text) -> list:
    """The words after `python` of the command that a message ends with."""
    return shlex.split(re.search(r"python (.*?)$", text)[1])


@pytest.mark.parametrize("line", [PAINT, [*PAINT[:2], "ldm", *PAINT[3:]],
                                  ["train_ldm.py", "--stage", "diffusion", "--data", DATA, "--out", "new"]])
def test_a_missing_network_is_made_by_the_command_that_is_named(place, line):
    """One after the other: the diffusion model asks for its autoencoder in turn."""
    waiting = [line]
    while waiting:
        assert len(waiting) < 5
        status, _, err = run_line(waiting[-1])
        if status == 0:
            waiting.pop()
        else:
            assert "make it with: " in err
            waiting.append(command_in(err))


def test_an_interrupted_synthetic_set_goes_on_with_its_command(place):
    succeed(*GAN)
    succeed(*PAINT)
    whole = Path("synth/slides.csv").read_bytes()
    Path("synth/slides.csv").unlink()
    Path("synth/images/000001.png").unlink()
    for line in (SEG, ["her2.data", "synth"]):
        told = refused(line)
        assert "--index" not in told and "not finished" in told
    succeed(*command_in(told))
    assert Path("synth/slides.csv").read_bytes() == whole and Path("synth/images/000001.png").exists()
    manifest = Path("synth/manifest.jsonl").read_bytes()
    for spoil in (Path.unlink, lambda path: path.write_bytes(manifest[:-30])):
        spoil(Path("synth/manifest.jsonl"))
        Path("synth/slides.csv").unlink()
        succeed(*PAINT)
        assert Path("synth/manifest.jsonl").read_bytes() == manifest
    Path("synth/manifest.jsonl").unlink()
    succeed(*PAINT)
    assert Path("synth/manifest.jsonl").read_bytes() == manifest
    succeed(*SEG)


def test_a_set_of_a_given_size_is_trained_on_with_the_command_that_is_named(place):
    succeed(*GAN)
    succeed(*shlex.split(hint(succeed(*PAINT)))[1:])


def test_a_set_too_small_for_the_ratio_is_made_larger(place):
    succeed(*GAN)
    succeed(*PAINT)
    longer = [*SEG[:-1], "2"]
    told = refused(longer)
    assert "give a lower --ratio, or delete the folder" in told
    shutil.rmtree("synth")
    succeed(*command_in(told))
    succeed(*longer)


def test_a_set_of_a_slide_that_is_now_held_out_is_made_again(place):
    rows = write_dataset(DATA, slides=8, height=64, width=64)
    succeed(*GAN)
    succeed(*PAINT[:-1], "8")
    lines = Path("synth/manifest.jsonl").read_text(encoding="utf-8").splitlines()
    used = json.loads(lines[0])["source_slide"]
    write_csv(DATA, [{**row, "split": "test" if row["slide"] == used else row["split"]} for row in rows])
    told = refused(SEG)
    assert used in told and "delete synth" in told
    shutil.rmtree("synth")
    told = refused(command_in(told))                    # the network has seen the slide as well, and says so
    assert "train it on this dataset" in told
    shutil.rmtree("runs/gan")
    succeed(*GAN)
    succeed(*PAINT)
    succeed(*SEG)


def test_more_flags_than_both_stages_share(place):
    told = refused(["train_ldm.py", "--data", DATA, "--steps", "1"])
    assert "add --stage autoencoder or --stage diffusion" in told
    for stage in ("autoencoder", "diffusion"):
        succeed("train_ldm.py", "--stage", stage, "--data", DATA, "--steps", "1")


def test_too_few_slides(place):
    rows = write_dataset(DATA, slides=4, height=64, width=64, split=False)
    write_csv(DATA, rows[:2])
    assert "needs 3 slides, found 2; add slides" in refused(GAN)
    write_csv(DATA, rows[:3])
    succeed(*GAN)


def test_no_tumor_in_training_names_the_command_that_tells_why(place):
    for k in (0, 1):
        save(f"{DATA}/masks/roi{k}.png", np.zeros((64, 64), np.uint8))
    told = refused(GAN)
    assert "what is left out and why" in told
    status, _, err = run_line(shlex.split(re.search(r"python -m (.*?)\)", told)[1]))
    assert status == 2 and "no tumor pixel in the split 'train'" in err


def test_a_damaged_record_is_removed(place):
    succeed(*GAN)
    Path("runs/gan/config.json").write_text("[]", encoding="utf-8")
    assert "restore or remove the file" in refused(PAINT)
    Path("runs/gan/config.json").unlink()
    succeed(*PAINT, "--patch", "32")


def test_weights_that_are_not_finite_are_trained_again(place):
    succeed(*GAN)
    model = torch.load("runs/gan/model.pt", weights_only=True)
    next(value for value in model["state_dict"].values() if value.ndim == 4).fill_(float("nan"))
    torch.save(model, "runs/gan/model.pt")
    assert "not finite" in refused(PAINT) and "train it again" in refused(PAINT)
    shutil.rmtree("runs/gan")
    succeed(*GAN)
    succeed(*PAINT)


def test_a_model_of_another_kind_names_the_command_for_the_right_one(place):
    succeed("train_ldm.py", "--stage", "autoencoder", "--data", DATA)
    told = refused([*PAINT, "--model", "runs/vq"])
    succeed(*command_in(told), "--data", DATA)
    succeed(*PAINT, "--model", "runs/gan")


def test_slides_csv_is_written_by_index_when_it_is_missing(place):
    table = list(csv.DictReader(open(f"{DATA}/slides.csv", encoding="utf-8")))
    Path(DATA, "slides.csv").unlink()
    assert "--index" in refused(GAN)
    succeed("her2.data", DATA, "--index")
    again = list(csv.DictReader(open(f"{DATA}/slides.csv", encoding="utf-8")))
    assert [row["image"] for row in again] == [row["image"] for row in table]
    succeed(*GAN)
