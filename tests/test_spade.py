"""SPADE networks and shared layers against slow, independent computations."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from her2.net_blocks import SpectralConv2d, frozen, init_weights, load_strict
from her2.discriminator import MultiscaleDiscriminator, PatchGAN
from her2.run_seeds import generator as random
from her2.spade import SPADEGenerator, SPADENorm, SPADEResBlock, VAEEncoder, recalibrated, reparameterize


@pytest.fixture(autouse=True)
def same_weights_in_every_run():
    """Constructors draw from torch's global generator."""
    torch.manual_seed(0)


def small_generator(**changes) -> SPADEGenerator:
    network = SPADEGenerator(**{**dict(num_classes=6, ngf=4, z_dim=8, size=64, hidden=16), **changes})
    init_weights(network, random(0, "weights"), gain=1.0)
    return network


def masks(batch: int, height: int, width: int, classes: int = 6) -> torch.Tensor:
    """(B, K, H, W): one-hot label maps of random 8 x 8 squares."""
    label = torch.randint(classes, (batch, height // 8, width // 8), generator=random(batch, height, width))
    label = label.repeat_interleave(8, 1).repeat_interleave(8, 2)
    return F.one_hot(label, classes).permute(0, 3, 1, 2).float()


def noise(*shape) -> torch.Tensor:
    return torch.randn(shape, generator=random("noise", *shape))


# Spectral normalisation

def test_spectral_norm_converges_to_the_largest_singular_value():
    layer = SpectralConv2d(5, 7, 3)
    init_weights(layer, random(1))
    for _ in range(300):
        layer.weight()
    sigma = np.linalg.svd(layer.weight_orig.detach().flatten(1).numpy(), compute_uv=False)[0]
    assert torch.allclose(layer.weight() * sigma, layer.weight_orig, rtol=1e-4, atol=1e-7)
    assert np.isclose(torch.linalg.svdvals(layer.weight().detach().flatten(1))[0], 1, rtol=1e-4)


def test_power_iteration_steps_once_per_training_forward_only():
    layer = SpectralConv2d(3, 4, 3, padding=1)
    x, w = noise(2, 3, 8, 8), layer.weight_orig.detach().flatten(1).numpy().astype(np.float64)
    u = layer.weight_u.numpy().astype(np.float64)
    layer.eval()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer(x)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    layer.train()
    layer(x)
    v = w.T @ u / np.linalg.norm(w.T @ u)
    u = w @ v / np.linalg.norm(w @ v)
    assert np.allclose(layer.weight_v, v, atol=1e-6) and np.allclose(layer.weight_u, u, atol=1e-6)
    assert np.allclose(layer.eval().weight().detach().flatten(1).numpy() * (u @ w @ v), w, atol=1e-6)


def test_gradient_of_spectral_norm_takes_u_and_v_as_constants():
    layer = SpectralConv2d(2, 3, 1, bias=False).double().eval()
    x = noise(1, 2, 4, 4).double()
    layer(x).square().sum().backward()
    u, v, w = layer.weight_u, layer.weight_v, layer.weight_orig.detach().clone()

    def value(weight):
        return F.conv2d(x, weight / (u @ weight.flatten(1) @ v)).square().sum()

    for index in np.ndindex(*w.shape):
        plus, minus = w.clone(), w.clone()
        plus[index] += 1e-6
        minus[index] -= 1e-6
        slope = (value(plus) - value(minus)) / 2e-6
        assert torch.isclose(layer.weight_orig.grad[index], slope, rtol=1e-5, atol=1e-6)


def test_two_forwards_before_one_backward():
    """Fake and real in two passes: the second power iteration must not spoil the graph of the first."""
    layer = SpectralConv2d(3, 4, 3)
    (layer(noise(1, 3, 5, 5)).sum() + layer(noise(1, 3, 6, 6)).sum()).backward()
    assert torch.isfinite(layer.weight_orig.grad).all()


def test_spectral_norm_stays_float32_under_autocast():
    layer = SpectralConv2d(16, 16, 3).eval()
    exact = layer.weight().detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.weight().detach(), exact)
        layer.train()
        layer.power_iteration(50)
    assert layer.weight_u.dtype == torch.float32
    sigma = np.linalg.svd(layer.weight_orig.detach().flatten(1).numpy(), compute_uv=False)[0]
    u, v = layer.weight_u.numpy(), layer.weight_v.numpy()
    assert np.isclose(u @ layer.weight_orig.detach().flatten(1).numpy() @ v, sigma, rtol=1e-3)


# Initialisation and loading

def test_init_is_xavier_and_a_function_of_the_generator_alone():
    networks = [SPADEGenerator(ngf=4, z_dim=16, size=64, hidden=32) for _ in range(2)]
    for network in networks:
        init_weights(network, random(3))
    assert all(torch.equal(a, b) for a, b in zip(networks[0].parameters(), networks[1].parameters()))
    for weight, fans in ((networks[0].fc.weight, 16 + 256),
                         (networks[0].head_0.conv_0.weight_orig, 2 * 64 * 9),
                         (networks[0].up_0.norm_0.mlp_gamma.weight, (64 + 32) * 9)):
        assert abs(weight.std() / (0.02 * (2 / fans) ** 0.5) - 1) < 0.05
    assert all(not p.any() for name, p in networks[0].named_parameters() if name.endswith("bias"))
    patchgan = PatchGAN(ndf=16)
    init_weights(patchgan, random(4), kind="normal")
    assert abs(patchgan.main[2].weight.std() - 0.02) < 1e-3 and abs(patchgan.main[3].weight.mean() - 1) < 0.02


def test_an_untrained_network_is_tame_in_eval_mode():
    """Without the power iterations of init_weights sigma would be the product of two random directions."""
    for seed in range(20):
        layer = SpectralConv2d(16, 16, 3)
        init_weights(layer, random(seed))
        assert np.linalg.svd(layer.eval().weight().detach().flatten(1).numpy(), compute_uv=False)[0] < 1.5


NETWORKS = {"generator": lambda: small_generator(), "encoder": lambda: VAEEncoder(ngf=4, z_dim=8, size=64),
            "discriminator": lambda: MultiscaleDiscriminator(9, 4), "patchgan": lambda: PatchGAN(ndf=4)}


@pytest.mark.parametrize("name", NETWORKS)
def test_official_weights_load_strictly(name):
    source, network = NETWORKS[name](), NETWORKS[name]()
    init_weights(source, random(5))
    network.load_official_state_dict(source.state_dict())
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in source.state_dict().items())

    wrong = {key: torch.randn_like(value, dtype=torch.float32) for key, value in source.state_dict().items()}
    first, second = list(wrong)[:2]
    del wrong[first]
    wrong[second] = torch.zeros(3, 2, 1)
    wrong["intruder.weight"] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        network.load_official_state_dict(wrong)
    assert f"1 missing: {first};" in str(error.value)
    assert "1 unexpected: intruder.weight;" in str(error.value)
    assert f"1 misshapen: {second} (3, 2, 1) instead of" in str(error.value)
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in source.state_dict().items())


