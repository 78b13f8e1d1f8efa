"""Train the latent diffusion model in two stages (paper, section 2.2; Rombach et al. 2022).

    python train_ldm.py                                             both stages, phantom: runs/vq and runs/ldm
    python train_ldm.py --stage autoencoder --data D --out runs/vq
    python train_ldm.py --stage diffusion --autoencoder runs/vq --data D --out runs/ldm

Stage 1, the VQ autoencoder. An image becomes a latent z a few times smaller per side, every cell of z is
replaced by the nearest row of a codebook, and a decoder paints the image back (built in her2/run_setup.py):

    nll = |image - reconstruction| + lambda_edge * edge_l1(reconstruction, image)       edge_l1: only in small
    loss = nll + vq_loss - weight * mean D(reconstruction)                              D: not in small
    weight = disc_weight * ||grad nll|| / ||grad mean D||                               from --disc-start on

Stage 2, diffusion on latents. A latent gets noise, which a U-Net that also sees the label learns to tell:

    xt = sqrt(alpha_bar[t]) x0 + sqrt(1 - alpha_bar[t]) eps     loss = |target - denoiser(xt, t, label code)|
    target = eps (--parametrisation eps), or sqrt(alpha_bar[t]) eps - sqrt(1 - alpha_bar[t]) x0 (v)
"""

from her2 import run_config as configuration         # first: it makes Ctrl-C one line, also during imports
import math
from dataclasses import dataclass
from typing import Literal

import torch

from her2 import (data_patches, draw, draw_axes, net_perceptual, quantizer, run, run_distributed, run_log,
                  run_setup, run_training, samplers)
from her2.autoencoder import VQAutoencoder, edge_l1, psnr
from her2.net_blocks import frozen, kept_buffers
from her2.diffusion import denoising_loss, draw_timesteps, loss_of_zero_output, quartile_sums
from her2.run_errors import command
from her2.gan_losses import adaptive_weight, adversarial_loss, pulls
from her2.run_seeds import generator


