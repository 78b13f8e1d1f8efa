"""More that a user can get wrong, a table as in test_run_bad_input: what stands inside of the right files.

model.pt of every kind with wrong shapes, types and values; config.json, split.json, manifest.jsonl,
slides.csv, classes.json with wrong content; files of the wrong kind in each role; flags that contradict each
other or the data. Exit status 2, one line that names file and remedy, nothing written.
"""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_factory import save, write_csv
from test_run_bad_input import (AGAIN, GAN, LDM, PAINT, SEG, SYNTH, VQ, WITH, add, contents, edit_config,
                                edit_model, manifest, one_thread, run_line, table_row, template, workplace)

from her2 import run
from her2.data_classes import DEFAULT_CLASSES
from her2.run_errors import atomic_write

assert one_thread and template and workplace            # fixtures, found by their names
EVAL = ["evaluate.py", "seg", "--out", "new"]
CHECK = ["her2.data", "data", "--out", "new.png"]
PREDICT = ["her2.predict", "data/images", "--model", "seg", "--out", "new", "--device", "cpu"]
CASES = {}


def case(name, line, words, spoil=None):
    assert name not in CASES, name
    CASES[name] = line, [words] if isinstance(words, str) else words, spoil or (lambda: None)


# ---- model.pt: the right kind, the wrong content -----------------------------------------------------------

def edit_weights(folder, function):
    """Change the state_dict of a model.pt: function(dict of tensors) -> dict of tensors."""
    def spoil():
        content = torch.load(Path(folder, "model.pt"), weights_only=True)
        content["state_dict"] = function(content["state_dict"])
        atomic_write(Path(folder, "model.pt"), lambda file: torch.save(content, file))
    return spoil


def first(function):
    def change(weights):
        name = next(name for name, value in weights.items() if value.ndim == 4)
        return {**weights, name: function(weights[name])}
    return change


BY_KIND = {"ldm": PAINT, "gan": [*SYNTH, "--method", "gan", "--model", "gan"], "vq": LDM,
           "seg": EVAL, "seg predict": PREDICT}
for kind, line in BY_KIND.items():
    folder = kind.split()[0]
    for name, words, function in (
            ("a tensor of another shape", ["do not fit", folder], first(lambda w: w[..., None])),
            ("a tensor too few", ["do not fit", folder], lambda ws: dict(list(ws.items())[:-1])),
            ("a tensor too many", ["do not fit", folder], lambda ws: {**ws, "extra": torch.ones(3)}),
            ("a number where a tensor is", ["do not fit", folder], lambda ws: {**ws, next(iter(ws)): 3}),
            ("a list of weights", [folder, "state_dict"], lambda ws: list(ws.values()))):
        case(f"{kind}: {name}", line, words, edit_weights(folder, function))
    case(f"{kind}: NaN weights", line, ["not finite", folder],
         edit_weights(folder, first(lambda w: w * float("nan"))))
    case(f"{kind}: kwargs is a list", line, [folder, "kwargs"], edit_model(folder, kwargs=[1]))
for name, line, words, spoil in (
        ("format is a text", PAINT, ["model.pt", "not written by this project"], edit_model("ldm",
         format="1")),
        ("no format", PAINT, ["model.pt", "not written by this project"], edit_model("ldm", format=None)),
        ("schedule of another version", PAINT, ["ldm", "Schedule"], edit_model("ldm", schedule={"steps": 9})),
        ("schedule of a negative length", PAINT, ["ldm", "Schedule"], edit_model("ldm", schedule={"T": -5})),
        ("no classes", PAINT, ["ldm", "class table"], edit_model("ldm", classes=None)),
        ("split is a list", PAINT, ["model.pt", "split"], edit_model("ldm", split=["s0"])),
        ("autoencoder is a path", PAINT, ["model.pt", "autoencoder"], edit_model("ldm", autoencoder="vq")),
        ("autoencoder inside is empty", PAINT, ["ldm", "VQAutoencoder"], edit_model("ldm", autoencoder={})),
        ("segmenter of no classes", EVAL, ["seg", "class"], edit_model("seg", classes=None)),
        ("segmenter of a number of classes", EVAL, ["seg", "class"], edit_model("seg", classes=6))):
    case(f"model.pt: {name}", line, words, spoil)


# ---- config.json, split.json -------------------------------------------------------------------------------

