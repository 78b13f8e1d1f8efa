"""Sampling: from noise to a latent, in S steps, with or without a region that is to stay.

    sigma  = eta sqrt((1 - prev) / (1 - now)) sqrt(1 - now / prev)
    x_prev = sqrt(prev) x0 + sqrt(1 - prev - sigma^2) eps + sigma noise

with now = alpha_bar at t, prev = alpha_bar at the next smaller timestep, x0 and eps what the network makes of
xt. eta 0 is deterministic; eta 1 with S = T is DDPM's ancestral sampling, with S < T the same on a subset.
Source: Song et al., Denoising Diffusion Implicit Models, ICLR 2021, eq. 12 and 16.

Timesteps. "trailing" (ours): exactly S steps for every S <= T, from T-1 down; the last step ends at x0
(prev = 1). Lin et al., WACV 2024, section 3.3. "leading" is latent-diffusion's "uniform": every (T // S)-th
level plus one. It never visits T-1, makes other numbers of steps when S does not divide T (7 -> 8,
300 -> 334), and for some S asks for level T, which does not exist: an IndexError there, a ValueError here.
"quadratic" is its "quad".

Inpainting. The known latent, noised to the level of xt, replaces xt outside `repaint` before every step;
after the last step the clean known latent does. Source: Lugmayr et al., RePaint, CVPR 2022, algorithm 1
without resampling. Officially the last replacement is missing (DDIMSampler: it keeps the network's guess), or
the replacement comes after the step at the step's own level, so that noise of t = 0 remains (p_sample_loop).
The arguments of `trajectory` reproduce both.

PAPER: neither sampler nor number of steps is given. Default: 50 steps with eta 1; eta 0 gave washed-out
images from models that were trained briefly.

Noise is a function noise(purpose, i) of the image's seed, the purpose and the step alone, so that an image
does not depend on the batch it is made in (after Karras et al., EDM, 2022: one generator per image).

Key: B batch, C latent channels, h w latent height and width, T number of noise levels, S of steps.
"""

import torch

from her2.run_seeds import generator


