"""All that a user can get wrong, end to end: exit status 2, one line with file and remedy, nothing written.

    python tests/test_bad_input.py          prints the number of cases per group

Each case takes valid files, spoils one thing and runs a whole command. What the single readers say about
every kind of damage is tested beside them (test_images, test_annotations, test_classes, test_data_command):
their tables of bad files go through the training scripts here. Good but odd input must be accepted, and
random damage must never be misread.
"""

import contextlib
import csv
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

from data_factory import (read_annotations, save, write_csv, write_dataset,  # noqa: E402
                          write_manifest)
from her2 import run  # noqa: E402
from her2.autoencoder import VQAutoencoder  # noqa: E402
from her2.data_classes import DEFAULT_CLASSES, load_classes  # noqa: E402
from her2.data_folder import load_dataset  # noqa: E402
from her2.denoiser import LatentDenoiser  # noqa: E402
from her2.diffusion import Schedule  # noqa: E402
from her2.run_errors import UserError, atomic_write, command  # noqa: E402
from her2.spade import SPADEGenerator  # noqa: E402
from run_kill_harness import one_thread  # noqa: E402
from test_data_annotations import BROKEN, SHAPES, WRITERS  # noqa: E402
from test_data import BAD  # noqa: E402
from test_data_images import BAD_IMAGES, BAD_INSTANCES, BAD_MASKS, RGB  # noqa: E402

DATA = ["--data", "data", "--device", "cpu", "--patch", "32", "--batch", "2", "--steps", "1"]
SEG = ["train_seg.py", *DATA, "--width", "8", "--out", "new"]
GAN = ["train_gan.py", *DATA, "--width", "8", "--out", "new"]
VQ = ["train_ldm.py", "--stage", "autoencoder", *DATA, "--width", "8", "--out", "new"]
LDM = ["train_ldm.py", "--stage", "diffusion", *DATA, "--autoencoder", "vq", "--out", "new"]
SYNTH = ["generate.py", *DATA, "--count", "2", "--out", "new"]
POSIX = os.name == "posix"
CASES = {}      # group: {name: (command line, what spoils the valid files, words that the line must hold)}


def case(group, name, line, words, spoil=None):
    table = CASES.setdefault(group, {})
    assert name not in table, f"{group}: {name} stands twice"
    table[name] = (line, spoil or (lambda: None), [words] if isinstance(words, str) else words)


def table_row(**cells):
    """Change cells of the first row (a training slide) of data/slides.csv."""
    rows = list(csv.DictReader(open("data/slides.csv", encoding="utf-8")))
    rows[0].update(cells)
    write_csv("data", rows)


# ---- slides.csv, masks, classes.json: the table of test_data_command, through the training scripts ---------

for number, (name, (spoil, file, words)) in enumerate(BAD.items()):
    def spoiled(spoil=spoil):
        shutil.rmtree("data")
        spoil(Path("data").resolve(), write_dataset("data", slides=4))
    case("tables, masks, classes", name, [SEG, GAN, VQ][number % 3],
         [file, "no tumor" if name == "no tumor in train" else words], spoiled)


# ---- pictures ----------------------------------------------------------------------------------------------

def picture(column, file, content):
    def spoil():
        Path("data", file).write_bytes(content)
        if column == "image":           # of the size that the spoiled pictures have
            save("data/m.png", np.zeros(RGB.shape[:2], np.uint8))
            table_row(image=file, mask="m.png")
        else:
            save("data/i.png", RGB)
            save("data/m.png", np.ones(RGB.shape[:2], np.uint8))
            table_row(**{"image": "i.png", "mask": "m.png", column: file})
    return spoil


for column, table in (("image", BAD_IMAGES), ("mask", BAD_MASKS), ("instances", BAD_INSTANCES)):
    for name, (file, content, words) in table.items():
        case("pictures", f"{column}: {name}", ["her2.data", "data", "--out", "new.png"], [file, words],
             picture(column, file, content))


# ---- annotations -------------------------------------------------------------------------------------------

def of_roi0(writer):
    """A writer of annotations that name the image to which they are given here, and its size."""
    return lambda shapes: writer(shapes).replace("s.tif", "roi0.png").replace("a/s.png", "roi0.png").replace(
        '"width": 24, "height": 20', '"width": 60, "height": 50')


WRITERS = {name: of_roi0(writer) for name, writer in WRITERS.items()}


