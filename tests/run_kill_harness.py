"""Kill the training loops and generate.py at random moments, again and again; compare with whole runs.

    python tests/run_kill_harness.py --kills 100 --seed 0

Each loop runs through its real script at miniature size. A killed process (SIGKILL; TerminateProcess on
Windows) gets no chance to clean up. When the same command has finally been let through, these must be equal
to the uninterrupted run's:

    training    model.pt and the sample pictures byte for byte, log.jsonl record for record (all but speed
                and memory)
    generate.py every image, mask and instance map, slides.csv and manifest.jsonl, byte for byte; and after
                each kill every PNG in the folder must be a whole one

Prints one line per loop with the kills by the moment that they hit; exit status 1 on any difference.
"""

import argparse
import importlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

import torch  # noqa: E402
from data_factory import write_dataset  # noqa: E402
from PIL import Image  # noqa: E402

from her2.run_errors import command  # noqa: E402

TIMING = ("samples_per_s", "memory_mib")        # the only values of a record that may differ
AIMS = ("start-up", "training", "training", "checkpoint", "sample", "model", "any time")
SMALL = ["--device", "cpu", "--patch", "32", "--batch", "2"]
# 11 steps, saved every 4 and logged every 3: neither divides the other, so that sums between two log lines
# are cut too.
STEPS = [*SMALL, "--steps", "11", "--save-every", "4", "--log-every", "3"]
LOOPS = {
    "autoencoder": ["train_ldm.py", "--stage", "autoencoder", *STEPS, "--width", "8", "--codes", "16",
                    "--disc-width", "8", "--disc-start", "5", "--warmup", "3"],
    "diffusion": ["train_ldm.py", "--stage", "diffusion", "--autoencoder", "{root}/autoencoder", *STEPS,
                  "--width", "32", "--sample-steps", "2", "--warmup", "3", "--latent-pool", "6"],
    "GAN": ["train_gan.py", *STEPS, "--width", "8", "--hidden", "8", "--z-dim", "4"],
    "segmentation": ["train_seg.py", *STEPS, "--width", "8", "--warmup", "3"],
    "generate": ["generate.py", "--method", "inpaint", "--model", "{root}/diffusion", *SMALL, "--count", "9",
                 "--steps", "2"],
}


def prepare(root) -> None:
    """The dataset that all loops use: four slides of 64 x 96 noise pixels."""
    write_dataset(Path(root) / "data", slides=4, height=64, width=96)


def command_line(name: str, root, out) -> list:
    """Script and arguments of a loop that writes into root/out."""
    root = Path(root)
    return [*(word.format(root=root.as_posix()) for word in LOOPS[name]), "--data", str(root / "data"),
            "--cache", str(root / "cache"), "--out", str(root / out)]


@contextmanager
def one_thread():
    """torch on one thread inside the block, as killed processes run: networks of a few channels are slower on
    more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_process(line: list) -> int:
    """Exit status of a script run inside this process (torch is imported once)."""
    try:
        command(importlib.import_module(Path(line[0]).stem).main, line[1:])
    except SystemExit as stop:
        return stop.code
    raise RuntimeError(f"{line[0]} went on after its end")


def start(line: list, errors) -> subprocess.Popen:
    """The command as a process of its own; what it says on stderr is appended to the file `errors`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with open(errors, "ab") as file:
        return subprocess.Popen([sys.executable, str(ROOT / line[0]), *line[1:]], cwd=ROOT, env=environment,
                                stdout=subprocess.DEVNULL, stderr=file)


def complete(line: list, errors) -> None:
    """Let the command through. RuntimeError with its last words when it fails."""
    if start(line, errors).wait():
        raise RuntimeError(f"{' '.join(line)}\n"
                           f"{Path(errors).read_text(encoding='utf-8', errors='replace')[-2000:]}")


def found(folder, *patterns) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def size(path) -> int:
    return path.stat().st_size if path.exists() else 0


def progress(folder) -> int:
    """Grows while the loop runs, and not before."""
    return size(folder / "log.txt") + len(list(folder.glob("instances/*.png")))


