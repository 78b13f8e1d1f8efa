"""The segmentation network: a U-Net whose contracting half is a ResNet-34, and inference on whole ROIs.

A ResNet-34 without its classifier halves the image five times and keeps the feature map of every level. The
decoder goes back up: double the resolution (nearest), append the encoder's map of that level (the skip; none
at the image's own resolution), two 3x3 convolutions. One more gives the logits of background and tumor:

    features  f_0 = x, f_1 (1/2, w), f_2 (1/4, w), f_3 (1/8, 2w), f_4 (1/16, 4w), f_5 (1/32, 8w)     w = width
    y_0 = f_5        y_i = block_i(concat(up2(y_{i-1}), f_{5-i})), i = 1..4        y_5 = block_5(up2(y_4))
    logits = conv3x3(y_5)

Source: paper, section 2.3 (U-Net [17] with a ResNet-34 [18] backbone pre-trained on ImageNet [19]); layout
and names of segmentation-models-pytorch's Unet("resnet34"), whose files load, as do torchvision's (encoder).

Differs from the official code: images come in [-1, 1] and the ImageNet normalisation is part of the network
(the official one leaves it to the data pipeline, where it is easily forgotten); the width is free; the
initialisation follows one rule for encoder and decoder (see `he_init`).

Key: B batch, K classes, H W image size, h w size of a feature map, c channels, w width.
"""

import hashlib
import itertools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from her2.net_blocks import load_strict
from her2.run_errors import UserError, one_line

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in [0, 1]: what every torchvision ResNet was trained with
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGENET_URL = "https://download.pytorch.org/models/resnet34-b627a593.pth"  # ends in the start of its SHA-256
STRIDE = 32                            # five halvings: sizes and places of tiles are multiples of it
BLOCKS = (3, 4, 6, 3)                  # residual blocks of f_2 .. f_5: He et al., CVPR 2016, table 1


class ResidualBlock(nn.Module):
    """relu(shortcut(x) + bn(conv(relu(bn(conv(x)))))): He et al., figure 2; torchvision's BasicBlock."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        # What came in is added as it is, but where the shape changes: as in torchvision.
        self.downsample = nn.Identity() if stride == 1 else nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)               # (B, c_out, h / stride, w / stride)
        return F.relu(self.bn2(self.conv2(x)) + shortcut, inplace=True)                     # the same


class ResNet34Encoder(nn.Module):
    """ResNet-34 without classifier; parameters named as torchvision's."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.channels = [3, width, width, 2 * width, 4 * width, 8 * width]
        # No biases before a batch norm: it subtracts the mean, and a bias with it.
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        for i, depth in enumerate(BLOCKS, start=1):
            c_in, c_out = self.channels[i], self.channels[i + 1]        # doubled where the side halves
            first = ResidualBlock(c_in, c_out, stride=1 if i == 1 else 2)  # layer1 comes after a pooling
            rest = [ResidualBlock(c_out, c_out, stride=1) for _ in range(depth - 1)]
            self.add_module(f"layer{i}", nn.Sequential(first, *rest))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x: ImageNet-normalised image. Returns the six maps f_0 .. f_5 of the module's docstring."""
        f1 = F.relu(self.bn1(self.conv1(x)), inplace=True)          # (B, w, H/2, W/2)
        f2 = self.layer1(F.max_pool2d(f1, 3, stride=2, padding=1))  # (B, w, H/4, W/4)
        f3 = self.layer2(f2)                                        # (B, 2w, H/8, W/8)
        f4 = self.layer3(f3)                                        # (B, 4w, H/16, W/16)
        f5 = self.layer4(f4)                                        # (B, 8w, H/32, W/32)
        return [x, f1, f2, f3, f4, f5]


