"""Schedule, samplers and noise, against Bayes' rule, simple loops, and data laws with a known denoiser."""

import math
from fractions import Fraction

import pytest
import torch
from parity_ldm import posterior

from her2.diffusion import Schedule, denoising_loss, draw_timesteps, loss_of_zero_output, quartile_sums
from her2.samplers import ddim_timesteps, image_noise, sample, trajectory

EPS, V = Schedule(), Schedule(parametrisation="v")
ZERO = Schedule(parametrisation="v", zero_terminal_snr=True)
ALL = pytest.mark.parametrize("schedule", [EPS, V, ZERO], ids=["eps", "v", "zero-snr"])


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def of_one_image(schedule, image):
    """The exact network for data that are this one image: eps is what remains of xt, v follows from both."""
    def predict(xt, t):
        signal, noise = schedule.roots(t, xt)
        return schedule.target(image, (xt - signal * image) / noise, t)
    return predict


def of_a_gaussian(schedule, deviation):
    """The exact network for x0 ~ N(0, deviation^2): E[eps | xt] and E[x0 | xt] are linear in xt."""
    def predict(xt, t):
        signal, noise = schedule.roots(t, xt)
        total = signal ** 2 * deviation ** 2 + noise ** 2
        return schedule.target(signal * deviation ** 2 / total * xt, noise / total * xt, t)
    return predict


def toy(xt, t):
    return 0.3 * xt.tanh() + 0.1 * t.view(-1, 1, 1, 1) / 1000


def test_schedule_is_linear_in_the_root_of_beta():
    roots = [0.0015 ** 0.5 + i / 999 * (0.0205 ** 0.5 - 0.0015 ** 0.5) for i in range(1000)]
    product = 1.0
    for i, root in enumerate(roots):
        product *= 1 - root ** 2
        if i in (0, 1, 500, 999):
            assert EPS.beta[i].item() == pytest.approx(root ** 2, rel=1e-12)
            assert EPS.alpha_bar[i].item() == pytest.approx(product, rel=1e-11)
    assert EPS.alpha_bar[999].item() == pytest.approx(9.691087e-05, rel=1e-6)
    assert EPS.alpha_bar_before[0] == 1 and torch.equal(EPS.alpha_bar_before[1:], EPS.alpha_bar[:-1])


def test_zero_terminal_snr_ends_in_pure_noise_and_begins_as_before():
    assert ZERO.alpha_bar[-1] == 0
    assert ZERO.alpha_bar[0].item() == pytest.approx(EPS.alpha_bar[0].item(), rel=1e-12)
    assert (ZERO.alpha_bar.diff() < 0).all() and ZERO.beta[-1] == 1
    torch.testing.assert_close(torch.cumprod(1 - ZERO.beta, 0), ZERO.alpha_bar, rtol=1e-9, atol=1e-15)
    with pytest.raises(ValueError, match="needs parametrisation 'v'"):
        Schedule(zero_terminal_snr=True)


def test_schedules_that_do_not_exist_are_refused():
    for options in (dict(T=1), dict(linear_start=0.0), dict(linear_end=1.0), dict(parametrisation="x0")):
        with pytest.raises(ValueError):
            Schedule(**options)
    assert Schedule(**ZERO.config).config == ZERO.config


