"""Train the latent diffusion model in two stages (paper, section 2.2; Rombach et al. 2022).

    python train_ldm.py                                             both stages, phantom: runs/vq and runs/ldm
    python train_ldm.py --stage autoencoder --data D --out runs/vq
    python train_ldm.py --stage diffusion --autoencoder runs/vq --data D --out runs/ldm

Stage 1, the VQ autoencoder. An image becomes a latent z a few times smaller per side, every cell of z is
replaced by the nearest row of a codebook, and a decoder paints the image back:

    loss = |image - reconstruction| + vq_loss + weight * hinge_generator(D(reconstruction))
    weight = disc_weight * ||grad |image - reconstruction| || / ||grad hinge||      from step --disc-start on

Stage 2, diffusion on latents. A latent gets noise, and a U-Net that also sees the label learns to name it:

    xt = sqrt(alpha_bar[t]) x0 + sqrt(1 - alpha_bar[t]) eps     loss = |target - denoiser(xt, t, label code)|
    target = eps (--parametrisation eps), or sqrt(alpha_bar[t]) eps - sqrt(1 - alpha_bar[t]) x0 (v)
"""

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
from tqdm import tqdm

from her2 import draw, draw_axes, run, run_config as configuration, run_training
from her2.autoencoder import VQ_F4, VQ_F8, VQAutoencoder, psnr
from her2.net_blocks import frozen, init_weights
from her2.data_folder import load_dataset, write_split
from her2.denoiser import LatentDenoiser
from her2.diffusion import Schedule, denoising_loss, loss_of_zero_output, quartile_sums
from her2.discriminator import PatchGAN
from her2.run_errors import UserError, command
from her2.gan_losses import adaptive_weight, hinge_discriminator, hinge_generator
from her2.data_latents import pooled_latents
from her2.net_perceptual import LPIPS
from her2.phantom import default_phantom
from her2.quantizer import count_codes, restart_dead_codes
from her2.data_patches import PatchSampler, loader
from her2.samplers import image_noise, sample
from her2.run_seeds import generator


@dataclass
class Common:
    data: str = ""                  # dataset folder; empty: the phantom of this preset, made on first use
    preset: Literal["tiny", "small", "paper"] = "tiny"  # sizes for minutes of CPU, a small study, the paper
    seed: int = 0                   # decides the initial weights, the batches and the noise
    split_seed: int = 0             # decides the split of slides when slides.csv has none
    device: Literal["auto", "cpu", "cuda"] = "auto"     # auto: the GPU when there is one
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"  # mixed precision; auto: where it is fast
    lr: float = 1e-3                # step size that Adam sees; never rescaled
    schedule: Literal["constant", "cosine"] = "cosine"  # learning rate after the warm-up; cosine falls to 0
    warmup: int = 50                # steps over which the learning rate rises linearly from 0
    clip: float = 1.0               # largest L2 norm of each network's gradient
    patch: int = 64                 # side of a patch in pixels, at least 32, divisible by what networks halve
    sampling: Literal["tumor", "subtype", "uniform"] = "subtype"  # where patches are centred
    uniform: float = 0.0            # share of patches from anywhere
    log_every: int = 25             # steps between two lines of the log
    workers: int = 0                # processes that read patches ahead
    cache: str = "cache"            # folder for the decoded images


@dataclass
class AutoencoderConfig(Common):
    out: str = "runs/vq"            # run folder; the same command again goes on where it stopped
    steps: int = 800                # optimiser steps
    batch: int = 8                  # patches per step
    init: str = ""                  # official weights to start from: a checkpoint of vq-f4 or vq-f8
    factor: Literal[4, 8] = 4       # image side / latent side. 4 is vq-f4 (PAPER: names vq-f4 and says eight)
    width: int = 16                 # channels of the finest level: 8, 16 or a multiple of 32; official: 128
    blocks: int = 1                 # residual blocks per level; 2 is the official number
    codes: int = 1024               # rows of the codebook
    beta: float = 0.25              # weight of the commitment term ||z - sg[e]||^2
    lpips: str = ""                 # file of LPIPS weights: adds the perceptual loss; empty: off
    lambda_lpips: float = 1.0       # weight of the perceptual loss, when there is one
    disc_start: int = 650           # step from which the discriminator's gradient enters; it trains from
                                    # step 0. Before L1 has flattened it ruins the reconstruction
    disc_weight: float = 0.1        # factor on the adaptive weight of the GAN loss; 0 trains no discriminator
    disc_width: int = 16            # channels of the discriminator's first layer; 64 is the official one
    save_every: int = 125           # steps between two checkpoints, with sample pictures


