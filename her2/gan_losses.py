"""Losses of the two adversarial networks. D's hinge loss (Lim & Ye 2017; of SPADE and of the VQ autoencoder):

    loss_real = mean relu(1 - logits_real)      loss_fake = mean relu(1 + logits_fake)      (discriminator)
    loss_G    = -mean logits_fake                                                           (generator)

SPADE adds, for the generator (Park et al., CVPR 2019, appendix A):

    feature matching   10 / levels * sum over levels and layers of mean |D_layer(fake) - D_layer(real)|
    KL divergence      0.05 * 1/2 sum over z of (mu^2 + exp(logvar) - 1 - logvar)

Taming's autoencoder weighs its adversarial loss so that both losses pull equally hard on the last layer
(Esser et al., CVPR 2021, eq. 7):   |d nll / d last_layer| / (|d g / d last_layer| + 1e-4)
with nll the reconstruction loss (its official name) and g the loss of the generator.

PAPER: the HER2 paper gives no weights; 10 and 0.05 are the numbers of the official code.
Differs from the official code (NVlabs/SPADE), also in the preset `paper`: the KL divergence is a mean over
the batch, not a sum, so that its weight does not grow with the batch: 0.05 pulls 16 times less than there at
batch 16 (`--lambda-kld 0.8` is the official strength there; reduction="sum" is for the parity test only). The
third official loss, 10 times that of VGG-19's features (net_perceptual.py), is off without a file at `--vgg`.

"logits" is one map (B, 1, h, w), or what MultiscaleDiscriminator returns, of which the last entry of every
level counts. Everything is summed up in float32, under autocast too.
"""

import torch
import torch.nn.functional as F

# What a logit x costs: D on a real and on a fake image, G on its own fake. D stops pulling where it is right
# by a margin of 1, and spends itself on what it still mistakes. G has no margin: every logit pulls alike.
HINGE = {"real": lambda x: F.relu(1 - x), "fake": lambda x: F.relu(1 + x), "generator": lambda x: -x}


def adversarial_loss(logits, role: str, cost=HINGE) -> torch.Tensor:
    """The loss () of `role`: the discriminator on "real" or "fake" images (both are added in SPADE, averaged
    in the VQ autoencoder), or the "generator" on fake ones."""
    maps = [logits] if torch.is_tensor(logits) else [level[-1] for level in logits]    # (B, 1, h, w) each
    # A mean per level, then over levels: the coarse one has a quarter of the logits and the same say.
    return torch.stack([cost[role](x.float()).mean() for x in maps]).mean()


def feature_matching(fake_features: list, real_features: list, weight: float = 10.0) -> torch.Tensor:
    """L1 distance between D's features of fake and real, all layers but the logits; no gradient into real."""
    # Where D is sure of every fake, the slope of its logits says little about how to become real. The
    # distance to real features still does. `detach`: it is the fake that has to move.
    distances = [F.l1_loss(fake.float(), real.detach().float())
                 for fake_level, real_level in zip(fake_features, real_features, strict=True)
                 for fake, real in zip(fake_level[:-1], real_level[:-1], strict=True)]  # without the logits
    return weight / len(fake_features) * torch.stack(distances).sum()   # ()


def kl_divergence(mu: torch.Tensor, logvar: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """KL(N(mu, exp(logvar)) || N(0, I)), (B, z_dim) each: summed over z; over B "mean" or official "sum"."""
    mu, logvar = mu.float(), logvar.float()                             # exp overflows in fp16 above 11
    # Pulls what the encoder says of every image towards one law, N(0, I). Where all their N(mu, var) overlap
    # and fill it, a z drawn from N(0, I) is one that G has been trained on: a fair draw at synthesis.
    kl = 0.5 * (mu ** 2 + logvar.exp() - 1 - logvar).sum(dim=1)                                 # (B,)
    return {"mean": kl.mean, "sum": kl.sum}[reduction]()                # ()


def pulls(nll: torch.Tensor, g: torch.Tensor, last_layer: torch.Tensor, loss_scale: float = 1.0):
    """The gradients of both losses at `last_layer`, (2, *its shape). loss_scale: GradScaler.get_scale(), by
    which losses are multiplied and gradients divided: in fp16 those of a mean of many pixels round to 0."""
    return torch.stack([torch.autograd.grad(loss_scale * loss, last_layer, retain_graph=True)[0].float()
                        / loss_scale for loss in (nll, g)])


def adaptive_weight(gradients) -> torch.Tensor:
    """How much harder nll pulls than the adversarial loss, (), from the `pulls` of the whole batch: at most
    1e4, and 0 where the scaled gradients overflow (GradScaler then skips the step and lowers itself)."""
    # The last layer stands for all others: every path of both losses goes through it, so the ratio there is
    # about the ratio everywhere, and its gradient costs one layer's backward instead of the whole network's.
    nll_gradient, g_gradient = gradients
    # 1e-4 and 1e4 (official): a D that says nothing would otherwise be amplified without bound.
    ratio = nll_gradient.norm() / (g_gradient.norm() + 1e-4)
    return ratio.nan_to_num(0.0, posinf=0.0).clamp(0.0, 1e4).detach()


def saturated_share(image: torch.Tensor) -> torch.Tensor:
    """Share of pixel values with |x| > 0.98. Plain white background, the known collapse, drives it to 1."""
    return (image.detach().abs() > 0.98).float().mean()      # tanh: 0.98 is a pre-activation of 2.3
