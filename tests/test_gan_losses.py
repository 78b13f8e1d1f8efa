"""Adversarial losses, discriminators and perceptual distances against independent computations."""

import pytest
import torch
import torch.nn.functional as F
from parity_spade import loss_of_kind

from her2.net_blocks import frozen, init_weights
from her2.discriminator import MultiscaleDiscriminator, PatchGAN, discriminate
from her2.gan_losses import (adaptive_weight, adversarial_loss, feature_matching, kl_divergence, pulls,
                             saturated_share)
from her2.net_perceptual import LPIPS, VGG19Loss
from her2.run_seeds import generator as random
from her2.spade import SPADEGenerator, VAEEncoder, reparameterize


@pytest.fixture(autouse=True)
def same_weights_in_every_run():
    """Constructors draw from torch's global generator."""
    torch.manual_seed(0)


def noise(*shape) -> torch.Tensor:
    return torch.randn(shape, generator=random("noise", *shape))


def scales_of(*maps) -> list:
    """What MultiscaleDiscriminator returns, with these maps as logits and one feature that must not count."""
    return [[torch.full((1, 1, 2, 2), 1e6), logits] for logits in maps]


# Adversarial losses

def test_hinge_by_hand():
    real, fake = torch.tensor([[[[2.0, 0.5, -1.0, 1.0]]]]), torch.tensor([[[[-2.0, -0.5, 1.0, 0.0]]]])
    loss_real, loss_fake = adversarial_loss(real, "real"), adversarial_loss(fake, "fake")
    assert loss_real == pytest.approx((0 + 0.5 + 2 + 0) / 4)
    assert loss_fake == pytest.approx((0 + 0.5 + 2 + 1) / 4)
    assert adversarial_loss(fake, "generator") == pytest.approx(1.5 / 4)


def test_scales_count_alike_whatever_their_size():
    large, small = torch.full((1, 1, 8, 8), 0.25), torch.full((1, 1, 2, 2), -3.0)
    loss_real = adversarial_loss(scales_of(large, small), "real")
    loss_fake = adversarial_loss(scales_of(small, large), "fake")
    assert loss_real == pytest.approx((0.75 + 4) / 2) and loss_fake == pytest.approx((0 + 1.25) / 2)
    assert adversarial_loss(scales_of(large, small), "generator") == pytest.approx((-0.25 + 3) / 2)


def test_other_kinds_against_torch():
    x = noise(2, 1, 5, 5) * 3
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    for role, target in (("real", one), ("fake", zero), ("generator", one)):
        assert torch.allclose(loss_of_kind(x, role, "ls"), F.mse_loss(x, target))
        cross_entropy = F.binary_cross_entropy_with_logits(x, target)
        assert torch.allclose(loss_of_kind(x, role, "original"), cross_entropy)
        assert torch.allclose(loss_of_kind(x, role, "w"), x.mean() * (1 if role == "fake" else -1))
    with pytest.raises(AssertionError, match="found kind 'wgan'"):
        loss_of_kind(x, "real", "wgan")


def test_feature_matching_leaves_out_the_logits_and_the_real_side():
    shapes = (1, 2, 4, 4), (1, 3, 2, 2), (1, 1, 2, 2)
    fake = [[noise(*shape).requires_grad_() for shape in shapes] for _ in range(2)]
    real = [[(feature.detach() + 0.5).requires_grad_() for feature in scale] for scale in fake]
    loss = feature_matching(fake, real)
    assert loss.item() == pytest.approx(10 / 2 * 2 * 2 * 0.5)
    loss.backward()
    assert all(feature.grad is None for scale in real for feature in scale)
    assert all(scale[-1].grad is None for scale in fake)
    assert torch.allclose(fake[1][0].grad, torch.full((1, 2, 4, 4), -10 / 2 / 32))
    with pytest.raises(ValueError, match="shorter"):
        feature_matching(fake, real[:1])


def test_kl_against_torch_distributions():
    mu, logvar = noise(3, 7), noise(3, 7) / 2
    q = torch.distributions.Normal(mu, (logvar / 2).exp())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(torch.zeros(3, 7), torch.ones(3, 7)))
    assert torch.allclose(kl_divergence(mu, logvar), kl.sum(1).mean(), rtol=1e-5)
    assert torch.allclose(kl_divergence(mu, logvar, reduction="sum"), kl.sum(), rtol=1e-5)
    assert kl_divergence(torch.zeros(2, 4), torch.zeros(2, 4)) == 0