def fields(**changes):
    return lambda content: {**content, "fields": {**content["fields"], **changes}}


def inputs(value):
    return lambda content: {**content, "inputs": value}


for name, line, words, spoil in (
        ("config.json of the autoencoder: data is a list", [*LDM[:3], "--autoencoder", "vq", "--out", "new"],
         ["config.json", "data"], edit_config("vq", fields(data=["data"]))),
        ("config.json of the autoencoder: split_seed is a text", LDM, ["config.json", "split_seed"],
         edit_config("vq", fields(split_seed="one"))),
        ("config.json of the autoencoder: patch is null", LDM, ["config.json", "patch"],
         edit_config("vq", fields(patch=None))),
        ("config.json of the autoencoder: patch is true", LDM, ["config.json", "patch"],
         edit_config("vq", fields(patch=True))),
        ("config.json of the autoencoder: out is a number", [*LDM[:3], "--autoencoder", "vq", "--out", "new"],
         ["config.json", "out"], edit_config("vq", fields(out=1))),
        ("config.json of the autoencoder: cwd is a list", [*LDM[:3], "--autoencoder", "vq", "--out", "new"],
         ["config.json", "cwd"], edit_config("vq", lambda c: {**c, "cwd": []})),
        ("config.json of the autoencoder: is cut", LDM, ["config.json", "JSON"],
         add("vq/config.json", b'{"fields": {')),
        ("config.json of the autoencoder: is a list", LDM, ["config.json", "fields"],
         add("vq/config.json", b"[]")),
        ("config.json of the autoencoder: UTF-16", LDM, ["config.json", "UTF-8"],
         add("vq/config.json", "{}".encode("utf-16"))),
        ("the data of the autoencoder are gone", ["train_ldm.py", "--stage", "diffusion", "--autoencoder",
                                                  "vq", "--out", "new"], ["gone", "--data"],
         edit_config("vq", fields(data="gone"))),
        ("the patch of the autoencoder does not fit", ["train_ldm.py", "--stage", "diffusion",
         "--autoencoder",
                                                       "vq", "--mult", "1,2,4", "--out", "new"], "--patch",
         edit_config("vq", fields(patch=24))),
        ("a model without config.json and no --data", ["generate.py", "--method", "gan", "--model", "gan",
                                                       "--out", "new"], ["gan", "config.json", "--data"],
                                                        None),
        ("the inputs are a list", AGAIN, ["config.json", "inputs"], edit_config("seg", inputs([1]))),
        ("the inputs of a field are a list", AGAIN, ["config.json", "inputs"], edit_config("seg", inputs({"data": []}))),
        ("the inputs of a field are a number", AGAIN, ["config.json", "inputs"], edit_config("seg", inputs({"data": 1}))),
        ("an input of before", AGAIN, ["images/old.png is gone"],
         edit_config("seg", inputs({"data": {"images/old.png": "0"}}))),
        ("a mask was corrected", AGAIN, ["seg: is stale", "masks/roi0.png changed"],
         lambda: save("data/masks/roi0.png", np.ones((50, 60), np.uint8))),
        ("an image was exchanged", AGAIN, ["seg: is stale", "images/roi1.png changed"],
         lambda: save("data/images/roi1.png", np.random.default_rng(9).integers(0, 256, (50, 60, 3),
          np.uint8))),
        ("split.json is a list", EVAL, ["split.json"], add("seg/split.json", b"[]")),
        ("split.json with another word", EVAL, ["split.json"], add("seg/split.json",
         b'{"slides": {"s0": "x"}}')),
        ("split.json is gone", EVAL, ["split.json"], lambda: Path("seg/split.json").unlink()),
        ("split.json is a picture", EVAL, ["split.json"], add("seg/split.json", b"\x89PNG\r\n\x1a\n")),
        ("config.json of the run: steps is a text", EVAL, ["config.json", "steps"],
         edit_config("seg", fields(steps="5"))),
        ("config.json of the run: synthetic is a number", EVAL, ["config.json", "synthetic"],
         edit_config("seg", fields(synthetic=5))),
        ("config.json of the run: ratio is a text", EVAL, ["config.json", "ratio"],
         edit_config("seg", fields(ratio="1"))),
        ("config.json of the run: its synthetic set is gone", EVAL, ["nowhere"],
         edit_config("seg", fields(synthetic="nowhere")))):
    case(f"records: {name}", line, words, spoil)


