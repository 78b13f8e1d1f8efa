"""What a run was made from: remembered by the next command, named when it changes, accepted where it moved.

The hints ("next: ...") are run as they are printed, one after the other, on a dataset whose path has blanks,
quotes and umlauts. Presets are cut to a step or two, so that a chain takes seconds; nothing else is changed.
"""

import contextlib
import csv
import hashlib
import importlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_factory import save, write_csv, write_dataset
from PIL import Image

import generate
import train_gan
import train_ldm
import train_seg
from her2 import run_provenance
from her2.data_folder import load_dataset
from her2.run_errors import UserError, command
from her2.run_provenance import data_hashes, differences, file_hash, file_hashes
from run_kill_harness import one_thread

ROOT = Path(__file__).resolve().parents[1]
DATA = "Meine Sch\u00e4tze/D'Arcy (2)"
SMALL = dict(steps=2, batch=2, width=8, patch=32, save_every=1, log_every=1)
TINY = ((train_gan.PRESETS, dict(SMALL, hidden=8, z_dim=4)),
        (train_ldm.AUTOENCODER_PRESETS, dict(SMALL, codes=16, disc_start=1, disc_width=8)),
        (train_ldm.DIFFUSION_PRESETS, dict(SMALL, sample_steps=2)),
        (generate.PRESETS, dict(steps=2)), (train_seg.PRESETS, SMALL))


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Presets that take a moment, and one thread: networks of a few channels are slower on more."""
    with one_thread(), pytest.MonkeyPatch.context() as monkeypatch:
        for presets, small in TINY:
            monkeypatch.setitem(presets, "tiny", small)
        yield


def stale(folder, cache="cache", **moved) -> list[str]:
    """What the run in `folder` was made from and is another now: ["data: masks/a.png changed"]; [] = nothing.

    `moved` {field: path} says where its inputs lie by now, if not there."""
    record = run_provenance.read_record(folder)
    found, seed = [], record["fields"].get("split_seed", 0)
    for field, known in record["inputs"].items():
        path = moved.get(field) or run_provenance.locate(folder, field)
        if not path:
            found.append(f"{field}: nowhere")
            continue
        if "slides.csv" in known:
            now = data_hashes(load_dataset(path, seed, require=()), cache)
        else:
            now = {run_provenance.model_file(path).name: file_hash(run_provenance.model_file(path))}
        found += [f"{field}: {change}" for change in differences(known, now)]
    return found


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, with a dataset of its own."""
    monkeypatch.chdir(tmp_path)
    write_dataset(DATA, slides=4, height=64, width=64)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(root)
        write_dataset(DATA, slides=4, height=64, width=64)
        chain()
    os.replace(root, root.with_name("kept"))
    return root.with_name("kept")