def test_kl_of_a_sample_does_not_depend_on_the_batch_size():
    """The pull on each sample: value, and gradient x B. The official sum grows with the batch."""
    mu, logvar = noise(1, 7), noise(1, 7)
    for batch in (1, 2, 16):
        wide = mu.repeat(batch, 1).requires_grad_()
        loss = kl_divergence(wide, logvar.repeat(batch, 1))
        assert loss.item() == pytest.approx(kl_divergence(mu, logvar).item(), rel=1e-5)
        official = kl_divergence(wide, logvar.repeat(batch, 1), reduction="sum")
        assert official.item() == pytest.approx(batch * loss.item(), rel=1e-5)
        loss.backward()
        assert torch.allclose(wide.grad.sum(0), mu[0], rtol=1e-5)


def test_adaptive_weight_is_the_ratio_of_two_gradients():
    last = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    x = last * torch.tensor([3.0, 4.0])
    weight = adaptive_weight(pulls(x.sum(), (last * torch.tensor([0.6, 0.8])).sum(), last))
    assert weight.item() == pytest.approx(5 / (1 + 1e-4)) and not weight.requires_grad
    assert adaptive_weight(pulls(x.sum() * 1e6, last.sum() * 1e-6, last)) == 1e4
    assert last.grad is None
    x.sum().backward()                                                       # the graph is still there
    assert torch.equal(last.grad, torch.tensor([3.0, 4.0]))


def test_adaptive_weight_of_half_precision_needs_the_scale():
    last = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    x = (last * torch.tensor([3.0, 4.0])).half().float() * 1e-8      # a gradient below the least fp16 number
    g = (last * torch.tensor([0.6, 0.8])).half().float() * 1e-8
    assert adaptive_weight(pulls(x.sum(), g.sum(), last)) == 0
    weight = adaptive_weight(pulls(x.sum(), g.sum(), last, loss_scale=2.0 ** 16))
    assert weight.item() == pytest.approx(5e-8 / 1e-4, rel=0.02)
    for factor in (1e8, 1):                                                  # inf / inf, inf / finite
        assert adaptive_weight(pulls(x.sum() * 1e8, g.sum() * factor, last, loss_scale=2.0 ** 20)) == 0


def test_saturated_share():
    image = torch.tensor([1.0, -1.0, 0.981, 0.98, 0.5, -0.3, 0.0, -0.99]).view(1, 1, 2, 4)
    assert saturated_share(image) == 0.5


# Discriminators

def test_discriminator_maps_have_the_official_sizes():
    discriminator = MultiscaleDiscriminator(9, 4)
    sizes = [[feature.shape[2] for feature in scale] for scale in discriminator(noise(1, 9, 64, 64))]
    assert sizes == [[33, 17, 9, 10, 11], [17, 9, 5, 6, 7]]
    assert [feature.shape[1] for feature in discriminator(noise(1, 9, 64, 64))[0]] == [4, 8, 16, 32, 1]
    assert PatchGAN(ndf=4)(noise(1, 3, 64, 64)).shape == (1, 1, 6, 6)


def test_the_second_scale_sees_a_border_that_is_no_darker():
    """Averages over 3 x 3 pixels inside the image only: a constant stays constant up to the edge."""
    discriminator = MultiscaleDiscriminator(1, 4, num_layers=2)
    seen = []
    discriminator.discriminator_1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    discriminator(torch.cat([torch.ones(1, 1, 8, 8), ramp]))
    assert torch.equal(seen[0][0], torch.ones(1, 4, 4))
    assert torch.allclose(seen[0][1, 0, 2], torch.tensor([0.5, 2, 4, 6]))


def test_discriminate_splits_one_batch_into_fake_and_real():
    discriminator = MultiscaleDiscriminator(5, 4).eval()
    onehot, fake, real = noise(3, 2, 32, 32), noise(3, 3, 32, 32), noise(3, 3, 32, 32).flip(0) + 1
    fake_features, real_features = discriminate(discriminator, onehot, fake, real)
    for images, features in ((fake, fake_features), (real, real_features)):
        alone = discriminator(torch.cat([onehot, images], dim=1))
        for ours, expected in zip(sum(features, []), sum(alone, []), strict=True):
            assert torch.allclose(ours, expected, atol=1e-5)