# ---- slides.csv, classes.json: what no reader can guess ----------------------------------------------------

def rows_of(function):
    """Change the rows of data/slides.csv: function(list of dicts) -> list of dicts."""
    def spoil():
        write_csv("data", function(list(csv.DictReader(open("data/slides.csv", encoding="utf-8")))))
    return spoil


def double(source, target):
    return lambda: shutil.copy(f"data/{source}", f"data/{target}")


def classes(value):
    return lambda: run.write_json("data/classes.json", value)


def row(k, **changes):
    return {**DEFAULT_CLASSES.to_json()[k], **changes}


TABLE = DEFAULT_CLASSES.to_json()
for name, line, words, spoil in (
        ("the same image in train and test", GAN, ["roi0.png", "roi3.png", "same image"],
         double("images/roi0.png", "images/roi3.png")),
        ("the same image in train and val", CHECK, ["roi1.png", "roi2.png", "same image"],
         double("images/roi1.png", "images/roi2.png")),
        ("slides that differ in case", SEG, ["'s0'", "'S0'"], rows_of(
            lambda rows: [*rows[:3], {**rows[3], "slide": "S0", "score": "0"}])),
        ("slides that differ in zeros", VQ, ["'s0'", "'s00'"], rows_of(
            lambda rows: [*rows[:3], {**rows[3], "slide": "s00"}])),
        ("slides that differ in a blank", CHECK, ["'s0'", "'s 0'"], rows_of(
            lambda rows: [*rows[:2], {**rows[2], "slide": "s 0"}, rows[3]])),
        ("one slide without a split column", GAN, ["needs 3 slides", "found 1"], rows_of(
            lambda rows: [{key: v for key, v in rows[0].items() if key != "split"}])),
        ("two slides without a split column", SEG, ["needs 3 slides", "found 2"], rows_of(
            lambda rows: [{key: v for key, v in one.items() if key != "split"} for one in rows[:2]])),
        ("downsample in percent", SEG, ["slides.csv", "downsample"], lambda: table_row(downsample="50%")),
        ("x in micrometres", SEG, ["slides.csv", "x is"], lambda: table_row(x="12 um")),
        ("an image that is a mask", SEG, ["masks/roi0.png", "grey"],
         lambda: table_row(image="masks/roi0.png")),
        ("an image that is the table", SEG, ["slides.csv", "ending"], lambda: table_row(image="slides.csv")),
        ("a mask that is an image", GAN, ["images/roi1.png"], lambda: table_row(mask="images/roi1.png")),
        ("a mask that is the table", GAN, ["slides.csv"], lambda: table_row(mask="slides.csv")),
        ("instances that are an image", GAN, ["images/roi1.png", "instance"],
         lambda: table_row(instances="images/roi1.png")),
        ("instances that are the mask", GAN, ["masks/roi0.png", "instance"],
         lambda: table_row(instances="masks/roi0.png")),
        ("annotations that are the class table", GAN, ["classes.json"],
         lambda: (run.write_json("data/classes.json", TABLE),
                  table_row(mask="", annotations="classes.json"))),
        ("annotations that are a model", GAN, ["a.pt"],
         lambda: (shutil.copy("gan/model.pt", "data/a.pt"), table_row(mask="", annotations="a.pt"))),
        ("an image that is a model", GAN, ["a.pt"],
         lambda: (shutil.copy("gan/model.pt", "data/a.pt"), table_row(image="a.pt"))),
        ("classes.json: one class", SEG, ["classes.json", "2 to"], classes([row(0)])),
        ("classes.json: background is tumor", SEG, ["classes.json", "background"],
         classes([row(0, tumor=True), *TABLE[1:]])),
        ("classes.json: nothing is tumor", SEG, ["classes.json", "tumor"],
         classes([{**one, "tumor": False, "variance": False} for one in TABLE])),
        ("classes.json: variance without tumor", SEG, ["classes.json", "variance"],
         classes([row(0, variance=True), *TABLE[1:]])),
        ("classes.json: a color twice", SEG, ["classes.json", "color"],
         classes([*TABLE[:5], row(5, color=TABLE[1]["color"])])),
        ("classes.json: a color by name", SEG, ["classes.json", "color"], classes([row(0, color="white")])),
        ("classes.json: an id of 1.0", SEG, ["classes.json", "whole number"],
         classes([row(0), row(1, id=1.0), *TABLE[2:]])),
        ("classes.json: tumor is 1", SEG, ["classes.json", "tumor"], classes([row(0, tumor=1)])),
        ("classes.json: a misspelt key", SEG, ["classes.json", "tumour"], classes([{**row(0),
         "tumour": True}])),
        ("classes.json: an alias with two meanings", SEG, ["classes.json", "two meanings"],
         classes([row(0, aliases=["x"]), row(1, aliases=["X"]), *TABLE[2:]])),
        ("classes.json: an alias of id 9", SEG, ["classes.json"], classes({"aliases": {"x": 9}})),
        ("classes.json: aliases are a list", SEG, ["classes.json", "aliases"], classes({"aliases": ["x"]})),
        ("classes.json: ids from 1", SEG, ["classes.json", "0, 1, 2"],
         classes([{**one, "id": one["id"] + 1} for one in TABLE])),
        ("classes.json: a name twice in other case", SEG, ["classes.json", "two meanings"],
         classes([*TABLE[:5], row(5, name="background")])),
        ("classes.json: an empty list", SEG, ["classes.json"], classes([])),
        ("classes.json: a key twice", SEG, ["classes.json", "twice"],
         add("data/classes.json", b'{"aliases": {}, "aliases": {}}'))):
    case(f"dataset: {name}", line, words, spoil)


