"""Inpainting: which latent cells are regenerated, what the encoder sees, what ends up in the picture.

`repaint` (B, H, W) bool, True = regenerate: the pixels of the relabelled tumor. A latent cell that touches
one such pixel is regenerated (max-pool: thin instances survive), and so is a rim of cells around, because
cells next to the border still encode old tumor. After decoding, `paste` puts the original pixels back
everywhere else: the background is bit-exact whatever the autoencoder does to it.

PAPER: "inpaint the tumor in existing images ... keeping the background unchanged" leaves the grid of the
latents, the rim and the pasting open. It also reports "tissue with staining closer to the original image":
the encoder sees the old tumor through its receptive field, and so do the known cells around the region.
`erase` fills the region with what surrounds it before encoding.

Key: B batch, H W image size, h w latent size.
"""

import torch
import torch.nn.functional as F


def grow(repaint: torch.Tensor, radius: int) -> torch.Tensor:
    """Every True becomes a square of side 2 radius + 1. repaint (B, H, W) bool -> the same."""
    assert repaint.dtype == torch.bool and repaint.dim() == 3, \
        f"repaint {repaint.dtype} {tuple(repaint.shape)} should be bool (B, H, W)"
    grown = F.max_pool2d(repaint[:, None].float(), 2 * radius + 1, stride=1, padding=radius)
    return grown[:, 0] > 0                                                   # (B, H, W)


def repaint_to_latent(repaint: torch.Tensor, factor: int, dilate: int = 1) -> torch.Tensor:
    """repaint (B, H, W) bool -> (B, 1, H/factor, W/factor) bool: touched cells, and `dilate` cells around."""
    assert repaint.shape[1] % factor == 0 and repaint.shape[2] % factor == 0, \
        f"repaint {tuple(repaint.shape)} should have sides that are multiples of {factor}"
    cells = F.max_pool2d(repaint[:, None].float(), factor)[:, 0] > 0         # (B, h, w)
    return grow(cells, dilate)[:, None]                                      # (B, 1, h, w)


def paste(image: torch.Tensor, generated: torch.Tensor, repaint: torch.Tensor) -> torch.Tensor:
    """`generated` where `repaint` (B, H, W) is True, `image` bit for bit elsewhere; images (B, 3, H, W)."""
    assert image.shape == generated.shape, f"{tuple(image.shape)} and {tuple(generated.shape)} differ"
    return torch.where(repaint[:, None], generated, image)                   # (B, 3, H, W)


def erase(image: torch.Tensor, repaint: torch.Tensor) -> torch.Tensor:
    """`image` (B, 3, H, W) with the region `repaint` (B, H, W) filled smoothly from the pixels around it.

    Pyramid filling (push-pull: Gortler et al., The Lumigraph, SIGGRAPH 1996): halve the image, averaging
    known pixels only, until all are known; on the way back an unknown pixel takes the coarser level's value.
    Known pixels stay as they are. An image without any known pixel becomes white: glass.
    """
    known = ~repaint[:, None]                                                # (B, 1, H, W)
    if bool(known.all()) or max(image.shape[-2:]) == 1:
        return torch.where(known, image, torch.ones_like(image))
    pool = dict(kernel_size=2, ceil_mode=True, count_include_pad=False)
    share = F.avg_pool2d(known.to(image.dtype), **pool)                      # (B, 1, H/2, W/2) in 0 .. 1
    mean = F.avg_pool2d(image * known, **pool) / share.clamp(min=0.25)       # (B, 3, H/2, W/2)
    coarse = erase(mean, share[:, 0] == 0)
    smooth = F.interpolate(coarse, size=image.shape[-2:], mode="bilinear")   # (B, 3, H, W)
    return torch.where(known, image, smooth)
