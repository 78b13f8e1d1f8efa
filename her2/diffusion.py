"""The mathematics of diffusion: noise schedule, forward process, posterior, targets, losses. No network.

    xt  = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps                     eps ~ N(0, I)        (1)
    x0  = (xt - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)                                      (2)
    q(x_{t-1} | xt, x0) = N(mean, variance)                                                         (3)
    mean     = sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t) x0
             + sqrt(alpha_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) xt
    variance = beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)
    v   = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x0                                          (4)

with alpha_t = 1 - beta_t and alpha_bar_t the product of the alphas up to t; t counts from 0, and alpha_bar
before the first is 1. Eq. 1 is many small steps at once, q(xt | x_{t-1}) = N(sqrt(alpha_t) x_{t-1}, beta_t):
each shrinks what is there and adds noise; shrinking multiplies up, variances add up to 1 - alpha_bar_t.
Eq. 3 is the product of two Gaussians of x_{t-1}:

    seen from x0 (eq. 1)   mean sqrt(alpha_bar_{t-1}) x0, variance 1 - alpha_bar_{t-1}
    seen from xt (a step)  mean xt / sqrt(alpha_t), variance beta_t / alpha_t
    their product          precisions (1 / variance) add, and means average by precision:
                           1 / (1 - alpha_bar_{t-1}) + alpha_t / beta_t = 1 / variance of (3)

Sources: (1) to (3) Ho et al., DDPM, NeurIPS 2020, eq. 4, 6, 7; (4) Salimans and Ho, Progressive Distillation,
ICLR 2022, appendix D. The schedule is latent-diffusion's "linear", linear in sqrt(beta), from 0.0015 to
0.0205 (models/ldm/semantic_synthesis256; some official configs end at 0.0195).

Differs from the official code: tables stay in float64 until a value is used (officially float32 buffers);
v-prediction and the zero terminal signal-to-noise ratio are additions, one argument each. With the official
schedule the last alpha_bar is 1e-4: training never shows pure noise while sampling begins with it, and images
of extreme brightness (white glass) come out too grey (Lin et al., WACV 2024, section 3.1).

Key: B batch, C latent channels, h w latent height and width, T number of noise levels.
"""

import math

import torch


