"""Colour deconvolution against closed forms: every test composes a colour whose dyes are known."""

import numpy as np
import pytest
import torch

from her2.report_staining import instance_densities
from her2.stains import (DAB, HAEMATOXYLIN, STAINS, compose, deconvolve, optical_density, stain_jitter,
                         stain_matrix, white_point)


def test_stain_rows_are_unit_vectors_and_the_residual_is_perpendicular_to_both_dyes():
    assert np.allclose(np.linalg.norm(STAINS, axis=1), 1)
    assert abs(STAINS[2] @ STAINS[0]) < 1e-12 and abs(STAINS[2] @ STAINS[1]) < 1e-12
    assert np.allclose(STAINS[0] / HAEMATOXYLIN, STAINS[0, 0] / HAEMATOXYLIN[0])
    assert np.allclose(STAINS[1] / DAB, STAINS[1, 0] / DAB[0])


def test_deconvolve_inverts_compose():
    random = np.random.default_rng(0)
    h, d = random.uniform(0, 1.2, (2, 9, 7))
    white = np.array([251.0, 247.0, 239.0])
    found_h, found_d = deconvolve(compose(h, d, white), white)
    assert np.abs(found_h - h).max() < 1e-9 and np.abs(found_d - d).max() < 1e-9


def test_deconvolve_inverts_compose_for_another_scanner_but_not_with_the_wrong_vectors():
    other = stain_matrix(np.array([0.60, 0.72, 0.33]), np.array([0.30, 0.55, 0.78]))
    h, d = np.full((2, 2), 0.4), np.full((2, 2), 0.3)
    rgb = compose(h, d, 255.0, other)
    assert np.allclose(deconvolve(rgb, 255.0, other), (h, d))
    assert np.abs(np.array(deconvolve(rgb, 255.0)) - (h, d)).max() > 0.02


def test_twice_the_thickness_is_twice_the_optical_density():
    h, d = np.array([0.1, 0.5]), np.array([0.3, 0.0])
    once, twice = optical_density(compose(h, d)), optical_density(compose(2 * h, 2 * d))
    assert np.allclose(twice, 2 * once)
    # Beer-Lambert in one number: a tenth of the light passes density 1.
    assert np.allclose(optical_density(np.array([25.5, 255.0, 2.55])), [1, 0, 2])


def test_one_dye_alone_reads_as_itself():
    h, d = deconvolve(255.0 * 10 ** -(0.7 * STAINS[1]))
    assert h == pytest.approx(0, abs=1e-9) and d == pytest.approx(0.7)


def test_black_pixels_stay_finite():
    assert np.isfinite(np.array(deconvolve(np.zeros((2, 2, 3), np.uint8)))).all()


def test_density_of_an_instance_is_the_mean_over_its_pixels_only_and_needs_the_white_point():
    white = np.array([240.0, 236.0, 228.0])
    d = np.zeros((20, 20))
    d[:5, :5] = 0.5
    d[0, 0] = 1.0
    rgb, instance = compose(np.zeros_like(d), d, white), np.zeros(d.shape, int)
    instance[:5, :5] = 1
    found = instance_densities(rgb, instance, 3, white_point(rgb), pixel_area=2)
    assert found[1] == pytest.approx((24 * 0.5 + 1.0) / 25)
    assert instance_densities(rgb, instance, 3, 255.0, pixel_area=2)[1] > 0.53
    assert np.isnan(found[2])
    assert np.allclose(white_point(rgb), white)


def test_stain_jitter_scales_the_dye_and_leaves_clear_glass_nearly_alone():
    amounts = np.zeros((2, 8, 8))
    amounts[1, :4] = 0.4
    rgb = compose(amounts[0], amounts[1]) / 255 * 2 - 1
    image = torch.tensor(rgb).permute(2, 0, 1)[None].float().repeat(3, 1, 1, 1)
    changed = stain_jitter(image, torch.Generator().manual_seed(1), scale=0.2, shift=0.0)
    assert changed.shape == image.shape and changed.min() >= -1 and changed.max() <= 1
    assert torch.allclose(changed[:, :, 4:], image[:, :, 4:], atol=1e-5)
    factors = []
    for one in changed:
        _, d = deconvolve((one.permute(1, 2, 0).double().numpy() + 1) / 2 * 255)
        assert np.ptp(d[:4]) < 1e-4
        factors.append(d[0, 0] / 0.4)
    assert all(0.8 <= f <= 1.2 for f in factors) and np.ptp(factors) > 0.01


def test_stain_jitter_without_strength_is_the_identity_and_a_function_of_the_generator():
    image = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(3)) * 1.9 - 0.95
    assert torch.allclose(stain_jitter(image, torch.Generator(), 0.0, 0.0), image, atol=1e-5)
    first, second = (stain_jitter(image, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, image)


def test_stain_jitter_is_deconvolve_change_compose_in_double_precision():
    """One 3 x 3 matrix per image and float32 logarithms against the three steps, dye by dye, in float64."""
    image = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 127.5 - 1
    found = stain_jitter(image, torch.Generator().manual_seed(9), scale=0.1, shift=0.02)
    random = torch.Generator().manual_seed(9)
    factor, offset = (torch.rand(2, 3, generator=random).double().numpy() * 2 - 1 for _ in range(2))
    for k, one in enumerate(image.permute(0, 2, 3, 1).double().numpy()):
        amounts = optical_density((one + 1) / 2 * 255) @ np.linalg.inv(STAINS)           # (32, 32, 3 dyes)
        amounts = amounts * (1 + 0.1 * factor[k]) + 0.02 * offset[k]
        expected = (10 ** -(amounts @ STAINS)).clip(0, 1) * 2 - 1
        assert np.abs(found[k].permute(1, 2, 0).numpy() - expected).max() < 1e-6
