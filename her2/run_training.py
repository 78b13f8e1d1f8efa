"""Small things that every training loop calls: device, mixed precision, EMA, warm-up, check for divergence.

None of them owns a step counter or knows a loss: the loop of each script stays visible in that script.
"""

import copy
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from her2 import run
from her2.data_classes import IGNORE
from her2.data_patches import loader
from her2.run_errors import UserError, one_line


def pick_device(name: str) -> torch.device:
    """'auto' is the GPU when there is one. UserError when 'cuda' is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device; "
                        "use --device cpu, or install a CUDA build of torch")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


class Precision:
    """Mixed precision: the forward pass in half precision where that is fast, weights and losses in float32.

    autocast()  context for the forward pass. `amp` = auto: bf16 where the hardware is built for it, else fp16
                on a GPU and nothing on a CPU. CPUs with matrix tiles (AMX) are: a training step is 1.8 to 2.4
                times as fast. A CPU without any bf16 instruction is 14 to 60 times slower; one that has the
                instruction without the tiles (avx512_bf16) gains 1.1 to 1.5, for which "bf16" must be said.
                UserError for fp16 on a CPU.
    scaler()    a GradScaler, enabled for fp16 only: bf16 has the exponent range of fp32 and needs none.
    """

    def __init__(self, device: torch.device, amp: str):
        assert amp in ("auto", "off", "bf16", "fp16"), f"amp is auto, off, bf16 or fp16, found {amp!r}"
        on_gpu = device.type == "cuda"
        if amp == "fp16" and not on_gpu:
            raise UserError("--amp fp16: is for GPUs; on the CPU give --amp bf16, or --amp off")
        # Older GPUs emulate bf16 and report it as supported; fp16 is many times faster there.
        native = (torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu
                  else bool(torch.cpu.get_capabilities().get("amx_bf16")))
        self.device, self.dtype = device, torch.float16 if on_gpu else None
        if amp == "off":
            self.dtype = None
        elif amp == "bf16" or (amp == "auto" and native):
            self.dtype = torch.bfloat16

    def autocast(self):
        return torch.autocast(self.device.type, dtype=self.dtype or torch.bfloat16,
                              enabled=self.dtype is not None)

    def scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def __str__(self):
        return {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]


class EMA:
    """Exponential moving average of a module's parameters.

        m <- d m + (1 - d) p,  with d = min(decay, (1 + n) / (10 + n))

    n counts the updates: early on the average forgets the initial weights fast (as in latent-diffusion's
    LitEma, where n is incremented before its first use). Buffers are copied. `module` is the averaged copy,
    in eval mode.
    """

    def __init__(self, module: torch.nn.Module, decay: float):
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for mean, value in zip(self.module.parameters(), module.parameters(), strict=True):
            mean.lerp_(value.to(mean.dtype), 1 - decay)
        for mean, value in zip(self.module.buffers(), module.buffers(), strict=True):
            mean.copy_(value)

    def state_dict(self) -> dict:
        return {"module": self.module.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        self.module.load_state_dict(state["module"])
        self.updates = state["updates"]


def set_learning_rate(optimizer, config, step: int) -> None:
    """Linear warm-up over the first `warmup` steps, then constant or half a cosine that is 0 at `steps`.

    config: lr, warmup, steps, schedule; step counts from 0. `lr` is what Adam sees after the warm-up: nothing
    multiplies it by batch size or devices.
    """
    factor = min(1.0, (step + 1) / max(config.warmup, 1))
    if config.schedule == "cosine" and step >= config.warmup:
        past = (step - config.warmup) / max(config.steps - config.warmup, 1)
        factor = 0.5 * (1 + math.cos(math.pi * past))
    for group in optimizer.param_groups:
        group["lr"] = config.lr * factor


def load_official(network, content, path) -> None:
    """Official weights into `network`, also from a checkpoint's "state_dict". UserError when they misfit."""
    state_dict = content.get("state_dict", content) if isinstance(content, dict) else content
    if (not isinstance(state_dict, dict)
            or not any(isinstance(value, torch.Tensor) for value in state_dict.values())):
        raise UserError(f"{path}: holds no tensors by name; "
                        "give a state_dict, or a checkpoint with one inside")
    try:
        network.load_official_state_dict(state_dict)
    except ValueError as error:
        raise UserError(f"{path}: {one_line(error)[:300]}; "
                        "check that the file belongs to this network and these sizes") from None


def refuse_leak(content: dict, dataset, path) -> None:
    """UserError when the model in `content` was trained on slides that are val or test in `dataset` now."""
    now = dataset.slides()
    leaked = sorted(slide for slide, split in content["split"].items()
                    if split == "train" and now.get(slide, "train") != "train")
    if leaked:
        raise UserError(f"{path}: was trained on {', '.join(leaked[:5])}, which {dataset.root} holds for "
                        "validation or test; train it on this dataset with this --split-seed")


def frozen_loss(cls, path: str, device):
    """The perceptual loss `cls` with the weights in `path`; None for no path, UserError when they misfit."""
    if not path:
        return None
    network = cls()
    load_official(network, run.load_file(path), path)
    return network.to(device)


