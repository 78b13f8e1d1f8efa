"""Every component agrees with its reference implementation, number for number.

Runs over tests/golden/ (a compact selection that travels with the project) and over the complete set if there
is one: the folder named by $HER2_GOLDEN_DIR, or ../shared/golden. meta['runner'] says what a file records;
tests/parity_*.py hold the functions that compute the same with our code, in RUNNERS:

    name -> function(meta, sd, inp, out) -> {output name: our value}

and every recorded output must be among them: none is passed over.

Limits follow from the conditioning of what is computed, not from the machine of the recording: see
golden_reader.disagreements. NETWORKS of the parity files are those whose float64 must equal the reference's.
"""

import importlib

import numpy as np
import parity_ldm
import parity_polygons
import parity_segmentation
import parity_spade
import pytest
import torch
import torch.nn.functional as F
from golden_reader import HERE, disagreements, expectation, folders, load
from parity_polygons import rasterize

from her2 import autoencoder, denoiser, quantizer, spade
from her2.discriminator import MultiscaleDiscriminator, discriminate
from her2.gan_losses import feature_matching, kl_divergence
from her2.net_blocks import SpectralConv2d
from her2.quantizer import vq_loss
from her2.samplers import ddim_timesteps, trajectory

RUNNERS, NETWORKS = {}, set()
for file in sorted(HERE.glob("parity_*.py")):
    part = importlib.import_module(file.stem)
    assert not RUNNERS.keys() & part.RUNNERS.keys(), f"{file.name}: defined twice: {part.RUNNERS.keys()}"
    RUNNERS.update(part.RUNNERS)
    NETWORKS |= set(part.NETWORKS)

FILES = [path for folder in folders() for path in sorted(folder.glob("*.npz"))]


def runner_of(path):
    """-> the function that computes what the file records, and whether that is a network."""
    meta, _, _, out, _ = load(path)
    runner = meta["runner"]
    if runner == "module":
        runner = f"module:{meta['config']['build']}"
    assert runner in RUNNERS, f"{path}: no runner '{runner}'; there are {sorted(RUNNERS)}"
    assert out, f"{path}: records no output"
    return RUNNERS[runner], runner in NETWORKS


@pytest.mark.parametrize("path", FILES, ids=[f"{path.parent.parent.name}/{path.stem}" for path in FILES])
def test_agrees_with_the_reference(path):
    lines = disagreements(path, *runner_of(path))
    expectation.cache_clear()
    assert not lines, f"{path}: {len(lines)} outputs disagree:\n" + "\n".join(lines[:40])


# --- Mistakes that were made in public, one at a time: the comparison sees each of them. The first step of a
# training is enough. A file that does not travel with the project is looked for in the complete set.

STEP = "^fake0$|^step0/(?!D/grad/)|^loss0/|^log0/"


def no_plus_one(self, x, onehot):
    h = self.mlp_shared(F.interpolate(onehot, size=x.shape[2:], mode="nearest"))
    return self.param_free_norm(x) * self.mlp_gamma(h) + self.mlp_beta(h)


def statistics_of_the_batch(self, x, onehot):
    h = self.mlp_shared(F.interpolate(onehot, size=x.shape[2:], mode="nearest"))
    return F.batch_norm(x, None, None, training=True) * (1 + self.mlp_gamma(h)) + self.mlp_beta(h)


def qkv_before_heads(self, x):
    flat = x.flatten(2)
    q, k, v = self.qkv(self.norm(flat)).unflatten(1, (3, self.num_heads, -1)).transpose(3, 4).unbind(1)
    y = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(flat.shape)
    return (flat + self.proj_out(y)).reshape(x.shape)


def with_options(function, **options):
    return lambda *args, **others: function(*args, **{**others, **options})


def sin_before_cos(t, dim):
    return torch.cat(embedding(t, dim).chunk(2, dim=1)[::-1], dim=1)


