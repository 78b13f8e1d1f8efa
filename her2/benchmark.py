"""How fast is this machine, and which card does a preset need: python -m her2.benchmark --preset tiny

Measured: every training loop through its own script (data, forward, backward, optimiser), then patches,
rasteriser, sampling and whole-region inference in this process. A number belongs to a machine; `--against` an
earlier file gives ratios.

Counted, without any memory or GPU: parameters, arithmetic and peak memory of one step of each loop. The
networks stand on torch's "meta" device, where tensors have shapes and no content. A step is run there, and

    arithmetic      2 per multiplication with addition, in convolutions and matrix products (torch's counter)
    peak memory     the most bytes of storages that live at once during forward and backward (activations,
                    gradients, what is in between), plus weights, Adam's two moments and the moving average

in float32. What cuDNN or oneDNN take for themselves comes on top. The same --batch in parts (micro-batches
whose gradients are added up) costs the memory of one part. The paper's size is counted at --preset paper.
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

from her2 import run, run_training
from her2 import run_config as configuration
from her2.autoencoder import VQ_F4, VQ_F8, VQAutoencoder
from her2.data_folder import load_dataset
from her2.data_patches import PatchSampler, iterate_rois
from her2.denoiser import LatentDenoiser
from her2.diffusion import Schedule, denoising_loss
from her2.discriminator import MultiscaleDiscriminator, PatchGAN, discriminate
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
from her2.spade import SPADEGenerator, VAEEncoder, reparameterize
from her2.study import environment

ROOT = Path(__file__).resolve().parents[1]
CLASSES = 6                                             # of the default class table
CARDS = (8, 12, 16, 24, 32, 40, 48, 80, 141, 192)       # GiB that cards are sold with
MARGIN = 1.15           # context, kernels and their workspace: 0.5 to 2 GiB on cards of 12 to 24
# loop: (its script, arguments, names of its configuration and presets there, copies of the weights that an
# average keeps)
LOOPS = {"autoencoder": ("train_ldm.py", ["--stage", "autoencoder"], "AutoencoderConfig", "AUTOENCODER_PRESETS"),
         "diffusion": ("train_ldm.py", ["--stage", "diffusion"], "DiffusionConfig", "DIFFUSION_PRESETS"),
         "gan": ("train_gan.py", [], "Config", "PRESETS"), "segmentation": ("train_seg.py", [], "Config", "PRESETS")}


@dataclass
class Config:
    preset: Literal["tiny", "small", "paper"] = "tiny"  # sizes to measure; paper needs a GPU
    count: bool = True              # count parameters, arithmetic and memory of the preset's loops
    measure: bool = True            # measure this machine; off: only count
    batch: int = 16                 # patches per step that are counted
    steps: int = 20                 # steps per loop; the second half of them is timed
    data: str = ""                  # dataset folder; empty: a phantom of this preset, made for the purpose
    out: str = ""                   # JSON file for the figures; empty: only print
    against: str = ""               # JSON file of an earlier run: prints ratios, above 1 = faster now
    device: Literal["auto", "cpu", "cuda"] = "auto"     # auto: the GPU when there is one
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"  # mixed precision; auto: where it is fast


def script_config(loop: str, preset: str):
    """The configuration that the script of `loop` has with this preset, read from the script itself."""
    script, _, config, presets = LOOPS[loop]
    names = runpy.run_path(str(ROOT / script), run_name="her2.benchmark")
    return configuration.build(names[config], names[presets], {"preset": preset})


class LiveBytes(TorchDispatchMode):
    """`with LiveBytes() as live:` counts the storages that operations make: live.now and live.peak, bytes."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.add, result)
        return result

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage not in self.seen:                    # views share one
            self.seen.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, storage.nbytes())

    def free(self, count):
        self.now -= count


