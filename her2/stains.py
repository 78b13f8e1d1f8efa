"""Haematoxylin and DAB: from a colour to the amount of each dye, and back.

Light that passes a dye is attenuated exponentially (Beer-Lambert). Per colour channel,

    rgb = white * 10 ** -od                     od = optical density, additive in the dyes
    od  = amounts @ STAINS                      amounts = (haematoxylin, DAB, residual) of a pixel

so three channels give three linear equations, and `deconvolve` inverts them: amounts = od @ inv(STAINS). The
rows of STAINS are the unit colour vectors of Ruifrok & Johnston, "Quantification of histochemical staining by
color deconvolution", Anal Quant Cytol Histol 23 (2001); the third row, perpendicular to both dyes, takes up
what neither explains. `compose` is the same equation forward, with which the phantom is drawn.

Differs from the common implementations: the white point is an argument instead of a fixed 255, because glass
is not 255 in any scanner, and a wrong white point reads as dye everywhere. `stain_jitter` takes 255 all the
same, since a training patch need not show glass: glass of 242 counts as a little dye there, and the jitter
makes 231 to 253 of it, as lamps and scanners do.
"""

import math

import numpy as np
import torch

# Ruifrok & Johnston, table 1: the colour of a dye as its direction in optical density (red, green, blue).
HAEMATOXYLIN = np.array([0.650, 0.704, 0.286])
DAB = np.array([0.268, 0.570, 0.776])
DARKEST = 0.5  # an 8-bit 0 stands for anything below 1; half a level keeps its logarithm finite


def stain_matrix(haematoxylin=HAEMATOXYLIN, dab=DAB) -> np.ndarray:
    """(3, 3): unit rows haematoxylin, DAB and their normalised cross product (the residual)."""
    rows = np.stack([haematoxylin, dab, np.cross(haematoxylin, dab)])                # the third: none of both
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


STAINS = stain_matrix()                                                 # (3, 3) rows: dyes, columns: channels


def white_point(rgb) -> np.ndarray:
    """(3,) brightness of glass in an image (..., 3), 0..255: a high percentile per channel."""
    assert np.shape(rgb)[-1] == 3, f"expected (..., 3), found {np.shape(rgb)}"
    return np.percentile(np.reshape(rgb, (-1, 3)), 99.0, axis=0).clip(min=1.0)


def optical_density(rgb, white=255.0) -> np.ndarray:
    """-log10(rgb / white) of an image (..., 3) in 0..255. Brighter than `white` gives a negative density."""
    return -np.log10(np.maximum(np.asarray(rgb, dtype=np.float64), DARKEST) / white)


def deconvolve(rgb, white=255.0, stains=STAINS) -> tuple[np.ndarray, np.ndarray]:
    """Image (..., 3) in 0..255 -> amounts (haematoxylin, DAB), each of shape (...)."""
    assert np.shape(rgb)[-1] == 3, f"expected (..., 3), found {np.shape(rgb)}"
    amounts = optical_density(rgb, white) @ np.linalg.inv(stains)       # (..., 3 dyes)
    return amounts[..., 0], amounts[..., 1]                             # the residual belongs to neither dye


def compose(haematoxylin, dab, white=255.0, stains=STAINS) -> np.ndarray:
    """Amounts (...) of both dyes -> image (..., 3), float in 0..white. `deconvolve` inverts it."""
    assert np.shape(haematoxylin) == np.shape(dab), f"{np.shape(haematoxylin)} against {np.shape(dab)}"
    amounts = np.stack([haematoxylin, dab], axis=-1)                    # (..., 2): a picture has no residual
    return white * 10.0 ** -(amounts @ np.asarray(stains[:2], dtype=amounts.dtype))


def stain_jitter(image, generator, scale: float = 0.1, shift: float = 0.01) -> torch.Tensor:
    """Change how strongly each image of a batch is stained: image (B, 3, H, W) in [-1, 1] -> the same.

    Every amount is multiplied by 1 + U(-scale, scale) and moved by U(-shift, shift), one draw per image and
    dye. PAPER: the paper does not say how it augments. Mild: as much as laboratories may differ. What the
    segmenter is asked, tumor or not, stays true under more; a subtype does not: twice the dye makes 2+ of 1+.
    """
    # In densities, not in RGB: laboratories differ in the amount of dye, while the colour of a dye stays.
    # A shift in RGB makes violet DAB and yellow glass, which no laboratory has.
    assert image.ndim == 4 and image.shape[1] == 3, f"expected (B, 3, H, W), found {tuple(image.shape)}"
    def draw(half_width):
        return (torch.rand(len(image), 3, generator=generator) * 2 - 1).double() * half_width   # (B, 3 dyes)
    # amounts = density @ inv(STAINS), then amounts * factor + offset, then @ STAINS: three linear maps, so
    # one 3 x 3 matrix per image. It serves logarithms of any base; the natural ones are the fastest.
    stains = torch.from_numpy(STAINS)                                                # (3 dyes, 3 channels)
    matrix = torch.linalg.inv(stains) * (1 + draw(scale))[:, None] @ stains          # (B, 3 from, 3 to)
    offset = -math.log(10) * draw(shift) @ stains                                    # (B, 3 channels)
    matrix, offset = (part.to(image.device, torch.float32) for part in (matrix, offset))
    light = image.float().flatten(2).add(1).mul_(0.5).clamp_(min=DARKEST / 255).log_()          # (B, 3, H*W)
    light = torch.baddbmm(offset[:, :, None], matrix.mT, light).exp_()                          # (B, 3, H*W)
    return light.mul_(2).sub_(1).clamp_(max=1).reshape(image.shape).to(image.dtype)  # (B, 3, H, W) in [-1, 1]
