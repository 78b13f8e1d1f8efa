"""Train the segmentation network, a U-Net with a ResNet-34 encoder: background or tumor (paper, section 2.3).

    python train_seg.py                                             the phantom, subtype-sampled: runs/seg
    python train_seg.py --data D --sampling tumor --out runs/seg-tumor
    python train_seg.py --data D --synthetic data/synth --ratio 1.0 --out runs/seg-ldm-100

One step: draw a batch of patches (real ones around tumor pixels, synthetic ones mixed in at `ratio`), reduce
the class ids to background/tumor, and minimise

    loss = dice_weight * Dice + (1 - dice_weight) * cross-entropy

with Adam. The number of optimiser steps is the same whatever the ratio is, so configurations are comparable.
The subtypes serve sampling and evaluation only: the network, built in her2/run_setup.py, never sees them.
"""

from her2 import run_config as configuration         # first: it makes Ctrl-C one line, also during imports
from dataclasses import dataclass
from typing import Literal

import torch

from her2 import draw, draw_axes, run, run_distributed, run_log, run_setup, run_training
from her2.data_classes import IGNORE
from her2.data_folder import load_synthetic
from her2.run_errors import UserError, command
from her2.losses import constant_prediction_loss, dice_cross_entropy
from her2.net_blocks import kept_buffers
from her2.metrics import ProbabilityHistogram
from her2.data_patches import MixedSampler, iterate_rois
from her2.segmenter import choose_tiles, predict_roi


