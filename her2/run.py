"""The run folder: what a training run leaves behind, and how it goes on after it was interrupted.

    config.json   every field, the command line, versions, device, git commit, and the hashes of all files
                  that the result depends on (run_provenance.py)
    log.txt       what was printed                     log.jsonl   one JSON object per logged step
    last.pt       all that is needed to go on          last.prev.pt   the checkpoint before it
    model.pt      what others load: weights and the network's keyword arguments

A checkpoint is written beside the one before and only then renamed: killed at any moment, the folder holds a
whole one. It is a zip archive whose members carry a CRC-32: a truncated or bit-flipped file is noticed before
anything in it is used. All are read with weights_only=True: nothing from a file is ever executed. No random
state is stored: every random number of a loop is a function of (seed, step) (run_seeds.py).
"""

import errno
import io
import json
import math
import os
import pickle
import sys
import zipfile
import zlib
from pathlib import Path

import torch

from her2 import run_distributed
from her2.data_classes import parse_json, read_text
from her2.run_errors import UserError, atomic_write, one_line, script_line
from her2.run_provenance import REMEDY, differences, in_short, model_file, read_record, versions

try:
    import fcntl
except ImportError:
    import msvcrt                           # Windows

LOCK = ".lock"      # in every run folder
FORMAT = 1          # version of model.pt and last.pt; a newer one is refused
_held = {}          # {path: open file}; open until the process ends


def read_json(path):
    """The content of a JSON file; UserError when it is missing, not UTF-8 or not JSON."""
    return parse_json(read_text(path, REMEDY), path, REMEDY)


