"""The whole protocol of the paper with one command: python -m her2.study --preset tiny

    phantom (or --data) -> autoencoder -> diffusion, GAN -> three synthetic sets -> segmentation -> report

Every stage is one of the five scripts, called as a subprocess with a command line that is printed first, so
each can be run by hand. A stage that finished is not run again; one that was interrupted goes on from its
checkpoint. It ends with results.json, report/report.md and the figures.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from her2 import run_config as configuration
from her2 import run
from her2.run_errors import UserError, atomic_write, command

ROOT = Path(__file__).resolve().parents[1]              # where the five scripts lie
METHODS = ("gan", "ldm", "inpaint")
RATIOS = {"tiny": (1.0,), "small": (0.5, 1.0, 2.0, 4.0), "paper": (0.5, 1.0, 2.0, 4.0)}     # paper, section 3
SEEDS = {"tiny": 1, "small": 5, "paper": 5}             # "all experiments were repeated five times"


@dataclass
class Config:
    data: str = ""                  # dataset folder; empty: a phantom of this preset, made in OUT/phantom
    out: str = "runs/study"         # folder for everything; the same command again goes on where it stopped
    preset: Literal["tiny", "small", "paper"] = "tiny"  # tiny: 1 seed, +100 % only; small, paper:
                                    # 14 configurations x 5 seeds, and the control on reconstructions
    seed: int = 0                   # first seed; run k of a configuration has seed + k
    split_seed: int = 0             # decides the split of slides when slides.csv has none
    device: Literal["auto", "cpu", "cuda"] = "auto"     # auto: the GPU when there is one
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"  # mixed precision; auto: where it is fast
    seeds: int = 0                  # segmentation runs per configuration; 0: as the preset says
    ratios: str = ""                # amounts of synthetic images, comma-separated, 1.0 = +100 %;
                                    # empty: as the preset says
    trial: int = 0                  # optimiser steps of every training, to try the whole chain;
                                    # 0: as the preset says
    cache: str = "cache"            # folder for the decoded images


def stages(config) -> list:
    """The protocol: a list of (name, command line, output folder); a command line begins with its script."""
    out = Path(config.out)
    data = config.data or str(out / "phantom")
    ratios = parse_ratios(config.ratios) or RATIOS[config.preset]
    sizes = ["--preset", config.preset]
    common = [*sizes, "--data", data, "--split-seed", str(config.split_seed), "--device", config.device,
              "--amp", config.amp, "--cache", config.cache]
    seed = ["--seed", str(config.seed)]
    short = ["--steps", str(config.trial)] if config.trial else []
    plan = []
    if not config.data:
        plan.append(("phantom", ["-m", "her2.phantom", *sizes, *seed, "--out", data], data))
    plan.append(("autoencoder", ["train_ldm.py", "--stage", "autoencoder", *common, *seed, *short,
                                 "--out", str(out / "vq")], out / "vq"))
    plan.append(("diffusion", ["train_ldm.py", "--stage", "diffusion", "--autoencoder", str(out / "vq"),
                               *common, *seed, *short, "--out", str(out / "ldm")], out / "ldm"))
    plan.append(("GAN", ["train_gan.py", *common, *seed, *short, "--out", str(out / "gan")], out / "gan"))
    for method in METHODS:
        # One set of the largest size per method; a smaller ratio uses its first images.
        model, folder = out / ("gan" if method == "gan" else "ldm"), out / f"synth-{method}"
        plan.append((f"images: {method}", ["generate.py", "--method", method, "--model", str(model), *common,
                                           *seed, "--ratio", str(max(ratios)), "--out", str(folder)], folder))
    for k in range(config.seeds or SEEDS[config.preset]):
        number = config.seed + k
        for name, flags in configurations(out, ratios).items():
            folder = out / f"seg-{name}-seed{number}"
            plan.append((f"segmentation: {name}, seed {number}",
                         ["train_seg.py", *common, "--seed", str(number), *short, *flags,
                          "--out", str(folder)], folder))
    runs = [str(folder) for name, _, folder in plan if name.startswith("segmentation")]
    synthetic = [str(out / f"synth-{method}") for method in METHODS]
    plan.append(("evaluation", ["evaluate.py", *runs, "--synthetic", *synthetic, *sizes, "--device",
                                config.device, "--amp", config.amp, "--cache", config.cache,
                                "--out", str(out / "report")], out / "report"))
    return plan


def configurations(out, ratios) -> dict:
    """{name: flags of train_seg.py}: the two baselines, the control, and each method in each amount."""
    table = {"tumor": ["--sampling", "tumor"], "subtype": ["--sampling", "subtype"],
             "reconstructed": ["--sampling", "subtype", "--reconstruct", str(out / "vq")]}
    for method in METHODS:
        for ratio in ratios:
            table[f"{method}-{round(100 * ratio)}"] = [
                "--sampling", "subtype", "--synthetic", str(out / f"synth-{method}"), "--ratio", str(ratio)]
    return table


def parse_ratios(text: str) -> tuple:
    """'0.5,1' -> (0.5, 1.0); UserError for anything but positive numbers."""
    try:
        ratios = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UserError(f"--ratios: found {text!r}; "
                        "give numbers with commas between them, such as 0.5,1,2,4") from None
    if any(not 0 < ratio <= 1000 for ratio in ratios):
        raise UserError(f"--ratios: found {text!r}; give numbers greater than 0 and at most 1000")
    return ratios


def main(argv):
    config = configuration.parse(Config, {name: {} for name in RATIOS}, argv, __doc__, "python -m her2.study")
    if config.data and not Path(config.data).is_dir():
        raise UserError(f"{config.data}: no such dataset folder; check --data")
    plan = stages(config)
    out = run.open_run("her2.study", config, config.device, ["-m", "her2.study", *argv])
    record = out / "stages.json"                        # {stage: {"command", "seconds"}} of what is complete
    done = run.read_json(record) if record.exists() else {}
    for number, (name, arguments, folder) in enumerate(plan, 1):
        shown = subprocess.list2cmdline(["python", *arguments])     # a path with spaces gets its quotes
        if done.get(name, {}).get("command") == shown and Path(folder).exists():
            print(f"[{number}/{len(plan)}] {name}: complete", flush=True)
            continue
        print(f"\n[{number}/{len(plan)}] {name}\n$ {shown}", flush=True)
        clock = time.perf_counter()
        line = arguments if arguments[0] == "-m" else [str(ROOT / arguments[0]), *arguments[1:]]
        status = subprocess.run([sys.executable, *line], env=environment()).returncode
        if status:
            raise UserError(f"stage '{name}' ended with exit status {status} (its message stands above); "
                            f"what is complete is kept in {out}, mend the cause and run the same command "
                            "again")
        done[name] = {"command": shown, "seconds": round(time.perf_counter() - clock, 1)}
        run.write_json(record, done)
    atomic_write(out / "results.json", (out / "report" / "results.json").read_bytes())
    total = sum(stage["seconds"] for stage in done.values())
    print(f"\ndone in {total / 60:.1f} min: {out / 'results.json'}, "
          f"{out / 'report' / 'report.md'} and its pictures")
    return 0


def environment() -> dict:
    """The environment for the stages: `her2` is found wherever the study is started from.

    Threads that wait should sleep: busy waiting costs a factor of ten when something else runs on the
    same cores.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONPATH": path}


if __name__ == "__main__":
    command(main)
