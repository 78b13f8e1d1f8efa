"""The quantiser and the autoencoder, against slow or closed-form computations of the same thing."""

import math
from collections import Counter

import pytest
import torch
from her2 import quantizer
from her2.autoencoder import Attention, ResBlock, VQAutoencoder, edge_l1, psnr
from her2.quantizer import Codebook, CodeUsage, count_codes, restart_dead_codes, vq_loss

SMALL = dict(factor=4, ch=16, ch_mult=(1, 2, 2), num_res_blocks=1, z_channels=3, num_codes=32)


@pytest.fixture(autouse=True)
def same_initial_weights():
    torch.manual_seed(0)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codebook_of(rows) -> Codebook:
    codebook = Codebook(*rows.shape)
    codebook.embedding.weight.data.copy_(rows)
    return codebook


@pytest.mark.parametrize("chunk", [1, 100, 2 ** 24])
def test_nearest_code_is_the_brute_force_one_for_every_chunk_size(chunk, monkeypatch):
    monkeypatch.setattr(quantizer, "CHUNK", chunk)
    codes, z = draw(37, 3), draw(2, 3, 5, 7, seed=1)
    found = codebook_of(codes).nearest(z)
    assert found.shape == (2, 5, 7)
    for b in range(2):
        for y in range(5):
            for x in range(7):
                distances = [math.dist(z[b, :, y, x].tolist(), code) for code in codes.tolist()]
                assert found[b, y, x] == distances.index(min(distances))