def train_autoencoder(config, argv) -> None:
    device, precision = run_training.pick_device(config.device, config.amp)
    model, disc = run_setup.autoencoder_gan(config, device)
    dataset, sampler = run_setup.training_data(config)
    perceptual = run_training.frozen_loss(net_perceptual.LPIPS, config.lpips, device)
    last_layer = model.decoder.conv_out.weight      # where the pulls of both losses are compared
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, betas=(0.5, 0.9))
    disc_optimizer = torch.optim.Adam(disc.parameters(), lr=config.lr, betas=(0.5, 0.9))
    scaler, disc_scaler = precision.scaler(), precision.scaler()
    usage = quantizer.CodeUsage(config.codes, math.ceil(1000 / config.batch), config.steps // 2, device)
    saved = {"model": model, "disc": disc, "optimizer": optimizer, "disc_optimizer": disc_optimizer,
             "scaler": scaler, "disc_scaler": disc_scaler, "usage": usage}
    run_training.compile_parts(config, model.encoder, model.decoder.mid, *model.decoder.up)
    folder, log, losses, step = run_log.begin("train_ldm.py --stage autoencoder", config, device, argv,
                                              dataset, saved)
    if step >= config.steps:
        return
    fixed = run_training.to_device(sampler.batch(0, 8)["image"], device)                # (8, 3, H, W)
    flat = float((fixed - fixed.mean((0, 2, 3), keepdim=True)).abs().mean())
    log.say(f"VQ autoencoder, {run_log.size(model)}, {device}, {precision}; "
            f"painting every pixel in the mean colour has an L1 of {flat:.3f}")

    def write_log():
        log.record(step, **losses.read(), flat_colour_l1=flat, codes_used=usage.used,
                   lr=optimizer.param_groups[0]["lr"], **steps.speed())
        if usage.used is not None and usage.used < 0.05 * config.codes and step > 2000 / config.batch:
            log.say(f"warning: {usage.used} of {config.codes} codes in use at step {step}, the codebook is "
                    "collapsing; try a lower --lr, a larger --beta or fewer --codes")

    def publish():
        with precision.autocast():
            draw.samples_png(folder, step, image=fixed, reconstruction=model(fixed)[0])
        draw_axes.curves_png(folder / "curves.png", log.records(), draw_axes.TRAINING["autoencoder"])
        run.save_model(folder, "autoencoder", model.config, model.state_dict(), step=step, **dataset.origin())

    def reconstruct(image):
        """-> reconstruction (B, 3, H, W), z (B, D, h, w), indices (B, h, w), L1, L1 and more, vq_loss ()"""
        reconstruction, z, _, indices, vq_loss = model(image)
        nll = l1 = (reconstruction.float() - image).abs().mean()
        if config.lambda_edge:
            nll = nll + config.lambda_edge * edge_l1(reconstruction.float(), image)
        if perceptual is not None:
            nll = nll + config.lambda_lpips * perceptual(reconstruction, image).mean()
        return reconstruction, z, indices, l1, nll, vq_loss

    def pulls_of_all(parts):
        """--accumulate: what the adaptive weight compares, of the whole batch, from a first pass."""
        whole = 0
        with kept_buffers(disc), precision.autocast():
            for part in parts:
                reconstruction, *_, nll, _ = reconstruct(run_training.to_device(part.batch["image"], device))
                g_loss = adversarial_loss(disc(reconstruction), "generator")
                whole += pulls(part.share * nll, part.share * g_loss, last_layer, scaler.get_scale())
        return run_distributed.total(whole)                                             # (2, 3, C, 3, 3)

    steps = run_training.Steps("autoencoder", config, sampler, step, device, losses)
    for batch in steps:
        adversarial = config.disc_weight > 0 and step >= config.disc_start
        for opt in (optimizer, disc_optimizer):
            opt.zero_grad()
            run_training.set_learning_rate(opt, config, step)
        parts, painted, latents, indices = run_distributed.parts(batch, config), [], [], []
        known = pulls_of_all(parts) if adversarial and len(parts) > 1 else None
        for part in parts:              # one, but for --accumulate
            # 1 through the bottleneck: every latent vector becomes the nearest of a few thousand codes.
            #   vq_loss pulls codes and latents together; the diffusion gets a small, tame space.
            image = run_training.to_device(part.batch["image"], device)                 # (B, 3, H, W)
            with precision.autocast(), frozen(disc):    # here D only passes the gradient on
                reconstruction, z, codes, l1, nll, vq_loss = reconstruct(image)
                loss = nll + vq_loss                                                    # ()

                # 2 look real: L1 alone blurs (the middle of all likely textures costs least). Late, since D
                #   would drive the first rough reconstructions anywhere; `disc_weight` times the pull of L1.
                if adversarial:
                    g_loss = adversarial_loss(disc(reconstruction), "generator")        # ()
                    both = known if known is not None else run_distributed.total(
                        pulls(part.share * nll, part.share * g_loss, last_layer, scaler.get_scale()))
                    weight = config.disc_weight * adaptive_weight(both)
                    loss = loss + weight * g_loss
                    losses.add(part.share, g_loss=g_loss, disc_weight=weight)
            scaler.scale(part.share * loss).backward()
            losses.add(part.share, loss=loss, l1=l1, vq_loss=vq_loss, psnr=psnr(reconstruction, image).mean())
            painted.append((part, image, reconstruction.detach()))
            latents.append(z.detach())
            indices.append(codes)
        norms = {"grad_norm": run_training.update(optimizer, scaler, config.clip)}

        # 3 the discriminator tells image from reconstruction, from step 0 on: it learns before it is heard.
        for part, image, fake in painted if config.disc_weight else ():
            with precision.autocast():
                d_loss = (adversarial_loss(disc(image), "real") + adversarial_loss(disc(fake), "fake")) / 2
            disc_scaler.scale(part.share * d_loss).backward()
            losses.add(part.share, d_loss=d_loss)
        if config.disc_weight:
            norms["d_grad_norm"] = run_training.update(disc_optimizer, disc_scaler, config.clip)
        losses.end(step, batch["names"], **norms)
        step += 1

        # 4 wake dead codes: a code that is nearest to no latent gets no gradient, ever. It restarts at a
        #   latent of this batch, but not in the second half of the training: the others should settle.
        usage.step(step, model.quantize, *(run_distributed.gather(p, config) for p in (indices, latents)),
                   generator(config.seed, "restart", step), optimizer)

        # 5 report
        steps.report(step, write_log, publish)
    configuration.say_done(config, "train_ldm.py", "--stage", "diffusion", "--autoencoder", folder)


def train_diffusion(config, argv) -> None:
    device, precision = run_training.pick_device(config.device, config.amp)
    content = run.load_model(config.autoencoder, "autoencoder", config.data)
    autoencoder = run.build_model(VQAutoencoder, content, config.autoencoder).requires_grad_(False).to(device)
    dataset, sampler = run_setup.training_data(config)
    run_training.refuse_leak(content, dataset, config.autoencoder)
    schedule, denoiser = run_setup.diffusion(config, autoencoder, len(dataset.classes), device)
    ema = run_training.EMA(denoiser, config.ema)        # over the denoiser and its label convolution
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=config.lr)
    scaler = precision.scaler()
    # Sums and numbers of losses by quarter of t since the last line of the log.
    quarters = torch.zeros(2, 4, dtype=torch.double, device=device)
    saved = {"denoiser": denoiser, "ema": ema, "optimizer": optimizer, "scaler": scaler, "quarters": quarters}
    run_training.compile_parts(config, denoiser.unet)
    folder, log, losses, step = run_log.begin("train_ldm.py --stage diffusion", config, device, argv, dataset,
                                              saved)
    if step >= config.steps:
        return

    def encode(image):                  # (B, 3, H, W) -> (B, C, h, w), everywhere in the same precision
        with torch.no_grad(), precision.autocast():
            return autoencoder.encode(run_training.to_device(image, device)).float()

    if step == 0 and not config.init:
        denoiser.set_latent_scale(data_patches.latent_std(sampler, encode, config.batch))  # the EMA copies it
    zero, fixed = loss_of_zero_output(config.loss), sampler.batch(0, 8)
    log.say(f"denoiser, {run_log.size(denoiser)}, {device}, {precision}; latent scale "
            f"{denoiser.latent_scale:.3f}; a network that always outputs zero has a loss of {zero:.3f}")

    def write_log():
        sums, counts = quarters.tolist()
        mean = sum(sums) / sum(counts)
        log.record(step, **losses.read() | {"loss": mean}, zero_output=zero,
                   **{f"loss_q{q + 1}": sums[q] / counts[q] if counts[q] else None for q in range(4)},
                   lr=optimizer.param_groups[0]["lr"], **steps.speed())
        if mean > 0.95 * zero and step >= max(500, config.warmup):
            log.say(f"warning: at step {step} the loss is still that of a network that outputs zero; "
                    "try another --lr, or look at the autoencoder's samples")
        quarters.zero_()

    def publish():
        onehot = run_training.one_hot(fixed["label"], len(dataset.classes), device)
        with precision.autocast():
            predict = ema.module.predictor(ema.module.label_code(onehot))
            x0 = samplers.sample(predict, schedule, samplers.image_noise(range(len(onehot)), latent, device),
                                 steps=min(config.sample_steps, config.timesteps))
            image = autoencoder.decode(x0 / ema.module.latent_scale).float().clamp(-1, 1)
        draw.samples_png(folder, step, dataset.classes, label=fixed["label"], real=fixed["image"],
                         sampled=image)
        draw_axes.curves_png(folder / "curves.png", log.records(), draw_axes.TRAINING["diffusion"])
        run.save_model(folder, "diffusion", denoiser.config, ema.module.state_dict(), step=step,
                       schedule=schedule.config, autoencoder=content, drop_label=config.drop_label,
                       **dataset.origin())

    latent = (denoiser.config["z_channels"], *2 * [config.patch // autoencoder.factor])     # C, h, w
    batches = config.latent_pool and data_patches.pooled_latents(config, dataset, encode, step)
    steps = run_training.Steps("diffusion", config, sampler, step, device, losses, batches=batches)
    for batch in steps:
        optimizer.zero_grad()
        # Drawn for the whole batch: the same whatever part of it a process or an --accumulate piece has.
        random = generator(config.seed, "noise", step)
        all_t = draw_timesteps(config.batch, config.timesteps, config.t_spread, random)         # (B,)
        all_eps = torch.randn(config.batch, *latent, generator=random)                  # (B, C, h, w)
        all_dropped = torch.rand(config.batch, generator=random) < config.drop_label    # (B,)
        for part in run_distributed.parts(batch, config):
            # 1 encode: the frozen autoencoder gives the clean latents. The schedule counts on variance 1.
            z = part.batch["z"].to(device) if config.latent_pool else encode(part.batch["image"])
            x0 = z * denoiser.latent_scale                                              # (B, C, h, w)
            onehot = run_training.one_hot(part.batch["label"], len(dataset.classes), device)    # (B, K, H, W)

            # 2 noise: a level per image, so that one step teaches all: detail at low t, layout at high t.
            t, eps, dropped = (drawn[part.rows].to(device, non_blocking=True)
                               for drawn in (all_t, all_eps, all_dropped))
            xt = schedule.q_sample(x0, t, eps)                                          # (B, C, h, w)

            # 3 tell noise from image, seeing the label. Now and then the label is hidden: then sampling can
            #   compare "with" and "without" and exaggerate the difference (guidance).
            with precision.autocast():
                code = denoiser.label_code(onehot).masked_fill(dropped[:, None, None, None], 0.0)
                output = denoiser(xt, t, code)                                          # (B, C, h, w)
            per_image = denoising_loss(output, schedule.target(x0, eps, t), config.loss)        # (B,)
            loss = per_image.mean()                                                     # ()

            # 4 gradient
            scaler.scale(part.share * loss).backward()
            losses.add(part.share, loss=loss)
            quarters += run_distributed.total(torch.stack(quartile_sums(per_image, t, config.timesteps)))

        # 5 update, and average the weights, to sample with: single steps jump with the t and eps drawn.
        run_training.set_learning_rate(optimizer, config, step)
        norm = run_training.update(optimizer, scaler, config.clip)
        ema.update(denoiser)
        losses.end(step, batch["names"], grad_norm=norm)
        step += 1

        # 6 report
        steps.report(step, write_log, publish)
    configuration.say_done(config, "generate.py", "--method", "ldm", "--model", folder)


@dataclass
class Common(configuration.Training):               # what both stages share beside what all scripts share
    lr: float = 1e-3                # step size that Adam sees; never rescaled
    schedule: Literal["constant", "cosine"] = "cosine"  # learning rate after the warm-up; cosine falls to 0
    warmup: int = 50                # steps over which the learning rate rises linearly from 0
    clip: float = 1.0               # largest L2 norm of each network's gradient
    log_every: int = 25             # steps between two lines of the log
    blocks: int = 1                 # residual blocks per level; 2 is the official number


@dataclass
class AutoencoderConfig(Common):
    out: str = "runs/vq"            # run folder; the same command again goes on where it stopped
    steps: int = 800                # optimiser steps
    batch: int = 8                  # patches per step
    save_every: int = 125           # steps between two checkpoints, with sample pictures
    init: str = ""                  # official weights to start from: a checkpoint of vq-f4 or vq-f8
    factor: Literal[2, 4, 8] = 4    # image side / latent side. 4 is vq-f4 (PAPER: names vq-f4 and says eight)
    width: int = 16                 # channels of the finest level; 128 is the official number
    codes: int = 1024               # rows of the codebook
    disc_width: int = 16            # channels of the discriminator's first layer; 64 is the official one
    # ---- losses
    beta: float = 0.25              # weight of the commitment term ||z - sg[e]||^2
    lambda_edge: float = 0.0        # weight of the L1 between differences of neighbouring pixels
    lpips: str = ""                 # file of LPIPS weights: adds the perceptual loss; empty: off
    lambda_lpips: float = 1.0       # weight of the perceptual loss, when there is one
    disc_start: int = 650           # step at which the GAN loss enters, once L1 is flat; D trains from 0
    disc_weight: float = 0.1        # factor on the adaptive weight of the GAN loss; 0 trains no discriminator


@dataclass
class DiffusionConfig(Common):
    out: str = "runs/ldm"           # run folder; the same command again goes on where it stopped
    autoencoder: str = "runs/vq"    # run folder of stage 1
    steps: int = 900                # optimiser steps
    batch: int = 16                 # patches per step
    save_every: int = 250           # steps between two checkpoints, with sample pictures
    sample_steps: int = 50          # DDIM steps of the sample pictures
    latent_pool: int = 0            # 0: new patches each step; N: N patches, encoded once in 8 orientations
    init: str = ""                  # official weights to start from: a latent-diffusion checkpoint
    width: int = 32                 # channels of the finest level; 128 is the official one
    mult: Literal["1,4,8", "1,2,4"] = "1,2,4"           # width of each level, as multiples of --width
    ema: float = 0.999              # decay of the moving average of the weights, which is what samples
    # ---- diffusion
    timesteps: int = 1000           # T, length of the noise schedule
    parametrisation: Literal["eps", "v"] = "v"          # what the network predicts
    zero_terminal_snr: bool = True  # rescale the schedule so that xT is pure noise: white glass stays white
    loss: Literal["l1", "l2"] = "l2"  # distance between the target and the prediction
    t_spread: float = 0.0           # how t is drawn: 0 uniform, else a logit-normal with this spread
    drop_label: float = 0.1         # probability of hiding the label, so that generate.py --guidance works


# The official objective, L1 on eps, samples grey plates after a few minutes of training: at t near T an error
# of eps is divided by sqrt(alpha_bar) = 0.01 on its way to x0. With v and a terminal SNR of zero the same
# minutes give images that obey the label: so the small presets; `paper` is the official one.
# PAPER: batch 16 and learning rate 1e-6 are printed for diffusion; the official code multiplies a base rate
# by batch and devices (1e-6 x 16 = 1.6e-5), and which is meant is not said. For the autoencoder nothing is
# printed: 4.5e-6 x 8 = 3.6e-5 is the official effective rate of vq-f4.
# Tried on pilot seed 0 (256 images of `small`, 1500 steps) and left out: a label code of 6 channels for 3.
# Obedience .923 -> .927, Frechet distance 4.3 -> 4.8, staining alike: three channels hold six classes.
FULL_SIZE = dict(patch=512, width=128, blocks=2, schedule="constant", warmup=1000, log_every=100, workers=8)
AUTOENCODER_PRESETS = {
    "tiny": {}, "small": dict(steps=800, factor=2, width=32, codes=4096, lambda_edge=1.0, disc_weight=0.0,
                              warmup=100, save_every=400, log_every=50),
    "paper": FULL_SIZE | dict(steps=200_000, batch=8, codes=8192, lr=3.6e-5, disc_start=50_000,
                              disc_weight=0.75, disc_width=64, save_every=5000)}
DIFFUSION_PRESETS = {
    "tiny": {}, "small": dict(steps=3000, latent_pool=320, warmup=100, ema=0.998, t_spread=1.0,
                              save_every=500, log_every=50),
    "paper": FULL_SIZE | dict(steps=400_000, mult="1,4,8", parametrisation="eps", zero_terminal_snr=False,
                              loss="l1", lr=1e-6, ema=0.9999, save_every=10_000)}
STAGES = {"autoencoder": (AutoencoderConfig, AUTOENCODER_PRESETS, train_autoencoder),
          "diffusion": (DiffusionConfig, DIFFUSION_PRESETS, train_diffusion)}


def main(argv):
    """Stage by stage. Without --stage both run one after the other, each into its default folder."""
    parser = configuration.Parser(prog="train_ldm.py", add_help=False)
    parser.add_argument("--stage", choices=tuple(STAGES))
    known, rest = parser.parse_known_args(argv)
    if not known.stage:
        more = "each stage has more flags: add --stage autoencoder or --stage diffusion"
        parser = configuration.Parser(more, prog="train_ldm.py", description=f"{__doc__ or ''}\nHere {more}.")
        configuration.add_fields(parser, Common, {})
        parser.parse_args(rest)                     # only what both stages understand
    for stage in [known.stage] if known.stage else STAGES:
        fields, presets, train = STAGES[stage]
        train(configuration.parse(fields, presets, rest, __doc__, f"train_ldm.py --stage {stage}"), argv)


if __name__ == "__main__":
    command(main)
