"""No validation or test slide reaches training: the proof by tainting them.

The whole chain runs through the real scripts three times at miniature size: autoencoder, diffusion (with new
patches and with the pool of latents), GAN, five synthetic sets, segmentation (real, mixed).
Between the first and the second time every pixel and every label of the val and test slides is exchanged for
a colour and a pattern that occur nowhere else. If anything that is trained or made depended on them (a patch,
a latent, the latent scale, a statistic of batch norm, a normalisation, a choice by the validation result)
some byte of some model or image would differ. The third time one training slide is changed instead, and
everything must differ: the comparison sees what is there to be seen.
"""

import csv
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_factory import save, write_dataset
from run_kill_harness import one_thread
from her2 import run
from her2.run_errors import command

COLOUR = (1, 254, 3)
SMALL = ["--data", "data", "--device", "cpu", "--patch", "32", "--batch", "2"]
STEPS = [*SMALL, "--steps", "4", "--save-every", "2", "--log-every", "1"]
CHAIN = {
    "vq": ["train_ldm.py", "--stage", "autoencoder", *STEPS, "--width", "8", "--codes", "16",
           "--disc-start", "1", "--disc-width", "8"],
    "ldm": ["train_ldm.py", "--stage", "diffusion", "--autoencoder", "vq", *STEPS, "--width", "8",
            "--sample-steps", "2"],
    "ldm-pool": ["train_ldm.py", "--stage", "diffusion", "--autoencoder", "vq", *STEPS, "--width", "8",
                 "--sample-steps", "2", "--latent-pool", "4"],
    "gan": ["train_gan.py", *STEPS, "--width", "8", "--hidden", "8", "--z-dim", "4"],
    **{f"synth-{method}": ["generate.py", "--method", method, "--model", model, *SMALL, *more,
                           "--count", "12"]
       for method, model, more in (("gan", "gan", []), ("ldm", "ldm", ["--steps", "2"]),
                                   ("inpaint", "ldm", ["--steps", "2", "--blend", "2", "--erase"]))},
    "seg": ["train_seg.py", *STEPS, "--width", "8"],
    "seg-mixed": ["train_seg.py", *STEPS, "--width", "8", "--synthetic", "synth-inpaint", "--ratio", "0.5"],
    "synth-reconstruct": ["generate.py", "--method", "reconstruct", "--model", "vq", *SMALL, "--count", "12"],
    "synth-restain": ["generate.py", "--method", "restain", *SMALL, "--count", "12"],
}


def spoil(folder, split) -> list:
    """Exchange image and mask of the slides of a split; returns their names."""
    with open(folder / "slides.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] in split]
    for row in rows:
        label = np.array(Image.open(folder / row["mask"]))
        stripes = np.where(np.arange(label.shape[1]) % 3 == 0, 3, 0).astype(np.uint8)
        save(folder / row["mask"], np.broadcast_to(stripes, label.shape).copy())
        save(folder / row["image"], np.full((*label.shape, 3), COLOUR, np.uint8))
    return [row["slide"] for row in rows]


def run_chain(folder, monkeypatch) -> dict:
    """{run: {file: bytes, log: records}} of all results that the chain leaves behind."""
    monkeypatch.chdir(folder)
    outcome = {}
    for name, line in CHAIN.items():
        with pytest.raises(SystemExit) as stop:
            command(importlib.import_module(line[0][:-3]).main, [*line[1:], "--out", name])
        assert stop.value.code == 0, name
        files = {path.relative_to(name).as_posix(): path.read_bytes() for path in Path(name).rglob("*")
                 if path.suffix in (".pt", ".png") and path.name != "curves.png"
                 or path.name in ("manifest.jsonl", "slides.csv", "split.json")}
        files["inputs"] = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))["inputs"]
        if (Path(name) / "log.jsonl").exists():
            records = [json.loads(text)
                       for text in (Path(name) / "log.jsonl").read_text(encoding="utf-8").splitlines()]
            files["log"] = [{key: value for key, value in record.items()
                             if key not in ("samples_per_s", "memory_mib")}
                            for record in records]
        outcome[name] = files
    return outcome


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """{"plain", "tainted", "train changed": (folder, outcome)}"""
    found = {}
    with one_thread():
        with pytest.MonkeyPatch.context() as monkeypatch:
            for name in ("plain", "tainted", "train changed"):
                folder = tmp_path_factory.mktemp("chain")
                write_dataset(folder / "data", slides=8, height=48, width=60)
                if name == "tainted":
                    assert spoil(folder / "data", ("val", "test")) == ["s2", "s3", "s6", "s7"]
                elif name == "train changed":
                    image = np.array(Image.open(folder / "data/images/roi0.png"))
                    save(folder / "data/images/roi0.png", 255 - image)
                found[name] = folder, run_chain(folder, monkeypatch)
        yield found


@pytest.mark.parametrize("name", CHAIN)
def test_held_out_slides_change_no_byte(outcomes, name):
    plain, tainted = outcomes["plain"][1][name], outcomes["tainted"][1][name]
    assert plain.keys() == tainted.keys() and {"split.json", "inputs"} < plain.keys()
    assert [file for file in plain if plain[file] != tainted[file]] == []


@pytest.mark.parametrize("name", CHAIN)
def test_training_slides_do(outcomes, name):
    plain, changed = outcomes["plain"][1][name], outcomes["train changed"][1][name]
    different = {file for file in plain if plain[file] != changed.get(file)}
    # A manifest names the network that painted; restaining has none.
    assert {"synth-restain": "images/000000.png"}.get(
        name, "manifest.jsonl" if name.startswith("synth") else "model.pt") in different
    assert "split.json" not in different
    assert name.startswith("synth") or {"log", "last.pt"} <= different


def test_the_taint_is_there_to_be_seen(outcomes):
    """Validation, which looks at these slides, gives other numbers; the colour is in the data alone."""
    plain, tainted = (outcomes[name][0] for name in ("plain", "tainted"))
    texts = [[line for line in (folder / "seg" / "log.txt").read_text(encoding="utf-8").splitlines()
              if "val Dice" in line]
             for folder in (plain, tainted)]
    assert len(texts[0]) == 2 and texts[0] != texts[1]
    assert (np.array(Image.open(tainted / "data/images/roi2.png")) == COLOUR).all()
    for path in [*(tainted / "synth-inpaint" / "images").glob("*.png"),
                 *(tainted / "seg" / "samples").glob("*.png")]:
        assert not (np.array(Image.open(path).convert("RGB")) == COLOUR).all(axis=2).any(), path


def test_manifests_and_models_name_training_slides_only(outcomes):
    folder, _ = outcomes["tainted"]
    for method in ("gan", "ldm", "inpaint"):
        lines = (folder / f"synth-{method}" / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
        assert ({json.loads(line)["source_slide"] for line in lines} <= {"s0", "s1", "s4", "s5"}
                and len(lines) == 12)
    for name, kind in (("vq", "autoencoder"), ("ldm", "diffusion"), ("gan", "gan"), ("seg", "segmenter")):
        split = run.load_model(folder / name, kind)["split"]
        assert {slide for slide, part in split.items() if part == "train"} == {"s0", "s1", "s4", "s5"}


def test_the_latent_scale_is_that_of_training_patches(outcomes):
    """A buffer of the denoiser: the same to the bit beside a taint, another with other training pixels."""
    scale = {name: float(run.load_model(folder / "ldm", "diffusion")["state_dict"]["latent_scale"])
             for name, (folder, _) in outcomes.items()}
    assert scale["plain"] == scale["tainted"] != scale["train changed"]
