"""What the training scripts begin with: the patches, and the networks with their initial weights.

Every size comes from the script's configuration. The initial weights are a function of its seed, or are read
from an official file (`init`).
"""

import math
from pathlib import Path

import torch

from her2 import run_distributed, run_training
from her2.autoencoder import VQ_F2, VQ_F4, VQ_F8, VQAutoencoder
from her2.data_folder import load_dataset
from her2.data_patches import PatchSampler
from her2.denoiser import LatentDenoiser
from her2.diffusion import Schedule
from her2.discriminator import MultiscaleDiscriminator, PatchGAN
from her2.net_blocks import init_weights
from her2.phantom import make_phantom
from her2.run_errors import UserError
from her2.run_seeds import generator
from her2.segmenter import UNet, encoder_weights
from her2.spade import SPADEGenerator, VAEEncoder


def training_data(config, stain: float = 0.0, flips: bool = True):
    """Dataset and sampler of the training split. stain: jitter; painters learn the true colours: 0."""
    with run_distributed.in_turn():         # process 0 makes the phantom and the cache, the others find them
        config.data = config.data or str(make_phantom(f"data/phantom-{config.preset}", config.preset))
        dataset = load_dataset(config.data, seed=config.split_seed)
        return dataset, PatchSampler(dataset, "train", config.patch, config.sampling, config.seed,
                                     flips=flips, stain=stain, cache=config.cache, uniform=config.uniform)


def segmenter(config, device):
    """The network with its initial weights."""
    torch.manual_seed(config.seed)                  # initial weights only: batches have their own generators
    network = UNet(num_classes=2, width=config.width)
    run_training.load_official(network, config.init or encoder_weights(config.encoder_weights))
    return network.to(device, memory_format=torch.channels_last)


def spade_gan(config, num_classes, device):
    """(generator, encoder, discriminator) with their initial weights, in training mode."""
    torch.manual_seed(config.seed)                  # initial u of the spectral norms; weights are drawn below
    net = SPADEGenerator(num_classes, config.width, config.z_dim, config.patch, hidden=config.hidden)
    encoder = VAEEncoder(config.width, config.z_dim, config.patch)
    disc = MultiscaleDiscriminator(num_classes + 3, config.width)
    for name, module in (("generator", net), ("encoder", encoder), ("discriminator", disc)):
        init_weights(module, generator(config.seed, name))
    for letter, module in (("G", net), ("E", encoder), ("D", disc)) if config.init else ():
        path = Path(config.init)
        path = path.with_name(path.name.replace("_G", f"_{letter}"))
        if module is net or (path != Path(config.init) and path.exists()):
            run_training.load_official(module, path)
    return [module.to(device, memory_format=torch.channels_last).train() for module in (net, encoder, disc)]


def autoencoder_gan(config, device):
    """(autoencoder, discriminator) with their initial weights. UserError when the sizes do not fit."""
    if config.patch % (4 * config.factor) or config.patch < 32:     # smaller ones vanish in the discriminator
        raise UserError(f"--patch: found {config.patch}; give a multiple of {4 * config.factor}, at least 32")
    torch.manual_seed(config.seed)                  # initial weights only: all else has its own generator
    official = {2: VQ_F2, 4: VQ_F4, 8: VQ_F8}[config.factor]
    model = VQAutoencoder(**{**official, "ch": config.width, "num_res_blocks": config.blocks,
                             "num_codes": config.codes, "beta": config.beta,
                             "groups": max(1, config.width // 4)})      # 4 channels each, as in the official
    run_training.load_official(model, config.init)
    disc = PatchGAN(3, config.disc_width, num_layers=2 if config.factor == 8 else 3)
    init_weights(disc, generator(config.seed, "discriminator"), kind="normal")
    return [module.to(device, memory_format=torch.channels_last) for module in (model, disc)]


def diffusion(config, autoencoder, num_classes, device):
    """(noise schedule, denoiser with its initial weights). UserError when the sizes do not fit together."""
    levels = tuple(int(m) for m in config.mult.split(","))
    if config.width * levels[-1] % 8:
        raise UserError(f"--width: found {config.width}; 8 attention heads share {levels[-1]} times that, "
                        f"give a multiple of {8 // math.gcd(8, levels[-1])}")
    coarsest = autoencoder.factor * 2 ** (len(levels) - 1)
    if config.patch % coarsest:
        raise UserError(f"--patch: found {config.patch}; autoencoder and denoiser halve it to 1/{coarsest}, "
                        f"give a multiple of {coarsest}")
    if config.zero_terminal_snr and config.parametrisation != "v":
        raise UserError("--zero-terminal-snr: at t = T - 1 the noise says nothing about x0; "
                        "add --parametrisation v, or --no-zero-terminal-snr")
    if config.init and config.parametrisation != "eps":
        raise UserError(f"--init: official weights predict eps, not {config.parametrisation}; "
                        "add --parametrisation eps --no-zero-terminal-snr")
    torch.manual_seed(config.seed)                  # initial weights only: all else has its own generator
    denoiser = LatentDenoiser(num_classes=num_classes, z_channels=autoencoder.config["z_channels"],
                              model_channels=config.width, channel_mult=levels, num_res_blocks=config.blocks,
                              stages=int(math.log2(autoencoder.factor)), groups=max(1, config.width // 4))
    run_training.load_official(denoiser, config.init)
    schedule = Schedule(T=config.timesteps, zero_terminal_snr=config.zero_terminal_snr,
                        parametrisation=config.parametrisation)
    return schedule.to(device), denoiser.to(device).laid_out(config.patch // autoencoder.factor)
