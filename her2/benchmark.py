"""How fast is this machine, and which card does a preset need: python -m her2.benchmark --preset tiny

Measured: every training loop through its own script (data, forward, backward, optimiser), then patches,
rasteriser, sampling and whole-region inference in this process. `paper` is measured on a GPU only.

Counted, without GPU or memory: one step of each loop on torch's "meta" device, where tensors have shapes and
no content, with the batch whole and in parts (whose gradients add up to the batch's):

    arithmetic  2 per multiplication with addition, in convolutions and matrix products (torch's counter)
    memory      the most bytes of storages alive at once in forward and backward (activations, gradients),
                plus weights, Adam's two moments and the moving average, in float32

What cuDNN or oneDNN take for themselves comes on top.
"""

import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from her2 import run, run_setup, run_training
from her2 import run_config as configuration
from her2.autoencoder import VQAutoencoder
from her2.data_folder import load_dataset
from her2.data_patches import PatchSampler, iterate_rois
from her2.denoiser import LatentDenoiser
from her2.diffusion import Schedule, denoising_loss
from her2.discriminator import discriminate
from her2.gan_losses import feature_matching, hinge_discriminator, hinge_generator, kl_divergence
from her2.losses import dice_cross_entropy
from her2.net_blocks import frozen
from her2.phantom import make_phantom
from her2.polygons import paint
from her2.run_errors import UserError, command
from her2.run_log import Log
from her2.run_provenance import git_commit, versions
from her2.samplers import image_noise, sample
from her2.segmenter import UNet, predict_roi
from her2.spade import SPADEGenerator, reparameterize

ROOT = Path(__file__).resolve().parents[1]
CLASSES = 6                                             # of the default class table
CARDS = (8, 12, 16, 24, 32, 40, 48, 80, 141, 192)       # GiB that cards are sold with
MARGIN = 1.15           # the context and the kernels' workspace: 1 to 2 GiB on a card of 12
# Loop: its script with arguments, and what precedes Config and PRESETS in the names there.
LOOPS = {"autoencoder": (["train_ldm.py", "--stage", "autoencoder"], "Autoencoder"),
         "diffusion": (["train_ldm.py", "--stage", "diffusion"], "Diffusion"),
         "gan": (["train_gan.py"], ""), "segmenter": (["train_seg.py"], "")}


@dataclass
class Config:
    preset: Literal["tiny", "small", "paper"] = "tiny"  # sizes to measure and to count
    steps: int = 20                 # steps per loop; the second half of them is timed
    batch: int = 16                 # patches per step that are counted
    data: str = ""                  # dataset folder; empty: a phantom of this preset, made for the purpose
    out: str = ""                   # JSON file for the figures; empty: only print
    against: str = ""               # JSON file of an earlier run: prints ratios, above 1 = faster now
    device: Literal["auto", "cpu", "cuda"] = "auto"     # auto: the GPU when there is one
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"  # mixed precision; auto: where it is fast


def script_config(loop: str, preset: str):
    """The configuration that the script of `loop` has with this preset, read from the script itself."""
    line, name = LOOPS[loop]
    names = runpy.run_path(str(ROOT / line[0]), run_name="her2.benchmark")
    presets = names[f"{name.upper()}_PRESETS" if name else "PRESETS"]
    config = configuration.build(names[f"{name}Config"], presets, {"preset": preset})
    if loop == "segmenter":
        config.encoder_weights = "none"                 # sizes are asked for: no download for that
    return config