@ALL
def test_network_output_read_back_gives_x0_and_eps(schedule):
    x0, eps, t = draw(5, 3, 4, 4), draw(5, 3, 4, 4, seed=1), torch.tensor([0, 1, 500, 998, 999])
    xt = schedule.q_sample(x0, t, eps)
    for b, step in enumerate(t.tolist()):
        share = schedule.alpha_bar[step].item()
        torch.testing.assert_close(xt[b], share ** 0.5 * x0[b] + (1 - share) ** 0.5 * eps[b])
    again_x0, again_eps = schedule.x0_and_eps(schedule.target(x0, eps, t), xt, t)
    torch.testing.assert_close(again_x0, x0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again_eps, eps, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(schedule.eps_from_x0(x0, xt, t), eps, rtol=1e-3, atol=1e-4)


@ALL
def test_posterior_is_bayes_rule(schedule):
    """q(x_{t-1} | xt, x0) ~ q(xt | x_{t-1}) q(x_{t-1} | x0): precisions add up."""
    x0, xt = draw(3, 1, 2, 2, dtype=torch.float64), draw(3, 1, 2, 2, seed=1, dtype=torch.float64)
    t = torch.tensor([1, 300, 998])
    mean, variance, log_variance = posterior(schedule, x0, xt, t)
    for b, step in enumerate(t.tolist()):
        alpha, beta = 1 - schedule.beta[step], schedule.beta[step]
        before = schedule.alpha_bar[step - 1]
        precision = alpha / beta + 1 / (1 - before)
        expected = (alpha.sqrt() / beta * xt[b] + before.sqrt() / (1 - before) * x0[b]) / precision
        torch.testing.assert_close(mean[b], expected, rtol=1e-8, atol=1e-10)
        assert variance[b].item() == pytest.approx(1 / precision.item(), rel=1e-8)
        assert log_variance[b].item() == pytest.approx(-math.log(precision.item()), rel=1e-8)
    mean, variance, log_variance = posterior(schedule, x0[:1], xt[:1], torch.tensor([0]))
    torch.testing.assert_close(mean, x0[:1])
    assert variance == 0 and log_variance.item() == pytest.approx(math.log(1e-20))


def test_trailing_timesteps_are_exactly_S_and_contain_the_last():
    for T in (2, 7, 50, 1000):
        for S in range(1, T + 1):
            steps = ddim_timesteps(T, S)
            exact = [math.floor(Fraction(T * k, S) + Fraction(1, 2)) - 1 for k in range(1, S + 1)]
            assert steps == exact and len(set(steps)) == S and steps[-1] == T - 1 and steps[0] >= 0
    with pytest.raises(ValueError, match="should be 1 to 10, found 11"):
        ddim_timesteps(10, 11)


def test_leading_timesteps_are_the_official_ones_with_their_counts():
    assert ddim_timesteps(1000, 10, "leading") == list(range(1, 1000, 100))
    counts = {S: len(ddim_timesteps(1000, S, "leading")) for S in (7, 30, 50, 150, 300, 400)}
    assert counts == {7: 8, 30: 31, 50: 50, 150: 167, 300: 334, 400: 500}
    noise = image_noise([0], (1, 2, 2))
    failing = [S for S in range(1, 1001) if ddim_timesteps(1000, S, "leading")[-1] >= 1000]
    assert failing == [3, 9, 27, 36, 37, *range(101, 112), *range(251, 334), *range(501, 1001)]
    with pytest.raises(ValueError, match="number of steps that divides T"):
        sample(toy, EPS, noise, steps=3, spacing="leading")


@ALL
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
def test_one_image_law_gives_the_image_back(schedule, eta, steps):
    image = 2 * draw(2, 3, 4, 4, seed=5)                      # latents are not clipped to [-1, 1]
    found = sample(of_one_image(schedule, image), schedule, image_noise([1, 2], (3, 4, 4)), steps, eta)
    torch.testing.assert_close(found, image, rtol=1e-4, atol=1e-3)


@ALL
@pytest.mark.parametrize("steps", [1, 10, 1000])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("deviation", [0.5, 2.0])
def test_gaussian_law_gives_the_exact_variance(schedule, steps, eta, deviation):
    """The exact network is linear here: each step is x <- gain x + sigma noise, and the variance is known."""
    steps_down, variance = ddim_timesteps(1000, steps)[::-1], 1.0
    for t, before in zip(steps_down, [*steps_down[1:], None]):
        now, prev = schedule.alpha_bar[t].item(), 1.0 if before is None else schedule.alpha_bar[before].item()
        sigma = eta * math.sqrt((1 - prev) / (1 - now) * (1 - now / prev))
        total = now * deviation ** 2 + 1 - now
        gain = (math.sqrt(prev) * math.sqrt(now) * deviation ** 2
                + math.sqrt(1 - prev - sigma ** 2) * math.sqrt(1 - now)) / total
        variance = gain ** 2 * variance + sigma ** 2
    found = sample(of_a_gaussian(schedule, deviation), schedule, image_noise([3], (1, 64, 64)), steps, eta)
    spread = math.sqrt(2 / 64 ** 2)                           # standard error of a variance estimate
    assert found.var().item() == pytest.approx(variance, rel=4 * spread, abs=1e-9)
    if steps == 1000:
        # The last step takes a mean: that costs 2 * 0.0015 / deviation^2, ancestral steps as much again.
        assert variance == pytest.approx(deviation ** 2, rel=0.03 if eta else 0.015)


def test_ddpm_is_ancestral_sampling_with_the_posterior():
    schedule, noise = Schedule(T=60), image_noise([1, 2], (2, 3, 3))
    x = noise("start", 0)
    for i, step in enumerate(reversed(range(60))):
        t = torch.full((2,), step)
        mean, variance, _ = posterior(schedule, schedule.x0_and_eps(toy(x, t), x, t)[0], x, t)
        x = mean + variance.sqrt() * noise("step", i)
    torch.testing.assert_close(sample(toy, schedule, noise, sampler="ddpm"), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_inpainting_keeps_the_known_latent_and_regenerates_the_rest(eta):
    noise, known = image_noise([1, 2], (3, 8, 8)), draw(2, 3, 8, 8, seed=9)
    free = sample(toy, EPS, noise, 20, eta)
    nothing, everything = torch.zeros(2, 1, 8, 8, dtype=torch.bool), torch.ones(2, 1, 8, 8, dtype=torch.bool)
    assert torch.equal(sample(toy, EPS, noise, 20, eta, known=known, repaint=nothing), known)
    assert torch.equal(sample(toy, EPS, noise, 20, eta, known=known, repaint=everything), free)
    half = everything.clone()
    half[..., :4] = False
    found = sample(toy, EPS, noise, 20, eta, known=known, repaint=half)
    assert torch.equal(found[..., :4], known[..., :4]) and (found[..., 4:] != known[..., 4:]).all()
    with pytest.raises(AssertionError, match="together"):
        sample(toy, EPS, noise, 20, known=known)


def test_known_region_has_the_noise_level_of_the_step_when_the_network_sees_it():
    known, seen = torch.full((1, 1, 64, 64), 3.0), {}

    def spy(xt, t):
        seen[t.item()] = xt[..., :32].clone()
        return toy(xt, t)

    repaint = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    repaint[..., :32] = False
    sample(spy, EPS, image_noise([4], (1, 64, 64)), 10, known=known, repaint=repaint)
    assert sorted(seen) == ddim_timesteps(1000, 10)
    for t, region in seen.items():
        share = EPS.alpha_bar[t].item()
        assert region.mean().item() == pytest.approx(3 * share ** 0.5, abs=0.1)
        assert region.var().item() == pytest.approx(1 - share, rel=0.1)


def test_a_network_in_half_precision_leaves_the_latents_in_float32():
    def half(xt, t):
        return of_one_image(V, image)(xt, t).bfloat16()

    image = draw(1, 3, 4, 4, seed=5)
    found = sample(half, V, image_noise([1], (3, 4, 4)), 10)
    assert found.dtype == torch.float32 and 0 < (found - image).abs().max() < 0.05
    both = EPS.x0_and_eps(image.bfloat16(), image, torch.tensor([9]))
    assert all(tensor.dtype == torch.float32 for tensor in both)


def test_noise_belongs_to_the_image_not_to_the_batch():
    together, alone = image_noise([7, "a", 9], (2, 4, 4)), image_noise(["a"], (2, 4, 4))
    assert torch.equal(together("step", 3)[1:2], alone("step", 3))
    torch.testing.assert_close(sample(toy, EPS, together, 5)[1:2], sample(toy, EPS, alone, 5), rtol=0, atol=0)
    streams = [alone(purpose, i) for purpose in ("start", "step", "known") for i in (0, 1)]
    streams.append(together("step", 0)[:1])
    for a in range(len(streams)):
        for b in range(a):
            assert not torch.equal(streams[a], streams[b])


def test_official_variants_differ_where_they_should():
    """The official ends: alpha_bar[0] instead of 1; blending after the step leaves the noise of t = 0."""
    noise, known = image_noise([1], (3, 8, 8)), draw(1, 3, 8, 8, seed=9)
    repaint = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    steps = ddim_timesteps(1000, 50, "leading")
    first = EPS.alpha_bar[0].item()
    ours = [x for x, _ in trajectory(toy, EPS, noise, steps, 0.0)][-1]
    official = [x for x, _ in trajectory(toy, EPS, noise, steps, 0.0, final_alpha_bar=first)][-1]
    assert 1e-4 < (ours - official).abs().max() / ours.abs().max() < 1e-1
    last = [x for x, _ in trajectory(toy, EPS, noise, steps, 0.0, known, repaint, blend="after")][-1]
    t = torch.tensor([1])
    torch.testing.assert_close(last, EPS.q_sample(known, t, noise("known", 49)))


def test_losses_and_the_loss_of_saying_nothing():
    output, target = draw(3, 2, 4, 4), draw(3, 2, 4, 4, seed=1)
    for kind, power in (("l1", 1), ("l2", 2)):
        expected = [sum(abs(x) ** power for x in row) / 32 for row in (output - target).flatten(1).tolist()]
        assert denoising_loss(output, target, kind).tolist() == pytest.approx(expected, rel=1e-5)
        nothing = denoising_loss(torch.zeros(1, 1, 1000, 1000), draw(1, 1, 1000, 1000), kind).item()
        assert nothing == pytest.approx(loss_of_zero_output(kind), abs=4e-3)
    assert denoising_loss(output.bfloat16(), target).dtype == torch.float32


def test_quartile_sums_are_a_loop_over_the_batch():
    loss, t = draw(50).abs(), torch.randint(0, 10, (50,), generator=torch.Generator().manual_seed(1))
    sums, counts = quartile_sums(loss, t, 10)
    expected, number = [0.0] * 4, [0] * 4
    for value, step in zip(loss.tolist(), t.tolist()):
        quarter = [q for q in range(4) if q * 10 / 4 <= step < (q + 1) * 10 / 4][0]
        expected[quarter] += value
        number[quarter] += 1
    assert sums.tolist() == pytest.approx(expected) and counts.tolist() == number


def test_timesteps_uniform_or_logit_normal():
    """Shares of quarters: closed forms, P(t < q T) = q, or Phi(logit(q) / spread)."""
    def shares(spread):
        t = draw_timesteps(40_000, 1000, spread, torch.Generator().manual_seed(0))
        assert t.dtype == torch.int64 and 0 <= int(t.min()) and int(t.max()) <= 999
        return [(t < q * 1000).float().mean().item() for q in (0.25, 0.5, 0.75)]

    assert shares(0.0) == pytest.approx([0.25, 0.5, 0.75], abs=0.012)
    normal = [0.5 * (1 + math.erf(math.log(q / (1 - q)) / 1.5 / math.sqrt(2))) for q in (0.25, 0.5, 0.75)]
    assert shares(1.5) == pytest.approx(normal, abs=0.012)