def test_load_strict_renames_and_notices_collisions():
    layer = nn.Linear(2, 3)
    load_strict(layer, {"old.w": torch.ones(3, 2), "old.b": torch.ones(3)},
                rename=[(r"^old\.", ""), (r"^w$", "weight"), (r"^b$", "bias")])
    assert layer.weight.eq(1).all() and layer.bias.eq(1).all()
    with pytest.raises(ValueError, match="1 given twice: bias"):
        load_strict(layer, {"weight": torch.ones(3, 2), "bias": torch.ones(3), "b": torch.ones(3)},
                    rename=[(r"^b$", "bias")])
    with pytest.raises(ValueError, match="misshapen: bias int instead of"):
        load_strict(layer, {"weight": torch.ones(3, 2), "bias": 7})


def test_the_patchgan_is_found_inside_an_autoencoder_checkpoint():
    source, network = PatchGAN(ndf=4), PatchGAN(ndf=4)
    inside = {f"loss.discriminator.{name}": value for name, value in source.state_dict().items()}
    network.load_official_state_dict({"encoder.conv_in.weight": torch.zeros(2), **inside})
    assert torch.equal(network.main[0].weight, source.main[0].weight)


def test_frozen_restores_what_was_trained():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with frozen(network):
        y = network(torch.ones(1, 2, requires_grad=True))
    y.sum().backward()
    assert all(p.requires_grad for p in network.parameters())
    assert all(p.grad is None for p in network.parameters())


