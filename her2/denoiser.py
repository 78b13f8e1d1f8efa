"""The denoiser: a U-Net that gets a noisy latent, the time and the label map, and tells noise from image.

    code   = LabelCode(onehot)                   one-hot label map shrunk to the latent's size
    output = Denoiser(concat(xt, code), t)       eps or v, see diffusion.py

The U-Net is that of Dhariwal and Nichol (Diffusion Models Beat GANs, NeurIPS 2021) as latent-diffusion uses
it for semantic synthesis (models/ldm/semantic_synthesis256): three resolutions of 128 x (1, 4, 8) channels,
two residual blocks each, the time added inside every block; attention in the middle alone, because its
attention resolutions [32, 16, 8] are factors that do not occur (1, 2, 4 do). Modules have official names.

Differs from the official code (latent-diffusion): LatentDenoiser owns the label code with the U-Net, so that
the moving average covers both (officially the U-Net alone: sampling then pairs averaged weights with a label
code they were never trained with); latents are always scaled to variance 1, measured over 256 patches
(officially where `scale_by_std` asks for it, on the first batch; semantic_synthesis256 does not: 1); no
gradient checkpointing; the number of groups is an argument.

PAPER: guidance is not mentioned. A dropped label (classifier-free guidance, Ho and Salimans 2022) is a code
of zeros: the label conv has no bias, so only pixels without any class (IGNORE) have the same.

Key: B batch, K classes, C channels, D latent channels, H W image size, h w latent size, E time embedding.
"""

import math
from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from her2.net_blocks import load_strict


def group_norm(channels: int, groups: int = 32) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(groups, channels), channels, eps=1e-5)      # eps as official


def zeroed(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():             # residual branches begin as zeros, so does the output
        nn.init.zeros_(parameter)
    return layer


def time_embedding(t: torch.Tensor, dim: int) -> torch.Tensor:
    """t (B,) -> (B, dim): cos, then sin of t at half = dim // 2 frequencies 10000^(-i/half), from 1 down."""
    # A number from 0 to 999 says little to a linear layer. Waves of all lengths do, as the hands of a clock:
    # fast ones tell t from t + 1, slow ones early from late.
    half = dim // 2
    # float32 in the official order of operations: at t = 999 one rounding (1e-7) turns an angle by 1e-4, so
    # another order, or another machine's exp, is seen in the output (1e-6), and nothing better is to be had.
    steps = torch.arange(half, dtype=torch.float32, device=t.device)         # (half,)
    angles = t[:, None].float() * torch.exp(-math.log(10000.0) * steps / half)          # (B, half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))  # (B, dim); odd: 0 at the end


class LabelCode(nn.Module):
    """One-hot labels (B, K, H, W) to a code (B, out, h, w) of the latent's size: halved, then a 1x1 conv."""

    def __init__(self, num_classes: int, out_channels: int = 3, halvings: int = 2):
        super().__init__()
        self.halvings = halvings
        self.channel_mapper = nn.Conv2d(num_classes, out_channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Bilinear halving averages 2 x 2 pixels: the code sees the share of every class in each latent cell.
        for _ in range(self.halvings):
            x = F.interpolate(x, scale_factor=0.5, mode="bilinear")          # (B, K, H/2, W/2) shares in 0..1
        return self.channel_mapper(x)                                        # (B, out, h, w)


class ResBlock(nn.Module):
    """Two convolutions with the time embedding added in between."""

    def __init__(self, in_channels: int, out_channels: int, emb_dim: int, groups: int = 32):
        super().__init__()
        # Identity is in the place of the official dropout (of 0), so that the numbers in the names agree.
        self.in_layers = nn.Sequential(group_norm(in_channels, groups), nn.SiLU(),
                                       nn.Conv2d(in_channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, out_channels))
        self.out_layers = nn.Sequential(group_norm(out_channels, groups), nn.SiLU(), nn.Identity(),
                                        zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)))
        new = in_channels != out_channels                               # only then is a sum impossible
        self.skip_connection = nn.Conv2d(in_channels, out_channels, 1) if new else nn.Identity()

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        # Time shifts every channel: by how much noise there is, the same pattern means detail or nothing.
        y = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]       # (B, out, h, w)
        return self.skip_connection(x) + self.out_layers(y)                  # (B, out, h, w)