@pytest.fixture
def players():
    generator, encoder = SPADEGenerator(ngf=2, z_dim=8, size=32, hidden=8), VAEEncoder(2, 8, 32)
    discriminator = MultiscaleDiscriminator(9, 4)
    for index, network in enumerate((generator, encoder, discriminator)):
        init_weights(network, random("players", index), gain=0.5)
    label = torch.randint(6, (2, 32, 32), generator=random("label"))
    onehot = F.one_hot(label, 6).permute(0, 3, 1, 2).float()
    return generator, encoder, discriminator, onehot, torch.tanh(noise(2, 3, 32, 32))


def test_each_step_leaves_the_other_side_without_gradients(players):
    """One generator forward serves both steps: with D frozen in G's, and the fake detached in D's."""
    generator, encoder, discriminator, onehot, real = players
    mu, logvar = encoder(real)
    fake = generator(onehot, reparameterize(mu, logvar, noise(2, 8)))
    with frozen(discriminator):
        fake_features, real_features = discriminate(discriminator, onehot, fake, real)
    loss = adversarial_loss(fake_features, "generator") + feature_matching(fake_features, real_features)
    (loss + kl_divergence(mu, logvar)).backward()
    assert all(p.grad is None for p in discriminator.parameters())
    for network in (generator, encoder):
        assert all(p.grad is not None for p in network.parameters())
        network.zero_grad(set_to_none=True)

    fake_features, real_features = discriminate(discriminator, onehot, fake.detach(), real)
    (adversarial_loss(real_features, "real") + adversarial_loss(fake_features, "fake")).backward()
    assert all(p.grad is not None for p in discriminator.parameters())
    assert all(p.grad is None for network in (generator, encoder) for p in network.parameters())


def test_freezing_the_discriminator_does_not_change_the_generators_gradient(players):
    generator, encoder, discriminator, onehot, real = players
    generator.eval(), discriminator.eval()
    gradients = []
    for freeze in (True, False):
        fake = generator(onehot, noise(2, 8))
        if freeze:
            with frozen(discriminator):
                features, _ = discriminate(discriminator, onehot, fake, real)
        else:
            features, _ = discriminate(discriminator, onehot, fake, real)
        generator.zero_grad(set_to_none=True)
        adversarial_loss(features, "generator").backward()
        gradients.append(generator.conv_img.weight.grad.clone())
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0


def test_the_players_learn(players):
    """Ten steps of each side move its loss the right way, the other standing still."""
    generator, encoder, discriminator, onehot, real = players
    fake = generator(onehot, noise(2, 8)).detach()
    adam = torch.optim.Adam(discriminator.parameters(), lr=4e-4, betas=(0.0, 0.9))
    losses = []
    for _ in range(10):
        features = discriminate(discriminator, onehot, fake, real)
        loss = adversarial_loss(features[1], "real") + adversarial_loss(features[0], "fake")
        losses.append(loss.item())
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert losses[-1] < losses[0] - 0.1
    adam = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.0, 0.9))
    losses = []
    for _ in range(10):
        with frozen(discriminator.eval()):
            features, _ = discriminate(discriminator, onehot, generator(onehot, noise(2, 8)), real)
        loss = adversarial_loss(features, "generator")
        losses.append(loss.item())
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert losses[-1] < losses[0] - 0.1


# Perceptual distances, with random weights of the right shapes