def write_json(path, value, indent=1) -> None:
    """UTF-8 JSON, written atomically; NaN and infinity are refused (they are not JSON)."""
    atomic_write(path, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def open_run(script: str, config, device, command, inputs=None, free=("out", "workers", "cache"),
             longer="") -> Path:
    """Create the run folder `config.out`, or check that the one there is of this very run; returns its path.
    `inputs` {field: {name: hash}}: the content that the result depends on (`input_hashes`), by the field of
    `config` that says where it lies; it may move, but not change. `free`: fields that may change between two
    starts. More `steps` are welcome where `longer` is "yes", else it says why not. UserError: another
    script's run, another configuration, other inputs, a folder in use, files that are no run."""
    folder, inputs = Path(config.out), inputs or {}
    path = folder / "config.json"
    # JSON has no infinity (--ratio inf): it is kept as its name.
    fields = {name: "inf" if value == math.inf else value for name, value in vars(config).items()}
    if not path.exists() and folder.exists() and any(
            item.suffix != ".tmp" and item.name != LOCK for item in folder.iterdir()):
        raise UserError(f"{folder}: is not empty and not a run folder; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    first = not run_distributed.rank()      # process 0 holds the folder, then looks and writes into it
    if first:
        hold(folder)
    if path.exists():
        content = check_same_run(folder, script, fields, inputs, free, longer)
    else:
        content = {"script": script, "fields": fields, "cwd": os.getcwd(), "command": list(command),
                   "device": str(device), **versions(), "inputs": inputs}
    if first:
        if content:
            write_json(path, content)
        # Of an earlier start that was killed while writing. In the folders of a study others may be at work.
        for rubbish in folder.glob("*.tmp" if script == "her2.study" else "**/*.tmp"):
            rubbish.unlink(missing_ok=True)
    return folder


def check_same_run(folder, script, fields, inputs, free, longer):
    """What config.json shall say now, None for what it says. UserError unless it is of the run that is asked
    for (`open_run`)."""
    record = read_record(folder)
    old, known = record["fields"], record["inputs"]
    if record["script"] != script:
        raise UserError(f"{folder}: holds a run of {record['script']}, not of {script}; choose another --out")
    before, now = old.get("steps"), fields.get("steps")
    lengthened = longer and None not in (before, now) and before < now
    if lengthened:
        if longer != "yes":
            raise UserError(f"{folder}: was begun with --steps {before}; {longer}, choose another --out")
        old["steps"] = now
    moved = [name for name in inputs if known.get(name) == inputs[name]]
    changes = [f"{name}: {old.get(name)!r} -> {fields.get(name)!r}" for name in sorted({*fields, *old})
               if old.get(name) != fields.get(name) and name not in (*free, *moved)]
    changes += [f"{name}: {change}" for name in inputs if name in known
                for change in differences(known[name], inputs[name])]
    if changes:
        raise UserError(f"{folder}: is stale, it was begun with something else ({in_short(changes)}); give "
                        "the old values, restore the files, or choose another --out")
    return {**record, "inputs": inputs} if lengthened or inputs and not known else None


def hold(folder) -> None:
    """Take the lock of a run folder. UserError while another process has it, for two would mix their logs and
    checkpoints. The lock is the operating system's: it ends with the process."""
    path = (Path(folder) / LOCK).resolve()
    if path in _held:
        return
    file = open(path, "ab")             # a file that nobody replaces: its lock would stay with the old one
    try:
        if os.name == "posix":
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            file.seek(1 << 30)      # Windows locks against reading too, so a byte is taken that no file has
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        file.close()
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            raise UserError(f"{folder}: another process is working in this folder; "
                            "wait until it is done, or stop it and run the same command again") from None
        print(f"note: {folder}: this file system knows no locks ({error.strerror}); "
              "do not start a second process in this folder", file=sys.stderr)
        return
    _held[path] = file


def load_file(path, own: bool = False) -> dict:
    """A file written by torch.save, to the CPU, with weights_only=True; of a zip archive the CRC-32 of every
    member is recomputed first. own: by this project, in a version that this code knows. UserError for
    anything else."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path")
    with open(path, "rb") as file:      # official weights come in the older tar format too, without checksums
        zipped = own or file.read(4) == b"PK\x03\x04"
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                if broken := archive.testzip():
                    raise zipfile.BadZipFile(f"{broken} fails its checksum")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, pickle.UnpicklingError, OSError, EOFError,
            ValueError, RuntimeError, ArithmeticError, LookupError, AttributeError, TypeError,
            AssertionError) as error:       # by what stands where a byte was
        raise UserError(f"{path}: damaged, or no file of plain tensors saved by torch "
                        f"({one_line(error)[:200]}); make it or fetch it again") from None
    if own and not (isinstance(content, dict) and content.get("format") == FORMAT):
        raise UserError(f"{path}: was not written by this project, or by a newer version of it; give a run "
                        "folder or its model.pt, or update the code")
    return content


def save(path, content: dict) -> None:
    """torch.save, atomic, by way of memory: while it writes to a file, torch turns whatever ends that (a full
    disk, Ctrl-C) into a RuntimeError about positions in an archive."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    atomic_write(path, buffer.getbuffer())


def save_checkpoint(folder, saved: dict, step: int) -> None:
    """Write last.pt: the `step`, the tensors in `saved`, and the state_dict of all else in it (networks, EMA,
    optimisers, scalers). The one before becomes last.prev.pt once the new one is whole on the disk."""
    last, fresh = Path(folder, "last.pt"), Path(folder, "last.new.pt")
    if not run_distributed.rank():
        save(fresh, {"format": FORMAT, "step": step, **{
            name: one if torch.is_tensor(one) else one.state_dict() for name, one in saved.items()}})
        if last.exists():
            last.replace(last.with_name("last.prev.pt"))
        fresh.replace(last)
    run_distributed.barrier()           # a process that has ended would take process 0 with it


def load_checkpoint(folder, saved: dict) -> int:
    """The newest whole checkpoint into all in `saved`; returns its step, 0 for a new run. A damaged one is
    named, moved aside, and the one before it is used."""
    damaged = None
    for path in filter(Path.exists, (Path(folder, "last.pt"), Path(folder, "last.prev.pt"))):
        try:
            state = load_file(path, own=True)
            for name, item in saved.items():
                load = item.copy_ if torch.is_tensor(item) else item.load_state_dict
                load(state[name])
            return state["step"]
        except UserError as error:
            if "newer version" in str(error):
                raise
            print(f"warning: {one_line(error)}; trying the checkpoint before it", file=sys.stderr)
            # Out of the way, or the next save would put it in the place of the whole one.
            damaged = path.replace(path.with_suffix(".damaged"))
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(f"{path}: is no checkpoint of this run and this version of the code "
                            f"({one_line(error)[:200]}); choose another --out") from None
    if damaged:
        raise UserError(f"{damaged}: no whole checkpoint is left; delete the run folder to start again")
    return 0


def save_model(folder, kind: str, kwargs: dict, state_dict: dict, **extra) -> None:
    """model.pt: {kind, format, kwargs, state_dict, ...}: `kwargs` rebuild the network, users need `extra`."""
    state_dict = {name: value.detach().cpu().contiguous() for name, value in state_dict.items()}
    save(Path(folder, "model.pt"),
         {"kind": kind, "format": FORMAT, "kwargs": kwargs, "state_dict": state_dict, **extra})


# The command that makes a model of a kind, and which dicts it holds besides kwargs and state_dict.
KINDS = {"autoencoder": (["train_ldm.py", "--stage", "autoencoder"], ["split"]),
         "diffusion": (["train_ldm.py", "--stage", "diffusion"], ["split", "schedule", "autoencoder"]),
         "gan": (["train_gan.py"], ["split"]), "segmenter": (["train_seg.py"], [])}


def load_model(path, kind: str, data: str = "") -> dict:
    """model.pt of a run folder (or the file itself); UserError with the command that makes it from `data`."""
    path, file, (words, needed) = Path(path), model_file(path), KINDS[kind]
    if not file.exists():
        remedy = script_line(*words, *(["--data", data] if data else []), "--out", path)
        raise UserError(f"{path}: no such run, or no model.pt in it yet; make it with: {remedy}")
    content = load_file(file, own=True)
    if content.get("kind") != kind:
        raise UserError(f"{file}: holds a model of kind {content.get('kind')!r}, needed is {kind!r}; "
                        f"make one with: {script_line(*words)}")
    for name in ["kwargs", "state_dict", *needed]:
        if not isinstance(content.get(name), dict):
            raise UserError(f"{file}: lacks {name!r}, another version of the code made it; train it again")
    return content


def build_model(cls, content: dict, path, device=None):
    """The network of a loaded model.pt, in eval mode; on a given `device` with channels last."""
    network = build(cls, content.get("kwargs", {}), path, content.get("state_dict", {})).eval()
    return network if device is None else network.to(device, memory_format=torch.channels_last)


def build(cls, kwargs: dict, path, state_dict=None):
    """cls(**kwargs), with these weights, as they stand in the model.pt `path`. UserError when they misfit, or
    are not finite: their training diverged."""
    try:
        made = cls(**kwargs)
        if state_dict is not None:
            made.load_state_dict(state_dict)
            for name, value in state_dict.items():
                if not value.isfinite().all():
                    raise ValueError(f"{name} is not finite")
        return made
    except (TypeError, RuntimeError, ValueError, AssertionError, AttributeError) as error:
        raise UserError(f"{path}: the weights do not fit {cls.__name__} ({one_line(error)[:200]}); "
                        "train it again, with this version of the code") from None