@pytest.fixture
def trained(finished, tmp_path, monkeypatch):
    """The same with a run of each kind in it: CHAIN, made elsewhere and moved here with its data."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_line(words):
    """(exit status, stdout, stderr) of a command line ["train_gan.py", ...], in this process."""
    name = Path(words[0]).name.removesuffix(".py")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        command(importlib.import_module(name).main, [str(word) for word in words[1:]])
    return stop.value.code, out.getvalue(), err.getvalue()


def succeed(*words):
    status, out, err = run_line(words)
    assert status == 0, err
    return out


def hint(out) -> str:
    [line] = [line for line in out.splitlines() if "next: " in line]
    return line.split("next: ")[1]


def follow(line) -> str:
    """Run a printed hint; its stdout."""
    program, *words = shlex.split(line)
    assert program == "python"
    return succeed(*words)


def config(folder) -> dict:
    return json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))["fields"]


# ---- the next command: on the same data, complete, quoted --------------------------------------------------

@pytest.mark.skipif(os.name == "nt", reason="cmd.exe quotes differently; list2cmdline is its own oracle")
def test_every_hint_runs_as_printed_on_the_data_of_the_network(place):
    write_dataset("data/phantom-tiny", slides=3)        # what a hint without --data would fall back on
    seen = []
    for first in (["train_gan.py", "--out", "my runs/gan 1"],
                  ["train_ldm.py", "--stage", "autoencoder", "--out", "my runs/vq"]):
        out = succeed(*first, "--data", DATA, "--split-seed", 3, "--device", "cpu")
        while "next: " in out:
            line = hint(out)
            assert not Path(shlex.split(line)[shlex.split(line).index("--out") + 1]).exists() \
                if "--out" in line else True, f"{line}: the folder is taken"
            seen.append(Path(shlex.split(line)[1]).name)
            out = follow(line)
    assert seen == ["generate.py", "train_seg.py", "evaluate.py",
                    "train_ldm.py", "generate.py", "train_seg.py", "evaluate.py"]
    runs = [path.parent for path in place.rglob("config.json")]
    assert len(runs) == 7                               # two segmenters, two sets, three networks
    assert all(config(folder)["data"] == DATA and config(folder)["split_seed"] == 3 for folder in runs)
    assert all("phantom" not in path.read_text(encoding="utf-8") for path in place.rglob("manifest.jsonl"))
    # Once more through a real shell: the quotes are the shell's business, not ours.
    shutil.rmtree("data/synth-gan 1")
    printed = hint(succeed("train_gan.py", "--out", "other", "--data", DATA, "--device", "cpu"))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(printed + " --count 1", shell=True, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and config("data/synth-other")["data"] == DATA, done.stderr


def test_a_hint_from_the_project_folder_names_the_script_alone(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    train_gan.configuration.say_done(train_gan.Config(data="D"), "generate.py", "--model", "a b")
    printed = hint(capsys.readouterr().out)
    assert os.name == "nt" or shlex.split(printed) == [
        "python", "generate.py", "--model", "a b", "--out", "data/synth-gan", "--data", "D"]


def test_data_split_and_patch_default_to_those_of_the_network(place):
    write_dataset("data/phantom-tiny", slides=3)
    write_dataset("other", slides=4, height=64, width=64, seed=1)
    succeed("train_gan.py", "--data", "other", "--patch", 64, "--split-seed", 5, "--out", "gan")
    succeed("train_ldm.py", "--stage", "autoencoder", "--data", "other", "--patch", 64, "--split-seed", 5,
            "--out", "vq")
    succeed("train_ldm.py", "--stage", "diffusion", "--autoencoder", "vq", "--out", "ldm")
    succeed("generate.py", "--method", "gan", "--model", "gan", "--out", "synth", "--count", 1)
    succeed("generate.py", "--method", "ldm", "--model", "ldm/model.pt", "--out", "synth-2", "--count", 2)
    succeed("train_seg.py", "--synthetic", "synth-2", "--ratio", 0.5, "--out", "seg")
    succeed("generate.py", "--method", "reconstruct", "--model", "vq", "--out", "synth-vq", "--count", 2)
    for folder in ("ldm", "synth", "synth-2", "seg", "synth-vq"):
        assert (config(folder)["data"], config(folder)["split_seed"], config(folder)["patch"]) == (
            "other", 5, 64), folder
    assert Image.open("synth/images/000000.png").size == (64, 64)
    # What is given wins; a network of another size says so itself.
    succeed("generate.py", "--method", "ldm", "--model", "ldm", "--out", "synth-3", "--patch", 32, "--data",
            DATA, "--count", 1, "--split-seed", 6)
    assert (config("synth-3")["patch"], config("synth-3")["data"], config("synth-3")["split_seed"]) == (
        32, DATA, 6)


def test_the_data_are_found_from_another_folder_and_after_a_move_of_everything(place, monkeypatch):
    succeed("train_gan.py", "--data", DATA, "--out", "runs/gan")
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    write_dataset(DATA, slides=5)                       # the same name, from here, is another dataset
    succeed("generate.py", "--method", "gan", "--model", "../runs/gan", "--out", "s", "--count", 1)
    assert Path(config("s")["data"]).resolve() == place / DATA
    monkeypatch.chdir(place)
    (place / "moved").mkdir()
    for name in ("runs", Path(DATA).parts[0]):
        os.replace(name, Path("moved", name))
    succeed("generate.py", "--method", "gan", "--model", "moved/runs/gan", "--out", "s2", "--count", 1)
    assert Path(config("s2")["data"]).resolve() == place / "moved" / DATA


# ---- changed, and moved ------------------------------------------------------------------------------------

def repaint(path):
    save(path, 255 - np.array(Image.open(path)) if "images" in str(path) else
         np.where(np.array(Image.open(path)) == 1, 2, np.array(Image.open(path))).astype(np.uint8))


def stop_after(folder, step):
    """Make a finished run of two steps one that was interrupted: its checkpoint before the last."""
    os.replace(Path(folder, "last.prev.pt"), Path(folder, "last.pt"))


CHAIN = {
    "vq": ["train_ldm.py", "--stage", "autoencoder", "--data", DATA],
    "ldm": ["train_ldm.py", "--stage", "diffusion", "--autoencoder", "vq", "--data", DATA],
    "gan": ["train_gan.py", "--data", DATA],
    "synth": ["generate.py", "--method", "gan", "--model", "gan", "--data", DATA, "--count", 8],
    "seg": ["train_seg.py", "--data", DATA],
    "seg-gan": ["train_seg.py", "--data", DATA, "--synthetic", "synth", "--ratio", 1],
}


def chain(*names):
    for name in names or CHAIN:
        succeed(*CHAIN[name], "--out", name)


def refused(name):
    """The one line of a run that refuses to go on."""
    status, out, err = run_line([*CHAIN[name], "--out", name])
    *warnings, line = err.splitlines()
    assert status == 2 and line.startswith(f"error: {name}: is stale"), (out, err)
    assert all(line.startswith("warning: ") for line in warnings)
    return line


@pytest.mark.parametrize("file", ["images/roi0.png", "masks/roi1.png"])
def test_changed_pixels_are_named_and_nothing_goes_on(trained, file):
    repaint(Path(DATA, file))
    for name in CHAIN:
        assert f"data: {file} changed" in refused(name)
        assert f"data: {file} changed" in stale(name)
    stop_after("gan", 1)
    before = {path: path.read_bytes() for path in Path("gan").rglob("*") if path.is_file()}
    assert f"data: {file} changed" in refused("gan")
    assert before == {path: path.read_bytes() for path in Path("gan").rglob("*") if path.is_file()}
    # The remedy, to the letter: delete the folder and give the command again.
    shutil.rmtree("gan")
    chain("gan")
    assert stale("gan") == []


def test_a_stale_network_is_named_by_whatever_uses_it(trained):
    repaint(Path(DATA, "masks/roi0.png"))
    for line in (["train_ldm.py", "--stage", "diffusion", "--autoencoder", "vq", "--out", "new"],
                 ["generate.py", "--method", "gan", "--model", "gan", "--count", "1", "--out", "new2"],
                 ["train_seg.py", "--synthetic", "synth", "--out", "new3"],
                 ["evaluate.py", "seg", "--out", "report"]):
        status, _, err = run_line(line)
        assert status == 0 and "is stale" in err and "masks/roi0.png changed" in err, err
    assert "is stale" in Path("report/report.md").read_text(encoding="utf-8")


def test_only_what_a_stage_used_makes_it_stale(trained):
    """A test slide is nobody's input but the evaluation's; a set or a network, that of its users alone."""
    repaint(Path(DATA, "images/roi3.png"))              # the test slide
    rows = list(csv.DictReader(open(Path(DATA, "slides.csv"), encoding="utf-8")))
    write_csv(DATA, [{**row, "note": "seen"} for row in rows])      # saved again with one more column
    assert all(stale(name) == [] for name in CHAIN)
    chain()                                             # complete, all of them
    shutil.rmtree("gan")
    succeed(*CHAIN["gan"], "--seed", 1, "--out", "gan")
    assert stale("synth") == ["model: model.pt changed"] and "model: model.pt changed" in refused("synth")
    assert [name for name in CHAIN if stale(name)] == ["synth"]
    repaint(Path("synth/images/000001.png"))
    assert [name for name in CHAIN if stale(name)] == ["synth", "seg-gan"]
    assert "synthetic: images/000001.png changed" in refused("seg-gan")
    Path("vq/model.pt").write_bytes(Path("gan/model.pt").read_bytes())
    assert [name for name in CHAIN if stale(name)] == ["ldm", "synth", "seg-gan"]


@pytest.mark.parametrize("spoil, words", [
    (lambda rows: rows[0].update(x="3"), "slides.csv changed"),
    (lambda rows: rows[0].update(split="val"), "images/roi0.png is gone"),
    (lambda rows: rows[3].update(split="train"), "images/roi3.png is new"),
])
def test_another_row_of_a_training_slide_is_a_change(place, spoil, words):
    rows = write_dataset(DATA, slides=8, height=64, width=64)
    chain("gan")
    spoil(rows)
    write_csv(DATA, rows)
    assert any(words in line for line in stale("gan")) and "slides.csv" in refused("gan")


def test_another_class_table_is_a_change(trained):
    Path(DATA, "classes.json").write_text('{"aliases": {"x": "3+"}}', encoding="utf-8")
    assert stale("gan") == ["data: classes.json changed"]
    Path(DATA, "classes.json").write_text('{"masks": "ids"}', encoding="utf-8")
    assert stale("gan") == ["data: classes.json changed"], "the same classes, but masks are read in another way"


def test_what_only_moved_is_accepted_finished_or_half_done(trained):
    bits = Path("gan/model.pt").read_bytes()
    stop_after("gan", 1)
    os.replace(DATA, "new place")
    os.replace("vq", "vq-2")
    os.replace("synth", "synth-2")
    where = {DATA: "new place", "vq": "vq-2", "synth": "synth-2"}
    for name in ("ldm", "gan", "seg", "seg-gan"):
        words = [where.get(word, word) for word in CHAIN[name]]
        succeed(*words, "--out", name)
        assert stale(name) and stale(name, data="new place", autoencoder="vq-2", synthetic="synth-2") == []
    assert Path("gan/model.pt").read_bytes() == bits
    status, _, err = run_line(["generate.py", "--method", "gan", "--model", "gan", "--count", "1",
                               "--out", "s"])
    assert status == 2 and DATA in err and "give --data" in err
    succeed("generate.py", "--method", "gan", "--model", "gan", "--count", 1, "--out", "s", "--data",
            "new place")
    # Moved and changed is another configuration, and both places are named.
    repaint("new place/images/roi0.png")
    status, _, err = run_line([*CHAIN["seg"][:2], "new place", *CHAIN["seg"][3:], "--out", "seg"])
    assert status == 2 and "'new place'" in err and DATA in err


# ---- the hashes --------------------------------------------------------------------------------------------

def test_hashes_are_those_of_the_files(place):
    dataset = load_dataset(DATA)
    found = data_hashes(dataset)
    assert set(found) == {"slides.csv", "classes.json", "images/roi0.png", "masks/roi0.png",
                          "images/roi1.png", "masks/roi1.png"}
    for name in ("images/roi0.png", "masks/roi1.png"):
        assert found[name] == hashlib.sha256(Path(DATA, name).read_bytes()).hexdigest()
    assert set(data_hashes(dataset, splits=("test",))) == {"slides.csv", "classes.json", "images/roi3.png",
                                                           "masks/roi3.png"}
    assert differences({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "4", "d": "5"}) == [
        "b changed", "c is gone", "d is new"]


def test_files_are_read_once_and_again_when_they_change(place, monkeypatch):
    read = []

    def counted(path, original=run_provenance.file_hash):
        read.append(Path(path).name)
        return original(path)

    monkeypatch.setattr(run_provenance, "file_hash", counted)
    paths = [Path(DATA, "images", f"roi{k}.png") for k in range(3)]
    first = file_hashes(paths)
    assert file_hashes(paths) == first and len(read) == 6       # just written: read again each time
    later = run_provenance.time.time() + 60
    monkeypatch.setattr(run_provenance.time, "time", lambda: later)
    assert file_hashes(paths) == file_hashes(paths) == first and len(read) == 9
    status = paths[1].stat()
    content = paths[1].read_bytes()
    paths[1].write_bytes(content[:-1] + b"x")                    # the same size, and the time put back
    os.utime(paths[1], ns=(status.st_atime_ns, status.st_mtime_ns))
    if os.name != "nt":
        assert file_hashes(paths)[1] == hashlib.sha256(content[:-1] + b"x").hexdigest() and len(read) == 10
    for damage in (b"", b"[1]", b"{", b"\xff"):
        Path("cache/hashes.json").write_bytes(damage)
        assert file_hashes(paths)[0] == first[0]


def test_a_run_of_before_records_adopts_what_is_there(trained):
    path = Path("gan/config.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({name: one for name, one in content.items() if name != "inputs"}), encoding="utf-8")
    assert stale("gan") == []
    chain("gan")
    repaint(Path(DATA, "images/roi0.png"))
    assert stale("gan") == ["data: images/roi0.png changed"]


def test_a_model_alone_needs_data(trained):
    Path("alone").mkdir()
    shutil.copy("gan/model.pt", "alone/model.pt")
    line = ["generate.py", "--method", "gan", "--model", "alone", "--patch", "32", "--count", "1", "--out",
            "s"]
    status, _, err = run_line(line)
    assert status == 2 and "alone" in err and "give --data" in err
    succeed(*line, "--data", DATA)
    with pytest.raises(UserError, match="no such run"):
        generate.run.load_model("nowhere", "gan")