def ddim_timesteps(T: int, S: int, spacing: str = "trailing") -> list:
    """The noise levels that S steps visit, ascending (see above); sampling walks them from the end."""
    if not 1 <= S <= T:
        raise ValueError(f"the number of steps should be 1 to {T}, found {S}")
    if spacing == "trailing":
        return [(2 * T * k + S) // (2 * S) - 1 for k in range(1, S + 1)]         # round(T k / S) - 1
    if spacing == "leading":
        return [t + 1 for t in range(0, T, T // S)]
    if spacing == "quadratic":
        roots = torch.linspace(0, (T * 0.8) ** 0.5, S, dtype=torch.float64)
        return [int(root ** 2) + 1 for root in roots]
    raise ValueError(f"spacing is 'trailing', 'leading' or 'quadratic', found {spacing!r}")


def ddim_tables(schedule, timesteps, eta: float, final_alpha_bar: float = 1.0):
    """-> alpha_bar at the timesteps, alpha_bar at the ones before, sigma: float64, (S,) each, ascending."""
    if not 0 <= min(timesteps) or not max(timesteps) < schedule.T:
        raise ValueError(f"timesteps {min(timesteps)} to {max(timesteps)} are not among 0 to "
                         f"{schedule.T - 1}: for spacing 'leading', take a number of steps that divides T")
    alpha_bar = schedule.alpha_bar.cpu()
    now = alpha_bar[torch.tensor(timesteps)]
    prev = torch.cat([now.new_tensor([final_alpha_bar]), now[:-1]])
    sigma = eta * ((1 - prev) / (1 - now)).sqrt() * (1 - now / prev).clamp(min=0).sqrt()
    return now, prev, sigma


def image_noise(seeds, shape, device="cpu"):
    """-> noise(purpose, i), standard normal (B, *shape): one independent stream per image seed (int or str).

    Drawn on the CPU, so that every device gets the same numbers.
    """
    seeds = list(seeds)

    def noise(purpose: str, i: int) -> torch.Tensor:
        images = [torch.randn(shape, generator=generator(seed, purpose, i)) for seed in seeds]
        return torch.stack(images).to(device)

    return noise


def trajectory(predict, schedule, noise, timesteps, eta: float = 1.0, known=None, repaint=None,
               final_alpha_bar: float = 1.0, blend: str = "before", clip_x0: bool = False):
    """Yields (xt, x0) after every step: the new latent and the guess at the end of it, (B, C, h, w) each.

    predict(xt, t) -> the network's output, t (B,). noise(purpose, i) with purpose "start" (i = 0), "step" and
    "known" (i = number of the step). timesteps ascending. Official variants: final_alpha_bar =
    schedule.alpha_bar[0]; blend "after" the step, at its level; clip_x0 to [-1, 1] (pixel models only).
    """
    if blend not in ("before", "after"):
        raise ValueError(f"blend is 'before' or 'after', found {blend!r}")
    xt = noise("start", 0)                                                   # (B, C, h, w)
    if known is not None:
        assert known.shape == xt.shape, f"known {tuple(known.shape)} should be {tuple(xt.shape)}"
        assert repaint.dtype == torch.bool and repaint.shape == (len(xt), 1, *xt.shape[2:]), \
            f"repaint {repaint.dtype} {tuple(repaint.shape)} should be bool {(len(xt), 1, *xt.shape[2:])}"

    def keep(xt, t, i):
        return torch.where(repaint, xt, schedule.q_sample(known, t, noise("known", i)))

    _, prev, sigma = (table.tolist() for table in ddim_tables(schedule, timesteps, eta, final_alpha_bar))
    for i, step in enumerate(reversed(range(len(timesteps)))):
        t = torch.full((len(xt),), timesteps[step], dtype=torch.int64, device=xt.device)
        if known is not None and blend == "before":
            xt = keep(xt, t, i)
        x0, eps = schedule.x0_and_eps(predict(xt, t), xt, t)                 # (B, C, h, w) each
        if clip_x0:
            x0 = x0.clamp(-1, 1)
            eps = schedule.eps_from_x0(x0, xt, t)
        xt = prev[step] ** 0.5 * x0 + max(0.0, 1 - prev[step] - sigma[step] ** 2) ** 0.5 * eps
        if sigma[step] > 0:
            xt = xt + sigma[step] * noise("step", i)
        if known is not None and blend == "after":
            xt = keep(xt, t, i)
        yield xt, x0


@torch.no_grad()
def sample(predict, schedule, noise, steps: int = 50, eta: float = 1.0, sampler: str = "ddim",
           spacing: str = "trailing", known=None, repaint=None, progress=None) -> torch.Tensor:
    """A batch of latents x0 (B, C, h, w) from noise.

    predict    function(xt (B, C, h, w), t (B,)) -> output, as `schedule.parametrisation` says
    noise      function(purpose, i) -> (B, C, h, w), see image_noise
    sampler    "ddim" with `steps` and `eta`, or "ddpm": all T steps of ancestral sampling
    known      clean latent (B, C, h, w) to keep where `repaint` (B, 1, h, w) bool is False
    progress   function(iterable, total) -> iterable, such as tqdm
    """
    if sampler not in ("ddim", "ddpm"):
        raise ValueError(f"sampler is 'ddim' or 'ddpm', found {sampler!r}")
    if (known is None) != (repaint is None):
        raise ValueError("known and repaint are given together or not at all")
    if sampler == "ddpm":
        steps, eta, spacing = schedule.T, 1.0, "trailing"
    timesteps = ddim_timesteps(schedule.T, steps, spacing)
    states = trajectory(predict, schedule, noise, timesteps, eta, known, repaint)
    for xt, _ in progress(states, total=len(timesteps)) if progress else states:
        pass
    return xt if known is None else torch.where(repaint, xt, known)
