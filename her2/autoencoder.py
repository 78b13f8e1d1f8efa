"""VQ autoencoder: an image to a small map of latent vectors and back (vq-f4, vq-f8 of latent-diffusion).

    z      = quant_conv(Encoder(image))              (B, D, H/f, W/f): what the diffusion model works on
    z_q    = the nearest codes of z                  (see quantizer.py)
    image' = Decoder(post_quant_conv(z_q))

Encoder and decoder are convolutional ResNets (GroupNorm, swish): between two levels the size is halved or
doubled, and at the coarsest every place attends to every other. Source: Esser et al., Taming Transformers,
CVPR 2021, table 7; Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, CVPR 2022,
table 8. Module names are the official ones, so that official weights load without a table.

Differs from the official code (latent-diffusion): the number of groups of a GroupNorm is an argument, so that
small models can be built; attention is the fused kernel (at 512 px and factor 4 the official one holds 16384
x 16384 scores per image); levels with attention are given as indices. In the loss (train_ldm.py) LPIPS, with
weight 1 officially, is off without a file at `--lpips`; edge_l1 is an addition, in `small` instead of a
discriminator; this learns from the first step on and the decoder listens from `disc_start` on (officially
neither happens before, so that the decoder first listens to a discriminator that knows nothing).

PAPER: vq-f4, "which compressed the input by a factor of eight" (section 2.2), contradicts itself: vq-f4
halves twice. The default is vq-f4 (512 px -> 128 x 128 x 3); VQ_F8 is the other reading.

Key: B batch, C channels, D latent channels, H W image size, h w size of a feature map, f factor.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from her2.quantizer import Codebook

# Official configurations vq-f4 and vq-f8; level 3 of vq-f8 is its "attn_resolutions: [32]" of 256 pixels.
VQ_F4 = dict(factor=4, ch=128, ch_mult=(1, 2, 4), num_res_blocks=2, z_channels=3, num_codes=8192)
VQ_F8 = VQ_F4 | dict(factor=8, ch_mult=(1, 2, 2, 4), z_channels=4, num_codes=16384, attention_levels=(3,))
# Not official. A latent cell should be about 1 um wide, many per nucleus: at the paper's .242 um per pixel
# that is factor 4, at 1 um per pixel it is nearest to this one.
VQ_F2 = VQ_F4 | dict(factor=2, ch_mult=(1, 2))


def group_norm(channels: int, groups: int = 32) -> nn.GroupNorm:    # where groups do not fit, fewer that do
    return nn.GroupNorm(math.gcd(groups, channels), channels, eps=1e-6)                     # eps as official


class ResBlock(nn.Module):          # x + f(x): an image has to come out; a block learns what to change in it
    def __init__(self, in_channels: int, out_channels: int, groups: int = 32):
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        new = in_channels != out_channels                               # only then is a sum impossible
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if new else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The norm comes first, so the sum itself is never normalised: brightness passes through.
        y = self.conv1(F.silu(self.norm1(x)))                                # (B, out, h, w)
        y = self.conv2(F.silu(self.norm2(y)))                                # (B, out, h, w)
        return self.nin_shortcut(x) + y                                      # (B, out, h, w)


class Attention(nn.Module):
    """Self-attention of one head: every place of a feature map sees every other."""

    def __init__(self, channels: int, groups: int = 32):
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)                                                     # (B, C, h, w)
        q, k, v = (layer(y).flatten(2).mT.unsqueeze(1) for layer in (self.q, self.k, self.v))  # (B, 1, hw, C)
        y = F.scaled_dot_product_attention(q, k, v)                          # softmax(q k' / sqrt(C)) v
        return x + self.proj_out(y.squeeze(1).mT.reshape(x.shape))           # (B, C, h, w)


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention where asked, then a change of size."""

    def __init__(self, in_channels, out_channels, blocks, attention, groups, coarser=False, finer=False):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(in_channels if i == 0 else out_channels, out_channels, groups)
                                   for i in range(blocks))
        self.attn = nn.ModuleList(Attention(out_channels, groups) if attention else nn.Identity()
                                  for _ in range(blocks))
        # One row below and one column right only: with even sizes, this is what a stride of 2 uses.
        self.downsample = nn.Sequential(OrderedDict(                         # OrderedDict: the official names
            pad=nn.ZeroPad2d((0, 1, 0, 1)),
            conv=nn.Conv2d(out_channels, out_channels, 3, stride=2))) if coarser else nn.Identity()
        # Nearest, then a convolution: a transposed one covers pixels unevenly, which shows as a checkerboard.
        self.upsample = nn.Sequential(OrderedDict(
            nearest=nn.Upsample(scale_factor=2.0, mode="nearest"),
            conv=nn.Conv2d(out_channels, out_channels, 3, padding=1))) if finer else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block, attention in zip(self.block, self.attn):
            x = attention(block(x))                                          # (B, out, h, w)
        return self.upsample(self.downsample(x))                             # one of them, or none, changes x


