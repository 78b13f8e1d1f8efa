"""Train the SPADE GAN with its VAE encoder (paper, section 2.2; Park et al. 2019, encoder of the appendix).

    python train_gan.py                                             the phantom: runs/gan
    python train_gan.py --data D --out runs/gan

The generator G paints an image from a label map and a vector z; the encoder E reads z off the real image, so
that G can learn what the label does not say (stain, glands, texture). One iteration is two steps:

    generator      mu, logvar = E(image);  z = mu + exp(logvar / 2) noise;  fake = G(onehot, z)
                   loss = -D(fake) + lambda_feat |D features(fake) - D features(image)|
                          + lambda_kld KL(N(mu, var) || N(0, 1))
    discriminator  loss = max(0, 1 - D(image)) + max(0, 1 + D(fake))           on the same fake, detached

At synthesis z is drawn from N(0, I): masks alone are enough. her2/run_setup.py builds the networks.
"""

from her2 import run_config as configuration         # first: it makes Ctrl-C one line, also during imports
from dataclasses import dataclass

import torch

from her2 import draw, draw_axes, net_perceptual, run, run_distributed, run_log, run_setup, run_training
from her2.net_blocks import frozen, power_iterations
from her2.discriminator import discriminate
from her2.run_errors import command
from her2.gan_losses import adversarial_loss, feature_matching, kl_divergence, saturated_share
from her2.run_seeds import generator
from her2.spade import recalibrated, reparameterize


def main(argv) -> None:
    config = configuration.parse(Config, PRESETS, argv, __doc__, "train_gan.py")
    run_training.check_patch(config, "the generator doubles")
    device, precision = run_training.pick_device(config.device, config.amp)
    dataset, sampler = run_setup.training_data(config)
    num_classes = len(dataset.classes)
    net, encoder, disc = run_setup.spade_gan(config, num_classes, device)
    perceptual = run_training.frozen_loss(net_perceptual.VGG19Loss, config.vgg, device)
    # Two rates (TTUR, Heusel et al. 2017): the gradient of G is only as good as a D that knows what G paints
    # now. With the larger steps D keeps up with a G that moves slowly, at one step of each per iteration.
    optimizer = torch.optim.Adam([*net.parameters(), *encoder.parameters()], lr=config.lr, betas=(0.0, 0.9))
    disc_optimizer = torch.optim.Adam(disc.parameters(), lr=config.disc_lr, betas=(0.0, 0.9))
    scaler, disc_scaler = precision.scaler(), precision.scaler()
    ema = run_training.EMA(net, config.ema)
    networks = {"generator": net, "encoder": encoder, "discriminator": disc}
    idle = torch.zeros((), dtype=torch.long, device=device)     # steps in a row with d_loss of almost 0
    saved = {**networks, "ema": ema, "optimizer": optimizer, "disc_optimizer": disc_optimizer,
             "scaler": scaler, "disc_scaler": disc_scaler, "idle": idle}
    run_training.compile_parts(config, *networks.values())
    folder, log, losses, step = run_log.begin("train_gan.py", config, device, argv, dataset, saved)
    if step >= config.steps:
        return
    fixed = sampler.batch(0, 8)
    sizes = ", ".join(f"{name} {run_log.size(module)}" for name, module in networks.items())
    log.say(f"{sizes}, {device}, {precision}; a discriminator that cannot tell has d_loss 2; healthy runs "
            f"stay between 0.5 and 2; {float(saturated_share(fixed['image'])):.3f} of the real pixels are "
            "saturated")

    def write_log():
        values = losses.read()
        log.record(step, **values, **steps.speed())
        if idle >= 200:
            log.say(f"warning: the discriminator's loss has been 0 for {int(idle)} steps, the generator "
                    "learns nothing from it; try a lower --disc-lr")
        if values["saturated"] > 0.5 + values["saturated_real"]:
            log.say(f"warning: {values['saturated']:.0%} of the generated pixels are black or white at step "
                    f"{step}, the generator is collapsing; try a lower --lr or a lower --disc-lr")

    def publish():
        def condition(k):           # (onehot (B, K, H, W), z (B, Z)) of batch k
            random = generator(config.seed, "calibrate", step, k)
            z = torch.randn(config.batch, config.z_dim, generator=random)
            label = sampler.batch(step + k, config.batch)["label"]
            return run_training.one_hot(label, num_classes, device), z.to(device)

        # The batch-norm statistics of training would shift the colours at test time (see spade.py).
        calibrated = recalibrated(ema.module, map(condition, range(16)))
        z = torch.randn(8, config.z_dim, generator=generator(config.seed, "sample z")).to(device)
        onehot = run_training.one_hot(fixed["label"], num_classes, device)
        with precision.autocast():
            each = calibrated(onehot, z).float()
            same = calibrated(onehot[:1].expand(8, -1, -1, -1).contiguous(), z).float()
        draw.samples_png(folder, step, dataset.classes, label=fixed["label"], real=fixed["image"],
                         generated=each, first_label_and_8_z=same)
        draw_axes.curves_png(folder / "curves.png", log.records(), draw_axes.TRAINING["gan"])
        run.save_model(folder, "gan", net.config, calibrated.state_dict(), step=step, **dataset.origin())

    steps = run_training.Steps("GAN", config, sampler, step, device, losses)
    for batch in steps:
        optimizer.zero_grad()
        disc_optimizer.zero_grad()
        painted, random = [], generator(config.seed, "z", step)
        noise = torch.randn(config.batch, config.z_dim, generator=random).to(device)    # (all B, Z)
        for part in run_distributed.parts(batch, config):       # one, but for --accumulate
            # 1 data
            image = run_training.to_device(part.batch["image"], device)                 # (B, 3, H, W)
            onehot = run_training.one_hot(part.batch["label"], num_classes, device)     # (B, K, H, W)
            power_iterations(part.first, net, encoder, disc)

            # 2 paint: E reads off the real image what the label does not say, G paints the label in that
            #   manner. The noise makes z a draw from a cloud and not a point: nearby z, similar images.
            with precision.autocast(), frozen(disc):    # here D only passes the gradient on
                mu, logvar = encoder(image)                                             # (B, Z), (B, Z)
                z = reparameterize(mu, logvar, noise[part.rows])                        # (B, Z)
                fake = net(onehot, z)                                                   # (B, 3, H, W)
                fake_features, real_features = discriminate(disc, onehot, fake, image)

            # 3 loss of the painters: D should call the fake real, D's layers should see in it what they see
            #   in the image, and E's clouds together should look like N(0, I), where synthesis draws z.
            gan = adversarial_loss(fake_features, "generator")                          # ()
            features = feature_matching(fake_features, real_features, config.lambda_feat)
            kld = config.lambda_kld * kl_divergence(mu, logvar)
            loss = gan + features + kld
            if perceptual is not None:
                loss = loss + config.lambda_vgg * perceptual(fake.float(), image)
            scaler.scale(part.share * loss).backward()
            painted.append((part, image, onehot, fake.detach()))
            losses.add(part.share, loss=loss, gan=gan, features=features, kld=kld,
                       saturated=saturated_share(fake), saturated_real=saturated_share(image))
        norm = run_training.update(optimizer, scaler, config.clip)

        # 4 loss of the discriminator: real logits above 1, fake ones below -1. On the same fakes, detached:
        #   no second forward of the generator, and no gradient into it.
        for part, image, onehot, fake in painted:
            power_iterations(part.first, disc)
            with precision.autocast():
                fake_features, real_features = discriminate(disc, onehot, fake, image)
            d_loss = adversarial_loss(real_features, "real") + adversarial_loss(fake_features, "fake")
            disc_scaler.scale(part.share * d_loss).backward()
            losses.add(part.share, d_loss=d_loss)
        d_norm = run_training.update(disc_optimizer, disc_scaler, config.clip)

        # 5 average the generator's weights: single steps of a GAN swing, their average does not
        ema.update(net)
        idle.add_(1).mul_(run_distributed.total(losses.sums["d_loss"]) < 0.02)          # ()
        losses.end(step, batch["names"], grad_norm=norm, d_grad_norm=d_norm)
        step += 1

        # 6 report
        steps.report(step, write_log, publish)
    configuration.say_done(config, "generate.py", "--method", "gan", "--model", folder)