# ---- synthetic sets ----------------------------------------------------------------------------------------

def unfinished():
    run.write_json("synth/config.json", {"script": "generate.py", "fields": {},
                                         "command": ["generate.py", "--out", "my synth"]})
    Path("synth/slides.csv").unlink()


for name, line, words, spoil in (
        ("interrupted", WITH, ["synth", "generate.py --out"], unfinished),
        ("interrupted, checked", ["her2.data", "synth", "--out", "p.png"], ["synth", "generate.py --out"],
         unfinished),
        ("too small for the ratio", [*WITH, "--ratio", "40"], ["synth", "--ratio", "--count"], None),
        ("manifest names an image twice", WITH, ["manifest.jsonl", "nothing about"],
         manifest(lambda t: "\n".join([t.splitlines()[0]] * len(t.splitlines())))),
        ("manifest in UTF-16", WITH, ["manifest.jsonl", "UTF-8"],
         lambda: Path("synth/manifest.jsonl").write_bytes("{}".encode("utf-16"))),
        ("manifest without source", WITH, ["manifest.jsonl", "line 1"],
         manifest(lambda t: t.replace('"source_slide"', '"slide"'))),
        ("manifest is a folder", WITH, ["manifest.jsonl"],
         lambda: (Path("synth/manifest.jsonl").unlink(), Path("synth/manifest.jsonl").mkdir())),
        ("manifest is empty lines", WITH, ["manifest.jsonl", "nothing about"], manifest(lambda t: "\n\n")),
        ("manifest is one list", WITH, ["manifest.jsonl", "line 1"],
         manifest(lambda t: json.dumps([json.loads(one) for one in t.splitlines()]))),
        ("the real data as synthetic", [*SEG, "--synthetic", "data"], ["data", "manifest.jsonl"], None),
        ("a run as synthetic", [*SEG, "--synthetic", "seg"], ["seg", "slides.csv"], None),
        ("a file as synthetic", [*SEG, "--synthetic", "seg/model.pt"], ["model.pt", "no such folder"], None),
        ("a slide of before", WITH, ["manifest.jsonl", "s0"], rows_of(
            lambda rows: [{**rows[0], "slide": "s9"}, *rows[1:]])),
        ("a source that is now a test slide", WITH, ["s0", "test"], rows_of(
            lambda rows: [{**rows[0], "split": "test"}, *rows[1:]]))):
    case(f"synthetic: {name}", line, words, spoil)


# ---- flags that contradict each other, the data or the model -----------------------------------------------

