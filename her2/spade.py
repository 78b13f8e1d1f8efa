"""SPADE: an image generator that is told at every resolution which tissue belongs where.

A usual conditional generator sees the label map once, at its input, and normalisation then washes it out: a
patch of one single class normalises to the same values whatever the class is. In SPADE the label sets factor
and shift after every normalisation, pixel by pixel:

    h = relu(conv(onehot, resized to x))     gamma = conv(h)     beta = conv(h)
    SPADE(x) = norm(x) * (1 + gamma) + beta                 (eq. 1 of Park et al.; 1 + gamma as in their code)

norm has no parameters of its own. The generator starts from a linear map of a latent vector z and doubles the
size five times, with such residual blocks in between. z comes from an encoder of a real image (a variational
autoencoder: mean mu, log-variance logvar), so that it carries what the mask does not say, such as the stain:

    z = mu + exp(logvar / 2) * noise                     at synthesis z ~ N(0, I): masks alone are enough

Source: Park et al., "Semantic image synthesis with spatially-adaptive normalization", CVPR 2019, sections 3
and appendix A (layers), appendix "VAE". The HER2 paper, section 2.2, uses it with the VAE encoder.

Differs from the official code (NVlabs/SPADE):
- Any height and width divisible by `stride` (32) works: the latent grid of the training size is resized
  (nearest) to the image's. The official grid fits one size only.
- The encoder follows the training size (officially images become 256 x 256, and the encoder of smaller crops
  fails on them, a layer short) and has z_dim outputs (officially 256 whatever z_dim is).
- Plain batch normalisation, not synchronised: equal on one device, but for the counter num_batches_tracked.
- `hidden`, the width of h above, is an argument (officially 128): with a small ngf it dominates the cost.
- PAPER: batch norm at test time is left open. Synthesised images are normalised with running averages, as
  officially, so that none depends on the others of its batch. But those belong to the weights of the last
  steps, not to averaged (EMA) ones, and to z from the encoder, not from N(0, I): `recalibrated` measures them
  anew. On the phantom, after 800 steps, images went from 80 % to 98 % of the contrast of training mode.

Key: B batch, K classes, C channels, h w size of a feature map, H W of the image, g = 2^5 (stride), n = ngf.
"""

import copy
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from her2.net_blocks import SpectralConv2d, load_strict

SLOPE = 0.2                                   # of every LeakyReLU outside the SPADE layers (official value)
UPSAMPLINGS = {"normal": 5, "more": 6, "most": 7}      # how often the latent grid is doubled


