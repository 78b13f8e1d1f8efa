"""The two discriminators: networks that give every region of an image a score, high for real.

Neither judges an image as a whole. Both are short stacks of 4x4 convolutions whose last map has one logit
per overlapping window ("PatchGAN", Isola et al., CVPR 2017): texture is judged, layout is left to the losses.

    MultiscaleDiscriminator   of SPADE (pix2pixHD): the same stack on the image and on its half-size copy. It
                              reads label map and image together, and returns every layer's output, because
                              the feature matching loss compares fake and real in all of them but the last
    PatchGAN                  of the VQ autoencoder: one stack on the image alone

Source: Wang et al., "pix2pixHD", CVPR 2018, section 3.2; Park et al., CVPR 2019, appendix A; Esser et al.,
"Taming transformers", CVPR 2021, section 3.1. No number differs from the official code (SPADE, taming).

A logit sees 70 pixels: back from it, r pixels become r + 3 below a 4x4 convolution of stride 1, 2 r + 2 below
one of stride 2. Both have three of stride 2, then two of stride 1: 4, 7, 16, 34, 70 (half-size copy: 141).

Key: B batch, C channels, h w size of a feature map, n = ndf, K classes.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from her2.net_blocks import SpectralConv2d, load_strict

# 0.2: official value. In place: the gradient needs the output alone, which the next layer keeps anyway.
LeakyReLU = partial(nn.LeakyReLU, 0.2, inplace=True)


class LevelDiscriminator(nn.Module):
    """num_layers convolutions (stride 2, the last one 1), then one to the logits; x -> every layer's output.
    Padding is 2 for a kernel of 4, as officially, so maps grow by one pixel: 64 -> 33, 17, 9, 10, 11."""

    def __init__(self, in_channels: int, ndf: int, num_layers: int):
        super().__init__()
        # No normalisation in the first layer: it would take away the brightness that a fake may have wrong.
        self.model0 = nn.Sequential(nn.Conv2d(in_channels, ndf, 4, stride=2, padding=2), LeakyReLU())
        width = ndf                                                     # doubles per layer
        for index in range(1, num_layers):
            in_width, width = width, min(2 * width, 512)           # 512: the official ceiling
            stride = 2 if index < num_layers - 1 else 1            # the last one looks wider, not coarser
            # Spectral norm bounds how steeply D can change, and with it the gradient that G gets from D.
            convolution = SpectralConv2d(in_width, width, 4, stride, padding=2, bias=False)
            normalised = nn.Sequential(convolution, nn.InstanceNorm2d(width))
            self.add_module(f"model{index}", nn.Sequential(normalised, LeakyReLU()))
        self.add_module(f"model{num_layers}", nn.Sequential(nn.Conv2d(width, 1, 4, padding=2)))  # the logits

    def forward(self, x: torch.Tensor) -> list:
        features = []
        for layer in self.children():                      # model0, model1, ...
            x = layer(x)                                   # (B, n * 1, 2, 4, 8, h/2, w/2), at last (B, 1, ..)
            features.append(x)
        return features


class MultiscaleDiscriminator(nn.Module):
    """x (B, K+3, H, W) -> per level, full resolution first, the list of features; its last entry = logits."""

    def __init__(self, in_channels: int = 9, ndf: int = 64, num_layers: int = 4, num_levels: int = 2):
        super().__init__()
        # 70 pixels of the image are the texture of nuclei and membranes, 141 how nuclei stand in a nest.
        for level in range(num_levels):                           # own weights each: other things to look for
            self.add_module(f"discriminator_{level}", LevelDiscriminator(in_channels, ndf, num_layers))

    def forward(self, x: torch.Tensor) -> list:
        features = []
        for level, discriminator in enumerate(self.children()):
            if level:            # zeros around the image do not count: a dark rim would tell nothing of fakes
                x = F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)  # (B, K+3, h/2, w/2)
            features.append(discriminator(x))
        return features

    load_official_state_dict = load_strict                 # NVlabs/SPADE's latest_net_D.pth: the same names


def discriminate(discriminator: MultiscaleDiscriminator, onehot, fake: torch.Tensor, real: torch.Tensor):
    """Features of fake and of real images under the same label maps -> (fake_features, real_features). In one
    batch, fake first: spectral norms change with every forward, and one D shall judge fake and real."""
    assert fake.shape == real.shape, f"fake {tuple(fake.shape)} and real {tuple(real.shape)} differ in shape"
    # With its label map beside it, a good image of the wrong tissue is a fake as well.
    x = torch.cat([torch.cat([onehot, onehot]), torch.cat([fake, real])], dim=1)      # (2B, K+3, H, W)
    halves = [[feature.chunk(2) for feature in level] for level in discriminator(x)]  # (B, C, h, w) each
    return tuple([[pair[half] for pair in level] for level in halves] for half in (0, 1))


class PatchGAN(nn.Module):
    """image (B, 3, H, W) -> logits (B, 1, h, w): num_layers stride-2 convolutions, with batch norm."""

    def __init__(self, in_channels: int = 3, ndf: int = 64, num_layers: int = 3):
        super().__init__()
        layers = [nn.Conv2d(in_channels, ndf, 4, stride=2, padding=1), LeakyReLU()]
        width = ndf
        for index in range(1, num_layers + 1):
            in_width, width = width, ndf * min(2 ** index, 8)      # 8: the official ceiling
            stride = 2 if index < num_layers else 1                # a logit sees 70 pixels (3 layers), 34 (2)
            # No bias: batch normalisation subtracts the mean, and a bias with it.
            layers += [nn.Conv2d(in_width, width, 4, stride, padding=1, bias=False),
                       nn.BatchNorm2d(width), LeakyReLU()]
        self.main = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, padding=1))         # one logit per window

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.main(image)                                                       # (B, 1, h, w)

    def load_official_state_dict(self, state_dict: dict) -> None:
        """Weights of taming's NLayerDiscriminator (same names), alone or inside an autoencoder's file."""
        inside = "loss.discriminator."                             # its name in a file of a whole autoencoder
        own = {name.removeprefix(inside): state_dict[name] for name in state_dict if name.startswith(inside)}
        load_strict(self, own or state_dict)
