"""DPM-Solver++(2M) against the exact solution of the sampling equation, and the levels that it visits."""

import math

import pytest
import torch

from her2 import samplers
from her2.diffusion import Schedule
from her2.samplers import ddim_timesteps, image_noise, log_snr_timesteps, sample, trajectory

EPS, V = Schedule(), Schedule(parametrisation="v")
ZERO = Schedule(parametrisation="v", zero_terminal_snr=True)
ALL = pytest.mark.parametrize("schedule", [EPS, V, ZERO], ids=["eps", "v", "zero-snr"])
# A schedule of the same shape with levels 64 times as dense, so that steps can be halved often.
DENSE = Schedule(T=64_000, linear_start=0.0015 / 64, linear_end=0.0205 / 64, parametrisation="v")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fixed(start):
    """Noise of which only the start is ever asked for."""
    def noise(purpose, i):
        assert (purpose, i) == ("start", 0)
        return start
    return noise


def of_a_gaussian(schedule, deviation):
    """The exact network for x0 ~ N(0, deviation^2), elementwise: E[x0 | xt] and E[eps | xt] are linear in xt."""
    def predict(xt, t):
        signal, noise = schedule.roots(t, xt)
        total = signal ** 2 * deviation ** 2 + noise ** 2
        return schedule.target(signal * deviation ** 2 / total * xt, noise / total * xt, t)
    return predict


def of_a_mixture(schedule):
    """The exact network for three Gaussians in the plane, by Bayes' rule; latents are (B, 2, 1, 1)."""
    means = torch.tensor([[2.0, 0.0], [-1.0, 1.5], [-0.5, -2.0]], dtype=torch.float64)
    weights, variance = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), 0.3 ** 2

    def predict(xt, t):
        signal, noise = (part.flatten(1) for part in schedule.roots(t, xt))                  # (B, 1)
        total = signal ** 2 * variance + noise ** 2
        apart = xt.flatten(1)[:, None] - signal[:, None] * means                              # (B, 3, 2)
        share = (weights.log() - apart.square().sum(2) / (2 * total)).softmax(1)              # (B, 3)
        x0 = (share[..., None] * (means + (signal * variance / total)[:, None] * apart)).sum(1).view_as(xt)
        return schedule.target(x0, schedule.eps_from_x0(x0, xt, t), t)
    return predict


def even_steps(schedule, S):
    """S + 1 levels of a dense schedule, evenly spaced in lambda between the first and the last."""
    levels = samplers.half_log_snr(schedule)
    wanted = torch.linspace(float(levels[0]), float(levels[-1]), S + 1, dtype=torch.float64)
    return (levels[None] - wanted[:, None]).abs().argmin(1).tolist()


def test_the_error_falls_with_the_square_of_the_steps_and_that_of_ddim_in_proportion():
    """For x0 ~ N(0, s^2) the equation keeps xt / sqrt(alpha_bar s^2 + 1 - alpha_bar): its exact solution."""
    start, deviation, errors = normal(1, 1, 8, 8), 0.5, {}
    spread = (DENSE.alpha_bar * deviation ** 2 + 1 - DENSE.alpha_bar).sqrt()
    exact = start * spread[0] / spread[-1]
    for multistep in (False, True):
        for S in (20, 40, 80):
            states = trajectory(of_a_gaussian(DENSE, deviation), DENSE, fixed(start), even_steps(DENSE, S),
                                0.0, multistep=multistep)
            found = [xt for xt, _ in states][-2]                     # at level 0, before the step to x0
            errors[multistep, S] = float((found - exact).abs().max() / exact.abs().max())
    for multistep, order in ((False, 1), (True, 2)):
        for S in (20, 40):
            rate = math.log2(errors[multistep, S] / errors[multistep, 2 * S])
            assert order - 0.2 < rate < order + 0.6, (multistep, S, rate, errors)
    assert errors[True, 20] < errors[False, 20] / 4


@pytest.mark.parametrize("schedule", [EPS, ZERO], ids=["eps", "zero-snr"])
def test_twelve_steps_are_nearer_to_the_exact_solution_than_fifty_of_ddim(schedule):
    predict, noise = of_a_mixture(schedule), fixed(normal(500, 2, 1, 1))
    exact = sample(predict, schedule, noise, schedule.T, sampler="dpm")

    def error(*options, **more):
        return float((sample(predict, schedule, noise, *options, **more) - exact).abs().mean())

    assert error(12, sampler="dpm") < 0.8 * error(50, 0.0)
    assert error(20, sampler="dpm") < error(20, 0.0) / 6
    # Evenly spaced in t it gains little, which is why the spacing follows the sampler.
    assert error(20, sampler="dpm", spacing="trailing") > 0.8 * error(20, 0.0)