def in_float64(t, dim):
    half = torch.arange(dim // 2, dtype=torch.float64) * -(torch.log(torch.tensor(1e4).double()) / (dim // 2))
    angles = t[:, None].double() * half.exp()
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def bilinear_corners(*args, **options):
    return interpolate(*args, **{**options, "align_corners": True if options["mode"] == "bilinear" else None})


def after_straight_through(z, e, beta=0.25, legacy=False):
    return vq_loss(z, z + (e - z).detach(), beta, legacy)


embedding, interpolate, linspace = denoiser.time_embedding, F.interpolate, torch.linspace
MISTAKES = {                # what: (file, outputs, object, attribute, the wrong thing)
    "SPADE without spectral norm": ("spade_step_batch_vae", STEP, SpectralConv2d, "weight",
                                    lambda self: self.weight_orig),
    "gamma for 1 + gamma": ("spade_norm_batch", "eval", spade.SPADENorm, "forward", no_plus_one),
    "batch statistics in eval": ("spade_norm_batch", "eval", spade.SPADENorm, "forward",
                                 statistics_of_the_batch),
    "encoder resizes with align_corners": ("spade_step_batch_vae", STEP, F, "interpolate", bilinear_corners),
    "D's pooling counts the padding": ("spade_step_batch_vae", STEP, F, "avg_pool2d",
                                       with_options(F.avg_pool2d, count_include_pad=True)),
    "feature matching with the logits": (
        "spade_losses", "G_losses", parity_spade, "feature_matching", lambda fake, real, weight:
        feature_matching([f + f[-1:] for f in fake], [r + r[-1:] for r in real], weight)),
    "KL as a mean over the batch": ("spade_losses", "kld", parity_spade, "kl_divergence", with_options(
        kl_divergence, reduction="mean")),
    "VQ: eps 1e-5": ("vq_f4_small_stored", "dec|prequant", autoencoder, "group_norm", denoiser.group_norm),
    "VQ: symmetric padding": ("vq_step", STEP, torch.nn, "ZeroPad2d", lambda sides:
                              torch.nn.ConstantPad2d(1, 0.0)),
    "VQ: beta on the other term": ("quantizer", "", quantizer, "vq_loss", lambda z, e, beta, legacy:
                                   vq_loss(z, e, beta, not legacy)),
    "VQ: loss after the straight-through": ("quantizer", "", quantizer, "vq_loss", after_straight_through),
    "U-Net: eps 1e-6": ("unet_semantic_mc32", "", denoiser, "group_norm", autoencoder.group_norm),
    "time embedding [sin, cos]": ("unet_semantic_mc32", "", denoiser, "time_embedding", sin_before_cos),
    "qkv split before heads": ("unet_semantic_mc32", "", denoiser.Attention, "forward", qkv_before_heads),
    "linear_end 0.0195": ("schedule_semantic", "", parity_ldm, "schedule_of", lambda config:
                          parity_ldm.Schedule(config["timesteps"], config["linear_start"], 0.0195)),
    "linear in beta": ("schedule_semantic", "", torch, "linspace", lambda start, end, steps, **options:
                       linspace(start ** 2, end ** 2, steps, **options).sqrt()),
    "DDIM timesteps without + 1": ("ddim_ldm", "", parity_ldm, "ddim_timesteps", lambda T, S, spacing:
                                   [t - 1 for t in ddim_timesteps(T, S, spacing)]),
    "DDIM ends at alpha_bar 1": ("ddim_ldm", "/x$", parity_ldm, "trajectory",
                                 with_options(trajectory, final_alpha_bar=1.0)),
    "diffusers' default flags": ("ddim_diffusers", "^ldm_like.*/x$", parity_ldm, "trajectory",
                                 lambda **o: trajectory(**{**o, "final_alpha_bar": 1.0, "timesteps":
                                                           [t - 1 for t in o["timesteps"]]})),
    "an absent class weighs nothing (MONAI)": (
        "seg_losses", "monai_gdl", parity_segmentation, "generalised_dice_loss",
        with_options(parity_segmentation.generalised_dice_loss, absent="zero")),
    "pixel centres on integers": ("polygons", "mask", parity_polygons, "rasterize", lambda rings, *size:
                                  rasterize([ring - 0.5 for ring in rings], *size)),
}


def found(name):
    paths = [path for path in FILES if path.stem == name]
    if not paths:
        pytest.skip(f"{name} is in the complete set only")
    return paths[-1]                                   # the complete one where there is one: it knows float64


@pytest.mark.parametrize("what", MISTAKES)
def test_a_planted_mistake_is_seen(what, monkeypatch):
    name, only, place, attribute, wrong = MISTAKES[what]
    path = found(name)
    run, network = runner_of(path)
    assert not disagreements(path, run, network, only)
    monkeypatch.setattr(place, attribute, wrong)
    try:
        assert disagreements(path, run, network, only, again=True)
    except (RuntimeError, AssertionError) as error:              # so wrong that it cannot even be computed
        assert "does not require grad" in str(error) or "not have been used" in str(error) \
            or "depends on the direction" in str(error), error


def test_a_better_exp_is_no_mistake(monkeypatch):
    """The embedding in float64, then rounded: another machine's exp may come as close. It moves 1e-6."""
    path = found("unet_semantic_mc32")
    run, network = runner_of(path)
    disagreements(path, run, network)
    monkeypatch.setattr(denoiser, "time_embedding", in_float64)
    assert not disagreements(path, run, network, again=True)


@pytest.mark.parametrize("norm, eps", [(autoencoder.group_norm(32), 1e-6), (denoiser.group_norm(32), 1e-5),
                                       (spade.SPADENorm(32, 2).param_free_norm, 1e-5)])
def test_eps_of_a_norm_is_seen_where_the_variance_is_small(norm, eps):
    """Groups and channels of variance 4e-6: eps 1e-5 shrinks them to 0.53, 1e-6 to 0.89, and clamping the
    variance at 1e-5 (synchronised batch norm on several devices) to 0.63."""
    x = torch.randn(4, 32, 64, 64, generator=torch.Generator().manual_seed(0))
    mean = x.mean((2, 3) if isinstance(norm, torch.nn.GroupNorm) else (0, 2, 3), keepdim=True)
    x = 2e-3 * (x - mean) / (x - mean).square().mean((2, 3) if isinstance(norm, torch.nn.GroupNorm)
                                                     else (0, 2, 3), keepdim=True).sqrt()
    y = norm(x)
    assert y.square().mean().sqrt().item() == pytest.approx((4e-6 / (4e-6 + eps)) ** 0.5, rel=1e-4)


# --- Kinds of files that are recorded elsewhere but do not travel with the project: their runners, on sets of
# that kind made here.

def test_runner_of_large_polygon_sets():
    """Six polygons of 20 to 200 corners on 512 x 512, corners on multiples of 1/16: exact in integers."""
    rng, size = np.random.default_rng(0), 512
    rings = [np.round(rng.uniform(-40, size + 40, (rng.integers(20, 201), 2)) * 16) / 16 for _ in range(6)]
    starts = np.cumsum([0] + [len(ring) for ring in rings])
    inp = {"verts": torch.from_numpy(np.concatenate(rings)), "ring_start": torch.from_numpy(starts),
           "poly_start": torch.arange(7)}
    ours = RUNNERS["polygons_big"]({"config": {"H": size, "W": size}}, {}, inp, {})
    masks = np.unpackbits(ours["mask"])[:6 * size * size].reshape(6, size, size).astype(bool)
    centre = 32 * np.arange(size) + 16                                 # in units of 1/32 of a pixel
    for ring, mask in zip(rings, masks):
        crossed_right = np.zeros((size, size), int)                    # edges right of every centre
        for (x1, y1), (x2, y2) in zip((ring * 32).astype(int), (np.roll(ring, -1, 0) * 32).astype(int)):
            for row in np.flatnonzero((y1 > centre) != (y2 > centre)):
                numerator = x1 * (y2 - y1) + (centre[row] - y1) * (x2 - x1)       # of the crossing's x
                crossed_right[row] += centre * abs(y2 - y1) < numerator * np.sign(y2 - y1)
        assert np.array_equal(mask, crossed_right % 2 == 1)
    assert np.array_equal(ours["area"], masks.sum((1, 2)))


def test_runner_of_spade_steps_without_an_encoder():
    opt = dict(semantic_nc=6, ngf=2, ndf=4, crop_size=64, norm_G="spectralspadeinstance3x3", use_vae=False,
               lr=1e-4)
    torch.manual_seed(0)
    networks = {"G": parity_spade.build_generator(opt), "D": MultiscaleDiscriminator(9, 4)}
    sd = {f"{letter}.{name}": value.clone() for letter, network in networks.items()
          for name, value in network.state_dict().items()}
    inp = {"label": torch.randint(0, 6, (2, 1, 64, 64)), "image": torch.rand(1, 2, 3, 64, 64) * 2 - 1}
    out = {"step0/D/grad_names": np.array([])}
    ours = RUNNERS["spade_step"]({"config": {"opt": opt, "steps": 1}}, sd, inp, out)
    assert not [name for name in ours if "/E/" in name or "KLD" in name]
    onehot = F.one_hot(inp["label"][:, 0], 6).movedim(-1, 1).float()
    fake = networks["G"](onehot)
    fakes, reals = discriminate(networks["D"], onehot, fake, inp["image"][0])
    match = sum((a - b).abs().mean() for f, r in zip(fakes, reals) for a, b in zip(f[:-1], r[:-1])) * 10 / 2
    assert torch.allclose(ours["fake0"], fake, atol=1e-5)
    assert torch.allclose(ours["loss0/GAN"], -(fakes[0][-1].mean() + fakes[1][-1].mean()) / 2, atol=1e-5)
    assert torch.allclose(ours["loss0/GAN_Feat"], match, rtol=1e-4)