class Attention(nn.Module):
    """Self-attention over all places; channels of q, k, v lie head by head (the official legacy order)."""

    def __init__(self, channels: int, num_heads: int, groups: int = 32):
        super().__init__()
        assert channels % num_heads == 0, f"{channels} channels cannot be split into {num_heads} heads"
        self.num_heads = num_heads                                      # each attends to something else
        self.norm = group_norm(channels, groups)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))         # begins as the identity

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(2)                                                  # (B, C, hw)
        qkv = self.qkv(self.norm(flat)).unflatten(1, (self.num_heads, 3, -1))  # (B, heads, 3, c, hw)
        q, k, v = qkv.transpose(3, 4).unbind(2)                              # (B, heads, hw, c)
        y = F.scaled_dot_product_attention(q, k, v)                          # (B, heads, hw, c)
        y = y.transpose(2, 3).reshape(flat.shape)                            # (B, C, hw)
        return (flat + self.proj_out(y)).reshape(x.shape)                    # (B, C, h, w)


class Layers(nn.ModuleList):                 # in a row; the residual blocks among them get the time embedding
    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x                                                        # (B, C, h, w)


class Denoiser(nn.Module):
    """U-Net: x (B, in_channels, h, w), t (B,) -> (B, out_channels, h, w), multiples of 2 ** (levels - 1)."""

    def __init__(self, in_channels: int = 6, out_channels: int = 3, model_channels: int = 128,
                 channel_mult=(1, 4, 8), num_res_blocks: int = 2, num_heads: int = 8, groups: int = 32):
        super().__init__()
        self.in_channels, self.model_channels, self.levels = in_channels, model_channels, len(channel_mult)
        emb_dim = 4 * model_channels                       # official
        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb_dim), nn.SiLU(),
                                        nn.Linear(emb_dim, emb_dim))
        block = partial(ResBlock, emb_dim=emb_dim, groups=groups)
        widths = [multiple * model_channels for multiple in channel_mult]  # per level
        channels = model_channels
        skips = [channels]                     # widths of what the way up will concatenate, last first
        self.input_blocks = nn.ModuleList([Layers([nn.Conv2d(in_channels, channels, 3, padding=1)])])
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                self.input_blocks.append(Layers([block(channels, width)]))
                channels = width
                skips.append(channels)
            if level < self.levels - 1:
                # Learned, unlike pooling: the network decides what survives. OrderedDict: the official names.
                half = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
                self.input_blocks.append(Layers([nn.Sequential(OrderedDict(op=half))]))
                skips.append(channels)
        # At the coarsest level every place sees every other: the stain agrees across a patch.
        self.middle_block = Layers([block(width, width), Attention(width, num_heads, groups),
                                    block(width, width)])
        self.output_blocks = nn.ModuleList()               # the way up: a block more per level, for the skips
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(num_res_blocks + 1):
                self.output_blocks.append(Layers([block(channels + skips.pop(), width)]))
                channels = width
            if level > 0:                                  # after the last block of a level: twice the side
                twice = OrderedDict(nearest=nn.Upsample(scale_factor=2.0),
                                    conv=nn.Conv2d(channels, channels, 3, padding=1))
                self.output_blocks[-1].append(nn.Sequential(twice))
        self.out = nn.Sequential(group_norm(channels, groups), nn.SiLU(),
                                 zeroed(nn.Conv2d(channels, out_channels, 3, padding=1)))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert x.shape[1] == self.in_channels, f"x {tuple(x.shape)} should be (B, {self.in_channels}, h, w)"
        assert all(size % 2 ** (self.levels - 1) == 0 for size in x.shape[2:]), \
            f"latent size {tuple(x.shape[2:])} should be a multiple of {2 ** (self.levels - 1)}"
        emb = self.time_embed(time_embedding(t, self.model_channels))        # (B, E)
        skips = []                       # from the way down: where exactly things are, lost by halving
        for layers in self.input_blocks:
            x = layers(x, emb)                                               # (B, C, h, w)
            skips.append(x)
        x = self.middle_block(x, emb)                                        # (B, C, h/4, w/4)
        for layers in self.output_blocks:
            x = layers(torch.cat([x, skips.pop()], dim=1), emb)              # (B, C, h, w)
        return self.out(x)                                                   # (B, out, h, w)


def guided(cond: torch.Tensor, uncond: torch.Tensor, guidance: float) -> torch.Tensor:
    """Classifier-free guidance: 1 is `cond`, the answer with the label; 3 goes on where the label led it
    (clearer classes, less variety); 8 leaves the law of the data (colours saturate)."""
    return uncond + guidance * (cond - uncond)