# SPADE layers

@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_spade_norm_pixel_by_pixel(norm):
    """The equation in loops, at a size ratio (10 : 7) that is no integer: nearest means floor(i * 10 / 7)."""
    layer = SPADENorm(3, 2, norm, hidden=4)
    x, onehot = noise(2, 3, 7, 7), (noise(2, 2, 10, 10) > 0).float()
    ours = layer(x, onehot).detach().numpy()
    weights = {name: value.detach().double().numpy() for name, value in layer.named_parameters()}
    x = x.double().numpy()
    axes = (0, 2, 3) if norm == "batch" else (2, 3)
    normal = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)
    small = onehot.numpy()[:, :, [i * 10 // 7 for i in range(7)]][:, :, :, [i * 10 // 7 for i in range(7)]]

    def convolve(image, name):
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        padded, axes = np.pad(image, ((0, 0), (0, 0), (1, 1), (1, 1))), ([1, 2, 3], [1, 2, 3])
        out = np.zeros((len(image), len(weight), 7, 7)) + bias[:, None, None]
        for i in range(7):
            for j in range(7):
                out[:, :, i, j] += np.tensordot(padded[:, :, i:i + 3, j:j + 3], weight, axes)
        return out

    h = np.maximum(convolve(small, "mlp_shared.0"), 0)
    expected = normal * (1 + convolve(h, "mlp_gamma")) + convolve(h, "mlp_beta")
    assert np.abs(ours - expected).max() < 1e-5


def test_a_mask_of_a_single_class_is_not_washed_out(monkeypatch):
    """The reason for SPADE: two uniform label maps, which any normalisation makes equal, give two results."""
    network = small_generator(norm="instance").eval()       # starts from z: the label comes by SPADE alone
    uniform, z = torch.zeros(2, 6, 64, 64), noise(1, 8).expand(2, 8)
    uniform[0, 1] = uniform[1, 4] = 1
    with torch.no_grad():
        a, b = network(uniform, z)[..., 16:48, 16:48]       # at the borders padding tells the two apart
        assert (a - b).abs().mean() > 0.01
        monkeypatch.setattr(SPADENorm, "forward", lambda self, x, onehot: self.param_free_norm(x))
        a, b = network(uniform, z)
        assert (a - b).abs().max() < 1e-6, "norm alone"


def test_block_has_a_shortcut_only_where_the_width_changes():
    same, other = SPADEResBlock(8, 8, 6), SPADEResBlock(8, 4, 6)
    assert not any(name.startswith(("conv_s", "norm_s")) for name in same.state_dict())
    assert {name.split(".")[0] for name in other.state_dict()} > {"conv_s", "norm_s"}
    assert other.conv_s.bias is None
    onehot = masks(2, 32, 32)
    x = noise(2, 8, 16, 16)
    same.conv_1.weight = lambda: torch.zeros(8, 8, 3, 3)      # with nothing added, the block is the identity
    assert torch.equal(same(x, onehot), x)


# Generator

@pytest.mark.parametrize("height, width", [(32, 32), (64, 64), (64, 96), (160, 32)])
@pytest.mark.parametrize("use_vae", [True, False])
def test_generator_works_at_every_size_divisible_by_32(height, width, use_vae):
    network = small_generator(use_vae=use_vae)
    image = network(masks(2, height, width), noise(2, 8) if use_vae else None)
    assert image.shape == (2, 3, height, width)
    assert image.abs().max() <= 1 and image.std() > 1e-3


@pytest.mark.parametrize("upsampling, stride", [("normal", 32), ("more", 64), ("most", 128)])
def test_upsampling_and_non_square_training_size(upsampling, stride):
    network = small_generator(upsampling=upsampling, size=(2 * stride, stride))
    assert network.stride == stride and network.fc.out_features == 16 * 4 * 2 * 1
    assert network(masks(2, 2 * stride, stride), noise(2, 8)).shape == (2, 3, 2 * stride, stride)


def test_latent_grid_is_repeated_at_other_sizes():
    network = small_generator(size=64)
    z = noise(2, 8)
    at_training_size = network.start(masks(2, 64, 64), z)
    assert torch.equal(at_training_size, network.fc(z).view(2, 64, 2, 2))
    doubled = network.start(masks(2, 128, 64), z)
    assert torch.equal(doubled, at_training_size.repeat_interleave(2, dim=2))


def test_generator_refuses_what_it_cannot_use():
    network = small_generator()
    with pytest.raises(AssertionError, match=r"divisible by 32, found \(48, 64\)"):
        network(masks(1, 48, 64), noise(1, 8))
    with pytest.raises(AssertionError, match=r"\(B, 6, H, W\), found \(1, 5, 64, 64\)"):
        network(masks(1, 64, 64, classes=5), noise(1, 8))
    with pytest.raises(AssertionError, match=r"z must be \(1, 8\), found None"):
        network(masks(1, 64, 64))
    with pytest.raises(AssertionError, match="divisible by 32"):
        small_generator(size=100)
    with pytest.raises(KeyError, match="least"):
        small_generator(upsampling="least")


def test_config_rebuilds_the_network():
    network = small_generator(upsampling="more", norm="instance")
    twin = SPADEGenerator(**network.config)
    assert {k: v.shape for k, v in twin.state_dict().items()} == \
           {k: v.shape for k, v in network.state_dict().items()}


def test_in_eval_mode_an_image_depends_on_its_own_mask_and_z_only():
    network = small_generator().eval()
    onehot, z = masks(3, 64, 64), noise(3, 8)
    together = network(onehot, z)
    for i in range(3):
        assert torch.allclose(together[i:i + 1], network(onehot[i:i + 1], z[i:i + 1]), atol=1e-5)
    assert (together[0] - network(onehot[:1], z[1:2])[0]).abs().max() > 1e-3          # z matters
    network.train()                                             # the same claim fails in training mode
    assert not torch.allclose(network(onehot, z)[:1], network(onehot[:1], z[:1]), atol=1e-2)


def test_channels_last_gives_the_same_image():
    network = small_generator().eval()
    onehot, z = masks(2, 64, 64), noise(2, 8)
    usual = network(onehot, z)
    network.to(memory_format=torch.channels_last)
    assert torch.allclose(network(onehot.contiguous(memory_format=torch.channels_last), z), usual, atol=1e-5)


def test_recalibrated_statistics_are_plain_averages_over_the_batches():
    network = small_generator().train()
    with torch.no_grad():                              # weights far from those that the statistics belong to
        network.fc.weight.mul_(7).add_(0.3)
    parameters = [p.clone() for p in network.parameters()]
    batches = [(masks(4, 64, 64)[i:], torch.randn(4 - i, 8, generator=random("z", i))) for i in range(3)]
    twin = recalibrated(network, batches)
    assert all(torch.equal(a, b) for a, b in zip(parameters, twin.parameters()))
    assert network.training and all(torch.equal(a, b) for a, b in zip(parameters, network.parameters()))
    first = network.head_0.norm_0.param_free_norm
    assert first.momentum == 0.1 and first.training
    network = recalibrated(network.eval(), batches)
    first = network.head_0.norm_0.param_free_norm
    assert not any(module.training for module in network.modules())
    starts = [network.start(onehot, z).detach() for onehot, z in batches]
    mean = torch.stack([x.mean((0, 2, 3)) for x in starts]).mean(0)
    var = torch.stack([x.var((0, 2, 3)) for x in starts]).mean(0)
    assert torch.allclose(first.running_mean, mean, atol=1e-5)
    assert torch.allclose(first.running_var, var, rtol=1e-4)


def test_recalibration_fits_the_spectral_norm_to_the_weights():
    """Averaged weights have other singular vectors: refitted once, whatever the number of batches."""
    fitted = []
    for count in (1, 3):
        network = small_generator()
        network.head_0.conv_0.weight_u.copy_(F.normalize(noise(64), dim=0))
        convolution = recalibrated(network, [(masks(2, 64, 64), noise(2, 8))] * count).head_0.conv_0
        weight = convolution.eval().weight().detach()
        assert 1 - 1e-4 < torch.linalg.svdvals(weight.flatten(1))[0] < 1.1
        fitted.append(convolution.weight_u)
    assert torch.equal(*fitted)


def test_after_recalibration_eval_reproduces_training_statistics():
    """With one batch the running statistics are that batch's own, so both modes agree (up to n / (n - 1))."""
    network = small_generator(size=128)
    batch = masks(6, 128, 128), noise(6, 8)
    network = recalibrated(network, [batch])
    evaluated = network(*batch)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.train()
    assert (network(*batch) - evaluated).abs().mean() < 0.01
    fresh = small_generator(size=128).eval()
    assert (fresh(*batch) - evaluated).abs().mean() > 0.05


# Encoder

@pytest.mark.parametrize("size, side", [(8, 8), (64, 64), (96, 64), (128, 128), (256, 256), (512, 256)])
def test_encoder_fits_every_training_size(size, side):
    encoder = VAEEncoder(ngf=2, z_dim=5, size=size)
    assert encoder.side == side
    assert encoder.fc_mu.in_features == 16 * 2 * min(8, side // 8)
    for height, width in ((size, size), (40, 72)):
        mu, logvar = encoder(noise(2, 3, height, width))
        assert mu.shape == logvar.shape == (2, 5)


def test_encoder_resizes_as_documented():
    encoder = VAEEncoder(ngf=2, z_dim=5, size=64).eval()
    image = noise(1, 3, 100, 64)
    resized = F.interpolate(image, size=(64, 64), mode="bilinear", align_corners=False)
    assert torch.equal(encoder(image)[0], encoder(resized)[0])
    halves = F.avg_pool2d(noise(1, 3, 128, 128), 2)     # bilinear at exactly one half averages 2 x 2 pixels
    assert torch.allclose(encoder(noise(1, 3, 128, 128))[0], encoder(halves)[0], atol=1e-5)


def test_reparameterize_has_the_right_law_and_gradient():
    mu, logvar = torch.tensor([[0.5, -2.0]]), torch.tensor([[0.0, 1.4]])
    n = 40000
    z = reparameterize(mu.expand(n, 2), logvar.expand(n, 2), torch.randn(n, 2, generator=random("law")))
    assert torch.allclose(z.mean(0), mu[0], atol=5 * 2.1 / n ** 0.5)
    assert torch.allclose(z.var(0), logvar[0].exp(), rtol=0.05)
    mu.requires_grad_(), logvar.requires_grad_()
    eps = torch.tensor([[1.0, -3.0]])
    reparameterize(mu, logvar, eps).sum().backward()
    assert torch.equal(mu.grad, torch.ones(1, 2))
    assert torch.allclose(logvar.grad, eps * (0.5 * logvar).exp() / 2)
