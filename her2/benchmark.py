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

import itertools
import os
import runpy
import subprocess
import sys
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.utils.benchmark import Timer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from her2 import (data_folder, data_patches, diffusion, losses, polygons, run, run_config as configuration,
                  run_log, run_provenance, run_setup, run_training, segmenter, spade)
from her2.discriminator import discriminate
from her2.gan_losses import adversarial_loss, feature_matching, kl_divergence
from her2.net_blocks import frozen
from her2.phantom import make_phantom
from her2.run_errors import ROOT, UserError, command

CLASSES = 6                                             # of the default class table
CARDS = (8, 12, 16, 24, 32, 40, 48, 80, 141, 192)       # GiB that cards are sold with
MARGIN = 1.15           # the context and the kernels' workspace: 1 to 2 GiB on a card of 12
LOOPS = list(run.KINDS)                                 # autoencoder, diffusion, gan, segmenter


@dataclass
class Config(configuration.Machine):
    preset: Literal["tiny", "small", "paper"] = "tiny"  # sizes to measure and to count
    steps: int = 20                 # steps per loop; the second half of them is timed
    batch: int = 16                 # patches per step that are counted
    out: str = ""                   # JSON file for the figures; empty: only print
    against: str = ""               # JSON file of an earlier run: prints ratios, above 1 = faster now


def script_config(loop: str, preset: str):
    """The configuration that the script of `loop` has with this preset, read from the script itself."""
    script, *stage = run.KINDS[loop][0]
    names = runpy.run_path(str(ROOT / script), run_name="her2.benchmark")
    cls, presets = (f"{loop.title()}Config", f"{loop.upper()}_PRESETS") if stage else ("Config", "PRESETS")
    config = names[cls](**{"preset": preset, **names[presets][preset]})     # not by `build`: it asks runs/vq
    config.encoder_weights = "none"             # of the segmenter: sizes are asked for, no download for that
    return config


