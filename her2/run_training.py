"""Small things that every training loop calls: device, mixed precision, EMA, warm-up, check for divergence.

None of them owns a step counter or knows a loss: the loop of each script stays visible in that script.
"""

import copy
import math
import signal
import sys
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from her2 import run, run_distributed
from her2.data_classes import IGNORE, ClassTable
from her2.data_patches import loader
from her2.run_errors import Stopped, UserError, asked_to_stop, one_line


class Precision:
    """Mixed precision: the forward pass in half precision where that is fast, weights and losses in float32.
    `amp` = auto: bf16 where the hardware is built for it, else fp16 on a GPU and nothing on a CPU. CPUs with
    matrix tiles (AMX) are: a training step is 1.8 to 2.4 times as fast. A CPU without any bf16 instruction is
    14 to 60 times slower; one that has the instruction without the tiles (avx512_bf16) gains 1.1 to 1.5, for
    which "bf16" must be said. fp16 alone needs a scaler: bf16 has the exponent range of fp32."""

    def __init__(self, device: torch.device, amp: str):
        on_gpu = device.type == "cuda"
        if amp == "fp16" and not on_gpu:
            raise UserError("--amp fp16: is for GPUs; on the CPU give --amp bf16, or --amp off")
        # Older GPUs emulate bf16 and report it as supported; fp16 is many times faster there.
        native = (torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu
                  else torch.cpu.get_capabilities().get("amx_bf16"))
        auto = torch.bfloat16 if native else torch.float16 if on_gpu else None
        self.device = device
        self.dtype = {"auto": auto, "off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]

    def autocast(self):
        return torch.autocast(self.device.type, dtype=self.dtype or torch.bfloat16,
                              enabled=self.dtype is not None)

    def scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    def __str__(self):
        return {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]


def pick_device(name: str, amp: str = "off"):
    """(device, its Precision). 'auto': the GPU where there is one, under torchrun this process's own."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device; "
                        "use --device cpu, or install a CUDA build of torch")
    gpu = name != "cpu" and torch.cuda.is_available()
    device = run_distributed.start(torch.device("cuda" if gpu else "cpu"))
    return device, Precision(device, amp)


class EMA:
    """Exponential moving average of a module's parameters: m <- d m + (1 - d) p

    with d = min(decay, (1 + n) / (10 + n)). n counts the updates, from 1: early on the average forgets the
    initial weights fast (as in latent-diffusion's LitEma). Buffers are copied. `module` is the average."""

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


def check_patch(config, halves: str) -> None:
    """UserError where the network cannot take these patches; `halves`: the words for what it does to them."""
    if config.patch % 32:
        raise UserError(f"--patch: found {config.patch}; {halves} five times, give a multiple of 32")
    if config.patch == 32 and config.batch // config.accumulate == 1:
        raise UserError(f"--batch: found {config.batch} in {config.accumulate} pieces, with patches of 32 "
                        "batch norm would see one value per channel; give 2 or more per --accumulate piece")


def set_learning_rate(optimizer, config, step: int) -> None:
    """Linear warm-up over the first `warmup` steps, then constant or half a cosine that is 0 at `steps`. step
    counts from 0. `lr` is what Adam sees after the warm-up: nothing multiplies it by batch or devices."""
    factor = min(1.0, (step + 1) / max(config.warmup, 1))
    if config.schedule == "cosine" and step >= config.warmup:
        past = (step - config.warmup) / max(config.steps - config.warmup, 1)
        factor = 0.5 * (1 + math.cos(math.pi * past))
    for group in optimizer.param_groups:
        group["lr"] = config.lr * factor


def load_official(network, path) -> None:
    """The official weights in `path`, a file or "", into `network`. UserError when they misfit."""
    if not path:
        return
    content = run.load_file(path)                   # a state_dict, or a checkpoint with one inside
    state_dict = content.get("state_dict", content) if isinstance(content, dict) else content
    values = state_dict.values() if isinstance(state_dict, dict) else ()
    if not any(isinstance(value, torch.Tensor) for value in values) or set(map(type, state_dict)) != {str}:
        raise UserError(f"{path}: holds no tensors by name; give a state_dict, or a checkpoint with one")
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


def refuse_other_classes(content: dict, dataset, path) -> None:
    """UserError when the model in `content` learned other classes than those of `dataset`."""
    if not content.get("classes") or ClassTable.from_json(content["classes"], path) != dataset.classes:
        raise UserError(f"{path}: was trained with another class table than that of {dataset.root}; "
                        "use the dataset that it was trained on")


def frozen_loss(cls, path: str, device):
    """The perceptual loss `cls` with the weights in `path`; None for no path, UserError when they misfit."""
    if not path:
        return None
    network = cls()                     # on the meta device: its weights come with the file
    load_official(network, path)
    return network.to(device)


def to_device(image: torch.Tensor, device) -> torch.Tensor:
    """Images (B, C, H, W) to `device`, channels last; from pinned memory without waiting for the copy."""
    return image.to(device, memory_format=torch.channels_last, non_blocking=True)


def one_hot(label: torch.Tensor, num_classes: int, device) -> torch.Tensor:
    """label (B, H, W) of class ids -> (B, K, H, W) float on `device`. IGNORE has no class: all zeros, which a
    generator so learns to read as tissue that nobody has named."""
    label = label.to(device, non_blocking=True)
    known = label != IGNORE
    return F.one_hot(label.where(known, 0), num_classes).movedim(-1, 1).float().mul_(known[:, None])


BACKEND = "inductor"        # torch's own; the tests take one that needs no compiler


def compile_parts(config, *parts: torch.nn.Module) -> None:
    """--compile: let torch.compile fuse the forward and backward of these modules, from their next call on.
    UserError where it does not work, so it is called before a run folder is made. What is compiled can be
    differentiated once per step only: the part between two losses whose gradients are compared is left."""
    if not config.compile:
        return
    try:
        torch.compile(lambda x: x.relu() + 1, backend=BACKEND)(torch.ones(8))
    except (RuntimeError, ImportError, OSError) as error:
        raise UserError(f"--compile: does not work here ({one_line(error)[:160]}); leave it out") from None
    # The compiler cannot look into the exchange of sums. (A decorator would load it at the start of every
    # command, more than a second.)
    norm = run_distributed.BatchNormOfAll
    norm.forward = torch.compiler.disable(norm.forward)
    for part in parts:
        part.compile(backend=BACKEND)


class Steps:
    """The batches of steps first..config.steps-1 of `sampler` (or `batches`), with a progress bar, from the
    networks of process 0. losses: a run_log.Losses, read before every checkpoint of what it knows as saved.
    After Ctrl-C or SIGTERM the steps end between two of them, saved, with the exception Stopped."""

    def __init__(self, name: str, config, sampler, first: int, device, losses, batches=None):
        run_distributed.same_start(*losses.networks.values())
        self.batches = batches or loader(sampler, first, config.steps, run_distributed.indices(config),
                                         workers=config.workers, pin_memory=device.type == "cuda")
        self.name, self.config, self.device, self.step = name, config, device, first
        self.losses, self.begun, self.samples = losses, 0.0, 0

    def __iter__(self):
        bar = tqdm(self.batches, self.name, initial=self.step, total=self.config.steps, leave=False,
                   disable=bool(run_distributed.rank()) or None)
        with asked_to_stop() as asked:
            self.speed()
            for batch in bar:
                yield batch
                if run_distributed.any_of_all(bool(asked)):
                    self.losses.read()
                    run.save_checkpoint(self.losses.folder, self.losses.saved, step=self.step)
                    raise Stopped(asked[0] if asked else signal.SIGTERM, self.step)

    def report(self, step: int, write_log, publish) -> None:
        """`step` steps are done: write_log, publish (by process 0) and write a checkpoint where it is due."""
        config, self.step = self.config, step
        self.samples += config.batch
        if step % config.log_every == 0 or step == config.steps:
            write_log()
        if step % config.save_every == 0 or step == config.steps:
            self.losses.read()
            if not run_distributed.rank():
                with torch.no_grad():
                    publish()
            run.save_checkpoint(self.losses.folder, self.losses.saved, step=step)
            self.speed()                    # the time for that is no training

    def speed(self) -> dict:
        """Samples per second since the last call, and the peak memory, for the log."""
        seconds, samples = time.perf_counter() - self.begun, self.samples
        self.begun, self.samples = time.perf_counter(), 0
        return {"samples_per_s": samples / seconds, "memory_mib": peak_memory(self.device)}


def peak_memory(device: torch.device):
    """Most memory in use so far, in MiB: of the GPU, or of the process (None where the system is silent)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource                     # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**(20 if sys.platform == "darwin" else 10)


def update(optimizer, scaler, clip: float) -> torch.Tensor:
    """One step with the gradients of all processes, cut to an L2 norm of `clip`; their norm before, ()."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    run_distributed.sum_gradients(parameters)
    scaler.unscale_(optimizer)              # fp16: the gradients were taken of a larger loss
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    scaler.step(optimizer)
    scaler.update()
    return norm