for name, line, words, spoil in (
        ("--steps without a stage", ["train_ldm.py", "--steps", "5"], ["--steps 5", "--stage"], None),
        ("--out without a stage", ["train_ldm.py", "--out", "new"], ["--out new", "--stage"], None),
        ("--codes in the diffusion stage", [*LDM, "--codes", "9"], ["--codes", "--help"], None),
        ("--timesteps in the autoencoder stage", [*VQ, "--timesteps", "9"], ["--timesteps", "--help"], None),
        ("--stage of no name", ["train_ldm.py", "--stage", "both"], ["--stage", "autoencoder"], None),
        ("patch larger than the images", [*SEG[:-1], "new", "--patch", "64"], ["data", "--patch"], None),
        ("a model for a method without network", [*SYNTH, "--method", "restain", "--model", "ldm"],
         ["--model", "restain"], None),
        ("the phantom's method on own data", [*SYNTH, "--method", "oracle"], ["data", "phantom"], None),
        ("new tissue on own data", [*SYNTH, "--method", "fresh"], ["data", "phantom"], None),
        ("a subtype that training does not show", [*PAINT, "--relabel-classes", "3+,LCIS/DCIS"],
         ["--relabel-classes", "not in the training slides"],
         lambda: [save(f"data/masks/roi{k}.png", np.ones((50, 60), np.uint8)) for k in range(4)]),
        ("evaluate a GAN", ["evaluate.py", "gan", "--out", "new"], ["gan"], None),
        ("evaluate an autoencoder", ["evaluate.py", "vq", "--out", "new"], ["vq"], None),
        ("evaluate a dataset", ["evaluate.py", "data", "--out", "new"], ["data"], None),
        ("generate with an autoencoder", [*SYNTH, "--method", "ldm", "--model", "vq"],
         ["vq", "'autoencoder', needed is 'diffusion'"], None),
        ("generate with a dataset", [*SYNTH, "--method", "ldm", "--model", "data"], ["data", "model.pt"],
         None),
        ("predict with a GAN", [*PREDICT[:3], "gan", *PREDICT[4:]], ["gan", "'segmenter'"], None),
        ("predict without images", ["her2.predict", "--model", "seg"], ["IMAGE"], None),
        ("predict a table", ["her2.predict", "data/slides.csv", "--model", "seg", "--out", "new"],
         ["slides.csv"], None),
        ("predict a folder of nothing", ["her2.predict", "empty", "--model", "seg", "--out", "new"],
         ["empty"],
         lambda: Path("empty").mkdir()),
        ("weights of another network as --vgg", [*GAN, "--vgg", "gan/model.pt"], ["gan/model.pt"], None),
        ("weights of another network as --lpips", [*VQ, "--lpips", "vq/model.pt"], ["vq/model.pt"], None),
        ("a folder as --init", [*SEG, "--init", "seg"], ["seg"], None),
        ("a picture as --init", [*SEG, "--init", "data/images/roi0.png"], ["roi0.png"], None),
        ("a dataset as --encoder-weights", [*SEG, "--encoder-weights", "data"], ["data"], None),
        ("--data twice: the last counts", [*SEG, "--data", "nowhere"], ["nowhere"], None),
        ("--index of a dataset", ["her2.data", "data", "--index"], ["slides.csv", "never overwritten"], None),
        ("--draft-classes over a table", ["her2.data", "data", "--draft-classes"], ["classes.json"],
         classes(TABLE)),
        ("--seed of a dataset as a word", ["her2.data", "data", "--seed", "one"], ["--seed"], None),
        ("her2.data without a folder", ["her2.data"], ["DIR"], None),
        ("her2.data of a file", ["her2.data", "data/slides.csv"], ["slides.csv", "no such folder"], None),
        ("her2.data of two folders", ["her2.data", "data", "synth"], ["synth"], None)):
    case(f"flags: {name}", line, words, spoil)


@pytest.mark.parametrize("name", CASES)
def test_one_line_that_names_file_and_remedy(name, workplace):
    line, words, spoil = CASES[name]
    spoil()
    before = contents(workplace)
    status, err = run_line(line)
    told = [text for text in err.splitlines() if not text.startswith(("note: ", "warning: "))]
    assert status == 2 and len(told) == 1 and told[0].startswith("error: "), err
    assert all(word in told[0] for word in words), (words, err)
    assert re.search(r"; |see --help|make it with", told[0]) and len(told[0]) < 1500, f"no remedy: {err}"
    assert contents(workplace) == before, f"written: {set(contents(workplace)) ^ set(before)}"


def test_there_are_enough_cases():
    assert len(CASES) >= 140
