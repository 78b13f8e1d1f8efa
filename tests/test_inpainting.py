"""Which cells are regenerated, what stays bit for bit, and what fills an erased region."""

import pytest
import torch
from her2 import inpainting
from her2.inpainting import erase, grow, paste, repaint_to_latent


@pytest.fixture(autouse=True)
def same_images():
    torch.manual_seed(0)


def drawn_mask(*shape, share=0.03, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize("factor, dilate", [(4, 0), (4, 1), (8, 1), (2, 2), (1, 0)])
def test_every_touched_cell_and_its_rim_is_regenerated(factor, dilate):
    repaint = drawn_mask(2, 32, 48)
    found = repaint_to_latent(repaint, factor, dilate)
    expected = torch.zeros(2, 1, 32 // factor, 48 // factor, dtype=torch.bool)
    for b, y, x in repaint.nonzero().tolist():
        for dy in range(-dilate, dilate + 1):
            for dx in range(-dilate, dilate + 1):
                row, column = y // factor + dy, x // factor + dx
                if 0 <= row < expected.shape[2] and 0 <= column < expected.shape[3]:
                    expected[b, 0, row, column] = True
    assert torch.equal(found, expected)
    assert repaint_to_latent(torch.zeros(1, 32, 32, dtype=torch.bool), factor).sum() == 0


def test_one_pixel_is_enough_and_wrong_sizes_are_refused():
    repaint = torch.zeros(1, 64, 64, dtype=torch.bool)
    repaint[0, 63, 0] = True
    assert repaint_to_latent(repaint, 8, dilate=0).nonzero().tolist() == [[0, 0, 7, 0]]
    assert grow(repaint, 1).sum() == 4
    with pytest.raises(AssertionError, match="multiples of 8"):
        repaint_to_latent(repaint[:, :60], 8)
    with pytest.raises(AssertionError, match="should be bool"):
        grow(repaint.float(), 1)


def test_paste_keeps_the_background_bit_for_bit():
    image, generated = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    repaint = drawn_mask(2, 16, 16, share=0.4)
    found = paste(image, generated, repaint)
    where = repaint[:, None].expand_as(image)
    assert torch.equal(found[~where], image[~where]) and torch.equal(found[where], generated[where])


def test_erase_forgets_the_region_and_keeps_the_rest():
    image, repaint = torch.rand(3, 3, 37, 50) * 2 - 1, drawn_mask(3, 37, 50, share=0.1)
    repaint[0, 5:30, 10:45] = True
    repaint[1] = False
    repaint[2] = True                                                # nothing known at all
    found = erase(image, repaint)
    where = repaint[:, None].expand_as(image)
    assert torch.equal(found[~where], image[~where])
    assert torch.equal(found, erase(torch.where(where, torch.rand_like(image), image), repaint))
    assert torch.equal(found[1], image[1]) and (found[2] - 1).abs().max() < 1e-5
    for channel in range(3):                                         # a mean of known pixels, nothing else
        known = image[0, channel][~repaint[0]]
        assert known.min() <= found[0, channel].min() and found[0, channel].max() <= known.max()


def test_erase_follows_the_surroundings():
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    repaint = torch.zeros(1, 64, 64, dtype=torch.bool)
    repaint[:, 24:40, 24:40] = True
    assert (erase(ramp, repaint) - ramp).abs().max() < 0.25          # the ramp changes by 0.5 over the region
    flat = torch.full((1, 3, 64, 64), 0.3)
    torch.testing.assert_close(erase(flat, repaint), flat)


def test_noise_level_is_that_of_the_sensor_and_grain_restores_it():
    """Known noise on a ramp, which a second difference removes; a quarter is texture and must not count."""
    ramp = torch.linspace(-0.5, 0.5, 64).expand(4, 3, 64, 64).clone()
    noise = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    noisy = ramp + 0.02 * noise
    noisy[:, :, :32, :32] += torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) - 0.5
    level = inpainting.noise_level(noisy)
    assert torch.allclose(level, torch.full((4,), 0.02), rtol=0.08)
    assert (inpainting.noise_level(ramp) < 1e-6).all()
    wide = torch.linspace(-0.5, 0.5, 256).expand(4, 3, 256, 256)
    some = wide + 0.016 * torch.randn(4, 3, 256, 256, generator=torch.Generator().manual_seed(2))
    more = inpainting.add_grain(some, torch.full((4,), 0.02), range(4))     # what is there already counts
    assert torch.allclose(inpainting.noise_level(more), torch.full((4,), 0.02), rtol=0.05)
    plain = inpainting.add_grain(ramp, level, range(4))
    assert torch.allclose(inpainting.noise_level(plain), level, rtol=0.1)
    assert torch.equal(plain, inpainting.add_grain(ramp, level, range(4)))