def annotated(name, content):
    def spoil():
        Path("data", name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        table_row(mask="", annotations=name)
    return spoil


for name, writer in WRITERS.items():
    for kind, (ring, words) in BROKEN.items():
        if (name, kind) in (("exact.txt", "one point"), ("exact.txt", "two points"), ("asap.xml", "x is 5")):
            continue                        # a point, a box, and how XML writes every number
        case("annotations", f"{name}: {kind}", GAN, [name, words], annotated(name, writer([("2+", [ring])])))
    for kind, ring in (("all outside", [(900, 900), (950, 900), (950, 950)]),
                       ("x and y swapped", [(10, 52), (40, 52), (40, 59)]),
                       ("negative", [(-30, -30), (-5, -30), (-5, -5)])):
        case("annotations", f"{name}: {kind}", GAN, [name, "outside the image"],
             annotated(name, writer([("2+", [ring])])))
    for kind, label in (("unknown class", "Tumour"), ("empty class", "")):
        case("annotations", f"{name}: {kind}", GAN, [name, "unknown class"],
             annotated(name, writer([(label, SHAPES[0][1])])))
    whole = writer(SHAPES)
    case("annotations", f"{name}: truncated", GAN, name, annotated(name, whole[:2 * len(whole) // 3]))
    case("annotations", f"{name}: UTF-16", GAN, [name, "UTF-8"], annotated(name, whole.encode("utf-16")))
    case("annotations", f"{name}: Latin-1", GAN, [name, "UTF-8"],
         annotated(name, whole.replace("Stroma", "Gef\xe4\xdf").encode("latin-1")))

ENTITY = '<!DOCTYPE a [<!ENTITY b "{}">]>'
for name, file, content, words in (
        ("empty", "a.json", "", "empty file"), ("a number", "a.json", "5", "no known format"),
        ("nested deeply", "a.json", "[" * 100_000, "deep"),
        ("nested at the limit", "a.json", "[" * 900 + "]" * 900, "no known format"),
        ("objects nested at the limit", "a.json", '{"results":' * 900 + "1" + "}" * 900, "where a list"),
        ("nested class", "a.json",
         json.dumps({"results": [{"vector": None, "annotation_type": json.loads("[" * 800 + "]" * 800)}]}),
         "a.json"),
        ("a number of thousands of digits", "a.json", '{"results": [' + "9" * 5000 + "]}", "JSON"),
        ("another schema", "a.json", '{"shapes": [], "version": "5.0"}', "no known format"),
        ("ids twice", "a.json", WRITERS["exact.json"](SHAPES).replace('"id": 11', '"id": 10'),
         "stands twice"),
        ("null class", "a.json", WRITERS["exact.json"](SHAPES).replace('"name": "1+"', '"name": null'),
         "unknown class"),
        ("a page of several", "a.json",
         WRITERS["exact.json"](SHAPES).replace('"next": null', '"next": "http://x"'), "page"),
        ("entity", "a.xml", ENTITY.format("x") + WRITERS["asap.xml"](SHAPES), "refused"),
        ("entities of entities", "a.xml", ENTITY.format("&c;&c;") + WRITERS["asap.xml"](SHAPES), "refused"),
        ("external entity", "a.xml", '<!DOCTYPE a SYSTEM "file:///etc/passwd">' + WRITERS["asap.xml"](SHAPES),
         "refused"),
        ("unknown entity", "a.xml", WRITERS["asap.xml"](SHAPES).replace("1+", "&b;"), "not whole XML"),
        ("another XML", "a.xml", "<svg/>", "another kind"), ("nested XML", "a.xml", "<a>" * 50_000, "XML"),
        ("PNG", "a.json", b"\x89PNG\r\n\x1a\n\0", "UTF-8"),
        ("a web page", "a.geojson", "<!doctype html><p>404", "a.geojson")):
    case("annotations", name, SEG, [file, words], annotated(file, content))


# ---- flags -------------------------------------------------------------------------------------------------

for line, flags in (
        (SEG, ["--steps 0", "--steps -3", "--steps 1e3", "--batch 0", "--lr 0", "--lr nan", "--lr inf?",
               "--lr inf", "--lr 1e308",
               "--patch 0", "--patch 48", "--patch 9000", "--seed -1", "--seed 99999999999",
               "--split-seed -1", "--clip 0", "--warmup -1", "--width 4", "--dice-weight 1.5", "--jitter -1",
               "--log-every 0", "--save-every 0", "--workers -1", "--ratio -1", "--ratio nan", "--batch 1",
               "--accumulate 4 --batch 4", "--accumulate 8 --batch 4", "--device tpu", "--amp int8", "--preset huge", "--sampling best", "--dice hard",
               "--schedule step", "--nonsense 1", "stray", "--steps", "--data nowhere",
               "--data data/slides.csv", "--init nowhere.pt", "--init data/slides.csv",
               "--encoder-weights nowhere.pt", "--synthetic nowhere", "--synthetic data",
               "--synthetic synth --ratio 0", "--synthetic synth --ratio 50",
               "--init seg/model.pt --encoder-weights x"]),
        (GAN, ["--disc-lr 0", "--width 7", "--hidden 0", "--z-dim 0", "--lambda-feat -1", "--lambda-kld nan",
               "--ema 1", "--vgg nowhere.pth", "--vgg seg/model.pt", "--init seg/model.pt", "--patch 33",
               "--patch 64", "--batch 1"]),
        (VQ, ["--codes 1", "--beta 0", "--disc-weight -1", "--factor 16", "--lpips nowhere.pth",
              "--lpips seg/model.pt", "--init seg/model.pt", "--patch 40", "--disc-width 0",
              "--disc-start -1", "--blocks 0"]),
        (LDM, ["--autoencoder nowhere", "--autoencoder seg", "--autoencoder data", "--autoencoder new",
               "--timesteps 1", "--mult 1,2", "--parametrisation x0", "--loss l3", "--drop-label 1",
               "--latent-pool -1", "--sample-steps 0", "--zero-terminal-snr --parametrisation eps",
               "--parametrisation eps --no-zero-terminal-snr --init seg/model.pt", "--width 33",
               "--patch 40"]),
        (SYNTH, ["--method vae", "--model nowhere", "--model seg", "--model vq", "--model ldm --steps 20000",
                 "--ratio -1", "--count -1", "--eta 2", "--guidance -1",
                 "--model ldm --relabel-classes Background", "--model ldm --relabel-classes Tumour",
                 "--model ldm --patch 33", "--sampler euler", "--spacing odd", "--dilate -1", "--blend -1",
                 "--model ldm --count 0 --ratio 0.0001", "--method gan --model ldm",
                 "--method gan --model gan --patch 48"]),
        (["evaluate.py", "seg", "--out", "new"], ["--tile 33", "--overlap 9999", "--batch 0",
                                                  "--data nowhere", "--synthetic nowhere", "--synthetic data",
                                                  "nowhere", "no*", "data"]),
        (["her2.cluster", "data", "--out", "new"], ["--classes -3", "--classes x", "--seed -1"]),
        (["her2.phantom", "--out", "new"], ["--preset huge", "--seed x", "--out data", "--nonsense"]),
        (["her2.study", "--out", "new"], ["--ratios 0", "--ratios a", "--ratios nan", "--seeds -1", "--seeds 0",
                                          "--repeats 0", "--jobs 0", "--jobs -1", "--data nowhere", "--out data",
                                          "--preset huge"])):
    for flag in flags:
        words = [part for part in flag.split() if part.startswith("--")][-1:] or [flag]
        file = re.search(r"\b(nowhere\S*|data\S*|seg\S*|vq|synth|ldm|gan|new|no\*)$", flag)
        more = line[:3] if line[0] == "train_ldm.py" else line[:1]
        case("flags", f"{' '.join(more)} {flag}", [*line, *flag.replace("inf?", "-inf").split()],
             [file[1] if file else words[0].split("=")[0]])


# ---- run folders and models --------------------------------------------------------------------------------

def edit_model(folder, **changes):
    """Change entries of a model.pt; None removes one."""
    def spoil():
        content = torch.load(Path(folder, "model.pt"), weights_only=True)
        content.update(changes)
        content = {name: value for name, value in content.items() if value is not None}
        atomic_write(Path(folder, "model.pt"), lambda file: torch.save(content, file))
    return spoil


def edit_config(folder, function):
    def spoil():
        content = run.read_json(Path(folder, "config.json"))
        run.write_json(Path(folder, "config.json"), function(content))
    return spoil


def damage(path, function):
    return lambda: Path(path).write_bytes(function(Path(path).read_bytes()))


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1:]


def add(path, content):
    return lambda: (Path(path).parent.mkdir(parents=True, exist_ok=True), Path(path).write_bytes(content))


class Code:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from a file was run')",))


def code_inside(path):
    return lambda: torch.save({"format": 1, "kind": "gan", "x": Code()}, path)


PAINT = [*SYNTH, "--model", "ldm"]
AGAIN = [*SEG[:-1], "seg"]                      # the run that is there already, at its own configuration
for name, line, words, spoil in (
        ("out is a file", SEG, ["new", "Not a directory"], add("new", b"x")),
        ("out lies below a file", [*SEG[:-1], "data/slides.csv/x"], ["slides.csv", "folder"], None),
        ("out has a long name", [*SEG[:-1], "n" * 300], ["too long"], None),
        ("out cannot be made", [*SEG[:-1], "/proc/new" if sys.platform == "linux" else "data/slides.csv/x"],
         ["another folder"], None),
        ("out holds other files", SEG, ["new", "not empty"], add("new/thesis.txt", b"precious")),
        ("cache is a file", [*SEG, "--cache", "data/slides.csv"], ["slides.csv", "folder"], None),
        ("run of another script", [*GAN[:-1], "seg"], ["seg", "train_seg.py"], None),
        ("run of another stage", [*LDM[:-1], "vq"], ["vq", "stage autoencoder"], None),
        ("another configuration", [*AGAIN, "--lr", "0.5"], ["seg", "lr: 0.001 -> 0.5"], None),
        ("another configuration, three fields", [*AGAIN, "--seed", "3", "--width", "16"],
         ["seed: 0 -> 3", "width: 8 -> 16"], None),
        ("config.json is cut", AGAIN, ["config.json", "JSON"], damage("seg/config.json", lambda c: c[:50])),
        ("config.json is empty", AGAIN, ["config.json", "empty"], add("seg/config.json", b"")),
        ("config.json is no text", AGAIN, ["config.json", "UTF-8"], add("seg/config.json", bytes(range(256)))),
        ("config.json is a list", AGAIN, ["config.json", "fields"],
         add("seg/config.json", b"[]")),
        ("config.json without fields", AGAIN, ["seg", "no known script"],
         add("seg/config.json", b"{}")),
        ("config.json nested deeply", AGAIN, ["config.json", "too deeply"], add("seg/config.json", b"[" * 99999)),
        ("config.json with a huge number", AGAIN, ["config.json", "JSON"],
         add("seg/config.json", b"9" * 9999)),
        ("config.json is a folder", AGAIN, ["config.json", "cannot be read"],
         lambda: (Path("seg/config.json").unlink(), Path("seg/config.json").mkdir())),
        *([("config.json is a pipe", AGAIN, ["config.json", "no ordinary file"],
            lambda: (Path("seg/config.json").unlink(), os.mkfifo("seg/config.json")))] if POSIX else []),
        ("data changed since", AGAIN, ["seg: is stale", "data: slides.csv changed"],
         lambda: table_row(score="9")),
        ("checkpoint of another network", AGAIN, ["last.pt", "no checkpoint of this run"],
         lambda: atomic_write("seg/last.pt", lambda file: torch.save({"format": 1, "step": 0}, file))),
        ("checkpoint of a newer version", AGAIN, ["last.pt", "newer version"],
         lambda: atomic_write("seg/last.pt", lambda file: torch.save({"format": 99}, file))),
        ("no model.pt", PAINT, ["ldm", "model.pt"], lambda: Path("ldm/model.pt").unlink()),
        ("model is empty", PAINT, ["model.pt", "damaged"], add("ldm/model.pt", b"")),
        ("model is text", PAINT, ["model.pt", "damaged"], add("ldm/model.pt", b"hello")),
        ("model is cut", PAINT, ["model.pt", "damaged"], damage("ldm/model.pt", lambda c: c[:-1])),
        ("model has a flipped bit", PAINT, ["model.pt", "damaged"], damage("ldm/model.pt", flip)),
        ("model is a bare tensor", PAINT, ["model.pt", "not written by this project"],
         lambda: torch.save(torch.ones(2), "ldm/model.pt")),
        ("model holds code", PAINT, ["model.pt", "plain tensors"], code_inside("ldm/model.pt")),
        ("old pickle with code", [*SEG, "--init", "evil.pth"], ["evil.pth", "plain tensors"],
         lambda: torch.save({"a": Code()}, "evil.pth", _use_new_zipfile_serialization=False)),
        ("model of a newer version", PAINT, ["model.pt", "newer version"], edit_model("ldm", format=99)),
        ("model of another kind", PAINT, ["model.pt", "'gan', needed is 'diffusion'"],
         edit_model("ldm", kind="gan")),
        ("model without weights", PAINT, ["model.pt", "state_dict"], edit_model("ldm", state_dict=None)),
        ("model without schedule", PAINT, ["model.pt", "schedule"], edit_model("ldm", schedule=None)),
        ("model without autoencoder", PAINT, ["model.pt", "autoencoder"],
         edit_model("ldm", autoencoder=None)),
        ("model without its split", PAINT, ["model.pt", "split"], edit_model("ldm", split=None)),
        ("model with empty weights", PAINT, ["ldm", "do not fit"], edit_model("ldm", state_dict={})),
        ("model with unknown arguments", PAINT, ["ldm", "do not fit"],
         edit_model("ldm", kwargs={"layers": 3})),
        ("model of other classes", PAINT, ["ldm", "class table"], edit_model("ldm", classes=[])),
        ("model saw a test slide", PAINT, ["ldm", "s3", "validation or test"],
         edit_model("ldm", split={"s3": "train"})),
        ("autoencoder saw a val slide", LDM, ["vq", "s2", "validation or test"],
         edit_model("vq", split={"s2": "train"})),
        ("reconstruction saw a test slide", [*SYNTH, "--method", "reconstruct", "--model", "vq"], ["vq", "s3"],
         edit_model("vq", split={"s3": "train"})),
        ("GAN saw a test slide", [*SYNTH, "--method", "gan", "--model", "gan"], ["gan", "s3"],
         edit_model("gan", split={"s3": "train"})),
        ("evaluate: not finished", ["evaluate.py", "seg", "--out", "new"], ["seg", "step 0 of 1"],
         edit_model("seg", step=0)),
        ("evaluate: data is a number", ["evaluate.py", "seg", "--out", "new"], ["config.json", "data"],
         edit_config("seg", lambda c: {**c, "fields": {**c["fields"], "data": 5}})),
        ("evaluate: seed is a text", ["evaluate.py", "seg", "--out", "new"], ["config.json", "seed"],
         edit_config("seg", lambda c: {**c, "fields": {**c["fields"], "seed": "a"}})),
        ("evaluate: broken split.json", ["evaluate.py", "seg", "--out", "new"], ["split.json"],
         add("seg/split.json", b"{}")),
        ("evaluate: model is cut", ["evaluate.py", "seg", "--out", "new"], ["model.pt", "damaged"],
         damage("seg/model.pt", lambda c: c[:99]))):
    case("run folders and models", name, line, words, spoil)


# ---- synthetic sets ----------------------------------------------------------------------------------------

def manifest(function):
    def spoil():
        path = Path("synth/manifest.jsonl")
        path.write_text(function(path.read_text(encoding="utf-8")), encoding="utf-8")
    return spoil


WITH = [*SEG, "--synthetic", "synth"]
SOURCE = '"source_image": "images/roi0'
for name, words, spoil in (
        ("from a test slide", ["manifest.jsonl", "s3", "test"],
         manifest(lambda t: t.replace(SOURCE, SOURCE[:-1] + "3").replace('"s0"', '"s3"'))),
        ("from a val slide", ["manifest.jsonl", "s2", "val"],
         manifest(lambda t: t.replace(SOURCE, SOURCE[:-1] + "2").replace('"s0"', '"s2"'))),
        ("from an unknown slide", ["manifest.jsonl", "s9"], manifest(lambda t: t.replace('"s0"', '"s9"'))),
        ("from an unknown image", ["manifest.jsonl", "roi9"],
         manifest(lambda t: t.replace(SOURCE, SOURCE[:-1] + "9"))),
        ("from a path outside", ["manifest.jsonl", "../"],
         manifest(lambda t: t.replace(SOURCE, SOURCE.replace("images", "../images")))),
        ("no manifest", ["manifest.jsonl", "no such file"], lambda: Path("synth/manifest.jsonl").unlink()),
        ("empty manifest", ["manifest.jsonl", "nothing about"], manifest(lambda t: "")),
        ("half a manifest", ["manifest.jsonl", "nothing about"], manifest(lambda t: t.splitlines()[0])),
        ("cut line", ["manifest.jsonl", "line"], manifest(lambda t: t[:-20])),
        ("a list in the manifest", ["manifest.jsonl", "line 1"], manifest(lambda t: "[]\n" + t)),
        ("a number as source", ["manifest.jsonl", "line 1"], manifest(lambda t: t.replace('"s0"', "0"))),
        ("no slides.csv", ["synth", "generate.py again"], lambda: Path("synth/slides.csv").unlink()),
        ("image missing", ["slides.csv", "roi0.png"], lambda: Path("synth/images/roi0.png").unlink()),
        ("mask missing", ["slides.csv", "roi0.png"], lambda: Path("synth/masks/roi0.png").unlink()),
        ("image is cut", ["roi0.png", "damaged"], damage("synth/images/roi0.png", lambda c: c[:-99])),
        ("images in the split test", ["slides.csv", "test"],
         damage("synth/slides.csv", lambda c: c.replace(b",train", b",test", 1))),
        ("network saw a test slide", ["split.json", "s3"],
         add("synth/split.json", b'{"slides": {"s3": "train"}}')),
        ("broken split.json", ["split.json"], add("synth/split.json", b"[")),
        ("images too small", ["synth", "less than a patch"], lambda: [
            save(f"synth/{kind}/roi0.png", np.ones((20, 20, 3)[:size], np.uint8))
            for kind, size in (("images", 3), ("masks", 2))])):
    case("synthetic sets", name, WITH, words, spoil)
def begun_by_another_network():
    assert run_line(PAINT)[0] == 0
    Path("new/slides.csv").unlink()
    edit_model("ldm", step=2)()


case("synthetic sets", "generate: images of another checkpoint", PAINT, ["new", "model.pt changed"],
     begun_by_another_network)


# ---- the test of them all ----------------------------------------------------------------------------------

def run_line(line):
    """(exit status, stderr) of a command, in this process."""
    name = line[0].removesuffix(".py")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        command(importlib.import_module(name).main, list(line[1:]))
    return stop.value.code, err.getvalue()


@pytest.fixture(scope="module", autouse=True)
def on_one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A valid dataset, one small run of each kind with random weights, and a synthetic set."""
    root = tmp_path_factory.mktemp("template")
    torch.manual_seed(0)
    with contextlib.chdir(root) if hasattr(contextlib, "chdir") else changed_directory(root):
        write_dataset("data", slides=4, height=50, width=60)
        dataset = load_dataset("data")
        about = {"classes": dataset.classes.to_json(), "split": dataset.slides()}
        vq = VQAutoencoder(factor=4, ch=8, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=3, num_codes=8)
        ldm = LatentDenoiser(num_classes=6, z_channels=3, model_channels=32, channel_mult=(1,),
                             num_res_blocks=1, stages=2)
        ldm.set_latent_scale(1.0)
        gan = SPADEGenerator(6, 1, 4, 32, hidden=1)
        run.save_model("vq", "autoencoder", vq.config, vq.state_dict(), step=1, **about)
        run.save_model("ldm", "diffusion", ldm.config, ldm.state_dict(), step=1, schedule=Schedule().config,
                       autoencoder=run.load_model("vq", "autoencoder"), **about)
        run.save_model("gan", "gan", gan.config, gan.state_dict(), step=1, **about)
        for folder, line in (("seg", AGAIN), ("vq-run", [*VQ[:-1], "vq-run"])):
            assert run_line(line) == (0, "")
        shutil.copy("vq-run/config.json", "vq/config.json")
        shutil.copy("vq-run/.lock", "vq/.lock")
        shutil.rmtree("vq-run")
        write_dataset("synth", slides=20, height=32, width=32, split=False)
        rows = list(csv.DictReader(open("synth/slides.csv", encoding="utf-8")))
        write_csv("synth", [{**row, "slide": "s0", "score": "", "split": "train"} for row in rows])
        write_manifest("synth", [(row["image"], "images/roi0.png", "s0") for row in rows])
        shutil.rmtree("cache", ignore_errors=True)
    return root


@contextlib.contextmanager
def changed_directory(path):                # contextlib.chdir of Python 3.11
    before = os.getcwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture
def workplace(template, tmp_path, monkeypatch):
    """A copy of the template as the working directory."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()
            and "cache" not in path.parts}


@pytest.mark.parametrize("group, name", [(group, name) for group, table in CASES.items() for name in table])
def test_one_line_that_names_file_and_remedy(group, name, workplace):
    line, spoil, words = CASES[group][name]
    spoil()
    before = contents(workplace)
    status, err = run_line(line)
    assert status == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert all(word in err for word in words), (words, err)
    assert re.search(r"; |see --help|make it with", err) and len(err) < 1500, f"no remedy: {err}"
    assert (contents(workplace) == before
            or set(before) <= set(contents(workplace)) and name.startswith("evaluate")), \
        f"written: {set(contents(workplace)) ^ set(before)}"


def test_there_are_enough_cases():
    assert sum(map(len, CASES.values())) >= 150


def test_as_processes(workplace):
    """The same through the shell, a handful: no traceback on the way out either."""
    for line in (SEG, ["train_gan.py", "--steps", "0"], ["her2.phantom", "--out", "data"]):
        shutil.rmtree("data/images", ignore_errors=True)
        program = ["-m", line[0]] if line[0].startswith("her2.") else [str(ROOT / line[0])]
        done = subprocess.run([sys.executable, *program, *line[1:]], capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, (
            done.stderr)


# ---- good but odd ------------------------------------------------------------------------------------------

def odd_table(function):
    path = Path("data/slides.csv")
    path.write_bytes(function(path.read_bytes()))


ODD = {
    "byte-order mark": lambda: odd_table(lambda raw: b"\xef\xbb\xbf" + raw),
    "CRLF": lambda: odd_table(lambda raw: raw.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")),
    "blank lines and spaces": lambda: odd_table(
        lambda raw: b"\n" + raw.replace(b",", b" , ") + b"\n\n,,,,\n"),
    "capital letters": lambda: odd_table(
        lambda raw: raw.replace(b"image,", b"Image,").replace(b"train", b"Train")),
    "backslashes": lambda: odd_table(lambda raw: raw.replace(b"images/", b"images\\")),
    "unknown column": lambda: odd_table(
        lambda raw: raw.replace(b"slide,", b"slide,").replace(b"score", b"stain")),
    "quoted cells": lambda: odd_table(lambda raw: raw.replace(b"s0,", b'"s0",')),
    "classes.json with a mark": add("data/classes.json", b'\xef\xbb\xbf{"aliases": {"x": "3+"}}\r\n'),
    "umlauts": lambda: (os.replace("data/images/roi0.png", "data/images/Gef\u00e4\u00df.png"),
                        odd_table(lambda raw: raw.replace(
                            b"images/roi0", "images/Gef\u00e4\u00df".encode()))),
    "JPEG": lambda: (Image.open("data/images/roi0.png").save("data/images/roi0.jpg"),
                     table_row(image="images/roi0.jpg")),
    "TIFF": lambda: (Image.open("data/images/roi0.png").save("data/images/roi0.TIF", "TIFF"),
                     table_row(image="images/roi0.TIF")),
    "palette mask": lambda: save_palette("data/masks/roi0.png"),
    "left-over temporary file": add("new/config.json.123.tmp", b"half"),
    **{f"{name} with mark and CRLF": annotated(
        name, b"\xef\xbb\xbf" + writer(SHAPES).replace("\n", "\r\n").encode())
       for name, writer in WRITERS.items()},
    **{f"{name} of 100,000 vertices": annotated(name, writer([("2+", [[
        (30 + 20 * float(np.cos(t)), 25 + 20 * float(np.sin(t))) for t in np.linspace(0, 50, 100_000)]])]))
       for name, writer in WRITERS.items()},
}


def save_palette(path):
    picture = Image.open(path)
    picture.load()
    picture.putpalette(DEFAULT_CLASSES.colors.tobytes())
    picture.save(path)


@pytest.mark.parametrize("name", ODD)
def test_good_but_odd_is_accepted(name, workplace):
    ODD[name]()
    status, err = run_line(SEG)
    assert status == 0 and "error" not in err, err
    run.load_model("new", "segmenter")


def test_a_dataset_in_a_folder_with_blanks_and_umlauts(workplace):
    os.replace("data", "meine Sch\u00e4tze")
    assert run_line([*SEG[:2], "meine Sch\u00e4tze", *SEG[3:-1], "neuer Lauf"])[0] == 0


# ---- random damage -----------------------------------------------------------------------------------------

def mutated(content: bytes, rng) -> bytes:
    """One to three places of `content` changed, cut, doubled, or exchanged for something else."""
    content = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(len(content) + 1))
        end = at + int(rng.integers(0, 12))
        filling = [b"", rng.bytes(3), bytes(content[at:end]) * 2, b",", b"\n", b"\0", b"..", b"-", b"1e9",
                   b'"'][rng.integers(10)]
        content[at:end] = filling
        if rng.random() < 0.1:
            del content[int(rng.integers(len(content) + 1)):]
    return bytes(content)


def second_reading_of_slides(path):
    """[(image, slide, split)] by the standard library's DictReader."""
    text = path.read_bytes().decode("utf-8-sig")
    rows = [row for row in csv.reader(io.StringIO(text, newline="")) if any(cell.strip() for cell in row)]
    header = [name.strip().lower() for name in rows[0]]
    assert all(len(row) == len(header) for row in rows)
    table = [dict(zip(header, (cell.strip() for cell in row))) for row in rows[1:]]
    return [(os.path.normpath(row["image"].replace("\\", "/")), row["slide"], row.get("split", "").lower())
            for row in table]


@pytest.mark.parametrize("file", ["data/slides.csv", "data/classes.json", "data/images/roi0.png",
                                  "data/images/roi0.jpg", "data/masks/roi0.png",
                                  *(f"data/{name}" for name in WRITERS), "synth/manifest.jsonl",
                                  "ldm/model.pt", "new/config.json", "new/split.json"])
def test_random_damage_is_refused_or_read_as_another_reader_reads_it(file, workplace):
    """Never a traceback, and what is accepted means what the file says.

    slides.csv: the rows of csv.reader; classes.json: the ids, names and flags of json; annotations: every
    coordinate stands in the file as a number and every class name as text; PNG, mask, model.pt: not a bit
    differs from the whole file.
    """
    rng = np.random.default_rng(sorted(file.encode())[0] + len(file))
    path, line = Path(file), ["her2.data", "data", "--out", "p.png"]
    if file.endswith(".jpg"):
        ODD["JPEG"]()
    elif path.name in WRITERS:
        annotated(path.name, WRITERS[path.name](SHAPES))()
    elif file.endswith("classes.json"):
        run.write_json(path, DEFAULT_CLASSES.to_json())
    elif file.startswith("synth"):
        line = WITH
    elif file.startswith("ldm"):
        line = PAINT
    elif file.startswith("new"):
        assert run_line(PAINT)[0] == 0
        line = PAINT
    whole, refused, rounds = path.read_bytes(), 0, 15 if file.startswith("new") else 40
    if path.name == "model.pt":
        expected = run.load_model("ldm", "diffusion")
    if path.suffix == ".png":
        pixels = np.array(Image.open(path))
    for k in range(rounds):
        path.write_bytes(mutated(whole, rng))
        if path.name == "model.pt":             # whole runs of generate.py would only repeat this
            try:
                content = run.load_model("ldm", "diffusion")
                assert all(torch.equal(content["state_dict"][name], value)
                           for name, value in expected["state_dict"].items())
                assert all(content[name] == expected[name]
                           for name in ("kwargs", "split", "schedule", "classes"))
                continue
            except UserError as error:
                status, err = 2, f"error: {error}\n"
        else:
            status, err = run_line(line if file.startswith(("data", "new")) else [*line, "--out", f"new{k}"])
        assert status in (0, 2) and "Traceback" not in err
        if status == 2:
            refused += 1
            assert all(text.startswith(("error: ", "note: ", "warning: ")) for text in err.splitlines()), err
            continue
        if path.name == "slides.csv":
            rows = second_reading_of_slides(path)
            assert ([(os.path.normpath(roi.name), roi.slide) for roi in load_dataset("data").rois]
                    == [row[:2] for row in rows])
            assert all(split in ("", roi.split) for roi, (*_, split) in zip(load_dataset("data").rois, rows))
        elif path.name == "classes.json":
            obj = json.loads(path.read_bytes().decode("utf-8-sig"))
            obj = obj if isinstance(obj, list) else obj.get("classes", DEFAULT_CLASSES.to_json())
            assert [(c.id, c.name, c.tumor, c.variance) for c in load_classes("data").classes] == \
                [(row["id"], row["name"], row["tumor"], row["variance"]) for row in obj]
        elif path.name in WRITERS:
            text = path.read_bytes().decode("utf-8-sig")
            numbers = {float(number.replace(",", "."))
                       for number in re.findall(r"-?\d+[.,]?\d*(?:[eE][+-]?\d+)?", text)}
            for polygon in read_annotations(path, image="roi0.png")[0]:
                assert polygon.name in text or polygon.name in json.loads(f'"{polygon.name}"'), polygon.name
                assert set(np.concatenate(polygon.rings).ravel().tolist()) <= numbers
        elif path.suffix == ".png":
            assert np.array_equal(np.array(Image.open(path)), pixels), "damage that nobody noticed"
    assert refused >= 5 or file.startswith("new/"), f"{refused} of {rounds} refused"


if __name__ == "__main__":
    for group, table in CASES.items():
        print(f"{len(table):5}  {group}")
    print(f"{sum(map(len, CASES.values())):5}  bad inputs; {len(ODD)} good but odd ones are accepted")