def test_nearest_code_wins_by_the_lowest_index_and_in_float32_under_autocast():
    codes = torch.tensor([[5.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.001, 0.0]])   # 1 and 1.001 agree in bfloat16
    z = torch.tensor([1.0009, 0.0]).view(1, 2, 1, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert codebook_of(codes).nearest(z).item() == 3
    assert codebook_of(codes[:3]).nearest(z).item() == 1


@pytest.mark.parametrize("legacy", [False, True])
def test_loss_has_the_closed_form_gradients(legacy):
    z, e = draw(2, 3, 4, 4).requires_grad_(), draw(2, 3, 4, 4, seed=1).requires_grad_()
    loss = vq_loss(z, e, beta=0.25, legacy=legacy)
    grad_z, grad_e = torch.autograd.grad(loss, [z, e])
    difference = (z - e).detach()
    on_z, on_e = (1.0, 0.25) if legacy else (0.25, 1.0)
    torch.testing.assert_close(loss, 1.25 * difference.square().mean())
    torch.testing.assert_close(grad_z, on_z * 2 * difference / z.numel())
    torch.testing.assert_close(grad_e, -on_e * 2 * difference / z.numel())


def test_straight_through_passes_the_gradient_to_z_and_none_to_the_codes():
    codebook, weight = codebook_of(draw(8, 3)), draw(1, 3, 4, 4, seed=2)
    z = draw(1, 3, 4, 4, seed=1).requires_grad_()
    z_q, indices, _ = codebook(z)
    torch.testing.assert_close(z_q, codebook.lookup(indices), rtol=0, atol=1e-6)
    (z_q * weight).sum().backward()
    assert torch.equal(z.grad, weight) and codebook.weight.grad is None


def test_usage_counts_add_up_over_batches():
    batches = [torch.tensor([[0, 0, 3]]), torch.tensor([[3, 1, 0]])]
    counts = sum(count_codes(batch, 5) for batch in batches)
    expected = Counter(index for batch in batches for index in batch.flatten().tolist())
    assert counts.tolist() == [expected[i] for i in range(5)]


@pytest.mark.parametrize("places", [2, 4, 40])           # fewer, as many, and more than dead codes
def test_restart_moves_dead_codes_to_latents_and_forgets_their_moments(places):
    codebook, z = codebook_of(draw(12, 3)), draw(places, 3, seed=1)
    optimizer = torch.optim.Adam(codebook.parameters(), lr=1e-3)
    codebook.weight.square().sum().backward()
    optimizer.step()
    before, moment = codebook.weight.detach().clone(), optimizer.state[codebook.weight]["exp_avg"].clone()
    usage = torch.tensor([3, 0, 1, 0, 0, 9, 1, 1, 1, 1, 0, 1])
    count = restart_dead_codes(codebook, usage, z, torch.Generator().manual_seed(5), optimizer)
    dead = usage == 0
    assert count == 4
    assert torch.equal(codebook.weight[~dead], before[~dead])
    assert all(row in z.tolist() for row in codebook.weight[dead].tolist())
    assert len({tuple(row) for row in codebook.weight[dead].tolist()}) == min(4, places)
    state = optimizer.state[codebook.weight]
    assert not state["exp_avg"][dead].any() and not state["exp_avg_sq"][dead].any()
    assert torch.equal(state["exp_avg"][~dead], moment[~dead]) and moment[dead].any()

    again = codebook_of(before)
    restart_dead_codes(again, usage, z.t().reshape(1, 3, places, 1), torch.Generator().manual_seed(5))
    assert torch.equal(again.weight, codebook.weight)        # a map of latents is as good as a list of them
    assert restart_dead_codes(again, usage + 1, z, torch.Generator()) == 0


def test_attention_is_a_softmax_over_all_places():
    layer, x = Attention(8), draw(2, 8, 3, 5)
    y = layer.norm(x)
    q, k, v = (conv(y).flatten(2) for conv in (layer.q, layer.k, layer.v))
    expected = torch.zeros(2, 8, 15)
    for b in range(2):
        for i in range(15):
            scores = [(q[b, :, i] @ k[b, :, j]).item() / math.sqrt(8) for j in range(15)]
            shares = [math.exp(score) / sum(map(math.exp, scores)) for score in scores]
            expected[b, :, i] = sum(share * v[b, :, j] for j, share in enumerate(shares))
    torch.testing.assert_close(layer(x), x + layer.proj_out(expected.view(2, 8, 3, 5)), rtol=1e-4, atol=1e-5)


def test_eps_of_the_norms_is_seen_where_the_variance_is_small():
    """At a variance of 1e-6 the official eps, 1e-6, halves the normalised variance; 1e-5 would leave 1/11."""
    x = 1e-3 * draw(4, 32, 64, 64)
    assert ResBlock(32, 32).norm1(x).var().item() == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("config, size", [
    (SMALL, (16, 24)), (dict(SMALL, ch=48, num_codes=7), (8, 8)),
    (dict(SMALL, factor=2, ch_mult=(1, 2)), (6, 10)),
    (dict(SMALL, factor=1, ch_mult=(1,)), (5, 7)), (dict(SMALL, z_channels=4, embed_dim=2), (8, 8)),
    (dict(SMALL, factor=8, ch_mult=(1, 1, 2, 2), attention_levels=(3,), z_channels=4), (16, 32))])
def test_shapes_of_small_models(config, size):
    model, f = VQAutoencoder(**config), config["factor"]
    latent = (config.get("embed_dim", config["z_channels"]), size[0] // f, size[1] // f)
    image = draw(2, 3, *size)
    reconstruction, z, z_q, indices, loss = model(image)
    assert reconstruction.shape == image.shape and loss.shape == () and loss > 0
    assert z.shape == z_q.shape == (2, *latent) and indices.shape == (2, *latent[1:])
    assert indices.max() < config["num_codes"]
    torch.testing.assert_close(model.decode(z), reconstruction)           # decode quantises by itself
    again = model.decode_quantized(model.quantize.lookup(indices))        # z + (e - z) is e up to rounding
    torch.testing.assert_close(again, reconstruction, rtol=1e-4, atol=1e-4)
    twin = VQAutoencoder(**model.config)
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin.to(memory_format=torch.channels_last)(image)[1], z, rtol=1e-4, atol=1e-5)


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="factor 8 does not fit the 3 levels"):
        VQAutoencoder(**dict(SMALL, factor=8))
    with pytest.raises(AssertionError, match="10 x 16 should be a multiple of 4"):
        VQAutoencoder(**SMALL).encode(draw(1, 3, 10, 16))


def test_every_parameter_gets_a_gradient():
    model = VQAutoencoder(**SMALL)
    reconstruction, _, _, _, loss = model(draw(2, 3, 16, 16))
    (reconstruction.abs().mean() + loss).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.decoder.conv_out.weight.grad.abs().sum() > 0


def test_official_weights_load_alone_and_out_of_a_checkpoint():
    source, image = VQAutoencoder(**SMALL), draw(1, 3, 16, 16)
    weights = source.state_dict()
    alone = {**weights, "loss.discriminator.main.0.weight": torch.zeros(3)}
    checkpoint = {**{f"first_stage_model.{name}": tensor for name, tensor in weights.items()},
                  "betas": torch.zeros(5), "model.diffusion_model.out.2.bias": torch.zeros(3),
                  "model_ema.decay": torch.zeros(()),
                  "cond_stage_model.channel_mapper.weight": torch.zeros(3)}
    for state_dict in (weights, alone, checkpoint):
        model = VQAutoencoder(**SMALL)
        model.load_official_state_dict(state_dict)
        assert torch.equal(model(image)[0], source(image)[0])