def conv_bn_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
                         nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class DecoderBlock(nn.Module):
    def __init__(self, in_channels: int, skip_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = conv_bn_relu(in_channels + skip_channels, out_channels)
        self.conv2 = conv_bn_relu(out_channels, out_channels)

    def forward(self, y: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
        y = F.interpolate(y, scale_factor=2, mode="nearest")        # (B, c_in, 2h, 2w)
        if skip is not None:                                        # where exactly: what halving has lost
            y = torch.cat([y, skip], dim=1)                         # (B, c_in + c_skip, 2h, 2w)
        y = self.conv1(y)                       # the same name: the widest map of all is gone before conv2
        return self.conv2(y)                                        # (B, c_out, 2h, 2w)


class Decoder(nn.Module):
    def __init__(self, channels, decoder_channels):
        super().__init__()
        inputs = [channels[5], *decoder_channels]                       # what arrives from the coarser level
        skips = [*channels[4:0:-1], 0]                               # f_4 .. f_1; the image itself is no skip
        self.blocks = nn.ModuleList(map(DecoderBlock, inputs, skips, decoder_channels))

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        y = features[5]                                             # (B, 8w, H/32, W/32)
        for block, skip in zip(self.blocks, [*features[4:0:-1], None]):
            y = block(y, skip)                                      # (B, c, 2h, 2w)
        return y                                                    # (B, c, H, W)


class UNet(nn.Module):
    """image (B, 3, H, W) in [-1, 1], H and W divisible by 32 -> logits (B, num_classes, H, W).

    `width` 64 is the official size (24,436,514 parameters); 16 or 32 train on a CPU. `decoder_channels`
    defaults to the official (256, 128, 64, 32, 16), one per doubling, times width / 64, at least 16 each."""

    def __init__(self, num_classes: int = 2, width: int = 64, decoder_channels=None):
        super().__init__()
        official = (max(16, c * width // 64) for c in (256, 128, 64, 32, 16))              # 16: no bottleneck
        decoder_channels = list(decoder_channels or official)
        assert len(decoder_channels) == 5, f"decoder_channels are 5, found {decoder_channels}"
        self.config = dict(num_classes=num_classes, width=width, decoder_channels=decoder_channels)
        self.encoder = ResNet34Encoder(width)
        self.decoder = Decoder(self.encoder.channels, decoder_channels)
        self.segmentation_head = nn.Sequential(nn.Conv2d(decoder_channels[-1], num_classes, 3, padding=1))
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("factor", 0.5 / std, persistent=False)   # constants: official files have none
        self.register_buffer("shift", (0.5 - mean) / std, persistent=False)
        he_init(self)                                              # the file of --encoder-weights comes after

    def normalised(self, image: torch.Tensor) -> torch.Tensor:         # ((image + 1) / 2 - mean) / std
        return image * self.factor + self.shift                         # (B, 3, H, W)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        assert image.ndim == 4 and image.shape[1] == 3, f"image is (B, 3, H, W), found {tuple(image.shape)}"
        assert image.shape[2] % STRIDE == image.shape[3] % STRIDE == 0, \
            f"sides must be divisible by {STRIDE}, found {tuple(image.shape[2:])}; predict_roi takes any size"
        features = self.encoder(self.normalised(image))                 # f_0 .. f_5
        return self.segmentation_head(self.decoder(features))           # (B, K, H, W)

    def load_official_state_dict(self, state_dict: dict) -> None:
        """Load a file of smp.Unet("resnet34") (all of it) or of torchvision's resnet34 (encoder, without fc),
        strictly: ValueError lists every missing, unexpected and misshapen tensor; nothing is loaded then."""
        target = self if any(name.startswith("encoder.") for name in state_dict) else self.encoder
        given = {name: tensor for name, tensor in state_dict.items() if name not in ("fc.weight", "fc.bias")}
        # Only the batch counters may be missing, if all of them are: files older than torch 0.4.1 have none,
        # and the counters have no effect at a fixed momentum.
        counters = {k: v for k, v in target.state_dict().items() if k.endswith("num_batches_tracked")}
        load_strict(target, given if counters.keys() & given.keys() else counters | given)


def he_init(model: nn.Module) -> None:
    """Draw all weights anew: convolutions as He et al., 2015 (fan-out, ReLU), the head as Glorot.

    Measured on a small texture task (width 16, batch 16, no clipping, 7 seeds): every run converged at rates
    of 2e-3 and 5e-3. With a head that starts at zero, where the first loss is ln 2, half of the runs ended at
    more than twice the loss. Residual branches that start at zero (last gamma of a block) changed nothing."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            # Fan-out: the gradient keeps its size through 34 layers of ReLU. (Batch norms begin as identity.)
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    nn.init.xavier_uniform_(model.segmentation_head[0].weight)
    nn.init.zeros_(model.segmentation_head[0].bias)                     # no class is favoured at first


def encoder_weights(choice: str) -> str | Path:
    """The file that `--encoder-weights CHOICE` asks for: a path, imagenet (torchvision's resnet34 in torch
    hub's cache, downloaded if it is not there, checked against the hash in its name), or none ("")."""
    if choice != "imagenet":
        return "" if choice == "none" else choice                       # none: he_init's weights stay
    path = Path(torch.hub.get_dir()) / "checkpoints" / IMAGENET_URL.rsplit("/", 1)[1]
    expected = path.stem.split("-")[1]
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(IMAGENET_URL, str(path), hash_prefix=expected)
        if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(expected):
            raise ValueError("damaged: its SHA-256 is not the one in its name")
    except (OSError, RuntimeError, ValueError) as error:        # no network, wrong hash, broken proxy
        raise UserError(
            f"{path}: not there, or no use ({one_line(error)}); delete it, get {IMAGENET_URL} on a machine "
            "with a network and put it there, or give --encoder-weights none") from error
    return path


def choose_tiles(tile: int, overlap: int, patch: int) -> tuple[int, int]:
    """(side of the tiles, overlap) for a network that was trained on patches of `patch` pixels; 0 leaves the
    choice to them. UserError for tiles that do not fit together."""
    # Every convolution pads with zeros, so in training a deep cell of a small patch always sees the border.
    # In the middle of a larger tile it sees tissue where zeros were, and not every network copes: one with a
    # val Dice of .93 on tiles of its patches' size, 64 px, had .65 on tiles of 256 px.
    tile = tile or patch
    overlap = overlap or min(max(STRIDE, tile // 4), tile - STRIDE)
    check_tiles(tile, overlap)
    return tile, overlap


def check_tiles(tile: int, overlap: int) -> None:
    if tile < STRIDE or tile % STRIDE or not 0 <= overlap <= tile - STRIDE:
        raise UserError(f"--tile {tile} --overlap {overlap}: tiles would not fit together; give a tile that "
                        f"is a multiple of {STRIDE} and an overlap of at most tile - {STRIDE}")


def tile_spans(length: int, tile: int, overlap: int) -> tuple[int, list[tuple[int, int, int]]]:
    """Cut one axis into tiles: (size of a tile, [(start of the tile, start of the kept part, its end), ...]).
    The kept parts are disjoint and cover [0, length). The last tile may reach beyond `length`."""
    # Tiles start at multiples of 32: a network with five halvings then sees every pixel on the same grid as
    # in one pass over the image. Neighbours are cut in the middle of what they share: both see far there.
    padded = math.ceil(length / STRIDE) * STRIDE
    tile = min(tile, padded)                                            # a small image is one tile
    step = (tile - overlap) // STRIDE * STRIDE           # down: the overlap is at least what was asked for
    starts = [*range(0, padded - tile, step), padded - tile] if tile < padded else [0]
    cuts = [0, *((left + tile + right) // 2 for left, right in zip(starts, starts[1:])), length]
    return tile, [(start, cuts[i], min(cuts[i + 1], length)) for i, start in enumerate(starts)]


@torch.no_grad()
def predict_roi(model: nn.Module, image: torch.Tensor, tile: int = 512, overlap: int = 128,
                batch_size: int = 16, device=None) -> torch.Tensor:
    """Tumor probability of every pixel of an ROI of any size: (3, H, W) -> (H, W) float32, on the CPU.

    `image` is float in [-1, 1] or uint8 (a view of a memory-mapped file is fine: only tiles are copied). The
    network sees overlapping tiles of which only the centres are kept, so each pixel comes from one tile.
    `model` maps (B, 3, h, w) to logits (B, K, h, w) and must be in eval mode."""
    assert not model.training, "predict_roi needs model.eval(): batch statistics would tie the tiles together"
    assert image.ndim == 3 and len(image) == 3 and image.numel(), f"image is (3, H, W), found {image.shape}"
    check_tiles(tile, overlap)
    height, width = image.shape[1:]
    (tile_h, spans_y), (tile_w, spans_x) = (tile_spans(length, tile, overlap) for length in (height, width))
    # Beyond right and bottom, up to a multiple of 32, a mirror: that is tissue, zeros would be even grey.
    rows, columns = (torch.from_numpy(np.pad(np.arange(side), (0, spans[-1][0] + size - side), "symmetric"))
                     for side, size, spans in ((height, tile_h, spans_y), (width, tile_w, spans_x)))
    prob = torch.empty(height, width)                      # on the CPU: an ROI may be larger than a GPU holds
    jobs = list(itertools.product(spans_y, spans_x))       # one per tile
    for first in tqdm(range(0, len(jobs), batch_size), "tiles", leave=False, delay=3, disable=None):
        batch = jobs[first:first + batch_size]
        tiles = torch.stack([image[:, rows[y:y + tile_h, None], columns[x:x + tile_w]]
                             for (y, _, _), (x, _, _) in batch]).to(device)                 # (B, 3, h, w)
        if tiles.dtype == torch.uint8:
            tiles = tiles.float() / 127.5 - 1
        logits = model(tiles.contiguous(memory_format=torch.channels_last))                 # (B, K, h, w)
        # Tumor is everything but background; clamped, because sums of a softmax pass 1 by a rounding.
        tumor = logits.float().softmax(dim=1)[:, 1:].sum(dim=1).clamp(max=1).cpu()          # (B, h, w)
        # Near its border a tile sees half of its surroundings: only the middle part is kept.
        for ((y, top, bottom), (x, left, right)), part in zip(batch, tumor):
            prob[top:bottom, left:right] = part[top - y:bottom - y, left - x:right - x]
    return prob
