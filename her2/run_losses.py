"""The losses of a training run: watched at every step, read from the device only when they are needed."""

import math
from pathlib import Path

import torch

from her2 import run, run_distributed
from her2.run_errors import UserError


class Losses:
    """What each step measured, kept on the device until it is read: asking a GPU for a number makes it wait.

    read() is due at every line of the log and before every checkpoint, so that weights are never saved which
    are not finite. networks: {name: module}.
    """

    def __init__(self, folder, networks: dict, scaler):
        self.folder, self.networks, self.scaler = Path(folder), networks, scaler
        self.kept, self.sums = [], {}

    def add(self, share: float, **values: torch.Tensor) -> None:
        """Losses (), means over a part of the step's batch that is `share` of it; several parts add up."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + share * value.detach().float()

    def end(self, step: int, names, **values: torch.Tensor) -> None:
        """`step` is done, on the images `names`. values: of the whole batch already, as gradient norms."""
        whole = {name: value.detach() / run_distributed.world() for name, value in values.items()}
        self.kept.append((step, names, {**self.sums, **whole}))
        self.sums = {}
        if len(self.kept) >= 1000:
            self.read()

    def read(self) -> dict:
        """The numbers of the last step, with one transfer from the device. Forgets all steps before it.

        UserError when a loss, a norm or a weight is not finite, after writing diagnosis.json. Under fp16 an
        infinite gradient is the scaler's ordinary business (it skips the step and halves its scale), until
        the scale is below 1: then no scale helps, and a run that skips every step would end untrained.
        """
        broken = [~p.detach().isfinite().all() for network in self.networks.values()
                  for p in network.parameters()]
        tensors = [value for *_, values in self.kept for value in values.values()] + broken
        numbers = iter(run_distributed.total(torch.stack([value.float() for value in tensors])).tolist())
        steps = [(step, names, dict(zip(values, numbers))) for step, names, values in self.kept]
        skips = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
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
        largest = {f"{network_name}.{name}": float(parameter.grad.abs().nan_to_num(nan=math.inf).max())
                   for network_name, network in self.networks.items()
                   for name, parameter in network.named_parameters() if parameter.grad is not None}
        worst = max(largest, key=largest.get, default=None)
        if not run_distributed.rank():
            run.write_json(self.folder / "diagnosis.json", {
                "step": step, "not_finite": broken, "batch": list(names),
                "values": {name: repr(value) for name, value in values.items()},
                "largest_gradient": {"parameter": worst, "value": repr(largest.get(worst))}})
        raise UserError(f"{self.folder}: {', '.join(broken)} not finite at step {step} "
                        f"(see {self.folder / 'diagnosis.json'}); the last checkpoint is intact; "
                        "try a lower --lr, a longer --warmup, or --amp off, with another --out")