@dataclass
class DiffusionConfig(Common):
    out: str = "runs/ldm"           # run folder; the same command again goes on where it stopped
    autoencoder: str = "runs/vq"    # run folder of stage 1
    steps: int = 900                # optimiser steps
    batch: int = 16                 # patches per step
    init: str = ""                  # official weights to start from: a latent-diffusion checkpoint
    width: int = 32                 # channels of the finest level; 128 is the official one
    mult: Literal["1,4,8", "1,2,4"] = "1,2,4"           # width of each level, as multiples of --width
    blocks: int = 1                 # residual blocks per level; 2 is the official number
    timesteps: int = 1000           # T, length of the noise schedule
    parametrisation: Literal["eps", "v"] = "v"          # what the network predicts
    zero_terminal_snr: bool = True  # rescale the schedule so that xT is pure noise: white glass stays white
    loss: Literal["l1", "l2"] = "l2"  # distance between the target and the prediction
    drop_label: float = 0.1         # probability of hiding the label, so that generate.py --guidance works
    ema: float = 0.999              # decay of the moving average of the weights, which is what samples
    latent_pool: int = 0            # 0: new patches each step; N: N patches, encoded once in 8 orientations
    sample_steps: int = 50          # DDIM steps of the sample pictures
    save_every: int = 250           # steps between two checkpoints, with sample pictures


# The official objective is L1 on eps. After a few minutes of training it samples grey plates: at t near T an
# error of eps is divided by sqrt(alpha_bar) = 0.01 on its way to x0. With v and a terminal SNR of zero the
# same minutes give images that obey the label, so the small presets use these; `paper` is the official one.
# PAPER: batch 16 and learning rate 1e-6 are printed for the diffusion model. The official code multiplies a
# base rate by batch and devices (1e-6 x 16 = 1.6e-5); the paper does not say which is meant. For the
# autoencoder nothing is printed: 4.5e-6 x 8 = 3.6e-5 is the official effective rate of vq-f4.
AUTOENCODER_PRESETS = {
    "tiny": {},
    "small": dict(steps=4000, width=32, codes=4096, warmup=200, disc_start=3000, save_every=250,
                  log_every=50),
    "paper": dict(steps=200_000, batch=8, patch=512, width=128, blocks=2, codes=8192, lr=3.6e-5,
                  schedule="constant", warmup=1000, disc_start=50_000, disc_weight=0.75, disc_width=64,
                  save_every=5000, log_every=100, workers=8),
}
DIFFUSION_PRESETS = {
    "tiny": {},
    "small": dict(steps=6000, patch=128, width=48, warmup=300, ema=0.999, save_every=1000, log_every=50),
    "paper": dict(steps=400_000, patch=512, width=128, mult="1,4,8", blocks=2, parametrisation="eps",
                  zero_terminal_snr=False, loss="l1", lr=1e-6, schedule="constant",
                  warmup=1000, ema=0.9999, save_every=10_000, log_every=100, workers=8),
}


def main(argv):
    """Stage by stage. Without --stage both run one after the other, each into its default folder."""
    parser = configuration.Parser(prog="train_ldm.py", add_help=False)
    parser.add_argument("--stage", choices=("autoencoder", "diffusion"))
    stage, rest = parser.parse_known_args(argv)
    if stage.stage == "autoencoder":
        return train_autoencoder(configuration.parse(
            AutoencoderConfig, AUTOENCODER_PRESETS, rest, __doc__, "train_ldm.py --stage autoencoder"), argv)
    if stage.stage == "diffusion":
        return train_diffusion(configuration.parse(
            DiffusionConfig, DIFFUSION_PRESETS, rest, __doc__, "train_ldm.py --stage diffusion"), argv)
    about = __doc__ + ("\nWithout --stage only the flags below are known; "
                       "each stage has more: --stage NAME --help.")
    parser = configuration.Parser(prog="train_ldm.py", description=about)
    configuration.add_fields(parser, Common, {})
    common = vars(parser.parse_args(rest))          # only what was given: a preset stands above a default
    train_autoencoder(configuration.build(AutoencoderConfig, AUTOENCODER_PRESETS, common), argv)
    return train_diffusion(configuration.build(DiffusionConfig, DIFFUSION_PRESETS, common), argv)