def middle(channels: int, groups: int) -> nn.Sequential:                    # (B, C, h, w) -> the same
    # Attention is here, at the coarsest level, because it is cheapest there: fewest places.
    return nn.Sequential(OrderedDict(block_1=ResBlock(channels, channels, groups),
                                     attn_1=Attention(channels, groups),
                                     block_2=ResBlock(channels, channels, groups)))


class Encoder(nn.Module):
    def __init__(self, widths, num_res_blocks: int, z_channels: int, attention_levels, groups: int):
        super().__init__()
        finest, coarsest = widths[0][0], widths[-1][1]                  # channels at both ends
        self.conv_in = nn.Conv2d(3, finest, 3, padding=1)
        self.down = nn.ModuleList(Level(*width, num_res_blocks, i in attention_levels, groups,
                                        coarser=i < len(widths) - 1) for i, width in enumerate(widths))
        self.mid = middle(coarsest, groups)
        self.norm_out = group_norm(coarsest, groups)
        self.conv_out = nn.Conv2d(coarsest, z_channels, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(image)                                              # (B, ch, H, W)
        for level in self.down:
            x = level(x)                                                     # (B, C, h, w)
        x = self.mid(x)                                                      # (B, C, H/f, W/f)
        return self.conv_out(F.silu(self.norm_out(x)))                       # (B, D, H/f, W/f)


class Decoder(nn.Module):
    """The encoder mirrored, with one residual block more per level; up.0 is the finest resolution."""

    def __init__(self, widths, num_res_blocks: int, z_channels: int, attention_levels, groups: int):
        super().__init__()
        outs = [out for _, out in widths]                          # channels that leave each level
        self.conv_in = nn.Conv2d(z_channels, outs[-1], 3, padding=1)
        self.mid = middle(outs[-1], groups)
        arriving = [*outs[1:], outs[-1]]                           # from the coarser level, or the middle
        self.up = nn.ModuleList(Level(arriving[i], out, num_res_blocks + 1, i in attention_levels, groups,
                                      finer=i > 0) for i, out in enumerate(outs))
        self.norm_out = group_norm(outs[0], groups)
        self.conv_out = nn.Conv2d(outs[0], 3, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.mid(self.conv_in(z))                                        # (B, C, H/f, W/f)
        for level in reversed(self.up):
            x = level(x)                                                     # (B, C, h, w)
        return self.conv_out(F.silu(self.norm_out(x)))                       # (B, 3, H, W)


class VQAutoencoder(nn.Module):
    """Encoder, codebook and decoder. Images are (B, 3, H, W) in [-1, 1], H and W multiples of `factor`.

    Level i (0 = finest) has ch * ch_mult[i] channels; factor = 2 ** (levels - 1), to be checked. z_channels:
    of the latent in encoder and decoder; embed_dim: width D of a code (default: the same)."""

    def __init__(self, factor: int = 4, ch: int = 128, ch_mult=(1, 2, 4), num_res_blocks: int = 2,
                 z_channels: int = 3, num_codes: int = 8192, attention_levels=(), beta: float = 0.25,
                 embed_dim: int = None, groups: int = 32):
        super().__init__()
        embed_dim = embed_dim or z_channels                             # D
        ch_mult, attention_levels = tuple(ch_mult), tuple(attention_levels)
        if factor != 2 ** (len(ch_mult) - 1):
            raise ValueError(f"factor {factor} does not fit the {len(ch_mult)} levels of ch_mult {ch_mult}")
        self.config = dict(factor=factor, ch=ch, ch_mult=ch_mult, num_res_blocks=num_res_blocks, beta=beta,
                           z_channels=z_channels, num_codes=num_codes, attention_levels=attention_levels,
                           embed_dim=embed_dim, groups=groups)
        # Narrow networks need fewer groups than the official 32: a group of one channel normalises away its
        # mean, and the decoder answers with dark and bright droplets (as StyleGAN2's section 2 found, Karras
        # et al. 2020). Officially the finest level has 4 channels a group: `groups` = ch / 4 keeps that.
        self.factor = factor                                            # pixels per latent cell and side
        ends = [ch] + [ch * multiple for multiple in ch_mult]           # what enters and leaves each level
        widths = list(zip(ends, ends[1:]))                              # (in, out) of the encoder's levels
        self.encoder = Encoder(widths, num_res_blocks, z_channels, attention_levels, groups)
        self.decoder = Decoder(widths, num_res_blocks, z_channels, attention_levels, groups)
        self.quantize = Codebook(num_codes, embed_dim, beta)            # (K, D)
        # 1 x 1, so that the codebook may look at the latent in axes of its own.
        self.quant_conv = nn.Conv2d(z_channels, embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        """The latent before quantisation (B, D, H/f, W/f): what the diffusion model works on."""
        assert image.dim() == 4 and image.shape[1] == 3, f"image {tuple(image.shape)} should be (B, 3, H, W)"
        height, width = image.shape[2:]
        assert height % self.factor == width % self.factor == 0, \
            f"image size {height} x {width} should be a multiple of {self.factor}"
        return self.quant_conv(self.encoder(image))                          # (B, D, h, w)

    def decode_quantized(self, z_q: torch.Tensor) -> torch.Tensor:       # image about [-1, 1], not clamped
        return self.decoder(self.post_quant_conv(z_q))                       # (B, 3, H, W)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latent (B, D, h, w) -> image: quantised first, as official; no gradient passes to the codes."""
        # A generated latent lies between the codes; the decoder has seen codes only.
        return self.decode_quantized(self.quantize(z)[0])                    # (B, 3, H, W)

    def forward(self, image: torch.Tensor):
        """-> reconstruction (B, 3, H, W), z, z_q (B, D, h, w), indices (B, h, w), vq_loss (scalar)."""
        z = self.encode(image)                                               # (B, D, h, w)
        z_q, indices, loss = self.quantize(z)                                # (B, D, h, w), (B, h, w), ()
        return self.decode_quantized(z_q), z, z_q, indices, loss

    def load_official_state_dict(self, state_dict: dict) -> None:
        """Weights of an autoencoder of latent-diffusion, on its own or as `first_stage_model.*` of a whole
        checkpoint; other networks in the file are left out. ValueError lists every tensor that misfits."""
        prefix, others = "first_stage_model.", ("loss.", "model.", "model_ema.", "cond_stage_model.")
        # Names without a dot are the buffers of the noise schedule.
        own = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()
               if "." in name and not name.startswith(others)}
        try:
            self.load_state_dict(own)
        except RuntimeError as error:
            raise ValueError(f"not the weights of this autoencoder: {error}") from None


def edge_l1(a, b):
    """Mean distance of the differences between neighbours of images (B, C, H, W): ()."""
    # L1 of the pixels alone is least for a smooth guess where a membrane may be; this one asks for its edge.
    return sum((torch.diff(a, dim=axis) - torch.diff(b, dim=axis)).abs().mean() for axis in (-2, -1))


def psnr(reconstruction: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB per image, (B,). Images (B, 3, H, W) in [-1, 1]; clamped to it."""
    assert reconstruction.shape == image.shape, f"shapes differ: {reconstruction.shape}, {image.shape}"
    error = (reconstruction.float().clamp(-1, 1) - image.float()).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=1e-10))                      # the peak is 2, squared 4
