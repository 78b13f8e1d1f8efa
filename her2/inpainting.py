"""Inpainting: which latent cells are regenerated, what the encoder sees, what ends up in the picture.

`repaint` (B, H, W) bool, True = regenerate: the pixels of the relabelled tumor. A latent cell that touches
one such pixel is regenerated, and so is a rim of cells around, because cells next to the border still encode
old tumor. After decoding, `paste` puts the original pixels back everywhere else.

PAPER: "inpaint the tumor in existing images ... keeping the background unchanged" leaves the grid of the
latents, the rim and the pasting open. It also reports "tissue with staining closer to the original image": in
the encoder, attention and GroupNorm let each cell see the whole patch, so all known cells carry something of
the old tumor's staining; `erase` takes it out. A decoder paints no noise, a sensor does: beside pasted pixels
of the photograph, smoothness alone would tell generated tumor from background, and a segmenter would learn
just that. `add_grain` gives generated pixels the noise of their slide.

Key: B batch, H W image size, h w latent size.
"""

import torch
import torch.nn.functional as F

from her2.run_seeds import generator

# Of pure noise the smoothest tenth of squares has this part of the whole's spread: 64 squared values scatter.
# Independent ones would give .88; neighbours in `fine` share pixels and count as fewer: measured .79.
SMOOTHEST = 0.8


def grow(repaint: torch.Tensor, radius: int) -> torch.Tensor:
    """Every True becomes a square of side 2 radius + 1. repaint (B, H, W) bool -> the same."""
    assert repaint.dtype == torch.bool and repaint.dim() == 3, f"{repaint.dtype}: should be bool, (B, H, W)"
    # The largest of a window is 1 where any of it is: max-pooling is dilation.
    return F.max_pool2d(repaint[:, None].float(), 2 * radius + 1, stride=1, padding=radius)[:, 0] > 0


def repaint_to_latent(repaint: torch.Tensor, factor: int, dilate: int = 1) -> torch.Tensor:
    """repaint (B, H, W) bool -> (B, 1, H/factor, W/factor) bool: touched cells, and `dilate` cells around."""
    assert not any(side % factor for side in repaint.shape[1:]), f"{repaint.shape}: no multiples of {factor}"
    # Maximum, not mean: an instance thinner than a cell must not vanish.
    cells = F.max_pool2d(repaint[:, None].float(), factor)[:, 0] > 0         # (B, h, w)
    return grow(cells, dilate)[:, None]                                      # (B, 1, h, w)


def paste(image: torch.Tensor, generated: torch.Tensor, repaint: torch.Tensor) -> torch.Tensor:
    """`generated` where `repaint` (B, H, W) is True, `image` bit for bit elsewhere; images (B, 3, H, W)."""
    assert image.shape == generated.shape, f"{tuple(image.shape)} and {tuple(generated.shape)} differ"
    return torch.where(repaint[:, None], generated, image)    # decoding moves every pixel: these stay


def erase(image: torch.Tensor, repaint: torch.Tensor) -> torch.Tensor:
    """`image` (B, 3, H, W) with the region `repaint` (B, H, W) filled smoothly from the pixels around it.
    Pyramid filling (push-pull: Gortler et al., The Lumigraph, SIGGRAPH 1996): halve the image, averaging
    known pixels only, until all are known; on the way back an unknown pixel takes the coarser level's value.
    An image without any known pixel becomes white: glass."""
    known = ~repaint[:, None]                                                # (B, 1, H, W)
    if bool(known.all()) or max(image.shape[-2:]) == 1:
        return torch.where(known, image, torch.ones_like(image))
    pool = dict(kernel_size=2, ceil_mode=True, count_include_pad=False)  # odd sides: a half window at the end
    share = F.avg_pool2d(known.to(image.dtype), **pool)                      # (B, 1, H/2, W/2) in 0 .. 1
    # Unknown pixels count as 0 in the numerator and not at all in the share: the mean of the known ones.
    mean = F.avg_pool2d(image * known, **pool) / share.clamp(min=0.25)       # (B, 3, H/2, W/2)
    smooth = F.interpolate(erase(mean, share[:, 0] == 0), size=image.shape[-2:], mode="bilinear")
    return torch.where(known, image, smooth)                                 # (B, 3, H, W)


def noise_level(image: torch.Tensor) -> torch.Tensor:
    """(B,) standard deviation of the noise in images (B, 3, H, W), where they are smoothest. A second
    difference along both axes removes what is locally a plane, and leaves white noise 6 times as strong
    (Immerkaer, Comput Vis Image Underst 64, 1996). Texture passes too, so only the smoothest tenth of all
    squares of 8 x 8 pixels is asked."""
    line = torch.tensor([1.0, -2.0, 1.0])
    kernel = (torch.outer(line, line) / 6).expand(3, 1, 3, 3)
    fine = F.conv2d(image.float(), kernel, groups=3)                         # (B, 3, H - 2, W - 2)
    return F.avg_pool2d(fine ** 2, 8).flatten(1).quantile(0.1, dim=1).sqrt() / SMOOTHEST


def add_grain(painted: torch.Tensor, level: torch.Tensor, seeds) -> torch.Tensor:
    """Noise that brings `painted` (B, 3, H, W) to `level` (B,). Before `paste`: in a photograph the smoothest
    squares would be its own, and what a network painted would seem to have its noise already."""
    lacking = (level ** 2 - noise_level(painted) ** 2).clamp(min=0).sqrt()   # variances of noises add up
    noise = torch.stack([torch.randn(painted.shape[1:], generator=generator("grain", s)) for s in seeds])
    return (painted + lacking[:, None, None, None] * noise).clamp(-1, 1)
