"""The sample pictures of the training scripts: always the same patches and noise, so that steps compare."""

import torch

from her2 import draw, run_training
from her2.run_seeds import generator
from her2.samplers import image_noise, sample


@torch.no_grad()
def segmenter(folder, step, network, fixed, classes, precision, device) -> None:
    """samples/: eight fixed patches with their label and the predicted tumor probability."""
    image = fixed["image"][:8].to(device, memory_format=torch.channels_last)
    with precision.autocast():
        prob = network(image).float().softmax(1)[:, 1].cpu()                            # (8, H, W)
    draw.samples_png(folder, step, classes, image=fixed["image"][:8], label=fixed["label"][:8],
                     probability=prob)


@torch.no_grad()
def spade_gan(folder, step, network, fixed, classes, config, precision, device) -> None:
    """samples/: eight fixed labels, their real patches, an image of each; the first label with eight z."""
    z = torch.randn(8, config.z_dim, generator=generator(config.seed, "sample z")).to(device)
    onehot = run_training.one_hot(fixed["label"], len(classes), device)
    with precision.autocast():
        each = network(onehot, z).float()
        same = network(onehot[:1].expand(8, -1, -1, -1).contiguous(), z).float()
    draw.samples_png(folder, step, classes, label=fixed["label"], real=fixed["image"], generated=each,
                     first_label_and_8_z=same)


@torch.no_grad()
def diffusion(folder, step, denoiser, autoencoder, schedule, fixed, dataset, config, precision,
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