def to_device(image: torch.Tensor, device) -> torch.Tensor:
    """Images (B, C, H, W) to `device`, channels last; from pinned memory without waiting for the copy."""
    return image.to(device, memory_format=torch.channels_last, non_blocking=True)


def one_hot(label: torch.Tensor, num_classes: int, device) -> torch.Tensor:
    """label (B, H, W) of class ids -> (B, K, H, W) float on `device`. IGNORE has no class: all zeros, which a
    generator so learns to read as tissue that nobody has named."""
    label = label.to(device)
    known = label != IGNORE
    return F.one_hot(label.where(known, 0), num_classes).movedim(-1, 1).float().mul_(known[:, None])


def steps(name: str, config, sampler, first: int, device, batches=None):
    """The batches of steps first..config.steps-1 of `sampler` (or `batches`), with a progress bar."""
    if batches is None:
        batches = loader(sampler, first, config.steps, config.batch, workers=config.workers,
                         pin_memory=device.type == "cuda")
    return tqdm(batches, initial=first, total=config.steps, desc=name, leave=False, disable=None)


class Speed:
    """Samples per second since the last report, and the peak memory, for the log."""

    def __init__(self, device: torch.device):
        self.device = device
        self.restart()

    def restart(self) -> None:
        self.begun, self.samples = time.perf_counter(), 0

    def add(self, samples: int) -> None:
        self.samples += samples

    def report(self) -> dict:
        seconds, samples = time.perf_counter() - self.begun, self.samples
        self.restart()
        return {"samples_per_s": samples / seconds, "memory_mib": peak_memory(self.device)}


def peak_memory(device: torch.device):
    """Most memory in use so far, in MiB: of the GPU, or of the process (None where the system is silent)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource                     # not on Windows
    except ImportError:
        return None
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (2**20 if sys.platform == "darwin" else 2**10)


def update(optimizer, scaler, clip: float) -> torch.Tensor:
    """One step of `optimizer` with gradients of L2 norm `clip` at most; returns their norm before, ()."""
    scaler.unscale_(optimizer)              # fp16: the gradients were taken of a larger loss
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    scaler.step(optimizer)
    scaler.update()
    return norm


class Losses:
    """What each step measured, kept on the device until it is read: asking a GPU for a number makes it wait.

    read() is due at every line of the log and before every checkpoint, so that weights are never saved which
    are not finite. networks: {name: module}.
    """

    def __init__(self, folder, networks: dict, scaler):
        self.folder, self.networks, self.scaler, self.kept = Path(folder), networks, scaler, []

    def add(self, step: int, names, **values) -> None:
        """The losses and gradient norms (numbers or tensors ()) of `step` on the images `names`."""
        self.kept.append((step, names, {name: value.detach() if torch.is_tensor(value) else value
                                        for name, value in values.items()}))
        if len(self.kept) >= 1000:
            self.read()

    def read(self) -> dict:
        """The numbers of the last step, with one transfer from the device. Forgets all steps before it.

        UserError when a loss, a norm or a weight is not finite, after writing diagnosis.json. Under fp16 an
        infinite gradient is the scaler's ordinary business (it skips the step and halves its scale), until
        the scale is below 1: then no scale helps, and a run that skips every step would end untrained.
        """
        weights = [p.detach().isfinite().all() for network in self.networks.values()
                   for p in network.parameters()]
        tensors = [value for *_, values in self.kept for value in values.values() if torch.is_tensor(value)]
        numbers = iter(torch.stack([value.float() for value in tensors + weights]).tolist())
        steps = [(step, names, {name: next(numbers) if torch.is_tensor(value) else value
                                for name, value in values.items()}) for step, names, values in self.kept]
        skips = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        for step, names, values in steps:
            broken = [name for name, value in values.items()
                      if not math.isfinite(value) and not (skips and "norm" in name)]
            if broken:
                self.stop(step, names, values, broken)
        if not all(numbers):                # what is left of them are the weights
            self.stop(*steps[-1], ["weights"])
        self.kept = self.kept[-1:]
        return steps[-1][2]

    def stop(self, step, names, values, broken) -> None:
        largest = {f"{network_name}.{name}": float(parameter.grad.abs().nan_to_num(nan=math.inf).max())
                   for network_name, network in self.networks.items()
                   for name, parameter in network.named_parameters() if parameter.grad is not None}
        worst = max(largest, key=largest.get, default=None)
        run.write_json(self.folder / "diagnosis.json", {
            "step": step, "not_finite": broken, "batch": list(names),
            "values": {name: repr(value) for name, value in values.items()},
            "largest_gradient": {"parameter": worst, "value": repr(largest.get(worst))}})
        raise UserError(f"{self.folder}: {', '.join(broken)} not finite at step {step} "
                        f"(see {self.folder / 'diagnosis.json'}); the last checkpoint is intact; "
                        "try a lower --lr, a longer --warmup, or --amp off, with another --out")
