"""How a training run begins, and what it says: log.txt for people, log.jsonl for the curves.

A resumed run cuts log.jsonl back to its checkpoint's step: it reads as if nothing had happened.
"""

import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from her2 import run, run_distributed
from her2.data_folder import write_split
from her2.run_errors import atomic_write, silence
from her2.run_provenance import input_hashes


def number(value) -> float:
    """A Python float from a number or a tensor of one element, with or without a gradient."""
    return float(value.detach()) if isinstance(value, torch.Tensor) else float(value)


def size(*networks) -> str:
    return f"{sum(p.numel() for network in networks for p in network.parameters()):,} parameters"


def begin(script: str, config, device, argv, dataset, saved: dict, synthetic=None, **numbers):
    """Open the run folder and go on from its checkpoint: (folder, log, step, numbers).

    `saved` and `numbers` as for `load_checkpoint`; `synthetic`: a second dataset. Says
    so when the run is complete; the log is None then.
    """
    longer = "yes"                  # unless an earlier step would have been another one in the longer run
    if getattr(config, "schedule", "constant") != "constant":
        longer = "a cosine schedule has used up its learning rate by then"
    elif hasattr(config, "codes"):
        longer = "unused codes are restarted in the first half of the steps only"
    with run_distributed.in_turn():
        folder = run.open_run(script, config, device, [script.split()[0], *argv],
                              input_hashes(config, dataset, synthetic), longer=longer)
        numbers = run.load_checkpoint(folder, saved, step=0, **numbers)
    if numbers["step"] >= config.steps:
        print(f"{folder}: complete ({numbers['step']} steps); nothing to do")
        return folder, None, numbers["step"], numbers
    log = Log(folder, numbers["step"])
    if not run_distributed.rank():
        write_split(folder / "split.json", dataset)
    return folder, log, numbers["step"], numbers


class Log:
    """log.txt and log.jsonl of one run; a resumed run cuts the latter back to its checkpoint's step.

    `step` is the number of finished optimiser steps that the checkpoint holds (0: a new run).
    """

    def __init__(self, folder, step: int):
        self.text_path, self.json_path = Path(folder) / "log.txt", Path(folder) / "log.jsonl"
        if run_distributed.rank():
            return                          # nothing that it says is printed or kept
        kept = [record for record in self.records() if record["step"] <= step]
        atomic_write(self.json_path, "".join(json.dumps(record) + "\n" for record in kept))
        if step == 0:
            atomic_write(self.text_path, "")

    def records(self) -> list:
        """All records so far; a last line that a crash cut short is left out."""
        if not self.json_path.exists():
            return []
        records = []
        for line in self.json_path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                break                       # half a line: the process died while writing it
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                break
            records.append(record)
        return records

    def begin(self, step: int, text: str) -> None:
        """Say `text` when a run begins, and that it goes on when it does."""
        self.say(f"going on from step {step}" if step else text)

    def say(self, text: str) -> None:
        """Print a line (above the progress bar) and keep it in log.txt."""
        try:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:             # | head: no reason to end a training
            silence(sys.stdout)
        if not run_distributed.rank():
            with open(self.text_path, "a", encoding="utf-8") as file:
                file.write(text + "\n")

    def record(self, step: int, **values) -> None:
        """Append {"step": step, ...} to log.jsonl and print it in short."""
        if run_distributed.rank():
            return
        values = {name: number(value) if value is not None else None for name, value in values.items()}
        with open(self.json_path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        self.say(f"step {step:6d}  " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()
                                                 if value is not None))