@ALL
def test_the_steps_are_algorithm_2_as_it_is_printed(schedule):
    """With r, h and exp(-h), for a network whose guess drifts with t."""
    levels, a, b = samplers.half_log_snr(schedule), normal(1, 1, 2, 2, seed=1), normal(1, 1, 2, 2, seed=2)
    steps = log_snr_timesteps(schedule, 15)
    middle = steps[:-1] if schedule is ZERO else steps                # algorithm 2 cannot begin at SNR 0

    def guess(t):
        return a + b * levels[t].clamp(min=-20)

    def predict(xt, t):
        signal, noise = schedule.roots(t, xt)
        return schedule.target(guess(t), (xt - signal * guess(t)) / noise, t)

    start, before, at = normal(1, 1, 2, 2), None, None
    found = [xt for xt, _ in trajectory(predict, schedule, fixed(start), middle, 0.0, multistep=True)]
    xt = start
    for now, after in zip(middle[::-1], middle[::-1][1:]):
        h = levels[after] - levels[now]
        alpha, sigma = schedule.alpha_bar.sqrt(), (1 - schedule.alpha_bar).sqrt()
        x0 = guess(now)
        if before is not None:
            r = (levels[now] - levels[at]) / h
            x0 = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before
        xt = sigma[after] / sigma[now] * xt - alpha[after] * (torch.exp(-h) - 1) * x0
        before, at = guess(now), now
    torch.testing.assert_close(found[-2], xt, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[-1], guess(0), rtol=1e-9, atol=1e-9)      # the last step: the guess


@ALL
@pytest.mark.parametrize("steps", [1, 2, 7, 15])
def test_both_ends_are_exact(schedule, steps):
    """Data that are one image come back; from an SNR of 0 the first step is DDIM's, whatever follows."""
    image = 2 * normal(2, 3, 4, 4, seed=5)

    def predict(xt, t):
        return schedule.target(image, schedule.eps_from_x0(image, xt, t), t)

    noise = fixed(normal(2, 3, 4, 4))
    torch.testing.assert_close(sample(predict, schedule, noise, steps, sampler="dpm"), image,
                               rtol=1e-6, atol=1e-6)
    predict, timesteps = of_a_gaussian(schedule, 0.5), log_snr_timesteps(schedule, steps)
    first, plain = (next(trajectory(predict, schedule, noise, timesteps, 0.0, multistep=multistep))[0]
                    for multistep in (True, False))
    assert torch.equal(first, plain) and torch.isfinite(first).all()


@ALL
def test_levels_are_exactly_S_distinct_ones_with_both_ends(schedule):
    for T in (2, 3, 10, 1000):
        short = Schedule(**{**schedule.config, "T": T})
        for S in {1, 2, 3, 10, 15, 50, 333, T - 1, T} & set(range(1, T + 1)):
            steps = log_snr_timesteps(short, S)
            assert len(set(steps)) == S and steps == sorted(steps) and steps[-1] == T - 1
            assert steps[0] == 0 or S == 1
    levels = samplers.half_log_snr(schedule)[log_snr_timesteps(schedule, 10)[:-1]]
    assert (levels.diff() / levels.diff().mean() - 1).abs().max() < 0.15      # even, up to whole levels
    with pytest.raises(ValueError, match="should be 1 to 1000, found 1001"):
        log_snr_timesteps(schedule, 1001)


def toy(xt, t):
    return 0.3 * xt.tanh() + 0.1 * t.view(-1, 1, 1, 1) / 1000


def test_inpainting_keeps_the_known_latent_on_its_own_path():
    """The known cells have the level of the step whenever the network looks, with one noise throughout."""
    noise, known = image_noise([1, 2], (3, 8, 8)), normal(2, 3, 8, 8, seed=9).float()
    everything = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    half = everything.clone()
    half[..., :4] = False
    seen = {}

    def spy(xt, t):
        seen[int(t[0])] = xt[..., :4].clone()
        return toy(xt, t)

    free = sample(toy, ZERO, noise, 15, sampler="dpm")
    assert torch.equal(sample(toy, ZERO, noise, 15, sampler="dpm", known=known, repaint=everything), free)
    assert torch.equal(sample(toy, ZERO, noise, 15, sampler="dpm", known=known, repaint=~everything), known)
    found = sample(spy, ZERO, noise, 15, sampler="dpm", known=known, repaint=half)
    assert torch.equal(found[..., :4], known[..., :4]) and torch.isfinite(found).all()
    assert sorted(seen) == log_snr_timesteps(ZERO, 15)
    for t, region in seen.items():
        level = torch.full((2,), t)
        torch.testing.assert_close(region, ZERO.q_sample(known, level, noise("start", 0))[..., :4])


def test_no_noise_is_added_and_no_other_sampler_is_known():
    noise = image_noise([1], (1, 4, 4))
    assert torch.equal(sample(toy, ZERO, noise, 9, 1.0, "dpm"), sample(toy, ZERO, noise, 9, 0.0, "dpm"))
    with pytest.raises(AssertionError, match="eta is 0, found 1"):
        next(trajectory(toy, ZERO, noise, ddim_timesteps(1000, 5), 1.0, multistep=True))
    with pytest.raises(ValueError, match="one of ddim, ddpm, dpm"):
        sample(toy, ZERO, noise, 5, sampler="euler")