def one_step(loop: str, c, batch: int, device):
    """(trained networks, frozen ones, averaged ones, function without arguments): forward and backward."""
    torch.manual_seed(0)
    image = torch.zeros(batch, 3, c.patch, c.patch, device=device)
    onehot = torch.zeros(batch, CLASSES, c.patch, c.patch, device=device)
    with torch.device(device):
        if loop == "segmentation":
            net, target = UNet(2, width=c.width), torch.zeros(batch, c.patch, c.patch, dtype=torch.long)
            return [net], [], [], lambda: dice_cross_entropy(net(image), target, c.dice)[0].backward()

        if loop == "gan":
            net = SPADEGenerator(CLASSES, c.width, c.z_dim, c.patch, hidden=c.hidden)
            encoder, disc = VAEEncoder(c.width, c.z_dim, c.patch), MultiscaleDiscriminator(CLASSES + 3, c.width)

            def step():
                with frozen(disc):
                    mu, logvar = encoder(image)
                    made = net(onehot, reparameterize(mu, logvar, torch.zeros_like(mu)))
                    fake, real = discriminate(disc, onehot, made, image)
                (hinge_generator(fake) + feature_matching(fake, real) + kl_divergence(mu, logvar)).backward()
                fake, real = discriminate(disc, onehot, made.detach(), image)
                sum(hinge_discriminator(real, fake)).backward()
            return [net, encoder, disc], [], [net], step

        factor, width = (c.factor, c.width) if loop == "autoencoder" else (4, script_config(
            "autoencoder", c.preset).width)
        model = VQAutoencoder(**{**(VQ_F4 if factor == 4 else VQ_F8), "ch": width, "num_res_blocks": c.blocks,
                                 "groups": max(1, width // 4)})
        if loop == "autoencoder":
            disc = PatchGAN(3, c.disc_width, num_layers=3 if factor == 4 else 2)

            def step():
                with frozen(disc):
                    again, _, _, _, vq_loss = model(image)
                    loss = (again - image).abs().mean() + vq_loss + hinge_generator(disc(again))
                loss.backward()
                sum(hinge_discriminator(disc(image), disc(again.detach()))).backward()
            return [model, disc], [], [], step

        denoiser = LatentDenoiser(CLASSES, 3, c.width, tuple(map(int, c.mult.split(","))), c.blocks,
                                  groups=max(1, c.width // 4))
        schedule, t = Schedule(T=c.timesteps).to(device), torch.zeros(batch, dtype=torch.long)

        def step():
            with torch.no_grad():
                x0 = model.encode(image)
            eps = torch.zeros_like(x0)
            output = denoiser(schedule.q_sample(x0, t, eps), t, denoiser.label_code(onehot))
            denoising_loss(output, eps).mean().backward()
        return [denoiser], [model], [denoiser], step


def count(loop: str, c, batch: int, device="meta") -> dict:
    """Parameters, floating-point operations and peak bytes of one step of a loop with configuration `c`."""
    trained, fixed, averaged, step = one_step(loop, c, batch, device)
    weights, still, copies = (sum(p.numel() for net in nets for p in net.parameters())
                              for nets in (trained, fixed, averaged))
    with LiveBytes() as live, FlopCounterMode(display=False) as flops:
        step()
    return {"parameters": weights, "flops": flops.get_total_flops(), "step_bytes": live.peak,
            "bytes": live.peak + 4 * (3 * weights + still + copies)}


def count_table(preset: str, batch: int) -> dict:
    """Prints what a step of every loop needs, the batch in one part and in smaller ones; returns the figures."""
    parts = sorted({batch, max(1, batch // 4), 1}, reverse=True)
    print(f"\none step at batch {batch}, preset {preset}, float32: GiB at "
          f"{' / '.join(map(str, parts))} patches at a time, and the smallest card for each")
    found = {}
    for loop in LOOPS:
        c = script_config(loop, preset)
        rows = [count(loop, c, part) for part in parts]
        gib = [row["bytes"] / 2**30 for row in rows]
        cards = [next((str(card) for card in CARDS if card >= MARGIN * size), "none") for size in gib]
        found[loop] = {"parameters": rows[0]["parameters"], "flops": rows[0]["flops"],
                       "bytes": {str(part): row["bytes"] for part, row in zip(parts, rows)}}
        print(f"  {loop:13} {rows[0]['parameters'] / 1e6:8.1f} M parameters {rows[0]['flops'] / 1e12:9.3f} TFLOP"
              f"   {' / '.join(f'{size:.2f}' for size in gib)} GiB   {' / '.join(cards)} GiB cards", flush=True)
    return found


def seconds(call, repeats: int = 5) -> float:
    """Median time of a call, after one that warms up."""
    call()
    times = []
    for _ in range(repeats):
        clock = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - clock)
    return statistics.median(times)


def train(loop: str, config, data, folder) -> dict:
    """Runs the script of a loop for `config.steps` steps and reads its log."""
    script, arguments, *_ = LOOPS[loop]
    c = script_config(loop, config.preset)
    half = max(1, config.steps // 2)
    line = [sys.executable, str(ROOT / script), *arguments, "--preset", config.preset, "--data", str(data),
            "--cache", str(folder / "cache"), "--out", str(folder / loop), "--device", config.device, "--amp",
            config.amp, "--steps", str(2 * half), "--log-every", str(half), "--save-every", str(2 * half)]
    line += ["--autoencoder", str(folder / "autoencoder"), "--sample-steps", "2"] * (loop == "diffusion")
    line += ["--disc-start", "0"] * (loop == "autoencoder")     # the dear phase of the training
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise UserError(f"{script}: ended with exit status {done.returncode}: {done.stderr.strip()[-300:]}")
    last = Log(folder / loop, 2 * half).records()[-1]
    return {"samples_per_s": last["samples_per_s"], "steps_per_s": last["samples_per_s"] / c.batch,
            "memory_mib": last["memory_mib"]}


def measure(config, data, folder, device) -> dict:
    """{row: figures}, printed one by one; a row has samples_per_s and what else is known."""
    rows, precision = {}, run_training.Precision(device, config.amp)

    def note(name, unit, **figures):
        rows[name] = figures
        more = "".join(f"   {figures[key]:.3g} {text}" for key, text in (
            ("steps_per_s", "steps/s"), ("memory_mib", "MiB at most")) if figures.get(key))
        print(f"  {name:24} {figures['samples_per_s']:10.4g} {unit}/s{more}", flush=True)

    for loop in LOOPS:
        note(loop, "patches", **train(loop, config, data, folder))
    c, dataset = script_config("segmentation", config.preset), load_dataset(data)
    sampler = PatchSampler(dataset, "train", c.patch, stain=1.0, cache=folder / "cache")
    numbers = iter(range(10**9))
    note("patches, augmented", "patches", samples_per_s=16 / seconds(lambda: sampler.batch(next(numbers), 16)))
    random = np.random.default_rng(0)
    angle = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    stars = [[random.uniform(0, 2000, 2) + (random.uniform(20, 120) * (1 + random.uniform(0, 0.2, 200))
              * np.stack([np.cos(angle), np.sin(angle)])).T] for _ in range(50)]
    note("rasterised polygons", "polygons", samples_per_s=50 / seconds(lambda: paint(stars, [1] * 50, 2000, 2000)))

    models = {kind: run.load_model(folder / loop, kind) for kind, loop in
              (("autoencoder", "autoencoder"), ("diffusion", "diffusion"), ("gan", "gan"),
               ("segmenter", "segmentation"))}
    autoencoder, denoiser, gan, segmenter = (
        run.build_model(cls, models[kind], folder).to(device, memory_format=torch.channels_last)
        for cls, kind in ((VQAutoencoder, "autoencoder"), (LatentDenoiser, "diffusion"),
                          (SPADEGenerator, "gan"), (UNet, "segmenter")))
    schedule, count = Schedule(**models["diffusion"]["schedule"]).to(device), 4
    onehot = run_training.one_hot(sampler.batch(0, count)["label"], len(dataset.classes), device)
    noise = image_noise(range(count), (3, *(side // autoencoder.factor for side in onehot.shape[2:])), device)

    def diffuse(**options):
        x0 = sample(denoiser.predictor(denoiser.label_code(onehot)), schedule, noise, **options)
        return autoencoder.decode(denoiser.unscale(x0))

    roi = max((image[0] for _, image, *_ in iterate_rois(dataset, "val", cache=folder / "cache")),
              key=lambda image: image.numel())
    with torch.no_grad(), precision.autocast():
        for name, options in (("DDIM, 50 steps", dict(eta=0.0)),
                              ("DPM-Solver++, 15 steps", dict(steps=15, sampler="dpm"))):
            note(name, "images", samples_per_s=count / seconds(lambda: diffuse(**options), 3))
        z = torch.zeros(count, models["gan"]["kwargs"]["z_dim"], device=device)
        note("GAN images", "images", samples_per_s=count / seconds(lambda: gan(onehot, z)))
        note("inference on a region", "megapixels", samples_per_s=roi[0].numel() / 1e6 / seconds(
            lambda: predict_roi(segmenter, roi, tile=max(256, c.patch), overlap=64, device=device), 3))
    return rows


def main(argv):
    config = configuration.parse(Config, {name: {} for name in ("tiny", "small", "paper")}, argv, __doc__,
                                 "python -m her2.benchmark")
    device = run_training.pick_device(config.device)
    earlier = run.read_json(config.against) if config.against else None
    if earlier is not None and not isinstance(earlier.get("rows"), dict):
        raise UserError(f"{config.against}: is no file of her2.benchmark --out; give one")
    settings = {"machine": torch.cuda.get_device_name() if device.type == "cuda" else
                torch.cpu.get_capabilities().get("cpu_name", "CPU"), "threads": torch.get_num_threads(),
                "cores": os.cpu_count(), "preset": config.preset, "device": str(device),
                "precision": str(run_training.Precision(device, config.amp)), "git": git_commit(), **versions()}
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    result = {"settings": settings, "rows": {}, "counted": {}}
    if config.measure:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:     # a mapped file stays open
            data = Path(config.data) if config.data else make_phantom(Path(folder) / "data", config.preset)
            result["rows"] = measure(config, data, Path(folder), device)
    for name in result["rows"] if earlier else ():
        if name in earlier["rows"]:
            ratio = result["rows"][name]["samples_per_s"] / earlier["rows"][name]["samples_per_s"]
            print(f"  {name:24} {ratio:6.2f} times as fast as in {config.against}")
    if config.count:
        result["counted"] = count_table(config.preset, config.batch)
    if config.out:
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        run.write_json(config.out, result)
    return 0


if __name__ == "__main__":
    command(main)