VGG = {16: [[64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3],
       19: [[64] * 2, [128] * 2, [256] * 4, [512] * 4, [512] * 4]}


def vgg_weights(depth: int) -> dict:
    """A whole torchvision VGG: convolutions numbered with their ReLUs and poolings, and the classifier."""
    weights, index, width = {"classifier.0.weight": torch.zeros(2, 2)}, 0, 3
    for stage in VGG[depth]:
        for out in stage:
            draw = torch.randn(out, width, 3, 3, generator=random(depth, index))
            weights[f"features.{index}.weight"] = draw * (2 / (9 * width)) ** 0.5
            weights[f"features.{index}.bias"] = torch.full((out,), 0.01)
            index, width = index + 2, out
        index += 1
    return weights


def vgg_features(weights: dict, depth: int, x: torch.Tensor, position) -> list:
    """The `position`-th activation of every stage."""
    found, index = [], 0
    for stage in VGG[depth]:
        stage_features = []
        for _ in stage:
            weight, bias = (weights[f"features.{index}.{part}"] for part in ("weight", "bias"))
            x = F.relu(F.conv2d(x, weight, bias, padding=1))
            stage_features.append(x)
            index += 2
        found.append(stage_features[position])
        x, index = F.max_pool2d(x, 2), index + 1
    return found


def test_vgg19_loss_against_the_sum_written_out():
    weights, (a, b) = vgg_weights(19), noise(2, 1, 3, 32, 32)
    loss = VGG19Loss()
    with pytest.raises(AssertionError, match="VGG19Loss has no weights"):
        loss(a, b)
    loss.load_official_state_dict(weights)
    features = [vgg_features(weights, 19, image, 0) for image in (a, b)]
    expected = sum(weight * (x - y).abs().mean()
                   for weight, x, y in zip((1 / 32, 1 / 16, 1 / 8, 1 / 4, 1), *features))
    assert torch.allclose(loss(a, b), expected, rtol=1e-5)
    assert loss(a, a) == 0
    loss(a.requires_grad_(), b.requires_grad_()).backward()
    assert a.grad is not None and b.grad is None


def lpips_heads() -> dict:
    return {f"lin{k}.model.1.weight": torch.rand(1, width, 1, 1, generator=random("head", k))
            for k, width in enumerate((64, 128, 256, 512, 512))}


def test_lpips_against_the_sum_written_out():
    weights, heads = vgg_weights(16), lpips_heads()
    a, b = noise(2, 2, 3, 32, 32)
    distance = LPIPS()
    distance.load_official_state_dict({**weights, **heads})
    mean, deviation = torch.tensor([-.030, -.088, -.188]), torch.tensor([.458, .448, .450])
    features = [vgg_features(weights, 16, ((image.movedim(1, 3) - mean) / deviation).movedim(3, 1), -1)
                for image in (a, b)]
    expected = 0
    for head, x, y in zip(heads.values(), *features):
        difference = (F.normalize(x, dim=1, eps=1e-10) - F.normalize(y, dim=1, eps=1e-10)) ** 2
        expected = expected + (difference * head).sum(1).mean((1, 2))
    assert distance(a, b).shape == (2,) and torch.allclose(distance(a, b), expected, rtol=1e-4)
    assert torch.equal(distance(a, a), torch.zeros(2))


def test_lpips_is_found_inside_an_autoencoder_checkpoint():
    inside = {"loss.perceptual_loss.scaling_layer.shift": torch.zeros(1, 3, 1, 1)}
    inside.update({f"loss.perceptual_loss.{name}": value for name, value in lpips_heads().items()})
    for name, value in vgg_weights(16).items():
        if name.startswith("features."):
            _, index, part = name.split(".")
            slice_number = 1 + sum(int(index) >= start for start in (4, 9, 16, 23))
            inside[f"loss.perceptual_loss.net.slice{slice_number}.{index}.{part}"] = value
    whole, plain = LPIPS(), LPIPS()
    whole.load_official_state_dict({**inside, "encoder.conv_in.weight": torch.zeros(1)})
    plain.load_official_state_dict({**vgg_weights(16), **lpips_heads()})
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in whole.state_dict().items())
    with pytest.raises(ValueError, match="5 missing: heads.0.weight"):
        plain.load_official_state_dict(vgg_weights(16))


@pytest.mark.parametrize("cls, weights", [(VGG19Loss, lambda: vgg_weights(19)),
                                          (LPIPS, lambda: {**vgg_weights(16), **lpips_heads()})])
def test_frozen_networks_stay_frozen_and_say_the_same_in_both_modes(cls, weights):
    network = cls()
    network.load_official_state_dict(weights())
    a, b = noise(2, 1, 3, 32, 32)
    judged = network.eval()(a.requires_grad_(), b)
    assert torch.equal(network.train()(a, b), judged)
    judged.sum().backward()
    assert a.grad.abs().max() > 0
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