class LiveBytes(TorchDispatchMode):
    """`with LiveBytes() as live:` counts the bytes of storages that operations make, live.now() and .peak."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = weakref.WeakKeyDictionary(), 0      # {storage: bytes}, while anybody has it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # What is there already, such as weights, is not counted; a view of it shares its storage.
        tree_map_only(torch.Tensor, lambda x: self.alive.setdefault(x.untyped_storage(), 0), (args, kwargs))
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, lambda x: self.alive.setdefault(
            x.untyped_storage(), x.untyped_storage().nbytes()), result)
        self.peak = max(self.peak, self.now())
        return result

    def now(self) -> int:
        return sum(self.alive.values())


def one_step(loop: str, c, device):
    """(trained networks, those kept beside them, function step(batch)): forward and backward, as in the loop.
    Beside are what is frozen and the moving averages. The content of the tensors changes neither count."""
    def zeros(batch, *channels):
        return torch.zeros((batch, *channels, c.patch, c.patch), device=device)

    if loop == "segmenter":
        net = run_setup.segmenter(c, device)

        def step(batch):
            logits, target = net(zeros(batch, 3)), zeros(batch).long()
            losses.dice_cross_entropy(logits, target, c.dice)[0].backward()
        return [net], [net], step

    if loop == "gan":
        net, encoder, disc = run_setup.spade_gan(c, CLASSES, device)

        def step(batch):
            image, onehot = zeros(batch, 3), zeros(batch, CLASSES)
            with frozen(disc):                  # the gradient passes through it
                mu, logvar = encoder(image)
                made = net(onehot, spade.reparameterize(mu, logvar, torch.zeros_like(mu)))
                fake, real = discriminate(disc, onehot, made, image)
            gan = adversarial_loss(fake, "generator")
            (gan + feature_matching(fake, real) + kl_divergence(mu, logvar)).backward()
            fake, real = discriminate(disc, onehot, made.detach(), image)
            (adversarial_loss(real, "real") + adversarial_loss(fake, "fake")).backward()
        return [net, encoder, disc], [net], step

    model, disc = run_setup.autoencoder_gan(script_config("autoencoder", c.preset), device)
    if loop == "autoencoder":
        def step(batch):
            image = zeros(batch, 3)
            with frozen(disc):
                again, _, _, _, vq_loss = model(image)
                loss = (again - image).abs().mean() + vq_loss
                (loss + adversarial_loss(disc(again), "generator") if c.disc_weight else loss).backward()
            if c.disc_weight:
                real, fake = disc(image), disc(again.detach())
                (adversarial_loss(real, "real") + adversarial_loss(fake, "fake")).backward()
        return [model, disc] if c.disc_weight else [model], [], step

    schedule, denoiser = run_setup.diffusion(c, model, CLASSES, device)

    def step(batch):
        with torch.no_grad():                   # the autoencoder learns no more: it keeps no activations
            x0 = model.encode(zeros(batch, 3))
        code = denoiser.label_code(zeros(batch, CLASSES))
        t, eps = torch.zeros(batch, device=device).long(), torch.zeros_like(x0)
        xt = schedule.q_sample(x0, t, eps)
        diffusion.denoising_loss(denoiser(xt, t, code), eps).mean().backward()
    return [denoiser], [model, denoiser], step


def count(loop: str, c, parts) -> dict:
    """Parameters, operations of one step, and its peak bytes with each of `parts` patches at a time."""
    trained, beside, step = one_step(loop, c, "meta")
    weights, others = (sum(p.numel() for net in nets for p in net.parameters()) for nets in (trained, beside))
    peaks, kept = {}, 4 * (3 * weights + others)        # float32: weight, Adam's two moments
    for part in parts:
        for net in trained:
            net.zero_grad(set_to_none=True)     # gradients count as made by the step, as in the loop
        with LiveBytes() as live:
            step(part)
        peaks[part] = live.peak
    with FlopCounterMode(display=False) as flops:       # a step of its own: the counter keeps tensors alive
        step(max(parts))
    return {"parameters": weights, "step_bytes": peaks, "flops": flops.get_total_flops(),
            "bytes": {part: peak + kept for part, peak in peaks.items()}}


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


def rate(number: float, call, repeats: int) -> dict:
    """`number` things per second of a call, by torch's timer: it warms up, and waits for a GPU."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return {"samples_per_s": number / timer.timeit(repeats).median}


def train(loop: str, config, data, folder) -> dict:
    """Runs the script of a loop for `config.steps` steps and reads its log."""
    half, (script, *stage) = max(1, config.steps // 2), run.KINDS[loop][0]
    flags = {"--preset": config.preset, "--data": data, "--cache": folder / "cache", "--out": folder / loop,
             "--device": config.device, "--amp": config.amp, "--steps": 2 * half, "--log-every": half,
             "--save-every": 2 * half}
    flags |= {"diffusion": {"--autoencoder": folder / "autoencoder", "--sample-steps": 2},
              "autoencoder": {"--disc-start": 0}}.get(loop, {})        # the dear phase of its training
    line = [sys.executable, ROOT / script, *stage, *(word for flag in flags.items() for word in flag)]
    # Threads that wait sleep: waiting busily costs a factor of ten where other programs run too.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, line)), env=environment, capture_output=True, text=True,
                          encoding="utf-8", errors="replace")
    if done.returncode:
        raise UserError(f"{script}: ended with exit status {done.returncode}: {done.stderr.strip()[-300:]}")
    last, batch = run_log.Log(folder / loop, 2 * half).records()[-1], script_config(loop, config.preset).batch
    return {**{key: last[key] for key in ("samples_per_s", "memory_mib")},
            "steps_per_s": last["samples_per_s"] / batch}