@dataclass
class Config(configuration.Training):               # data, seed, patch, device and what else scripts share
    out: str = "runs/gan"           # run folder; the same command again goes on where it stopped
    # ---- networks
    width: int = 16                 # ngf and ndf, channels at the finest resolution; 64 is the official one
    hidden: int = 32                # channels inside each SPADE layer; 128 is the official number
    z_dim: int = 64                 # length of z; 256 is the official one
    init: str = ""                  # official SPADE generator file to start from, such as latest_net_G.pth;
                                    # where latest_net_E.pth, latest_net_D.pth lie beside it, E and D as well
    # ---- losses
    lambda_feat: float = 10.0       # weight of feature matching
    lambda_kld: float = 0.05        # weight of KL, a mean over the batch (SPADE's sum of B is B * 0.05 here)
    vgg: str = ""                   # file of VGG-19 weights (torchvision) for the perceptual loss; empty: off
    lambda_vgg: float = 10.0        # weight of the perceptual loss, when there is one
    # ---- optimisers
    steps: int = 300                # iterations, each one generator and one discriminator step
    batch: int = 8                  # patches per step
    lr: float = 4e-4                # step size that the generator's Adam sees; never rescaled
    disc_lr: float = 4e-4           # step size that the discriminator's Adam sees (SPADE: 4 times the other)
    clip: float = 1e6               # largest L2 norm of each gradient; the default does not clip, as SPADE
    ema: float = 0.995              # decay of the generator's moving average, which generate.py samples
    save_every: int = 100           # steps between two checkpoints, with sample pictures


# PAPER: learning rate 1e-5 and batch 16 are printed. SPADE's two-time-scale rule (TTUR), on by default in the
# official code, makes them 5e-6 for G and E, 2e-5 for D; whether it was kept is not said. We take it as kept.
# Tried on pilot seed 0 (256 images of `small`) and left out: DiffAugment (Zhao et al., NeurIPS 2020; shift,
# cutout before D). Frechet distance 16.6 -> 11.9, obedience as before, 3+ too brown: .58 -> .77, real .60.
PRESETS = {
    "tiny": {}, "small": dict(steps=900, lr=2e-4, disc_lr=4e-4, ema=0.998, log_every=50, save_every=450),
    "paper": dict(steps=200_000, batch=16, patch=512, width=64, hidden=128, z_dim=256, lr=5e-6, disc_lr=2e-5,
                  ema=0.999, log_every=100, save_every=5000, workers=8)}


if __name__ == "__main__":
    command(main)