def main(argv) -> None:
    config = configuration.parse(Config, PRESETS, argv, __doc__, "train_seg.py")
    run_training.check_patch(config, "the network halves")
    if config.init and config.encoder_weights != "none":
        raise UserError("--init and --encoder-weights both name initial weights; "
                        "beside --init give --encoder-weights none")
    device, precision = run_training.pick_device(config.device, config.amp)
    dataset, sampler, synthetic = open_data(config)
    is_tumor = torch.zeros(256, dtype=torch.long)
    is_tumor[dataset.classes.tumor_ids] = 1         # class id -> 0 background, 1 tumor
    is_tumor[IGNORE] = IGNORE
    network = run_setup.segmenter(config, device)
    ema = run_training.EMA(network, config.ema)     # what is evaluated: a single step's weights scatter more
    optimizer = torch.optim.Adam(network.parameters(), lr=config.lr)
    scaler = precision.scaler()                     # fp16 only: small gradients would round to 0

    saved = {"network": network, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    run_training.compile_parts(config, network)
    folder, log, losses, step = run_log.begin("train_seg.py", config, device, argv, dataset, saved, synthetic)
    if step >= config.steps:
        return
    fixed = sampler.batch(0, config.batch)          # always the same patches: pictures compare across steps
    shares = dict(dice=config.dice, dice_weight=config.dice_weight, ce_weight=1 - config.dice_weight)
    nothing = constant_prediction_loss(is_tumor[fixed["label"]], **shares)
    log.say(f"U-Net, {run_log.size(network)}, {device}, {precision}; {sampler.num_patches} patches tile the "
            f"training ROIs once; a network that predicts the same everywhere has a loss of {nothing:.3f}")

    def write_log():
        log.record(step, **losses.read(), predicts_nothing=nothing, lr=optimizer.param_groups[0]["lr"],
                   **steps.speed())

    def publish():
        val = validate(ema.module, dataset, config, precision, device)
        log.say(f"step {step:6d}  val Dice {val['dice']:.3f}  recall " + "  ".join(
            f"{name} {value:.2f}" for name, value in val["recall"].items() if value is not None))
        image, label = fixed["image"][:8], fixed["label"][:8]
        with precision.autocast():
            prob = ema.module(run_training.to_device(image, device)).float().softmax(1)[:, 1]
        draw.samples_png(folder, step, dataset.classes, image=image, label=label, probability=prob.cpu())
        draw_axes.curves_png(folder / "curves.png", log.records(), draw_axes.TRAINING["segmenter"])
        run.save_model(folder, "segmenter", network.config, ema.module.state_dict(), step=step,
                       patch=config.patch, **dataset.origin())

    steps = run_training.Steps("segmentation", config, sampler, step, device, losses)
    for batch in steps:
        optimizer.zero_grad()
        parts = run_distributed.parts(batch, config)            # one, but for --accumulate
        known = sums_of_all(network, parts, is_tumor, config, precision, device) if len(parts) > 1 else None
        for part in parts:
            # 1 data: patches around tumor pixels. The network is asked one question, tumor or not; were it to
            #   name the subtype too, it could not be compared with the paper's.
            image = run_training.to_device(part.batch["image"], device)                 # (B, 3, H, W)
            target = is_tumor[part.batch["label"]].to(device, non_blocking=True)        # (B, H, W)

            # 2 predict and compare: Dice looks at the overlap, so that much background does not drown little
            #   tumor; cross-entropy gives every pixel a gradient, also where Dice is flat.
            with precision.autocast():
                logits = network(image)                                                 # (B, 2, H, W)
                loss, terms = dice_cross_entropy(logits, target, **shares,
                                                 pool=run_distributed.WholeSums(part.share, known))     # ()

            # 3 gradient
            scaler.scale(part.share * loss).backward()
            losses.add(part.share, loss=loss, dice_loss=terms["dice"], cross_entropy=terms["ce"])

        # 4 update: a small rate at first, while Adam's averages are those of few steps; and one strange batch
        #   may not throw the weights away, so the gradient's length is limited.
        run_training.set_learning_rate(optimizer, config, step)
        norm = run_training.update(optimizer, scaler, config.clip)
        ema.update(network)
        losses.end(step, batch["names"], grad_norm=norm)
        step += 1

        # 5 report
        steps.report(step, write_log, publish)
    configuration.say_done(config, "evaluate.py", folder)


@torch.no_grad()
def sums_of_all(network, parts, is_tumor, config, precision, device) -> list:
    """--accumulate: sums over the whole batch, from a first pass. A mean over the parts is another Dice."""
    found = []
    with kept_buffers(network), precision.autocast():
        for part in parts:
            dice_cross_entropy(network(run_training.to_device(part.batch["image"], device)),
                               is_tumor[part.batch["label"]].to(device), config.dice,
                               pool=lambda sums: found.append(sums) or sums)
    half = len(found) // len(parts)                 # sums that one part asks for: of Dice, of cross-entropy
    return [run_distributed.total(sum(found[k::half])) for k in range(half)]


def validate(network, dataset, config, precision, device) -> dict:
    """Metrics on the whole ROIs of the validation slides at threshold 0.5; training chooses nothing by it."""
    histogram = ProbabilityHistogram(dataset.classes)
    for _, image, label, _ in iterate_rois(dataset, "val", cache=config.cache):
        with precision.autocast():
            prob = predict_roi(network, image[0], *choose_tiles(0, 0, config.patch), device=device)
        histogram.add(prob, label[0])
    return histogram.report()


def open_data(config):
    """(dataset, sampler of its training patches, the synthetic set or None)"""
    dataset, sampler = run_setup.training_data(config, stain=config.jitter)
    if not config.synthetic:
        return dataset, sampler, None
    with run_distributed.in_turn():
        # It refuses images that were made from a val or test slide: they would tell what is asked there.
        synthetic, _ = load_synthetic(config.synthetic, dataset, same_classes=False)
        return dataset, MixedSampler(sampler, synthetic, config.ratio, config.cache), synthetic


@dataclass
class Config(configuration.Training):               # data, seed, patch, device and what else scripts share
    out: str = "runs/seg"           # run folder; the same command again goes on where it stopped
    name: str = ""                  # of this configuration in reports; empty: from sampling, method, ratio
    # ---- patches
    synthetic: str = ""             # folder made by generate.py; empty: real patches only
    ratio: float = 1.0              # synthetic images per real patch; 1.0 = +100 %, inf: no real patches
    jitter: float = 1.0             # strength of the stain augmentation, 0 = off
    # ---- network
    width: int = 16                 # channels of the encoder's finest level; 64 is the real ResNet-34
    encoder_weights: str = "none"   # initial encoder: none, imagenet (torch hub's cache or download), a file
    init: str = ""                  # official weights to start from: torchvision's ResNet-34 or smp's Unet
    # ---- loss
    dice: Literal["soft", "generalised"] = "soft"       # which Dice loss
    dice_weight: float = 0.5        # share of Dice in the loss; cross-entropy has the rest
    # ---- optimiser
    steps: int = 240                # optimiser steps
    batch: int = 16                 # patches per step
    lr: float = 1e-3                # step size that Adam sees; never rescaled
    schedule: Literal["constant", "cosine"] = "cosine"  # learning rate after the warm-up; cosine falls to 0
    warmup: int = 30                # steps over which the learning rate rises linearly from 0
    clip: float = 1.0               # largest L2 norm of the gradient
    ema: float = 0.99               # decay of the average of weights that is evaluated; 0: the last step's
    save_every: int = 120           # steps between two checkpoints, with sample pictures and a look at val


# PAPER: learning rate 1e-6 with batch 16 are the printed numbers, for ImageNet weights and (unprinted) many
# steps; from random weights they learn nothing in the steps of `tiny` and `small`, whose rates are measured.
PRESETS = {"tiny": {}, "small": dict(steps=2400, warmup=100, save_every=1200, log_every=50),
           "paper": dict(steps=100_000, patch=512, width=64, lr=1e-6, schedule="constant", warmup=1000,
                         save_every=2000, log_every=100, encoder_weights="imagenet", workers=8)}


if __name__ == "__main__":
    command(main)