class SPADENorm(nn.Module):
    """Normalise x without parameters, then stretch and shift every pixel as the label map says there."""

    def __init__(self, channels: int, num_classes: int, norm: str = "batch", hidden: int = 128):
        super().__init__()
        layer = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d}[norm]
        self.param_free_norm = layer(channels, affine=False)   # what follows is the label map's business
        # 3 x 3 twice: gamma and beta know how far the next tissue is, not only which one is here.
        self.mlp_shared = nn.Sequential(nn.Conv2d(num_classes, hidden, 3, padding=1), nn.ReLU())
        self.mlp_gamma, self.mlp_beta = (nn.Conv2d(hidden, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor, onehot: torch.Tensor) -> torch.Tensor:
        """x (B, C, h, w); onehot (B, K, any, any) is resized to x -> (B, C, h, w)."""
        # Nearest keeps one class per pixel: a mean of two one-hot vectors is a tissue that does not exist.
        onehot = F.interpolate(onehot, size=x.shape[2:], mode="nearest")              # (B, K, h, w)
        h = self.mlp_shared(onehot)                                                   # (B, hidden, h, w)
        gamma, beta = self.mlp_gamma(h), self.mlp_beta(h)                             # (B, C, h, w)
        # gamma starts at a few 1e-5 (init_weights): without the 1 every layer would begin as a zero and let
        # nothing pass; with it the network begins with plain normalisation, and learns the label's part.
        return self.param_free_norm(x) * (1 + gamma) + beta                           # (B, C, h, w)


class SPADEResBlock(nn.Module):
    """x + conv(conv(x)), each convolution after SPADE and LeakyReLU; 1x1 shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, num_classes: int, norm="batch", hidden=128):
        super().__init__()
        middle = min(in_channels, out_channels)        # the narrower of the two: most of the cost is here
        self.conv_0 = SpectralConv2d(in_channels, middle, 3, padding=1)
        self.conv_1 = SpectralConv2d(middle, out_channels, 3, padding=1)
        self.norm_0 = SPADENorm(in_channels, num_classes, norm, hidden)
        self.norm_1 = SPADENorm(middle, num_classes, norm, hidden)
        self.shortcut = in_channels != out_channels
        if self.shortcut:
            self.conv_s = SpectralConv2d(in_channels, out_channels, 1, bias=False)   # only mixes channels
            self.norm_s = SPADENorm(in_channels, num_classes, norm, hidden)

    def forward(self, x: torch.Tensor, onehot: torch.Tensor) -> torch.Tensor:
        # The label enters before each convolution, the shortcut's too: no learned path goes around it.
        skip = self.conv_s(self.norm_s(x, onehot)) if self.shortcut else x            # (B, C', h, w)
        # In place: a leaky ReLU's gradient needs its output alone, which the convolution keeps anyway.
        x = self.conv_0(F.leaky_relu(self.norm_0(x, onehot), SLOPE, inplace=True))    # (B, min, h, w)
        x = self.conv_1(F.leaky_relu(self.norm_1(x, onehot), SLOPE, inplace=True))    # (B, C', h, w)
        return skip + x                                                               # (B, C', h, w)


class SPADEGenerator(nn.Module):
    """onehot (B, K, H, W) and z (B, z_dim) -> image (B, 3, H, W) in [-1, 1]; H, W divisible by `stride`.

    size: the training patch, one int or (height, width): fixes the grid of the first linear layer.
    Official variants, which no script here asks for: norm="instance"; upsampling "more" doubles six times
    instead of five, "most" seven, with one more block; use_vae=False starts from a convolution of the
    downsampled label map instead of z, so that the image is a function of the mask alone."""

    def __init__(self, num_classes: int = 6, ngf: int = 64, z_dim: int = 256, size=512, norm: str = "batch",
                 use_vae: bool = True, upsampling: str = "normal", hidden: int = 128):
        super().__init__()
        size = [size, size] if isinstance(size, int) else list(size)
        self.config = dict(num_classes=num_classes, ngf=ngf, z_dim=z_dim, size=size, norm=norm,
                           use_vae=use_vae, upsampling=upsampling, hidden=hidden)
        self.stride = 2 ** UPSAMPLINGS[upsampling]
        assert all(s % self.stride == 0 for s in size), f"size: found {size}, not divisible by {self.stride}"
        self.grid = [s // self.stride for s in size]
        block = partial(SPADEResBlock, num_classes=num_classes, norm=norm, hidden=hidden)
        self.fc = (nn.Linear(z_dim, 16 * ngf * math.prod(self.grid)) if use_vae   # z sets the look of a patch
                   else nn.Conv2d(num_classes, 16 * ngf, 3, padding=1))
        for name in ("head_0", "G_middle_0", "G_middle_1"):
            self.add_module(name, block(16 * ngf, 16 * ngf))
        for i in range(5 if upsampling == "most" else 4):      # twice the side, half the width: the same cost
            self.add_module(f"up_{i}", block(16 * ngf // 2 ** i, 8 * ngf // 2 ** i))
        self.conv_img = nn.Conv2d(ngf // 2 if upsampling == "most" else ngf, 3, 3, padding=1)

    def start(self, onehot: torch.Tensor, z) -> torch.Tensor:
        """The coarsest feature map, (B, 16n, H/g, W/g)."""
        grid = [s // self.stride for s in onehot.shape[2:]]
        if not self.config["use_vae"]:
            return self.fc(F.interpolate(onehot, size=grid, mode="nearest"))          # (B, 16n, H/g, W/g)
        wanted, found = (len(onehot), self.config["z_dim"]), None if z is None else tuple(z.shape)
        assert found == wanted, f"z must be {wanted}, found {found}: draw it from N(0, I), or encode an image"
        x = self.fc(z).unflatten(1, (-1, *self.grid))                                 # (B, 16n, grid)
        return x if grid == self.grid else F.interpolate(x, size=grid, mode="nearest")  # (B, 16n, H/g, W/g)

    def forward(self, onehot: torch.Tensor, z=None) -> torch.Tensor:
        classes = self.config["num_classes"]
        assert onehot.shape[1] == classes, f"onehot must be (B, {classes}, H, W), found {tuple(onehot.shape)}"
        assert all(s % self.stride == 0 for s in onehot.shape[2:]), \
            f"height and width must be divisible by {self.stride}, found {tuple(onehot.shape[2:])}"
        double = partial(F.interpolate, scale_factor=2, mode="nearest")   # no transposed one: no checkers
        x = self.start(onehot, z)                                                     # (B, 16n, H/g, W/g)
        x = double(self.head_0(x, onehot))                                            # (B, 16n, 2H/g, ..)
        x = self.G_middle_0(x, onehot)                                                # a second look at this
        if self.stride > 32:
            x = double(x)
        x = double(self.G_middle_1(x, onehot))                                        # (B, 16n, 4H/g, ..)
        x = double(self.up_0(x, onehot))                                              # (B, 8n, 8H/g, ..)
        x = double(self.up_1(x, onehot))                                              # (B, 4n, 16H/g, ..)
        x = double(self.up_2(x, onehot))                                              # (B, 2n, H, W)
        x = self.up_3(x, onehot)                                                      # (B, n, H, W)
        if self.stride > 64:
            x = self.up_4(double(x), onehot)                                          # (B, n/2, H, W)
        # tanh keeps the image in [-1, 1]; where it saturates its gradient is 0: see saturated_share.
        return torch.tanh(self.conv_img(F.leaky_relu(x, SLOPE, inplace=True)))        # (B, 3, H, W)

    load_official_state_dict = load_strict          # NVlabs/SPADE's latest_net_G.pth: the same names


class VAEEncoder(nn.Module):
    """image (B, 3, any, any) in [-1, 1] -> mu, logvar (B, z_dim) of q(z | image): resized (bilinear) to the
    largest power of two not above `size`, the training patch, nor above 256 (official value), then 3x3
    convolutions of stride 2 with spectral and instance norm, down to 4x4, then two linear maps."""

    def __init__(self, ngf: int = 64, z_dim: int = 256, size: int = 256):
        super().__init__()
        self.halvings = int(math.log2(min(size, 256))) - 2     # a side of 4 is left
        self.side = 4 * 2 ** self.halvings
        widths = [3] + [ngf * min(2 ** i, 8) for i in range(self.halvings)]      # 3, n * 1, 2, 4, 8, 8, 8
        for i, (in_width, out_width) in enumerate(zip(widths, widths[1:]), start=1):
            convolution = SpectralConv2d(in_width, out_width, 3, stride=2, padding=1, bias=False)
            self.add_module(f"layer{i}", nn.Sequential(convolution, nn.InstanceNorm2d(out_width)))
        # What is left is 4 x 4: too coarse to hold where a nest is, fine enough for how dark it is.
        self.fc_mu, self.fc_var = (nn.Linear(widths[-1] * 16, z_dim) for _ in range(2))

    def forward(self, image: torch.Tensor):
        assert image.dim() == 4 and image.shape[1] == 3, f"image is (B, 3, H, W), found {tuple(image.shape)}"
        x = F.interpolate(image, size=(self.side, self.side), mode="bilinear")        # (B, 3, side, side)
        for i in range(1, self.halvings + 1):
            x = F.leaky_relu(getattr(self, f"layer{i}")(x), SLOPE, inplace=True)      # (B, C, h/2, w/2)
        x = x.flatten(1)                                                              # (B, 8n*4*4)
        return self.fc_mu(x).float(), self.fc_var(x).float()     # (B, z_dim) twice; exp overflows in fp16

    load_official_state_dict = load_strict          # NVlabs/SPADE's latest_net_E.pth: the same names


def reparameterize(mu: torch.Tensor, logvar: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """z ~ N(mu, exp(logvar)) with gradients into mu and logvar; noise ~ N(0, I); all (B, z_dim)."""
    assert mu.shape == logvar.shape == noise.shape, f"found {mu.shape}, {logvar.shape} and {noise.shape}"
    # Drawing has no gradient. Written so, the draw is in `noise`, and mu and logvar are ordinary factors.
    return mu + torch.exp(0.5 * logvar) * noise


@torch.no_grad()
def recalibrated(generator: SPADEGenerator, batches) -> SPADEGenerator:
    """A copy in eval mode whose singular vectors and batch-norm statistics fit its weights: plain averages
    over `batches`, (onehot, z) each, z ~ N(0, I) as in synthesis. Tens give steady ones."""
    network = copy.deepcopy(generator).eval()              # eval: no power iteration per forward
    for layer in network.modules():
        if isinstance(layer, SpectralConv2d):
            layer.power_iteration(steps=10)                # averaged weights have other singular vectors
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None                          # torch: cumulative average instead of exponential
            layer.train()
    for onehot, z in batches:
        network(onehot, z)
    return network.eval()
