"""How a training run begins, and what it says: log.txt for people, log.jsonl for the curves (a resumed run
cuts it back to its checkpoint's step: it reads as if nothing had happened); its losses, watched at every
step, read from the device only when they are needed.
"""

import json
import math
import sys
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from her2 import run, run_distributed
from her2.data_folder import write_split
from her2.run_errors import UserError, atomic_write, silence
from her2.run_provenance import input_hashes


def size(*networks) -> str:
    return f"{sum(p.numel() for network in networks for p in network.parameters()):,} parameters"


def begin(script: str, config, device, argv, dataset, saved: dict, synthetic=None):
    """Open the run folder and go on from its checkpoint, into all in `saved` (as of `save_checkpoint`):
    (folder, log, losses, step). Log and losses are None for a run that is complete. `synthetic`: a second
    dataset."""
    run_distributed.divide(config)  # before a folder is made: its remedy is another --batch
    longer = "yes"                  # unless an earlier step would have been another one in the longer run
    if getattr(config, "schedule", "constant") != "constant":
        longer = "a cosine schedule has used up its learning rate by then"
    elif hasattr(config, "codes"):
        longer = "unused codes are restarted in the first half of the steps only"
    with run_distributed.in_turn():
        folder = run.open_run(script, config, device, [script.split()[0], *argv],
                              input_hashes(config, dataset, synthetic), longer=longer)
        step = run.load_checkpoint(folder, saved)
    if step >= config.steps:
        print(f"{folder}: complete ({step} steps); nothing to do")
        return folder, None, None, step
    log = Log(folder, step)
    if step:
        log.say(f"going on from step {step}")
    run_distributed.rank() or write_split(folder / "split.json", dataset)
    return folder, log, Losses(folder, saved), step


class Log:
    """log.txt and log.jsonl of one run, of which `step` steps are done (0: a new run)."""

    def __init__(self, folder, step: int):
        self.folder = Path(folder)
        if not run_distributed.rank():
            kept = [record for record in self.records() if record["step"] <= step]
            atomic_write(self.folder / "log.jsonl", "".join(json.dumps(record) + "\n" for record in kept))
            if step == 0:
                atomic_write(self.folder / "log.txt", "")

    def records(self) -> list:
        """All records so far, as `record` wrote them; a crash may have cut the last one short."""
        found = []
        with suppress(ValueError, FileNotFoundError):
            path = self.folder / "log.jsonl"
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                found.append(json.loads(line))
        return found

    def append(self, name: str, line: str) -> None:
        if not run_distributed.rank():      # of the others nothing that they say is printed or kept
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write(line + "\n")

    def say(self, text: str) -> None:
        """Print a line (above the progress bar) and keep it in log.txt."""
        try:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:             # | head: no reason to end a training
            silence(sys.stdout)
        self.append("log.txt", text)

    def record(self, step: int, **values) -> None:
        """Append {"step": step, ...} to log.jsonl and print it in short."""
        values = {name: None if value is None or not math.isfinite(value) else float(value)
                  for name, value in values.items()}            # JSON has no infinity: fp16's norms
        self.append("log.jsonl", json.dumps({"step": step, **values}))
        self.say(f"step {step:6d}  " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()
                                                 if value is not None))


class Losses:
    """What each step measured, kept on the device until it is read: asking a GPU for a number makes it wait.
    Read before every checkpoint: weights that are not finite are never saved. saved: what the checkpoint
    holds, {"network": module, "scaler": .., ...}."""

    def __init__(self, folder, saved: dict):
        self.folder, self.saved, self.kept, self.sums = Path(folder), saved, [], {}
        self.networks = {name: one for name, one in saved.items() if isinstance(one, torch.nn.Module)}
        self.parameters = dict(torch.nn.ModuleDict(self.networks).named_parameters())   # "network.its.weight"

    def add(self, share: float, **values: torch.Tensor) -> None:
        """Losses (), means over a part of the step's batch that is `share` of it; several parts add up."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + share * value.detach().float()

    def end(self, step: int, names, **values: torch.Tensor) -> None:
        """`step` is done, on the images `names`. values: of the whole batch already, as gradient norms."""
        whole = {name: value.detach() / run_distributed.world() for name, value in values.items()}
        self.kept.append((step, names, {**self.sums, **whole}))
        self.sums = {}

    def read(self) -> dict:
        """The numbers of the last step, with one transfer from the device; forgets the steps before it.
        UserError and diagnosis.json when a loss, a norm or a weight is not finite. Under fp16 an infinite
        gradient is the scaler's business (it skips the step, halves its scale) until the scale is below 1."""
        tensors = [value for *_, values in self.kept for value in values.values()]
        tensors += [~p.detach().isfinite().all() for p in self.parameters.values()]
        numbers = iter(run_distributed.total(torch.stack([value.float() for value in tensors])).tolist())
        steps = [(step, names, dict(zip(values, numbers))) for step, names, values in self.kept]
        scaler = self.saved["scaler"]
        skips = scaler.is_enabled() and scaler.get_scale() >= 1
        for step, names, values in steps:
            broken = [name for name, value in values.items()
                      if not math.isfinite(value) and not (skips and "norm" in name)]
            if broken:
                self.stop(step, names, values, broken)
        if any(numbers):                    # what is left of them are the weights
            self.stop(*steps[-1], ["weights"])
        del self.kept[:-1]
        return steps[-1][2]

    def stop(self, step, names, values, broken) -> None:
        largest = {name: float(p.grad.abs().nan_to_num(nan=math.inf).max())
                   for name, p in self.parameters.items() if p.grad is not None}
        worst = max(largest, key=largest.get, default=None)
        if not run_distributed.rank():
            run.write_json(self.folder / "diagnosis.json", {
                "step": step, "not_finite": broken, "batch": list(names),
                "values": {name: repr(value) for name, value in values.items()},
                "largest_gradient": {"parameter": worst, "value": repr(largest.get(worst))}})
        raise UserError(f"{self.folder}: {', '.join(broken)} not finite at step {step} "
                        f"(see {self.folder / 'diagnosis.json'}); the last checkpoint is intact; "
                        "try a lower --lr, a longer --warmup, or --amp off, with another --out")