def kill(process, folder, aim: str, longest: float, rng) -> str:
    """Kill the process at a moment of the kind `aim`; returns the moment that was hit, "" if it ended before.

    The moments are seen from outside, by the files that come and go, so that nothing in the code knows of
    the test.
    """
    begun, before, deadline = progress(folder), progress(folder), time.monotonic() + longest
    until = (time.monotonic()
             + {"start-up": rng.uniform(0, 0.4), "any time": rng.random()}.get(aim, 1) * longest)
    wait = rng.uniform(0, 0.3)
    while process.poll() is None and time.monotonic() < min(until, deadline + 5):
        now = progress(folder)
        if aim == "training" and now > begun:
            time.sleep(wait)
            break
        if aim == "checkpoint" and found(folder, "last.new.pt*") \
                or aim == "sample" and found(folder, "samples/*.tmp", "images/*.tmp", "masks/*.tmp",
                                             "instances/*.tmp") \
                or aim == "model" and found(folder, "model.pt.*.tmp", "manifest.jsonl.*.tmp"):
            break
        time.sleep(0.0005)
    process.kill()
    # A process that was through before the signal came has ended by itself: that is no kill.
    if process.wait() == 0:
        return ""
    if found(folder, "last.new.pt*"):
        return "checkpoint"
    if found(folder, "samples/*.tmp", "images/*.tmp", "masks/*.tmp", "instances/*.tmp"):
        return "sample"
    if found(folder, "*.tmp"):
        return "other file"
    return "training" if progress(folder) > before else "start-up"


def half_pictures(folder) -> list:
    """The PNG files in a run folder that are not whole."""
    broken = []
    for path in sorted(folder.rglob("*.png")):
        try:
            with Image.open(path) as picture:
                picture.verify()
            with Image.open(path) as picture:
                picture.load()
        except (OSError, SyntaxError, ValueError) as error:
            broken.append(f"{path.name}: {error}")
    return broken


def outcome(folder) -> dict:
    """What must not depend on interruptions: {file: bytes, or the records of the log}."""
    kept = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if (name in ("model.pt", "split.json", "slides.csv", "manifest.jsonl")
                or name.endswith(".png") and "/" in name):
            kept[name] = path.read_bytes()
        if name == "log.jsonl":
            records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            kept[name] = [{key: value for key, value in record.items() if key not in TIMING}
                          for record in records]
        if name.endswith((".tmp", ".damaged")):
            kept[name] = "must not be there"
    return kept


def differences(reference, folder) -> list:
    """Names of the files in which two finished folders differ."""
    one, two = outcome(reference), outcome(folder)
    return sorted(name for name in {**one, **two} if one.get(name) != two.get(name))


def interrupt(name: str, root, out: str, aims, longest: float, rng) -> tuple:
    """Start a loop, kill it once per aim or until it is through. Returns (moments hit, what went wrong)."""
    folder, hit, wrong = Path(root) / out, Counter(), []
    for aim in aims:
        moment = kill(start(command_line(name, root, out), Path(root) / f"{out}.err"), folder, aim, longest,
                      rng)
        wrong += [f"{out}: half-written {picture}" for picture in half_pictures(folder)]
        if not moment:
            break
        hit[moment] += 1
    return hit, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="over all loops [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [%(default)s]")
    options = parser.parse_args()
    rng, total, faults, clock = random.Random(options.seed), 0, [], time.monotonic()
    moments = ("start-up", "training", "checkpoint", "sample", "other file")
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        prepare(root)
        print(f"{'loop':14}{'runs':>6}{'kills':>7}" + "".join(f"{moment:>12}" for moment in moments)
              + f"{'losses':>8}{'seconds':>9}", flush=True)
        for number, name in enumerate(LOOPS):
            begun = time.monotonic()
            complete(command_line(name, root, name), root / f"{name}.err")
            longest, hits, runs, losses = time.monotonic() - begun, Counter(), 0, 0
            wanted = options.kills * (number + 1) // len(LOOPS) - options.kills * number // len(LOOPS)
            while hits.total() < wanted:
                out = f"{name}-{runs}"
                aims = rng.choices(AIMS, k=min(rng.randint(3, 7), wanted - hits.total()))
                hit, wrong = interrupt(name, root, out, aims, longest, rng)
                complete(command_line(name, root, out), root / f"{out}.err")
                wrong += [f"{out}: {file} differs" for file in differences(root / name, root / out)]
                losses, runs, hits = losses + bool(wrong), runs + 1, hits + hit
                faults += wrong
            total += hits.total()
            print(f"{name:14}{runs:6}{hits.total():7}" + "".join(f"{hits[moment]:12}" for moment in moments)
                  + f"{losses:8}{time.monotonic() - begun:9.0f}", flush=True)
    print(f"{total} kills, {len(faults)} differences, {time.monotonic() - clock:.0f} s")
    for fault in faults:
        print(f"LOST: {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