def test_official_weights_that_do_not_fit_are_all_listed():
    weights = VQAutoencoder(**SMALL).state_dict()
    weights["quant_conv.extra"] = weights.pop("quant_conv.bias")
    weights["quantize.embedding.weight"] = torch.zeros(33, 3)
    for prefix in ("", "first_stage_model."):
        with pytest.raises(ValueError) as error:
            VQAutoencoder(**SMALL).load_official_state_dict({prefix + name: x for name, x in weights.items()})
        for name in ("quant_conv.extra", "quant_conv.bias", "quantize.embedding.weight"):
            assert name in str(error.value)
    with pytest.raises(ValueError, match="unknown.weight"):
        prefixed = {f"first_stage_model.{name}": x for name, x in VQAutoencoder(**SMALL).state_dict().items()}
        VQAutoencoder(**SMALL).load_official_state_dict({**prefixed, "unknown.weight": torch.zeros(1)})


def test_psnr_of_a_known_error():
    image = torch.zeros(2, 3, 8, 8)
    image[1] = 1.0
    noisy = image + torch.tensor([0.2, 7.0]).view(2, 1, 1, 1)             # the second is clamped back to 1
    assert psnr(noisy, image).tolist() == pytest.approx([20.0, 10 * math.log10(4e10)], rel=1e-4)


def test_a_few_steps_learn_to_reconstruct_one_batch():
    model = VQAutoencoder(**dict(SMALL, factor=2, ch_mult=(1, 2), num_codes=64))
    image = torch.tanh(torch.nn.functional.interpolate(draw(4, 3, 4, 4), size=16, mode="bilinear"))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(50):
        reconstruction, _, _, _, vq = model(image)
        loss = (reconstruction - image).abs().mean() + vq
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    flat = image.mean((0, 2, 3), keepdim=True).expand_as(image)
    assert psnr(flat, image).mean().item() < 13                  # measured: 12.0 dB, against 23.5 dB below
    assert psnr(model(image)[0], image).mean().item() > 19


def test_narrow_networks_keep_four_channels_a_group():
    """Groups of one channel would be instance norm; at the official width nothing changes."""
    narrow = VQAutoencoder(ch=16, num_codes=8, num_res_blocks=1, groups=4)
    norms = [m for m in narrow.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert {(m.num_channels, m.num_groups) for m in norms} == {(16, 4), (32, 4), (64, 4)}
    with torch.device("meta"):
        assert {m.num_groups for m in VQAutoencoder().modules() if isinstance(m, torch.nn.GroupNorm)} == {32}


def test_codes_are_counted_over_a_window_and_restarted_in_its_first_fifth_and_at_its_end():
    """Latents are all near code 0: the other codes move to latents at steps 2, 10 and 20, and no more."""
    codebook, moved = Codebook(4, 3), []
    usage = CodeUsage(4, window=10, last=20)
    for step in range(1, 41):
        z = torch.full((1, 3, 2, 2), 100.0 + step)
        before = codebook.weight.detach().clone()
        usage.step(step, codebook, torch.zeros(1, 2, 2, dtype=torch.long), z, torch.Generator(), None)
        if not torch.equal(before, codebook.weight):
            moved.append(step)
            assert torch.equal(codebook.weight[1:], torch.full((3, 3), 100.0 + step))
            assert torch.equal(codebook.weight[0], before[0])
        assert usage.used == (1 if step >= 10 else None)
    assert moved == [2, 10, 20]
    short, before = CodeUsage(4, window=10, last=1), codebook.weight.detach().clone()
    for step in (1, 2):                                      # a first look after `last` moves nothing either
        short.step(step, codebook, torch.zeros(1, 2, 2, dtype=torch.long), z + 1, torch.Generator(), None)
    assert torch.equal(before, codebook.weight)
    usage.counts += 7
    copy = CodeUsage(4, window=10, last=20)
    copy.load_state_dict(usage.state_dict())
    assert torch.equal(copy.counts, usage.counts) and copy.used == 1


def test_edge_l1_is_the_sum_over_neighbours():
    a, b = torch.rand(2, 3, 5, 7), torch.rand(2, 3, 5, 7)
    down = [abs((a[..., y + 1, x] - a[..., y, x]) - (b[..., y + 1, x] - b[..., y, x])).mean()
            for y in range(4) for x in range(7)]
    right = [abs((a[..., y, x + 1] - a[..., y, x]) - (b[..., y, x + 1] - b[..., y, x])).mean()
             for y in range(5) for x in range(6)]
    expected = sum(down) / len(down) + sum(right) / len(right)
    assert torch.allclose(edge_l1(a, b), expected, atol=1e-6)
    assert edge_l1(a, a + 0.3) < 1e-6                        # a change of colour has no edge
