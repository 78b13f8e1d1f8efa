"""Cached latents: encode a fixed pool of N patches, in eight orientations, once; train the denoiser on these.

At full size the frozen encoder is most of the cost of a diffusion step (897 against 417 GMAC at 512 px). The
price: no ever new patches; 8 N latents and N label maps in memory (512 px, factor 4: 1.8 MB per patch).
"""

import math

import torch
from tqdm import tqdm

from her2 import run_distributed
from her2.data_patches import PatchSampler, dihedral
from her2.run_seeds import generator


def latent_std(sampler, encode, batch: int) -> float:
    """Standard deviation of all latents, over 256 patches. The official code takes the first batch's and
    loses it on resuming; here it is saved with the weights."""
    return float(torch.cat([encode(sampler.batch(k, batch)["image"])
                            for k in range(max(1, 256 // batch))]).std())


def pooled_latents(config, dataset, encode, first_step: int):
    """Batches for the steps first_step..config.steps-1, each a function of (config.seed, step) alone; under
    torchrun this process's samples of them. {"z": (B, C, h, w) on the CPU, "label": (B, H, W), "names": [B]}.
    encode(image (B, 3, H, W)) -> z (B, C, h, w). An encoder is not exactly equivariant, so a flipped image is
    encoded again; its latent is not flipped instead."""
    upright = PatchSampler(dataset, "train", config.patch, config.sampling, config.seed, flips=False,
                           cache=config.cache, uniform=config.uniform)
    z, label, names = [[] for _ in range(8)], [], []
    for part in tqdm(range(math.ceil(config.latent_pool / config.batch)), "latents", leave=False,
                     disable=None):
        batch = upright.batch(part, config.batch)       # its pixels are not kept
        label.append(batch["label"].to(torch.uint8))
        names += batch["names"]
        for k in range(8):
            z[k].append(encode(dihedral(batch["image"], k)).cpu())
    z, label = [torch.cat(parts) for parts in z], torch.cat(label)
    for step in range(first_step, config.steps):
        random = generator(config.seed, "pool", step)
        picked = torch.randint(config.latent_pool, (config.batch,), generator=random).tolist()
        turned = torch.randint(8, (config.batch,), generator=random).tolist()
        samples = [(picked[n], turned[n]) for n in run_distributed.indices(config)]
        yield {"z": torch.stack([z[k][i] for i, k in samples]),
               "label": torch.stack([dihedral(label[i], k) for i, k in samples]).long(),
               "names": [names[i] for i, _ in samples]}
