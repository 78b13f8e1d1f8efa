"""Vector quantisation: a latent vector is replaced by the nearest of K learned codes.

    indices = argmin_k |z - codes_k|^2                 e = codes[indices]
    vq_loss = |sg[z] - e|^2 + beta |z - sg[e]|^2       (means over all elements; sg = stop gradient)
    z_q     = z + sg[e - z]                            straight-through: forward e, backward the identity

The first term of the loss pulls the codes to the latents, the second (weight beta) commits the encoder to
its codes. Source: van den Oord et al., Neural Discrete Representation Learning, NeurIPS 2017, eq. 1 to 3.

Differs from the official code (taming-transformers, VectorQuantizer2, as latent-diffusion calls it):
- the official default puts beta = 0.25 on the first term, the codebook's ("legacy"). The codes learn from
  that term alone and Adam divides a gradient by its own size, so they move as before; but the commitment of
  the encoder weighs 1 instead of 0.25 against L1. Here beta is on the commitment, but with `legacy=True`.
- distances are computed in chunks (16 images of 512 px at factor 4 and K = 8192 make an 8 GiB matrix) and in
  float32 also under autocast (bfloat16 mistakes neighbouring codes for each other).
- codes that stay unused are restarted at latents of the data, as in Jukebox (Dhariwal et al. 2020, 3.1).

Key: B batch, D width of a code, K number of codes, h w latent height and width, N = B h w.
"""

import torch
import torch.nn.functional as F
from torch import nn

CHUNK = 2 ** 24                     # distances held at once: 64 MiB of float32


def vq_loss(z: torch.Tensor, e: torch.Tensor, beta: float = 0.25, legacy: bool = False) -> torch.Tensor:
    """Codebook plus commitment term, a float32 scalar. z latents, e their codes as looked up, one shape:
    through the straight-through z_q the codebook would get no gradient. `legacy` changes gradients alone."""
    assert z.shape == e.shape, f"z {tuple(z.shape)} and e {tuple(e.shape)} differ in shape"
    z, e = z.float(), e.float()                                                      # half precision ends
    # One distance, two gradients: left the codes move to the latents, right the latents to their codes.
    codebook, commitment = F.mse_loss(e, z.detach()), F.mse_loss(z, e.detach())
    return commitment + beta * codebook if legacy else codebook + beta * commitment  # ()


class Codebook(nn.Module):
    """K learned codes of width D; the parameter is `embedding.weight` (K, D), as in official files."""

    def __init__(self, num_codes: int, dim: int, beta: float = 0.25):
        super().__init__()
        self.beta = beta
        self.embedding = nn.Embedding(num_codes, dim)                   # (K, D)
        nn.init.uniform_(self.embedding.weight, -1 / num_codes, 1 / num_codes)       # official; all near 0

    @property
    def weight(self) -> torch.Tensor:                                                # (K, D)
        return self.embedding.weight

    @torch.no_grad()
    def nearest(self, z: torch.Tensor) -> torch.Tensor:
        """Index of the nearest code of every latent vector; the lowest index wins a tie."""
        codes = self.weight.float()                                                  # (K, D)
        assert z.shape[1] == codes.shape[1], f"z {tuple(z.shape)} should be (B, {codes.shape[1]}, h, w)"
        with torch.autocast("cuda" if z.is_cuda else "cpu", enabled=False):          # see above
            rows = z.permute(0, 2, 3, 1).reshape(-1, codes.shape[1]).float()         # (N, D)
            squares = (codes ** 2).sum(1)                                            # (K,)
            # |z - e|^2 without |z|^2, which is the same for all codes and only costs precision.
            nearest = [torch.addmm(squares, chunk, codes.t(), alpha=-2).argmin(1)    # (n, K) -> (n,)
                       for chunk in rows.split(max(1, CHUNK // len(codes)))]
        return torch.cat(nearest).view(z.shape[0], *z.shape[2:])                     # (B, h, w)

    def lookup(self, indices: torch.Tensor) -> torch.Tensor:           # (B, h, w) -> their codes, as latents
        return self.embedding(indices).permute(0, 3, 1, 2)                           # (B, D, h, w)

    def forward(self, z: torch.Tensor, legacy: bool = False):
        """z (B, D, h, w) -> z_q (straight-through), indices (B, h, w), loss (scalar)."""
        indices = self.nearest(z)                                                    # (B, h, w)
        e = self.lookup(indices)                                                     # (B, D, h, w)
        loss = vq_loss(z, e, self.beta, legacy)        # from e itself: z_q would give the codes no gradient
        # argmin has no gradient: a small change of z changes nothing, then all at once. So the backward pass
        # leaves that step out: the value is e, the gradient goes to z as if nothing had happened between.
        return z + (e - z).detach(), indices, loss


def count_codes(indices: torch.Tensor, num_codes: int) -> torch.Tensor:
    """How often each code occurs in `indices` (any shape): (K,) int64. Add the counts of many batches up."""
    indices = indices.flatten()
    # Not bincount: on a GPU it asks for the largest index, and waits for it.
    return indices.new_zeros(num_codes).index_add_(0, indices, torch.ones_like(indices))


class CodeUsage:
    """How often each code was used over `window` steps (one batch says little), and the restarts for it. The
    first look is after a fifth of a window: all codes begin near 0, and few are nearest to any latent. After
    step `last` no code is moved. used: codes in use in the last window, None before."""

    def __init__(self, num_codes: int, window: int, last: int, device=None):
        self.counts = torch.zeros(num_codes, dtype=torch.long, device=device)                # (K,)
        self.window, self.last, self.used = window, last, None

    def step(self, step: int, codebook: Codebook, indices, z, generator, optimizer) -> None:
        """Count the `indices` of the batch of `step` (from 1 on); restart the codes that no latent used."""
        self.counts += count_codes(indices, len(self.counts))
        if step % self.window == 0:
            self.used = int((self.counts > 0).sum())
        if step % self.window == 0 or step == self.window // 5:
            if step <= self.last:                                  # later ones would disturb what has settled
                restart_dead_codes(codebook, self.counts, z, generator, optimizer)
            self.counts.zero_()                                         # a new window

    def state_dict(self) -> dict:
        return {"counts": self.counts, "used": self.used}

    def load_state_dict(self, state: dict) -> None:
        self.counts.copy_(state["counts"])
        self.used = state["used"]


@torch.no_grad()
def restart_dead_codes(codebook: Codebook, usage: torch.Tensor, z, generator, optimizer=None) -> int:
    """Move every code whose `usage` (K,) is 0 to a randomly drawn latent of z (B, D, h, w) or (N, D); returns
    how many. `generator` is a CPU generator: the same restart on every device. Adam's moments of the moved
    rows in `optimizer` are cleared: they belong to the old place."""
    weight = codebook.weight
    vectors = z.movedim(1, -1).reshape(-1, weight.shape[1])                          # (N, D)
    # A code that is never the nearest gets no gradient, so it stays where it is, for ever.
    dead = (usage.to(weight.device) == 0).nonzero().flatten()                        # (dead codes,)
    # Without replacement where the sample is large enough: two codes at one place would stay one code.
    order = [torch.randperm(len(vectors), generator=generator) for _ in range(-(-len(dead) // len(vectors)))]
    if order:
        weight[dead] = vectors[torch.cat(order)[:len(dead)].to(vectors.device)].to(weight.dtype)
    state = optimizer.state.get(weight, {}) if optimizer is not None else {}  # empty before its first step
    for moment in state.values():
        if torch.is_tensor(moment) and moment.shape == weight.shape:
            moment[dead] = 0                                         # of Adam's two, (K, D) each
    return len(dead)