def measure(config, folder, device):
    """Yields (row, what is counted, figures); figures have samples_per_s and, of loops, steps and memory."""
    data = make_phantom(folder / "data", config.preset)
    for loop in LOOPS:
        yield f"{loop} training", "patches", train(loop, config, data, folder)
    side, dataset = script_config("segmenter", config.preset).patch, data_folder.load_dataset(data)
    sampler = data_patches.PatchSampler(dataset, "train", side, stain=1.0, cache=folder / "cache")
    steps = itertools.count()                   # every call another batch: one is read from no cache
    yield f"{side}-px patches, augmented", "patches", rate(8, lambda: sampler.batch(next(steps), 8), 20)
    random, angle = np.random.default_rng(0), np.linspace(0, 2 * np.pi, 200, endpoint=False)
    unit = np.stack([np.cos(angle), np.sin(angle)], axis=1)                                     # (200, 2)
    stars = [[random.uniform(0, 2000, 2) + random.uniform(50, 100, (200, 1)) * unit] for _ in range(50)]
    yield "rasterising", "polygons of 200 points", rate(
        50, lambda: polygons.paint(stars, [1] * 50, 2000, 2000), 5)

    # Images are painted by what generate.py paints with, four at a time.
    synthesis = runpy.run_path(str(ROOT / "generate.py"), run_name="her2.benchmark")
    label = sampler.batch(0, 4)["label"]
    batch = {"seeds": range(4), "onehot": run_training.one_hot(label, len(dataset.classes), device)}

    def images(loop, repeats, **options):
        c = synthesis["Config"](model=str(folder / loop), patch=side, **options)
        painter = synthesis["make_painter"](c, run.load_model(c.model, loop), dataset, device)
        return rate(4, lambda: painter.paint(batch), repeats)

    _, roi, *_ = next(data_patches.iterate_rois(dataset, "val", cache=folder / "cache"))       # (1, 3, H, W)
    content = run.load_model(folder / "segmenter", "segmenter")
    network = run.build_model(segmenter.UNet, content, folder, device)
    with torch.no_grad(), run_training.Precision(device, config.amp).autocast():
        yield "DDIM, 50 steps", "images", images("diffusion", 3, eta=0.0)
        yield "DPM-Solver++, 15 steps", "images", images("diffusion", 3, steps=15, sampler="dpm")
        yield "GAN", "images", images("gan", 5, method="gan")
        yield "region inference", "megapixels", rate(roi[0, 0].numel() / 1e6, lambda: segmenter.predict_roi(
            network, roi[0], *segmenter.choose_tiles(0, 0, side), device=device), 3)


def main(argv):
    config = configuration.parse(Config, {}, argv, __doc__, "python -m her2.benchmark")
    device, precision = run_training.pick_device(config.device, config.amp)
    earlier = run.read_json(config.against) if config.against else {"rows": {}}
    if not isinstance(earlier, dict) or not isinstance(earlier.get("rows"), dict):
        raise UserError(f"{config.against}: was not written by her2.benchmark --out; give such a file")
    on_gpu = device.type == "cuda"
    made = run_provenance.versions()
    settings = {"machine": torch.cuda.get_device_name() if on_gpu
                else torch.cpu.get_capabilities().get("cpu_name", "CPU"),
                "cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": str(device),
                "precision": str(precision), "preset": config.preset, "git": made["git"], **made["versions"]}
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    rows = {}
    if config.preset != "paper" or on_gpu:          # a CPU would need days for it
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:    # mapped files are open
            for name, unit, figures in measure(config, Path(folder), device):
                rows[name], speed = figures, figures["samples_per_s"]
                text = f"  {name:26} {speed:9.4g} {unit}/s"
                for key, word in (("steps_per_s", "steps/s"), ("memory_mib", "MiB at most")):
                    text += f"   {figures[key]:.3g} {word}" if figures.get(key) else ""
                if before := (earlier["rows"].get(name) or {}).get("samples_per_s"):
                    text += f"   {speed / before:.2f} times the earlier rate"
                print(text, flush=True)
    counted = count_table(config.preset, config.batch)
    if config.out:
        run.write_json(config.out, {"settings": settings, "rows": rows, "counted": counted})


if __name__ == "__main__":
    command(main)
