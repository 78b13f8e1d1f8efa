"""Sampling: from noise to a latent, in S steps, with or without a region that is to stay.

A network that sees xt guesses the clean latent x0 and the noise eps in it (diffusion.py, eq. 1). A step goes
from alpha_bar = now, at timestep t, to the larger alpha_bar = after of the next timestep:

    sigma   = eta sqrt((1 - after) / (1 - now)) sqrt(1 - now / after)
    x_after = sqrt(after) x0                          the guess, in the strength that it has at that level
            + sqrt(1 - after - sigma^2) eps           what is left of the old noise: the direction to xt
            + sigma noise                             fresh noise in place of the rest

The squares of the last two factors add up to 1 - after: whatever eta is, the noise has the strength that the
network expects there. eta 0 is deterministic (DDIM). eta 1 with S = T is DDPM's ancestral sampling: sigma^2
is then the variance of the posterior (diffusion.py, eq. 3); with S < T it is the same for the chain of the
visited levels alone. Source: Song et al., Denoising Diffusion Implicit Models, ICLR 2021, eq. 12 and 16.

DPM-Solver++(2M). With eta 0 the step follows an ordinary differential equation, and holds the guess x0 fixed
on the way, as Euler's method would. But the guess drifts, nearly in a straight line over lambda, half the log
of the signal-to-noise ratio. So this sampler continues the line through the last two guesses to the middle of
the step (h = the step in lambda, h_before the one before it), and takes the deterministic step from there:

    lambda = log(sqrt(alpha_bar) / sqrt(1 - alpha_bar))        x0 <- x0 + h / (2 h_before) (x0 - x0_before)

Twice as many steps then divide the error by 4, not by 2. Where there is no line (first step; lambda infinite:
the step from pure noise, the last one to x0) the guess is taken as it is. Source: Lu et al., DPM-Solver++,
2022, algorithm 2 (data prediction, multistep), which divides 0 by 0 at a signal-to-noise ratio of 0.

Timesteps. "trailing" (ours): exactly S steps for every S <= T, from T-1 down; the last step ends at x0
(after = 1). Lin et al., WACV 2024, section 3.3. "leading" is latent-diffusion's "uniform": every (T // S)-th
level plus one. It rarely visits T-1, makes other numbers of steps when S does not divide T (7 -> 8), and for
some S asks for level T: an IndexError there, a ValueError here. "log-snr": see `log_snr_timesteps`.

Inpainting. The known latent is put back before every step and, clean, after the last: Lugmayr et al.,
RePaint, CVPR 2022, algorithm 1 without resampling. Officially the last one is missing (DDIMSampler), or the
replacement comes after the step at the step's own level, so that noise of t = 0 remains (p_sample_loop).

PAPER: neither sampler nor number of steps is given: 50 with eta 1; after short trainings eta 0 washes out.

Key: B batch, C latent channels, h w latent height and width, T number of noise levels, S of steps.
"""

import torch

from her2.run_seeds import generator

SAMPLERS = ("ddim", "ddpm", "dpm")
# Below this alpha_bar (signal 1/20 of the noise) lambda falls far, without end for a terminal signal-to-noise
# ratio of 0, while the guess hardly moves from the mean of the data: log-snr jumps over it in one step. On a
# mixture of three Gaussians 12 steps then have 0.74 of the error that they have with 1e-4.
LOWEST = 0.0025


