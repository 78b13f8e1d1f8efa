"""The denoiser: label code, attention, time, guidance, latent scale, official checkpoints."""

import math

import pytest
import torch
from her2.autoencoder import VQAutoencoder
from her2.denoiser import Attention, Denoiser, LabelCode, LatentDenoiser, time_embedding
from her2.run_training import EMA

SMALL = dict(num_classes=6, z_channels=3, model_channels=32, channel_mult=(1, 2), num_res_blocks=1,
             num_heads=4)


@pytest.fixture(autouse=True)
def same_initial_weights():
    torch.manual_seed(0)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomised(module):
    """A network at the start answers 0: give every weight a value."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module


def small(scale=0.5, **changes) -> LatentDenoiser:
    model = randomised(LatentDenoiser(**{**SMALL, **changes})).eval()
    model.set_latent_scale(1 / scale)
    return model


@pytest.mark.parametrize("dim", [2, 8, 33])
def test_time_embedding_is_cosines_then_sines(dim):
    t = torch.tensor([0, 1, 17, 999])
    found, half = time_embedding(t, dim), dim // 2
    for b, time in enumerate(t.tolist()):
        angles = [time * 10000 ** (-i / half) for i in range(half)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles] + [0.0] * (dim % 2)
        assert found[b].tolist() == pytest.approx(expected, abs=1e-3)


def test_the_layout_follows_the_coarsest_maps_and_changes_no_result():
    """channel_mult (1, 2): latents of 8 end in maps of 4 x 4, latents of 16 in maps of 8 x 8."""
    for side, layout in ((8, torch.contiguous_format), (16, torch.channels_last)):
        model, seen = small(), []
        xt, code, t = draw(2, 3, side, side), draw(2, 3, side, side, seed=1), torch.tensor([3, 700])
        plain = small()(xt, t, code).detach()
        middle = model.laid_out(side).unet.middle_block
        middle.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        for given in (torch.contiguous_format, torch.channels_last):         # the encoder's latents: the latter
            torch.testing.assert_close(model(xt.to(memory_format=given), t, code), plain,
                                       rtol=1e-3, atol=1e-4 * float(plain.abs().max()))
        assert all(maps.is_contiguous(memory_format=layout) for maps in seen) and len(seen) == 2


def test_label_code_is_the_share_of_every_class_times_the_weights():
    label = torch.randint(0, 6, (2, 16, 24), generator=torch.Generator().manual_seed(0))
    onehot = torch.nn.functional.one_hot(label, 6).permute(0, 3, 1, 2).float()
    layer = LabelCode(6, 3, halvings=2)
    code, weight = layer(onehot), layer.channel_mapper.weight[:, :, 0, 0]
    assert code.shape == (2, 3, 4, 6)
    for b in range(2):
        for y in range(4):
            for x in range(6):
                cell = label[b, 4 * y:4 * y + 4, 4 * x:4 * x + 4].flatten()
                share = torch.bincount(cell, minlength=6) / 16
                torch.testing.assert_close(code[b, :, y, x], weight @ share)


def test_attention_splits_head_by_head():
    layer, x = randomised(Attention(8, num_heads=2)), draw(1, 8, 2, 3)
    qkv = layer.qkv(layer.norm(x.flatten(2)))[0]
    heads = []
    for head in range(2):
        q, k, v = qkv[12 * head:12 * head + 12].split(4)                     # q, k and v of one head together
        heads.append(v @ torch.softmax(q.t() @ k / math.sqrt(4), dim=1).t())
    expected = x.flatten(2) + layer.proj_out(torch.cat(heads)[None])
    torch.testing.assert_close(layer(x), expected.view(x.shape))


def test_eps_of_the_norms_is_seen_where_the_variance_is_small():
    """At a variance of 1e-5 the official eps, 1e-5, halves the variance after it; 1e-6 would leave 10/11."""
    block = Denoiser(model_channels=32, channel_mult=(1,)).middle_block[0]
    assert block.in_layers[0](1e-5 ** 0.5 * draw(4, 32, 64, 64)).var().item() == pytest.approx(0.5, rel=0.02)


def test_a_new_network_answers_zero_and_depends_on_everything_later():
    xt, t, code = draw(2, 3, 8, 8), torch.tensor([3, 900]), draw(2, 3, 8, 8, seed=1)
    assert not LatentDenoiser(**SMALL)(xt, t, code).any()
    model = small()
    answer = model(xt, t, code)
    assert answer.shape == xt.shape
    for other in (model(xt, t + 50, code), model(xt, t, code + 0.1), model(xt + 0.1, t, code)):
        assert (other - answer).abs().max() > 1e-4
    torch.testing.assert_close(model(xt[1:], t[1:], code[1:]), answer[1:], rtol=1e-4, atol=1e-5)
    assert model(xt[:, :, :, :4], t, code[:, :, :, :4]).shape == (2, 3, 8, 4)


def test_wrong_shapes_are_refused():
    with pytest.raises(AssertionError, match="multiple of 2"):
        small()(draw(1, 3, 7, 8), torch.tensor([1]))
    with pytest.raises(AssertionError, match=r"should be \(B, 6, h, w\)"):
        Denoiser(model_channels=32, channel_mult=(1,))(draw(1, 5, 8, 8), torch.tensor([1]))
    with pytest.raises(AssertionError, match="cannot be split into 3 heads"):
        LatentDenoiser(**dict(SMALL, num_heads=3))


def test_attention_is_in_the_middle_alone():
    model = Denoiser(model_channels=32, channel_mult=(1, 2), num_res_blocks=1)
    assert [isinstance(module, Attention) for module in model.modules()].count(True) == 1
    assert isinstance(model.middle_block[1], Attention)
    assert model(draw(1, 6, 8, 8), torch.tensor([5])).shape == (1, 3, 8, 8)


def test_dropped_label_and_guidance():
    model, xt, t, code = small(), draw(3, 3, 8, 8), torch.tensor([1, 50, 999]), draw(3, 3, 8, 8, seed=1)
    dropped = code * torch.tensor([0, 1, 0])[:, None, None, None]           # zeros are no label
    with torch.no_grad():
        cond, uncond = model(xt, t, code), model(xt, t)
        torch.testing.assert_close(model(xt, t, dropped)[[0, 2]], uncond[[0, 2]])
        assert torch.equal(model.predictor(code)(xt, t), cond)
        torch.testing.assert_close(model.predictor(code, 1.5)(xt, t), uncond + 1.5 * (cond - uncond),
                                   rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.predictor(code, 0.0)(xt, t), uncond)


def test_latent_scale_survives_saving_averaging_and_is_checked():
    z, model = draw(2, 3, 8, 8), small(scale=0.25)
    assert torch.equal(z * model.latent_scale, 0.25 * z)
    ema = EMA(LatentDenoiser(**SMALL), 0.99)
    ema.update(model)
    for state_dict in (model.state_dict(), ema.module.state_dict()):
        other = LatentDenoiser(**model.config)
        other.load_state_dict(state_dict)
        assert other.latent_scale.item() == 0.25
    for bad in (float("nan"), 0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="latent_scale is"):
            LatentDenoiser(**SMALL).load_state_dict({**model.state_dict(), "latent_scale": torch.tensor(bad)})
    with pytest.raises(ValueError, match="latent_scale is"):
        model.set_latent_scale(float("inf"))


def checkpoint_of(model: LatentDenoiser, average: LatentDenoiser) -> dict:
    """A checkpoint as latent-diffusion writes it."""
    first = VQAutoencoder(factor=1, ch=8, ch_mult=(1,), num_res_blocks=1, num_codes=4)
    return {"betas": torch.zeros(10), "model_ema.decay": torch.zeros(()),
            "model_ema.num_updates": torch.zeros(()),
            **{f"model.diffusion_model.{name}": x for name, x in model.unet.state_dict().items()},
            **{f"model_ema.diffusion_model{name.replace('.', '')}": x
               for name, x in average.unet.state_dict().items()},
            **{f"first_stage_model.{name}": x for name, x in first.state_dict().items()},
            "cond_stage_model.channel_mapper.weight": model.label_code.channel_mapper.weight.detach()}


def test_official_checkpoint_loads_with_and_without_its_average():
    model, average = small(), small()
    for parameter in average.parameters():
        parameter.data.mul_(0.5)
    checkpoint = checkpoint_of(model, average)
    xt, t, code = draw(1, 3, 8, 8), torch.tensor([7]), draw(1, 3, 8, 8, seed=1)
    plain = {name: x for name, x in checkpoint.items() if not name.startswith("model_ema.")}
    for state_dict, ema, expected in ((checkpoint, True, average), (checkpoint, False, model),
                                      (plain, True, model)):
        loaded = LatentDenoiser(**SMALL)
        loaded.load_official_state_dict(state_dict, ema=ema)
        assert torch.equal(loaded(xt, t, code), expected(xt, t, code)) and loaded.latent_scale == 1
        assert torch.equal(loaded.label_code.channel_mapper.weight, model.label_code.channel_mapper.weight)
    loaded.load_official_state_dict({**plain, "scale_factor": torch.tensor(0.18)})
    assert loaded.latent_scale.item() == pytest.approx(0.18)


@pytest.mark.parametrize("broken, named", [
    ("model.diffusion_model.out.2.bias", r"out\.2\.bias"),
    ("model_ema.diffusion_modelout2bias", r"out\.?2\.?bias"),
    ("cond_stage_model.channel_mapper.weight", r"channel_mapper\.weight")])
def test_official_checkpoint_that_does_not_fit_is_an_error_with_names(broken, named):
    good = checkpoint_of(small(), small())
    load = LatentDenoiser(**SMALL).load_official_state_dict
    for state_dict in ({name: x for name, x in good.items() if name != broken},            # missing
                       {**good, broken: torch.zeros(7, 7)},                               # misshapen
                       {**good, broken + "x": torch.zeros(1)}):                           # unexpected
        with pytest.raises(ValueError, match=named):
            load(state_dict, ema=broken.startswith("model_ema"))
    with pytest.raises(ValueError, match="stranger.weight"):
        load({**good, "stranger.weight": torch.zeros(1)})