class LatentDenoiser(nn.Module):
    """The denoiser with its label code and the scale of the latents: all that is averaged, saved and sampled.

    stages: halvings of the label map, log2 of the autoencoder's factor. code_channels: default z_channels.
    The buffer latent_scale, 1 / standard deviation of the latents z: x0 = latent_scale * z has variance 1. It
    is NaN until `set_latent_scale`; loading one that is not a positive number raises ValueError."""

    def __init__(self, num_classes: int = 6, z_channels: int = 3, model_channels: int = 128,
                 channel_mult=(1, 4, 8), num_res_blocks: int = 2, num_heads: int = 8, stages: int = 2,
                 code_channels: int = None, groups: int = 32):
        super().__init__()
        self.code_channels = code_channels = code_channels or z_channels
        self.config = dict(num_classes=num_classes, z_channels=z_channels, model_channels=model_channels,
                           channel_mult=tuple(channel_mult), num_res_blocks=num_res_blocks,
                           num_heads=num_heads, stages=stages, code_channels=code_channels, groups=groups)
        self.label_code = LabelCode(num_classes, code_channels, stages)
        self.unet = Denoiser(z_channels + code_channels, z_channels, model_channels, channel_mult,
                             num_res_blocks, num_heads, groups=groups)
        # A schedule's signal-to-noise ratios hold for data of variance 1: at a standard deviation of 5 each
        # is 25 times as large, and the last level may show what sampling, which begins with pure noise, has
        # not. Kept with the weights, which mean nothing with another factor.
        self.register_buffer("latent_scale", torch.tensor(float("nan")))
        self.register_load_state_dict_post_hook(lambda module, _: module.check_latent_scale())
        self.memory_format = torch.preserve_format             # until `laid_out`: as the input comes

    def laid_out(self, side: int):
        """The network with its weights laid out in memory as is fastest for latents of `side` cells."""
        # Channels last, but on a CPU with coarsest maps of 4 x 4 or less: there oneDNN's kernels for that
        # layout were 3 to 20 % slower (5 % faster for larger maps). A rule by shape: a resumed run keeps it.
        tiny = side >> (self.unet.levels - 1) <= 4 and self.latent_scale.device.type == "cpu"
        self.memory_format = torch.contiguous_format if tiny else torch.channels_last
        return self.to(memory_format=self.memory_format)

    def check_latent_scale(self) -> None:
        value = self.latent_scale.item()                       # NaN: sampling would go on and decode nonsense
        if not 0 < value < math.inf:
            raise ValueError(f"latent_scale is {value}, should be a positive number: it was never set")

    def set_latent_scale(self, std: float) -> None:          # std: of the latents, over many batches
        self.latent_scale.fill_(1.0 / float(std))
        self.check_latent_scale()

    def forward(self, xt: torch.Tensor, t: torch.Tensor, code: torch.Tensor = None) -> torch.Tensor:
        """xt (B, D, h, w), t (B,), code (B, code_channels, h, w) or None (no label) -> (B, D, h, w)."""
        if code is None:
            code = xt.new_zeros(len(xt), self.code_channels, *xt.shape[2:])
        # The label lies beside the latent, place by place: the first convolution sees both at once.
        x = torch.cat([xt, code.to(xt.dtype)], dim=1)                        # (B, D + code, h, w)
        return self.unet(x.to(memory_format=self.memory_format), t)          # (B, D, h, w)

    def predictor(self, code: torch.Tensor, guidance: float = 1.0):
        """-> function(xt, t) for the samplers. guidance 1: plain conditional; else two answers per image."""
        def predict(xt, t):
            if guidance == 1.0:
                return self(xt, t, code)
            both = torch.cat([code, torch.zeros_like(code)])                 # (2B, code, h, w) one forward
            cond, uncond = self(xt.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
            return guided(cond, uncond, guidance)

        return predict

    def load_official_state_dict(self, state_dict: dict, ema: bool = True) -> None:
        """U-Net, label conv and scale of a latent-diffusion checkpoint; its other parts are left out. ema:
        take the averaged U-Net (model_ema.*, names without dots) where there is one; the official average
        does not cover the label conv. ValueError lists every missing, unexpected and misshapen tensor."""
        inside = "model_ema.diffusion_model"
        averaged = ema and any(name.startswith(inside) for name in state_dict)
        flat = {inside + name.replace(".", ""): "unet." + name for name in self.unet.state_dict()}
        unused = ("first_stage_model.", "model_ema.decay", "model_ema.num_updates",
                  "model." if averaged else "model_ema.")
        # Names without a dot are the tables of the schedule, and the factor of the latents.
        given = {flat.get(name, name): tensor for name, tensor in state_dict.items()
                 if "." in name and not name.startswith(unused)}
        given["latent_scale"] = state_dict.get("scale_factor", torch.tensor(1.0)).reshape(())
        load_strict(self, given, rename=[(r"^cond_stage_model\.", "label_code."),
                                         (r"^model\.(diffusion_model\.)?", "unet.")])