def ddim_timesteps(T: int, S: int, spacing: str = "trailing") -> list:
    """The noise levels that S steps visit, ascending (see above); sampling walks them from the end."""
    if not 1 <= S <= T:
        raise ValueError(f"the number of steps should be 1 to {T}, found {S}")
    if spacing == "trailing":
        return [(2 * T * k + S) // (2 * S) - 1 for k in range(1, S + 1)]         # round(T k / S) - 1
    if spacing == "leading":
        return [t + 1 for t in range(0, T, T // S)]       # official, for comparison: S may come out otherwise
    raise ValueError(f"spacing is 'trailing', 'leading' or 'log-snr', found {spacing!r}")


def half_log_snr(schedule) -> torch.Tensor:
    """lambda of every level, (T,) float64, falling; -infinity at a signal-to-noise ratio of 0."""
    alpha_bar = schedule.alpha_bar.cpu()                                # (T,)
    return (alpha_bar.log() - torch.log1p(-alpha_bar)) / 2


def log_snr_timesteps(schedule, S: int) -> list:
    """S levels evenly spaced in lambda, ascending, T-1 and (from two on) 0 among them."""
    T, levels = schedule.T, half_log_snr(schedule)                      # (T,) falling: later hold less
    if not 1 <= S <= T:
        raise ValueError(f"the number of steps should be 1 to {T}, found {S}")
    seen = max(1, int((schedule.alpha_bar >= LOWEST).sum()))            # levels 0 .. seen - 1
    jump = [T - 1] if seen < T or S == 1 else []                        # S = 1: from pure noise at once
    wanted = torch.linspace(float(levels[0]), float(levels[seen - 1]), S - len(jump), dtype=torch.float64)
    steps = (levels[:seen] - wanted[:, None]).abs().argmin(1).tolist() + jump    # (S,) the nearest levels
    # Levels near 0 lie far apart in lambda: where the spacing is finer than that, each of them is visited.
    for k in range(1, S):
        steps[k] = max(steps[k], steps[k - 1] + 1)                      # duplicates move up,
    return [min(t, T - S + k) for k, t in enumerate(steps)]             # and none beyond T-1


def ddim_tables(schedule, timesteps, eta: float, final_alpha_bar: float = 1.0):
    """-> now, after, sigma and, 0 where no line can be continued, h / (2 h_before) of the step from each
    timestep, float64, (S,) each, ascending as `timesteps`."""
    now = schedule.alpha_bar.cpu()[torch.tensor(timesteps)]             # (S,)
    after = torch.cat([now.new_tensor([final_alpha_bar]), now[:-1]])    # (S,) the level that a step leads to
    # In float64: 1 - now / after loses digits near 0.
    sigma = eta * ((1 - after) / (1 - now)).sqrt() * (1 - now / after).clamp(min=0).sqrt()
    h = -half_log_snr(schedule)[torch.tensor(timesteps)].diff()         # (S - 1,) h[k]: from k + 1 to k
    middle = h[:-1] / (2 * h[1:])                   # 0 after the step from pure noise, whose h is infinite
    return now, after, sigma, torch.cat([h.new_zeros(1), middle, h.new_zeros(1)])[:len(timesteps)]


def image_noise(seeds, shape, device="cpu"):
    """-> noise(purpose, i), standard normal (B, *shape): one independent stream per image seed (int or str),
    so that an image does not depend on the batch it is made in (after Karras et al., EDM, 2022)."""
    def noise(purpose: str, i: int) -> torch.Tensor:     # from the CPU: every device gets the same numbers
        images = [torch.randn(shape, generator=generator(seed, purpose, i)) for seed in seeds]
        return torch.stack(images).to(device)                           # (B, *shape)

    return noise


def trajectory(predict, schedule, noise, timesteps, eta: float = 1.0, known=None, repaint=None,
               final_alpha_bar: float = 1.0, blend: str = "before", multistep: bool = False):
    """Yields (xt, x0) after every step: the new latent and the guess that led to it, (B, C, h, w) each.
    predict(xt, t) -> the network's output, t (B,). noise(purpose, i) with purpose "start" (i = 0), "step" and
    "known" (i = number of the step). timesteps ascending. multistep: DPM-Solver++(2M), with eta 0. Official
    samplers: final_alpha_bar = schedule.alpha_bar[0]; blend "after" the step, at its level."""
    assert blend in ("before", "after"), f"blend is 'before' or 'after', found {blend!r}"
    assert not (multistep and eta), f"DPM-Solver++(2M) adds no noise: eta is 0, found {eta}"
    xt = noise("start", 0)                                                   # (B, C, h, w)
    if known is not None:
        assert known.shape == xt.shape, f"known {tuple(known.shape)} should be {tuple(xt.shape)}"
        assert repaint.dtype == torch.bool and repaint.shape == (len(xt), 1, *xt.shape[2:]), \
            f"repaint {repaint.dtype} {tuple(repaint.shape)} should be bool {(len(xt), 1, *xt.shape[2:])}"

    def keep_known(xt, t, i):
        # At the noise of t: the network was trained on that everywhere, and would misread clean cells. Fresh
        # noise makes the guesses jump from step to step, and a line through two of them points anywhere; with
        # one noise throughout, the known cells follow their own equation exactly.
        eps = noise("start", 0) if multistep else noise("known", i)
        return torch.where(repaint, xt, schedule.q_sample(known, t, eps))

    _, after, sigma, middle = (x.tolist() for x in ddim_tables(schedule, timesteps, eta, final_alpha_bar))
    guess = None
    for i, k in enumerate(reversed(range(len(timesteps)))):             # i: number of the step
        t = torch.full((len(xt),), timesteps[k], dtype=torch.int64, device=xt.device)           # (B,)
        if known is not None and blend == "before":
            xt = keep_known(xt, t, i)
        x0, eps = schedule.x0_and_eps(predict(xt, t), xt, t)            # (B, C, h, w) each
        if multistep:
            guess, guess_before = x0, guess                 # the line goes through unextended guesses
            if middle[k] > 0:
                x0 = guess + middle[k] * (guess - guess_before)         # (B, C, h, w) half a step ahead
                eps = schedule.eps_from_x0(x0, xt, t)       # of the same xt: another x0, another noise
        xt = after[k] ** 0.5 * x0 + max(0.0, 1 - after[k] - sigma[k] ** 2) ** 0.5 * eps
        if sigma[k] > 0:                            # the last step draws none: nothing would remove it
            xt = xt + sigma[k] * noise("step", i)                       # (B, C, h, w)
        if known is not None and blend == "after":
            xt = keep_known(xt, t, i)
        yield xt, x0


@torch.no_grad()
def sample(predict, schedule, noise, steps: int = 50, eta: float = 1.0, sampler: str = "ddim",
           spacing: str = "auto", known=None, repaint=None) -> torch.Tensor:
    """A batch of latents x0 (B, C, h, w) from noise (see image_noise). predict(xt (B, C, h, w), t (B,)) ->
    output, as `schedule.parametrisation` says. sampler: "ddim" with `steps` and `eta`; "ddpm", ancestral
    sampling in all T steps; or "dpm", DPM-Solver++(2M) with `steps`, without fresh noise. spacing: of the
    timesteps; "auto" is "log-snr" for "dpm" and "trailing" for the others. known: clean latent (B, C, h, w)
    to keep where `repaint` (B, 1, h, w) bool is False."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is one of {', '.join(SAMPLERS)}, found {sampler!r}")
    assert (known is None) == (repaint is None), "known and repaint are given together or not at all"
    eta = {"ddim": eta, "ddpm": 1.0, "dpm": 0.0}[sampler]               # fresh noise: some, all, none
    timesteps = spaced_timesteps(schedule, steps, sampler, spacing)
    walk = trajectory(predict, schedule, noise, timesteps, eta, known, repaint, multistep=sampler == "dpm")
    for xt, _ in walk:
        pass
    # What is known needs no guess: clean, and not as the last step left it.
    return xt if known is None else torch.where(repaint, xt, known)


def spaced_timesteps(schedule, steps: int, sampler: str, spacing: str) -> list:
    """The timesteps that `sample` visits, ascending; its arguments."""
    if sampler == "ddpm":
        return list(range(schedule.T))              # the chain of training, level by level
    if spacing == "log-snr" or (spacing, sampler) == ("auto", "dpm"):
        return log_snr_timesteps(schedule, steps)
    timesteps = ddim_timesteps(schedule.T, steps, "trailing" if spacing == "auto" else spacing)
    if timesteps[-1] >= schedule.T:
        raise ValueError(f"spacing 'leading' asks for timestep {timesteps[-1]} of 0 to {schedule.T - 1}: "
                         "take a number of steps that divides T")
    return timesteps