class Schedule:
    """Tables over t = 0 .. T-1 (float64) and what follows from them. Latents (B, C, h, w), t (B,) int64.

    parametrisation: what the network puts out, "eps" or "v". zero_terminal_snr: the last level is pure noise;
    needs "v", because eq. 2 divides by 0 there."""

    def __init__(self, T: int = 1000, linear_start: float = 0.0015, linear_end: float = 0.0205,
                 zero_terminal_snr: bool = False, parametrisation: str = "eps"):
        if T < 2 or not 0 < linear_start <= linear_end < 1:
            raise ValueError(f"no schedule has T {T} and beta from {linear_start} to {linear_end}")
        if parametrisation not in ("eps", "v"):
            raise ValueError(f"parametrisation is 'eps' or 'v', found {parametrisation!r}")
        if zero_terminal_snr and parametrisation == "eps":
            raise ValueError("zero_terminal_snr needs parametrisation 'v': with 'eps', x0 is 0 / 0")
        self.config = dict(T=T, linear_start=linear_start, linear_end=linear_end,
                           zero_terminal_snr=zero_terminal_snr, parametrisation=parametrisation)
        self.T, self.parametrisation = T, parametrisation
        # Linear in the root: many gentle steps at first, so that fine detail is decided in small portions.
        beta = torch.linspace(linear_start ** 0.5, linear_end ** 0.5, T, dtype=torch.float64) ** 2
        alpha_bar = torch.cumprod(1 - beta, dim=0)                      # (T,) share of signal power
        if zero_terminal_snr:
            # Lin et al., algorithm 1: shift so that the last is 0, then stretch so that the first stays.
            root = alpha_bar.sqrt()
            alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])        # (T,); before the first: no noise
        self.alpha_bar, self.alpha_bar_before = alpha_bar, before
        self.alpha = alpha_bar / before if zero_terminal_snr else 1 - beta  # (T,)
        self.beta = 1 - self.alpha if zero_terminal_snr else beta       # (T,)
        # Eq. 3, to be looked at and compared with the reference: sampling (samplers.py, eta 1) does without.
        self.posterior_variance = self.beta * (1 - before) / (1 - alpha_bar)
        self.posterior_x0 = before.sqrt() * self.beta / (1 - alpha_bar)  # weight of x0: grows towards t = 0
        self.posterior_xt = self.alpha.sqrt() * (1 - before) / (1 - alpha_bar)  # weight of xt

    def to(self, device) -> "Schedule":                                 # moves the tables
        for name, value in vars(self).items():
            if torch.is_tensor(value):
                setattr(self, name, value.to(device))
        return self

    def at(self, table: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Entries of a table for a batch, (B, 1, 1, 1), in x's precision but no less than float32."""
        assert t.shape == x.shape[:1], f"t {tuple(t.shape)} should be ({len(x)},)"
        return table[t].to(torch.promote_types(x.dtype, torch.float32)).view(-1, *[1] * (x.dim() - 1))

    def roots(self, t: torch.Tensor, x: torch.Tensor):
        """sqrt(alpha_bar), sqrt(1 - alpha_bar): strengths of signal and noise at t, each (B, 1, 1, 1)."""
        # Their squares add up to 1: with x0 of variance 1, xt has variance 1 at every level.
        return self.at(self.alpha_bar.sqrt(), t, x), self.at((1 - self.alpha_bar).sqrt(), t, x)

    def q_sample(self, x0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """Eq. 1: x0 noised to level t."""
        assert x0.shape == eps.shape, f"x0 {tuple(x0.shape)} and eps {tuple(eps.shape)} differ in shape"
        signal, noise = self.roots(t, x0)
        return signal * x0 + noise * eps                                     # (B, C, h, w)

    def target(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the network should put out for xt: eps, or v by eq. 4."""
        if self.parametrisation == "eps":
            return eps               # of unit variance at every t: one size of error for all levels of noise
        signal, noise = self.roots(t, x0)
        # At T-1 with zero_terminal_snr signal is 0 and v = -x0: xt is pure noise, and the network paints an
        # image from the label alone. With eps it could copy its input there, and would learn nothing.
        return signal * eps - noise * x0                                     # (B, C, h, w)

    def x0_and_eps(self, output: torch.Tensor, xt: torch.Tensor, t: torch.Tensor):
        """The network's output read as (x0, eps): (eq. 2, output), or for v
            x0 = sqrt(alpha_bar) xt - sqrt(1 - alpha_bar) v   eps = sqrt(1 - alpha_bar) xt + sqrt(alpha_bar) v
        """
        assert output.shape == xt.shape, f"output {tuple(output.shape)} and xt {tuple(xt.shape)} differ"
        output = output.to(xt.dtype)                         # half precision ends with the network
        if self.parametrisation == "eps":
            # Errors of the output grow with 1 / sqrt(alpha_bar), a hundredfold at the last level.
            of_xt, of_eps = (1 / self.alpha_bar).sqrt(), (1 / self.alpha_bar - 1).sqrt()        # (T,) each
            return self.at(of_xt, t, xt) * xt - self.at(of_eps, t, xt) * output, output
        signal, noise = self.roots(t, xt)
        # (xt, v) is (x0, eps) turned by an angle, so turning back has no division and no such growth.
        return signal * xt - noise * output, signal * output + noise * xt    # (B, C, h, w) each

    def eps_from_x0(self, x0: torch.Tensor, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:     # eq. 1
        signal, noise = self.roots(t, xt)
        return (xt - signal * x0) / noise                                    # (B, C, h, w)


def draw_timesteps(count: int, T: int, spread: float, generator) -> torch.Tensor:
    """(count,) int64 in 0..T-1: uniform for `spread` 0, else T sigmoid(spread N(0, 1)).

    A short training gains from the middle, where the image is decided: half of all uniform levels are nearly
    pure noise (signal-to-noise below 0.1), and their loss is flat after a few hundred steps. It changes how
    often a level is seen, not the minimum of its loss. Source: Esser et al., ICML 2024, section 3.1."""
    if not spread:
        return torch.randint(T, (count,), generator=generator)          # (count,)
    return (T * torch.sigmoid(spread * torch.randn(count, generator=generator))).long().clamp(max=T - 1)


def denoising_loss(output: torch.Tensor, target: torch.Tensor, kind: str = "l1") -> torch.Tensor:
    """Mean absolute ("l1", as official) or squared ("l2") error per image: (B,) float32. l2 is least for the
    mean of all that xt may come from, which sampling asks for; l1 for the median, less moved by outliers."""
    assert kind in ("l1", "l2"), f"kind is 'l1' or 'l2', found {kind!r}"
    assert output.shape == target.shape, f"output {tuple(output.shape)}, target {tuple(target.shape)}"
    error = (output.float() - target.float()).flatten(1)                     # (B, C*h*w)
    return (error.abs() if kind == "l1" else error.square()).mean(1)    # (B,)


def loss_of_zero_output(kind: str = "l1") -> float:
    """What a network that always says 0 scores on eps, E|eps| = sqrt(2 / pi) or E eps^2 = 1: it has learned
    nothing. The same for v as far as x0 is Gaussian and of unit variance (`latent_scale` sees to that)."""
    return {"l1": math.sqrt(2 / math.pi), "l2": 1.0}[kind]              # .798, 1


def quartile_sums(loss: torch.Tensor, t: torch.Tensor, T: int):
    """Losses (B,) by quarter of the noise levels: sums and counts, (4,) float64, to be added up over steps.
    The quarters differ by an order of magnitude: their common mean hides which of them improves."""
    assert loss.shape == t.shape, f"loss {tuple(loss.shape)} and t {tuple(t.shape)} differ in shape"
    member = (t * 4 // T == torch.arange(4, device=t.device)[:, None]).double()          # (4, B)
    return (member * loss.detach().double()).sum(1), member.sum(1)