class LiveBytes(TorchDispatchMode):
    """`with LiveBytes() as live:` counts the storages that operations make: live.now, live.peak in bytes."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # What is there already, such as weights, is not counted; a view of it shares its storage.
        tree_map_only(torch.Tensor, lambda tensor: self.seen.add(tensor.untyped_storage()), (args, kwargs))
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.add, result)
        return result

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage not in self.seen:
            self.seen.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, storage.nbytes())

    def free(self, count):
        self.now -= count


def one_step(loop: str, c, device):
    """(trained, frozen, averaged networks, function step(batch)): forward and backward as in the loop."""
    def zeros(*shape):
        return torch.zeros(shape, device=device)

    if loop == "segmenter":
        net = run_setup.segmenter(c, device)

        def step(batch):
            logits, target = net(zeros(batch, 3, c.patch, c.patch)), zeros(batch, c.patch, c.patch).long()
            dice_cross_entropy(logits, target, c.dice)[0].backward()
        return [net], [], [], step

    if loop == "gan":
        net, encoder, disc = run_setup.spade_gan(c, CLASSES, device)

        def step(batch):
            image, onehot = zeros(batch, 3, c.patch, c.patch), zeros(batch, CLASSES, c.patch, c.patch)
            with frozen(disc):
                mu, logvar = encoder(image)
                made = net(onehot, reparameterize(mu, logvar, torch.zeros_like(mu)))
                fake, real = discriminate(disc, onehot, made, image)
            (hinge_generator(fake) + feature_matching(fake, real) + kl_divergence(mu, logvar)).backward()
            fake, real = discriminate(disc, onehot, made.detach(), image)
            sum(hinge_discriminator(real, fake)).backward()
        return [net, encoder, disc], [], [net], step

    model, disc = run_setup.autoencoder_gan(
        c if loop == "autoencoder" else script_config("autoencoder", c.preset), device)
    if loop == "autoencoder":
        def step(batch):
            image = zeros(batch, 3, c.patch, c.patch)
            with frozen(disc):
                again, _, _, _, vq_loss = model(image)
                loss = (again - image).abs().mean() + vq_loss
                (loss + hinge_generator(disc(again)) if c.disc_weight else loss).backward()
            if c.disc_weight:
                sum(hinge_discriminator(disc(image), disc(again.detach()))).backward()
        return [model, disc] if c.disc_weight else [model], [], [], step

    schedule, denoiser = run_setup.diffusion(c, model, CLASSES, device)

    def step(batch):
        with torch.no_grad():
            x0 = model.encode(zeros(batch, 3, c.patch, c.patch))
        code = denoiser.label_code(zeros(batch, CLASSES, c.patch, c.patch))
        t, eps = zeros(batch).long(), torch.zeros_like(x0)
        denoising_loss(denoiser(schedule.q_sample(x0, t, eps), t, code), eps).mean().backward()
    return [denoiser], [model], [denoiser], step


def count(loop: str, c, parts, device="meta") -> dict:
    """Parameters, operations of one step, and its peak bytes with each of `parts` patches at a time."""
    trained, fixed, averaged, step = one_step(loop, c, device)
    weights, still, copies = (sum(p.numel() for net in nets for p in net.parameters())
                              for nets in (trained, fixed, averaged))
    found = {"parameters": weights, "step_bytes": {}, "bytes": {}}
    for part in parts:
        for net in trained:
            net.zero_grad(set_to_none=True)
        with LiveBytes() as live:
            step(part)
        found["step_bytes"][part] = live.peak
        found["bytes"][part] = live.peak + 4 * (3 * weights + still + copies)
    with FlopCounterMode(display=False) as flops:       # a step of its own: the counter keeps tensors alive
        step(max(parts))
    return {**found, "flops": flops.get_total_flops()}


def count_table(preset: str, batch: int) -> dict:
    """{loop: figures} of a step in one part and in smaller ones, printed."""
    parts = sorted({batch, max(1, batch // 4), 1}, reverse=True)
    print(f"a step at batch {batch}, preset {preset}, float32: GiB with {'/'.join(map(str, parts))} patches "
          "at a time, and the smallest card for each")
    found = {}
    for loop in LOOPS:
        one = found[loop] = count(loop, script_config(loop, preset), parts)
        gib = [size / 2**30 for size in one["bytes"].values()]
        cards = [next((str(card) for card in CARDS if card >= MARGIN * size), "no") for size in gib]
        print(f"  {loop:12} {one['parameters'] / 1e6:7.1f} M parameters {one['flops'] / 1e12:8.3f} TFLOP   "
              f"{' / '.join(f'{size:.2f}' for size in gib)} GiB   {' / '.join(cards)} GiB card", flush=True)
    return found


def rate(number: float, call, repeats: int = 5) -> dict:
    """`number` things per second by the median time of a call, after one that warms up."""
    times = []
    for _ in range(1 + repeats):
        clock = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - clock)
    return {"samples_per_s": number / statistics.median(times[1:])}


def train(loop: str, config, data, folder) -> dict:
    """Runs the script of a loop for `config.steps` steps and reads its log."""
    half = max(1, config.steps // 2)
    line = [sys.executable, str(ROOT / LOOPS[loop][0][0]), *LOOPS[loop][0][1:], "--preset", config.preset,
            "--data", str(data), "--cache", str(folder / "cache"), "--out", str(folder / loop), "--device",
            config.device, "--amp", config.amp, "--steps", str(2 * half), "--log-every", str(half),
            "--save-every", str(2 * half)]
    line += {"diffusion": ["--autoencoder", str(folder / "autoencoder"), "--sample-steps", "2"],
             "autoencoder": ["--disc-start", "0"]}.get(loop, [])        # the dear phase of its training
    # Threads that wait sleep: waiting busily costs a factor of ten where other programs run too.
    done = subprocess.run(line, env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise UserError(f"{LOOPS[loop][0][0]}: ended with exit status {done.returncode}: "
                        f"{done.stderr.strip()[-300:]}")
    last = Log(folder / loop, 2 * half).records()[-1]
    return {"samples_per_s": last["samples_per_s"], "memory_mib": last["memory_mib"],
            "steps_per_s": last["samples_per_s"] / script_config(loop, config.preset).batch}


def measure(config, data, folder, device):
    """Yields (row, what is counted, figures); figures have samples_per_s and, of loops, steps and memory."""
    for loop in LOOPS:
        yield f"{loop} training", "patches", train(loop, config, data, folder)
    side, dataset = script_config("segmenter", config.preset).patch, load_dataset(data)
    sampler = PatchSampler(dataset, "train", side, stain=1.0, cache=folder / "cache")
    numbers = iter(range(99))
    yield f"{side}-px patches, augmented", "patches", rate(8, lambda: sampler.batch(next(numbers), 8), 20)
    random, angle = np.random.default_rng(0), np.linspace(0, 2 * np.pi, 200, endpoint=False)
    unit = np.stack([np.cos(angle), np.sin(angle)], axis=1)                                     # (200, 2)
    stars = [[random.uniform(0, 2000, 2) + random.uniform(50, 100, (200, 1)) * unit] for _ in range(50)]
    yield "rasterising", "polygons of 200 points", rate(50, lambda: paint(stars, [1] * 50, 2000, 2000))

    contents = {loop: run.load_model(folder / loop, loop) for loop in LOOPS}
    autoencoder, denoiser, gan, segmenter = (
        run.build_model(cls, contents[loop], folder).to(device, memory_format=torch.channels_last)
        for loop, cls in zip(LOOPS, (VQAutoencoder, LatentDenoiser, SPADEGenerator, UNet)))
    schedule = Schedule(**contents["diffusion"]["schedule"]).to(device)
    onehot = run_training.one_hot(sampler.batch(0, 4)["label"], len(dataset.classes), device)   # (4, K, H, W)
    cells = side // autoencoder.factor
    noise = image_noise(range(4), (denoiser.config["z_channels"], cells, cells), device)

    def diffuse(**options):
        x0 = sample(denoiser.predictor(denoiser.label_code(onehot)), schedule, noise, **options)
        autoencoder.decode(denoiser.unscale(x0))

    _, roi, *_ = next(iterate_rois(dataset, "val", cache=folder / "cache"))                     # (1, 3, H, W)
    z = torch.zeros(4, contents["gan"]["kwargs"]["z_dim"], device=device)
    with torch.no_grad(), run_training.Precision(device, config.amp).autocast():
        yield "DDIM, 50 steps", "images", rate(4, lambda: diffuse(eta=0.0), 3)
        yield "DPM-Solver++, 15 steps", "images", rate(4, lambda: diffuse(steps=15, sampler="dpm"), 3)
        yield "GAN", "images", rate(4, lambda: gan(onehot, z))
        yield "region inference", "megapixels", rate(roi[0, 0].numel() / 1e6, lambda: predict_roi(
            segmenter, roi[0], tile=max(256, side), overlap=64, device=device), 3)


def main(argv):
    config = configuration.parse(Config, {name: {} for name in ("tiny", "small", "paper")}, argv, __doc__,
                                 "python -m her2.benchmark")
    device = run_training.pick_device(config.device)
    earlier = run.read_json(config.against) if config.against else {"rows": {}}
    if not isinstance(earlier, dict) or not isinstance(earlier.get("rows"), dict):
        raise UserError(f"{config.against}: was not written by her2.benchmark --out; give such a file")
    machine = (torch.cuda.get_device_name() if device.type == "cuda"
               else torch.cpu.get_capabilities().get("cpu_name", "CPU"))
    settings = {"machine": machine, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
                "device": str(device), "precision": str(run_training.Precision(device, config.amp)),
                "preset": config.preset, "git": git_commit(), **versions()}
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    rows = {}
    if config.preset != "paper" or device.type == "cuda":
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:    # mapped files are open
            data = config.data or make_phantom(Path(folder) / "data", config.preset)
            for name, unit, figures in measure(config, data, Path(folder), device):
                rows[name] = figures
                text = "".join(f"   {figures[key]:.3g} {word}" for key, word in (
                    ("steps_per_s", "steps/s"), ("memory_mib", "MiB at most")) if figures.get(key))
                if name in earlier["rows"]:
                    ratio = figures["samples_per_s"] / earlier["rows"][name]["samples_per_s"]
                    text += f"   {ratio:.2f} times the earlier rate"
                print(f"  {name:26} {figures['samples_per_s']:9.4g} {unit}/s{text}", flush=True)
    counted = count_table(config.preset, config.batch)
    if config.out:
        run.write_json(config.out, {"settings": settings, "rows": rows, "counted": counted})
    return 0


if __name__ == "__main__":
    command(main)
