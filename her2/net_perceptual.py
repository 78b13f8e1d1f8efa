"""Perceptual distances: two images are close when a network trained on photographs sees the same in both.

    VGG19Loss   sum over five layers of weight * mean |features(fake) - features(real)|, weight 1/32, 1/16,
                1/8, 1/4, 1 from the first layer to the last: SPADE's third generator loss, used times 10.
                Its file: torchvision's vgg19 (vgg19-dcbb9e9d.pth)
    LPIPS       features normalised per pixel to length 1, squared difference, a learned weight per channel,
                mean over the image, sum over five layers: part of the VQ autoencoder's reconstruction loss.
                Its file: a checkpoint of a CompVis autoencoder that holds loss.perceptual_loss.*, or
                torchvision's vgg16 (vgg16-397923af.pth) with the linear maps of LPIPS 0.1 (vgg.pth)

Neither is trained here nor worth anything without its weights, so both are off unless the user gives a file.
Until it is loaded a network lives on torch's meta device, without memory.

Source: Park et al., CVPR 2019, appendix A (from Wang et al., pix2pixHD, CVPR 2018); Zhang et al., "The
unreasonable effectiveness of deep features as a perceptual metric", CVPR 2018, eq. 1.
Differs from the official code: nothing in the numbers. VGG19Loss takes images in [-1, 1] as they are, as
officially, without ImageNet's mean and deviation (the factor 10 was tuned with that). No layer knows training
from eval mode: the official LPIPS has dropout, which a stray .train() turns on.

Key: B batch, C channels, h w size of a feature map.
"""

import torch
import torch.nn.functional as F
from torch import nn

from her2.net_blocks import load_strict

WIDTHS = (64, 128, 256, 512, 512)     # channels of the five stages, between which the size is halved
VGG19_WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)
# Of images in [-1, 1]: ImageNet's mean and standard deviation, as LPIPS 0.1 was calibrated with.
LPIPS_MEAN, LPIPS_DEVIATION = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class FrozenVGG(nn.Module):
    """The convolutions of a VGG, `counts` per stage, up to the last of the layers `taps` (torchvision's)."""

    def __init__(self):
        super().__init__()
        layers, width = [], 3
        for count, wide in zip(self.counts, WIDTHS):
            for _ in range(count):
                layers += [nn.Conv2d(width, wide, 3, padding=1, device="meta"), nn.ReLU()]
                width = wide
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1]).requires_grad_(False)   # nothing comes after the last

    def activations(self, x: torch.Tensor) -> list:
        """The five features of x (B, 3, H, W), each (B, C, h, w)."""
        assert not self.features[0].weight.is_meta, f"{type(self).__name__} has no weights: load them first"
        found = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.taps:
                found.append(x)
        return found

    def load_official_state_dict(self, state_dict: dict, rename=()) -> None:
        """Weights up to the last tap; classifier and deeper layers of a whole VGG file are left out."""
        deeper = tuple(f"features.{index}." for index in range(len(self.features), 40))     # VGG-19 has 37
        load_strict(self, {name: value for name, value in state_dict.items()
                           if not name.startswith(("classifier.", *deeper))}, rename)
        self.float()


class VGG19Loss(FrozenVGG):
    """forward(fake, real) -> (): images (B, 3, H, W) in [-1, 1]; no gradient into real."""
    counts, taps = (2, 2, 4, 4, 1), (1, 6, 11, 20, 29)      # relu1_1, relu2_1, relu3_1, relu4_1, relu5_1

    def forward(self, fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        assert fake.shape == real.shape, f"fake {tuple(fake.shape)}, real {tuple(real.shape)}: shapes differ"
        with torch.no_grad():
            targets = self.activations(real)
        return sum(weight * F.l1_loss(x.float(), target.float())
                   for weight, x, target in zip(VGG19_WEIGHTS, self.activations(fake), targets))


class LPIPS(FrozenVGG):
    """forward(a, b) -> (B,), the distance of each pair of images (B, 3, H, W) in [-1, 1]."""
    counts, taps = (2, 2, 3, 3, 3), (3, 8, 15, 22, 29)      # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False, device="meta")
                                   for width in WIDTHS).requires_grad_(False)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert a.shape == b.shape, f"images {tuple(a.shape)} and {tuple(b.shape)} differ in shape"
        mean, deviation = (a.new_tensor(x)[:, None, None] for x in (LPIPS_MEAN, LPIPS_DEVIATION))
        distance, features = 0.0, [self.activations((image - mean) / deviation) for image in (a, b)]
        for head, x, y in zip(self.heads, *features):
            x, y = (f.float() / (f.float().norm(dim=1, keepdim=True) + 1e-10) for f in (x, y))  # (B, C, h, w)
            distance = distance + head((x - y) ** 2).float().mean(dim=(1, 2, 3))                # (B,)
        return distance

    def load_official_state_dict(self, state_dict: dict) -> None:
        """Weights of one file, or of two as {**vgg16, **linear}."""
        inside = "perceptual_loss."
        state_dict = {k.split(inside)[1]: v for k, v in state_dict.items() if inside in k} or state_dict
        doubles = ("scaling_layer.", "lins.")       # the two constants above, and other names of lin0 to lin4
        given = {name: state_dict[name] for name in state_dict if not name.startswith(doubles)}
        super().load_official_state_dict(given, rename=[(r"^net\.slice\d\.(\d+)\.", r"features.\1."),
                                                        (r"^lin(\d)\.model\.1\.", r"heads.\1.")])