def open_data(config):
    """Dataset and sampler of the training split. No stain jitter: a painter should learn the true colours."""
    config.data = config.data or str(default_phantom(config.preset))
    dataset = load_dataset(config.data, seed=config.split_seed)
    return dataset, PatchSampler(dataset, "train", config.patch, config.sampling, config.seed,
                                 cache=config.cache, uniform=config.uniform)


def train_autoencoder(config, argv) -> int:
    if config.patch % (4 * config.factor) or config.patch < 32:     # smaller ones vanish in the discriminator
        raise UserError(f"--patch: found {config.patch}; give a multiple of {4 * config.factor}, at least 32")
    device = run_training.pick_device(config.device)
    precision = run_training.Precision(device, config.amp)
    dataset, sampler = open_data(config)

    # ---- networks, optimisers ------------------------------------------------------------------------------
    torch.manual_seed(config.seed)                  # initial weights only: all else has its own generator
    official = VQ_F4 if config.factor == 4 else VQ_F8
    model = VQAutoencoder(**{**official, "ch": config.width, "num_res_blocks": config.blocks,
                             "num_codes": config.codes, "beta": config.beta,
                             "groups": max(1, config.width // 4)})      # 4 channels each, as in the official
    if config.init:
        run_training.load_official(model, run.load_file(config.init), config.init)
    disc = PatchGAN(3, config.disc_width, num_layers=3 if config.factor == 4 else 2)
    init_weights(disc, generator(config.seed, "discriminator"), kind="normal")
    perceptual = run_training.frozen_loss(LPIPS, config.lpips, device)

    folder = run.open_run("train_ldm.py --stage autoencoder", config, device, ["train_ldm.py", *argv],
                          dataset.files())
    model.to(device, memory_format=torch.channels_last)
    disc.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, betas=(0.5, 0.9))
    disc_optimizer = torch.optim.Adam(disc.parameters(), lr=config.lr, betas=(0.5, 0.9))
    scaler, disc_scaler = precision.scaler(), precision.scaler()
    window = math.ceil(1000 / config.batch)         # codes are counted over 1000 patches, not over a batch
    saved = {"model": model, "disc": disc, "optimizer": optimizer, "disc_optimizer": disc_optimizer,
             "scaler": scaler, "disc_scaler": disc_scaler}
    numbers = run.load_checkpoint(folder, saved, step=0, codes_used=None,
                                  usage=torch.zeros(config.codes, dtype=torch.long))
    step, codes_used, usage = numbers["step"], numbers["codes_used"], numbers["usage"].to(device)
    if step >= config.steps:
        print(f"{folder}: complete ({step} steps); nothing to do")
        return 0
    log = run.Log(folder, step)
    write_split(folder / "split.json", dataset)

    # ---- what is normal ------------------------------------------------------------------------------------
    fixed = sampler.batch(0, 8)["image"].to(device, memory_format=torch.channels_last)
    flat = float((fixed - fixed.mean((0, 2, 3), keepdim=True)).abs().mean())
    if step == 0:
        parameters = sum(p.numel() for p in model.parameters())
        log.say(f"VQ autoencoder, {parameters:,} parameters, {device}, {precision}; "
                f"painting every pixel in the mean colour has an L1 of {flat:.3f}")
    else:
        log.say(f"going on from step {step}")

    # ---- the loop ------------------------------------------------------------------------------------------
    clock, images = time.perf_counter(), 0
    batches = loader(sampler, step, config.steps, config.batch, workers=config.workers,
                     pin_memory=device.type == "cuda")
    for batch in tqdm(batches, initial=step, total=config.steps, desc="autoencoder", leave=False,
                      disable=None):
        image = batch["image"].to(device, memory_format=torch.channels_last, non_blocking=True)
        for opt in (optimizer, disc_optimizer):
            run_training.set_learning_rate(opt, config.lr, step, config.warmup, config.steps, config.schedule)

        # The autoencoder: reconstruct, commit to the codes, and (later) look real to the discriminator.
        with precision.autocast(), frozen(disc):
            reconstruction, z, _, indices, vq_loss = model(image)
            l1 = (reconstruction.float() - image).abs().mean()
            nll = l1
            if perceptual is not None:
                nll = nll + config.lambda_lpips * perceptual(reconstruction, image).mean()
            loss, g_loss, weight = nll + vq_loss, None, None
            if config.disc_weight and step >= config.disc_start:
                g_loss = hinge_generator(disc(reconstruction))
                weight = config.disc_weight * adaptive_weight(nll, g_loss, model.last_layer,
                                                              scaler.get_scale())
                loss = loss + weight * g_loss
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = run_training.grad_norm(model.parameters(), config.clip)
        losses = {"loss": loss, "l1": l1, "vq_loss": vq_loss}
        losses |= {} if g_loss is None else {"g_loss": g_loss, "disc_weight": weight}

        # The discriminator: tell the image from its reconstruction, from the first step on.
        d_loss, d_norm = None, 0.0
        if config.disc_weight:
            with precision.autocast():
                d_loss = sum(hinge_discriminator(disc(image), disc(reconstruction.detach()))) / 2
            disc_optimizer.zero_grad(set_to_none=True)
            disc_scaler.scale(d_loss).backward()
            disc_scaler.unscale_(disc_optimizer)
            d_norm = run_training.grad_norm(disc.parameters(), config.clip)
            losses["d_loss"] = d_loss
        run_training.stop_if_diverged(folder, step, losses, {"grad_norm": norm, "d_grad_norm": d_norm},
                                  {"autoencoder": model, "discriminator": disc}, batch["names"], scaler)
        scaler.step(optimizer)
        scaler.update()
        if config.disc_weight:
            disc_scaler.step(disc_optimizer)
            disc_scaler.update()
        step, images = step + 1, images + len(image)

        # Codes unused over 1000 patches restart at latents of this batch, at first sooner: all begin near 0.
        usage += count_codes(indices, config.codes)
        counted, first = step % window == 0, step == window // 5
        if counted:
            codes_used = int((usage > 0).sum())
            if codes_used < 0.05 * config.codes and step > window:
                log.say(f"warning: {codes_used} of {config.codes} codes in use at step {step}, the codebook "
                        "is collapsing; try a lower --lr, a larger --beta or fewer --codes")
        if first or (counted and step <= config.steps // 2):    # later the codebook should stay
            restart_dead_codes(model.quantize, usage, z.detach(), generator(config.seed, "restart", step),
                               optimizer)
        if first or counted:
            usage.zero_()

        if step % config.log_every == 0 or step == config.steps:
            log.record(step, loss=loss, l1=l1, flat_colour_l1=flat, vq_loss=vq_loss, g_loss=g_loss,
                       d_loss=d_loss, disc_weight=weight, psnr=psnr(reconstruction.detach(), image).mean(),
                       codes_used=codes_used, grad_norm=norm, lr=optimizer.param_groups[0]["lr"],
                       samples_per_s=images / (time.perf_counter() - clock),
                       memory_mib=run_training.peak_memory(device))
            clock, images = time.perf_counter(), 0
        if step % config.save_every == 0 or step == config.steps:
            model.eval()
            with torch.no_grad(), precision.autocast():
                again = model(fixed)[0]
            model.train()
            draw.samples_png(folder, step, image=fixed, reconstruction=again)
            draw_axes.curves_png(folder / "curves.png", log.records(), [
                draw_axes.Panel("reconstruction L1", {"L1": "l1"}, log_y=True,
                            reference={"one flat colour": flat}),
                draw_axes.Panel("PSNR of the batch (dB)", {"PSNR": "psnr"}),
                draw_axes.Panel("adversarial", {"discriminator": "d_loss", "generator": "g_loss"}),
                draw_axes.Panel("codes used over 1000 patches", {"codes": "codes_used"},
                            reference={"codebook": config.codes})])
            run.save_model(folder, "autoencoder", model.config, model.state_dict(), step=step,
                           classes=dataset.classes.to_json(), split=dataset.slides())
            run.save_checkpoint(folder, saved, step=step, codes_used=codes_used, usage=usage)
            clock, images = time.perf_counter(), 0
    print(f"done: {folder / 'model.pt'}; next: python train_ldm.py --stage diffusion --autoencoder {folder}")
    return 0


def train_diffusion(config, argv) -> int:
    device = run_training.pick_device(config.device)
    precision = run_training.Precision(device, config.amp)
    content = run.load_model(config.autoencoder, "autoencoder")
    autoencoder = run.build_model(VQAutoencoder, content, config.autoencoder).requires_grad_(False).to(device)
    dataset, sampler = open_data(config)
    run_training.refuse_leak(content, dataset, config.autoencoder)
    levels = tuple(int(m) for m in config.mult.split(","))
    if config.width * levels[-1] % 8:
        raise UserError(f"--width: found {config.width}; times {levels[-1]} it must be divisible by the 8 "
                        "attention heads")
    coarsest = autoencoder.factor * 2 ** (len(levels) - 1)
    if config.patch % coarsest:
        raise UserError(f"--patch: found {config.patch}; autoencoder and denoiser halve it to 1/{coarsest}, "
                        f"give a multiple of {coarsest}")
    if config.zero_terminal_snr and config.parametrisation != "v":
        raise UserError("--zero-terminal-snr: at t = T - 1 the noise says nothing about x0; "
                        "add --parametrisation v, or --no-zero-terminal-snr")

    # ---- network, optimiser --------------------------------------------------------------------------------
    torch.manual_seed(config.seed)                  # initial weights only: all else has its own generator
    classes = dataset.classes
    schedule = Schedule(T=config.timesteps, zero_terminal_snr=config.zero_terminal_snr,
                        parametrisation=config.parametrisation)
    denoiser = LatentDenoiser(num_classes=len(classes), z_channels=content["kwargs"]["z_channels"],
                              model_channels=config.width, channel_mult=levels, num_res_blocks=config.blocks,
                              stages=int(math.log2(autoencoder.factor)), groups=max(1, config.width // 4))

    @torch.no_grad()
    def encode(image):                              # the same precision for every use of the autoencoder
        with precision.autocast():
            return autoencoder.encode(image.to(device, memory_format=torch.channels_last)).float()

    if config.init:
        if config.parametrisation != "eps":
            raise UserError("--init: official weights name eps; "
                            "add --parametrisation eps --no-zero-terminal-snr")
        run_training.load_official(denoiser, run.load_file(config.init), config.init)
    inputs = [*dataset.files(), run.model_file(config.autoencoder)]
    folder = run.open_run("train_ldm.py --stage diffusion", config, device, ["train_ldm.py", *argv], inputs)
    denoiser.to(device, memory_format=torch.channels_last)
    schedule.to(device)
    ema = run_training.EMA(denoiser, config.ema)        # over the denoiser and its label convolution
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=config.lr)
    scaler = precision.scaler()
    saved = {"denoiser": denoiser, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    # Loss per quarter of t since the last log line: low t is detail, high t is layout.
    numbers = run.load_checkpoint(folder, saved, step=0, sums=torch.zeros(4), counts=torch.zeros(4))
    step, sums, counts = numbers["step"], numbers["sums"], numbers["counts"]
    if step >= config.steps:
        print(f"{folder}: complete ({step} steps); nothing to do")
        return 0
    log = run.Log(folder, step)
    write_split(folder / "split.json", dataset)
    if step == 0 and not config.init:
        # One scale for the whole data law, over many patches. The official code takes the first batch's and
        # loses it on resuming; here it is a buffer, saved with the weights.
        z = torch.cat([encode(sampler.batch(k, config.batch)["image"])
                       for k in range(max(1, 256 // config.batch))])
        denoiser.set_latent_scale(float(z.std()))
        ema.module.set_latent_scale(float(z.std()))

    # ---- data: new patches every step, or a pool of cached latents -----------------------------------------
    if config.latent_pool:
        batches = pooled_latents(config, dataset, encode, step)
    else:
        batches = loader(sampler, step, config.steps, config.batch, workers=config.workers,
                         pin_memory=device.type == "cuda")

    # ---- what is normal ------------------------------------------------------------------------------------
    zero = loss_of_zero_output(config.loss)
    fixed = sampler.batch(0, 8)
    if step == 0:
        parameters = sum(p.numel() for p in denoiser.parameters())
        log.say(f"denoiser, {parameters:,} parameters, {device}, {precision}; "
                f"latent scale {float(denoiser.latent_scale):.3f}; "
                f"a network that always outputs zero has a loss of {zero:.3f}")
    else:
        log.say(f"going on from step {step}")

    # ---- the loop ------------------------------------------------------------------------------------------
    clock, images = time.perf_counter(), 0
    for batch in tqdm(batches, initial=step, total=config.steps, desc="diffusion", leave=False, disable=None):
        z = batch["z"].to(device) if config.latent_pool else encode(batch["image"])
        x0 = denoiser.scale(z)                                                          # (B, C, h, w)
        onehot = run_training.one_hot(batch["label"], len(classes), device)                  # (B, K, H, W)
        random = generator(config.seed, "noise", step)
        t = torch.randint(config.timesteps, (len(x0),), generator=random).to(device)
        eps = torch.randn(x0.shape, generator=random).to(device)
        dropped = (torch.rand(len(x0), generator=random) < config.drop_label).to(device)
        xt = schedule.q_sample(x0, t, eps)
        with precision.autocast():
            code = denoiser.drop_label(denoiser.label_code(onehot), dropped)
            output = denoiser(xt, t, code)                                              # (B, C, h, w)
        per_image = denoising_loss(output, schedule.target(x0, eps, t), config.loss)    # (B,)
        loss = per_image.mean()
        run_training.set_learning_rate(optimizer, config.lr, step, config.warmup, config.steps,
                                       config.schedule)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = run_training.grad_norm(denoiser.parameters(), config.clip)
        run_training.stop_if_diverged(folder, step, {"loss": loss}, {"grad_norm": norm},
                                      {"denoiser": denoiser}, batch["names"], scaler)
        scaler.step(optimizer)
        scaler.update()
        ema.update(denoiser)
        step, images = step + 1, images + len(x0)
        quarter_sums, quarter_counts = quartile_sums(per_image.detach(), t, config.timesteps)
        sums, counts = sums + quarter_sums.cpu(), counts + quarter_counts.cpu()

        if step % config.log_every == 0 or step == config.steps:
            quarters = {f"loss_q{q + 1}": float(sums[q] / counts[q]) if counts[q] else None for q in range(4)}
            mean = float(sums.sum() / counts.sum())
            log.record(step, loss=mean, zero_output=zero, **quarters, grad_norm=norm,
                       lr=optimizer.param_groups[0]["lr"],
                       samples_per_s=images / (time.perf_counter() - clock),
                       memory_mib=run_training.peak_memory(device))
            if mean > 0.95 * zero and step >= max(500, config.warmup):
                log.say(f"warning: at step {step} the loss is still that of a network that outputs zero; "
                        "try another --lr, or look at the autoencoder's samples")
            clock, images = time.perf_counter(), 0
            sums, counts = torch.zeros(4), torch.zeros(4)
        if step % config.save_every == 0 or step == config.steps:
            sample_picture(folder, step, ema.module, autoencoder, schedule, fixed, dataset, config, precision,
                           device)
            draw_axes.curves_png(folder / "curves.png", log.records(), [
                draw_axes.Panel("loss", {"loss": "loss"}, reference={"zero output": zero}),
                draw_axes.Panel("loss by quarter of t",
                            {f"t in quarter {q}": f"loss_q{q}" for q in range(1, 5)})])
            run.save_model(folder, "diffusion", denoiser.config, ema.module.state_dict(), step=step,
                           schedule=schedule.config, autoencoder=content, classes=classes.to_json(),
                           split=dataset.slides(), drop_label=config.drop_label)
            run.save_checkpoint(folder, saved, step=step, sums=sums, counts=counts)
            clock, images = time.perf_counter(), 0
    print(f"done: {folder / 'model.pt'}; next: python generate.py --method ldm --model {folder}")
    return 0


@torch.no_grad()
def sample_picture(folder, step, denoiser, autoencoder, schedule, fixed, dataset, config, precision,
                   device) -> None:
    """samples/: eight fixed labels, their real patches, and images from fixed noise with the EMA weights."""
    onehot = run_training.one_hot(fixed["label"], len(dataset.classes), device)
    side = config.patch // autoencoder.factor
    noise = image_noise(range(len(onehot)), (denoiser.config["z_channels"], side, side), device)
    with precision.autocast():
        x0 = sample(denoiser.predictor(denoiser.label_code(onehot)), schedule, noise,
                    steps=min(config.sample_steps, config.timesteps))
        image = autoencoder.decode(denoiser.unscale(x0)).float().clamp(-1, 1)
    draw.samples_png(folder, step, dataset.classes, label=fixed["label"], real=fixed["image"],
                        sampled=image)


if __name__ == "__main__":
    command(main)
