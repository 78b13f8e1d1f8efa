"""One step of each training loop is the gradient of the formula in its docstring, computed apart from it.

The loop runs in float64 with plain gradient descent in place of Adam, so that (weights before - weights after) is
rate times the gradient. The networks before, the batch and the noise come from the same seeds; the losses are
written out here. And what is saved, clipped and scheduled.
"""

import importlib
import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_factory import rectangles, save, write_csv, write_dataset
from run_kill_harness import LOOPS, command_line, in_process
from run_processes import double_precision

import generate
import train_gan
import train_ldm
import train_seg
from her2 import run, run_config, run_setup, run_training
from her2.autoencoder import VQAutoencoder
from her2.data_classes import IGNORE
from her2.data_folder import load_dataset
from her2.denoiser import LatentDenoiser
from her2.diffusion import draw_timesteps
from her2.losses import dice_cross_entropy
from her2.quantizer import CodeUsage
from her2.run_errors import UserError
from her2.run_seeds import generator
from her2.spade import SPADEGenerator

CPU = torch.device("cpu")
ONE = ["--device", "cpu", "--patch", "32", "--batch", "4", "--steps", "1", "--clip", "1e12", "--log-every", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four slides of noise with all classes and, in the first, pixels to be ignored."""
    folder = tmp_path_factory.mktemp("loops")
    write_dataset(folder / "data", slides=4, height=64, width=96)
    label = rectangles(64, 96, (1, 2, 3, 4, 5))
    label[:, 40:60] = IGNORE
    save(folder / "data/masks/roi0.png", label)
    return folder


@pytest.fixture
def descent(monkeypatch):
    """Gradient descent in the optimisers' place; [(class, learning rate, betas)] of those that were made."""
    made = []
    for name in ("Adam", "AdamW"):
        def optimizer(parameters, lr, betas=None, name=name):
            made.append((name, lr, betas))
            return torch.optim.SGD(parameters, lr=lr)
        monkeypatch.setattr(torch.optim, name, optimizer)
    return made


def one_step(script, folder, out, *flags):
    """(configuration, checkpoint) of one step of a script, in float64."""
    line = [*script, *ONE, *flags, "--data", str(folder / "data"), "--cache", str(folder / "cache"),
            "--out", str(folder / out)]
    assert in_process(line) == 0
    stage = script[2:] and script[2]
    module = importlib.import_module(script[0].removesuffix(".py"))
    cls, presets = module.STAGES[stage][:2] if stage else (module.Config, module.PRESETS)
    words = line[3:] if stage else line[1:]
    return run_config.parse(cls, presets, words, "", script[0]), run.load_file(folder / out / "last.pt")


def assert_descended(before, after: dict, gradients, rate):
    """`after` (a state_dict) is `before` (named parameters) less rate times gradients, all of them."""
    for (name, weight), gradient in zip(before, gradients, strict=True):
        moved = weight.detach() - after[name]
        assert torch.allclose(moved, rate * gradient, rtol=1e-6, atol=1e-12 + 1e-9 * float(gradient.abs().max())), name
    assert max(float(g.abs().max()) for g in gradients) > 0


def onehot_of(label):
    return torch.stack([(label == k).double() for k in range(6)], dim=1)


def test_gan(data, descent):
    with double_precision():
        flags = ["--width", "8", "--hidden", "8", "--z-dim", "4", "--lr", "0.5", "--disc-lr", "2", "--lambda-kld", "0.3"]
        config, after = one_step(["train_gan.py"], data, "gan", *flags)
        assert descent == [("Adam", 0.5, (0.0, 0.9)), ("Adam", 2.0, (0.0, 0.9))]
        _, sampler = run_setup.training_data(config)
        net, encoder, disc = run_setup.spade_gan(config, 6, CPU)
        batch = sampler.batch(0, 4)
        image, onehot = batch["image"].double(), onehot_of(batch["label"])
        mu, logvar = encoder(image)
        fake = net(onehot, mu + (logvar / 2).exp() * torch.randn(4, 4, generator=generator(0, "z", 0)))

        def judged(made):           # D sees label and image; fakes first, in one batch
            levels = disc(torch.cat([torch.cat([onehot, one], dim=1) for one in (made, image)]))
            return [[f.chunk(2) for f in level] for level in levels]

        levels = judged(fake)
        gan = -torch.stack([level[-1][0].mean() for level in levels]).mean()
        features = 10 / 2 * sum((a - b.detach()).abs().mean() for level in levels for a, b in level[:-1])
        kld = 0.3 * (0.5 * (mu ** 2 + logvar.exp() - 1 - logvar)).sum(1).mean()
        named = [("generator", net), ("encoder", encoder)]
        parameters = [p for _, one in named for p in one.parameters()]
        gradients = torch.autograd.grad(gan + features + kld, parameters)
        for name, one in named:
            count = len(list(one.parameters()))
            assert_descended(one.named_parameters(), after[name], gradients[:count], 0.5)
            gradients = gradients[count:]
        # On the same fakes, and nothing of the other step's gradient is left in D.
        levels = judged(fake.detach())
        d_loss = torch.stack([F.relu(1 - level[-1][1]).mean() for level in levels]).mean() + torch.stack(
            [F.relu(1 + level[-1][0]).mean() for level in levels]).mean()
        assert_descended(disc.named_parameters(), after["discriminator"],
                         torch.autograd.grad(d_loss, list(disc.parameters())), 2.0)


def test_autoencoder(data, descent):
    with double_precision():
        flags = ["--width", "8", "--codes", "16", "--disc-width", "8", "--warmup", "0", "--schedule", "constant",
                 "--lr", "0.5", "--disc-start", "0", "--disc-weight", "0.7", "--lambda-edge", "0.4", "--beta", "0.3"]
        config, after = one_step(["train_ldm.py", "--stage", "autoencoder"], data, "vq", *flags)
        assert descent == [("Adam", 0.5, (0.5, 0.9))] * 2
        model, disc = run_setup.autoencoder_gan(config, CPU)
        image = run_setup.training_data(config)[1].batch(0, 4)["image"].double()
        z = model.encode(image)
        codes = model.quantize.weight
        vectors = z.movedim(1, -1).reshape(-1, codes.shape[1])
        e = codes[((vectors[:, None] - codes) ** 2).sum(2).argmin(1)].view(z.movedim(1, -1).shape).movedim(-1, 1)
        again = model.decode_quantized(z + (e - z).detach())
        vq = ((z.detach() - e) ** 2).mean() + 0.3 * ((z - e.detach()) ** 2).mean()
        edges = sum(((again - image).diff(dim=axis)).abs().mean() for axis in (2, 3))
        nll, hinge = (again - image).abs().mean() + 0.4 * edges, -disc(again).mean()
        last = model.decoder.conv_out.weight
        pull, other = (torch.autograd.grad(one, last, retain_graph=True)[0].norm() for one in (nll, hinge))
        loss = nll + vq + 0.7 * (pull / (other + 1e-4)).detach() * hinge
        assert_descended(model.named_parameters(), after["model"],
                         torch.autograd.grad(loss, list(model.parameters())), 0.5)
        d_loss = (F.relu(1 - disc(image)).mean() + F.relu(1 + disc(again.detach())).mean()) / 2
        assert_descended(disc.named_parameters(), after["disc"],
                         torch.autograd.grad(d_loss, list(disc.parameters())), 0.5)


@pytest.mark.parametrize("objective", [["--parametrisation", "v", "--loss", "l2"],
                                       ["--parametrisation", "eps", "--no-zero-terminal-snr", "--loss", "l1"]])
def test_diffusion(data, root, descent, objective, tmp_path):
    with double_precision():
        flags = [*objective, "--autoencoder", str(root / "autoencoder"), "--width", "32", "--warmup", "0", "--schedule",
                 "constant", "--lr", "0.5", "--drop-label", "0.5", "--sample-steps", "2"]
        config, after = one_step(["train_ldm.py", "--stage", "diffusion"], data, f"ldm{objective[1]}", *flags)
        assert descent == [("AdamW", 0.5, None)]
        content = run.load_model(root / "autoencoder", "autoencoder")
        encode = run.build_model(VQAutoencoder, content, "").requires_grad_(False).encode
        _, sampler = run_setup.training_data(config)
        schedule, denoiser = run_setup.diffusion(config, run.build_model(VQAutoencoder, content, ""), 6, CPU)
        deviation = torch.cat([encode(sampler.batch(k, 4)["image"].double()) for k in range(64)]).std()
        denoiser.set_latent_scale(float(deviation))
        batch, random = sampler.batch(0, 4), generator(0, "noise", 0)
        x0 = encode(batch["image"].double()) / deviation
        t = draw_timesteps(4, 1000, 0.0, random)
        eps = torch.randn(*x0.shape, generator=random)
        dropped = torch.rand(4, generator=random) < 0.5
        assert 0 < dropped.sum() < 4
        alpha_bar = schedule.alpha_bar[t].view(-1, 1, 1, 1)
        signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        code = denoiser.label_code(onehot_of(batch["label"])) * ~dropped.view(-1, 1, 1, 1)
        output = denoiser(signal * x0 + noise * eps, t, code)
        error = output - (eps if objective[1] == "eps" else signal * eps - noise * x0)
        loss = error.abs().mean() if objective[1] == "eps" else (error ** 2).mean()
        assert_descended(denoiser.named_parameters(), after["denoiser"],
                         torch.autograd.grad(loss, list(denoiser.parameters())), 0.5)


@pytest.mark.parametrize("dice", ["soft", "generalised"])
def test_segmentation(data, descent, dice):
    """All five tumor classes are tumor, and what is to be ignored is."""
    with double_precision():
        flags = ["--width", "8", "--warmup", "0", "--schedule", "constant", "--lr", "0.5", "--dice", dice,
                 "--dice-weight", "0.3", "--sampling", "uniform", "--seed", "1", "--jitter", "0"]
        config, after = one_step(["train_seg.py"], data, f"seg-{dice}", *flags)
        assert descent == [("Adam", 0.5, None)]
        network = run_setup.segmenter(config, CPU)
        batch = train_seg.open_data(config)[1].batch(0, 4)
        target = torch.where(batch["label"] == IGNORE, IGNORE, (batch["label"] > 0).long())
        assert {0, 1, IGNORE} == set(target.unique().tolist()) and (batch["label"] == 5).any()
        loss, _ = dice_cross_entropy(network(batch["image"].double()), target, dice, dice_weight=0.3, ce_weight=0.7)
        assert_descended(network.named_parameters(), after["network"],
                         torch.autograd.grad(loss, list(network.parameters())), 0.5)


def test_flags_arrive_at_the_sampler(data):
    for sampling, uniform, jitter in (("tumor", 0.0, 0.5), ("subtype", 0.25, 0.0)):
        common = dict(data=str(data / "data"), cache=str(data / "cache"), patch=32, seed=3, sampling=sampling, uniform=uniform)
        painted = run_setup.training_data(train_gan.Config(**common))[1]
        learned = train_seg.open_data(train_seg.Config(**common, jitter=jitter))[1]
        for sampler, stain in ((painted, 0.0), (learned, jitter)):
            groups = [(c,) for c in sampler.present] if sampling == "subtype" else [tuple(sampler.present)]
            assert (sampler.groups, sampler.uniform, sampler.stain) == (groups, uniform, stain)
            assert (sampler.patch, sampler.seed, sampler.flips) == (32, 3, True)


@pytest.mark.parametrize("name", [name for name in LOOPS if name != "generate"])
def test_the_learning_rate_is_the_one_of_its_step(root, name):
    """11 steps, 3 of them warm-up: what is logged at step n is the rate of step number n - 1."""
    records = [json.loads(line) for line in (root / name / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    rate = run.read_json(root / name / "config.json")["fields"]["lr"]
    for record in records:
        n = record["step"] - 1
        expected = rate * ((n + 1) / 3 if n < 3 else 0.5 * (1 + math.cos(math.pi * (n - 3) / 8)))
        assert name == "GAN" and "lr" not in record or record["lr"] == pytest.approx(expected)


def test_an_update_cuts_the_gradient_and_says_how_long_it_was():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for clip, moved in ((1.0, (0.6, 0.8)), (10.0, (3.0, 4.0))):
        weight.data.zero_()
        weight.grad = torch.tensor([3.0, 4.0])
        norm = run_training.update(optimizer, torch.amp.GradScaler("cpu", enabled=False), clip)
        assert norm == 5 and torch.allclose(-weight.data, torch.tensor(moved), atol=1e-6)


@pytest.mark.parametrize("name", [name for name in LOOPS if name != "generate"])
def test_a_loss_that_is_scaled_for_fp16_trains_alike(root, name, monkeypatch):
    """The scaler multiplies losses by 65536; all that compares or clips gradients has to know."""
    found = {}
    for scaled in (False, True):
        with monkeypatch.context() as patch:
            if scaled:
                patch.setattr(run_training.Precision, "scaler", lambda self: torch.amp.GradScaler("cpu", enabled=True))
            out = f"{name}-scaled{scaled}"
            assert in_process([*command_line(name, root, out), "--steps", "3"]) == 0
            found[scaled] = run.load_file(root / out / "model.pt")["state_dict"]
    # A power of two: not a bit is lost on the way up and down.
    for key, value in found[False].items():
        assert torch.allclose(value, found[True][key], rtol=1e-5, atol=1e-7), key
    assert run.load_file(root / f"{name}-scaledTrue" / "last.pt")["scaler"]["scale"] == 65536


def test_a_segmenter_says_how_large_its_patches_were(root):
    """Whole images are predicted in tiles of that size."""
    assert in_process([*command_line("segmentation", root, "patches"), "--patch", "32", "--steps", "1"]) == 0
    assert run.load_model(root / "patches", "segmenter")["patch"] == 32


def test_what_is_saved_for_others_is_the_average(root):
    for name, key, kind in (("segmentation", "network", "segmenter"), ("diffusion", "denoiser", "diffusion"),
                            ("GAN", "generator", "gan")):
        saved = run.load_model(root / name, kind)["state_dict"]
        last = run.load_file(root / name / "last.pt")
        average, single = last["ema"]["module"], last[key]
        statistics = [k for k in saved if re.search(r"running|num_batches|_[uv]$", k)] if name == "GAN" else []
        assert all(torch.equal(saved[k], average[k]) for k in saved.keys() - statistics), name
        assert any(not torch.equal(saved[k], single[k]) for k in saved.keys() - statistics), name
        assert name != "GAN" or any(not torch.equal(saved[k], average[k]) for k in statistics), "calibrated"


def test_the_generator_is_calibrated_on_training_labels(root):
    """The first batch norm's mean is that of its input over the 16 batches, by a hook."""
    fields = run.read_json(root / "GAN" / "config.json")["fields"]
    config = train_gan.Config(**fields)
    dataset, sampler = run_setup.training_data(config)
    content, last = run.load_model(root / "GAN", "gan"), run.load_file(root / "GAN" / "last.pt")
    net = SPADEGenerator(**content["kwargs"])
    net.load_state_dict(last["ema"]["module"])
    first = next(m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))
    name = next(n for n, m in net.named_modules() if m is first)
    seen = []
    first.register_forward_hook(lambda module, inputs, _: seen.append(inputs[0].mean((0, 2, 3))))
    net.train()
    with torch.no_grad():
        for k in range(16):
            label = sampler.batch(config.steps + k, config.batch)["label"]
            z = torch.randn(len(label), config.z_dim, generator=generator(config.seed, "calibrate", config.steps, k))
            net(onehot_of(label).float(), z)
    assert torch.allclose(content["state_dict"][f"{name}.running_mean"], torch.stack(seen).mean(0), atol=1e-5)


def test_codes_restart_alike_in_a_run_that_was_interrupted(root, monkeypatch):
    """The window of 1000 patches is longer than these runs: here it is 5 steps."""
    moved = []
    honest = train_ldm.quantizer.restart_dead_codes
    monkeypatch.setattr(train_ldm.quantizer, "CodeUsage", lambda codes, window, last, device: CodeUsage(codes, 5, 11, device))
    monkeypatch.setattr(train_ldm.quantizer, "restart_dead_codes", lambda *a: moved.append(honest(*a)))
    assert in_process(command_line("autoencoder", root, "restart-whole")) == 0
    assert max(moved) > 0
    whole = run.load_file(root / "restart-whole" / "model.pt")["state_dict"]
    save_checkpoint = run.save_checkpoint

    def once(folder, saved, **numbers):
        save_checkpoint(folder, saved, **numbers)
        raise KeyboardInterrupt             # after step 4, in the middle of a window

    with monkeypatch.context() as patch:
        patch.setattr(run, "save_checkpoint", once)
        assert in_process(command_line("autoencoder", root, "restart-halves")) == 130
    assert in_process(command_line("autoencoder", root, "restart-halves")) == 0
    again = run.load_file(root / "restart-halves" / "model.pt")["state_dict"]
    assert all(torch.equal(value, again[key]) for key, value in whole.items())


def test_a_file_without_names_is_no_official_weights(tmp_path):
    for content in ({0: torch.zeros(1)}, {"a": 1}, [torch.zeros(1)]):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(UserError, match="holds no tensors by name"):
            run_training.load_official(train_seg.run_setup.UNet(2, width=8), tmp_path / "a.pt")


def test_groups_of_a_narrow_network_have_four_channels():
    config = train_ldm.AutoencoderConfig(patch=32, width=16)
    model, _ = run_setup.autoencoder_gan(config, CPU)
    _, denoiser = run_setup.diffusion(train_ldm.DiffusionConfig(patch=32, width=16), model, 6, CPU)
    for network in (model, denoiser):
        found = {m.num_channels // m.num_groups for m in network.modules() if isinstance(m, torch.nn.GroupNorm)
                 if m.num_channels == 16}
        assert found == {4}


# ---- generate.py: what is painted --------------------------------------------------------------------------

class Spy:
    """A painter that keeps its batches and paints grey."""
    multiple = 1

    def __init__(self):
        self.batches = []

    def paint(self, batch):
        self.batches.append(batch)
        return torch.zeros_like(batch["image"])


def test_the_painter_is_asked_for_the_labels_that_are_written(tmp_path, monkeypatch):
    write_dataset(tmp_path / "data", slides=4, height=64, width=96)
    spy = Spy()
    monkeypatch.setattr(generate, "make_painter", lambda *_: spy)
    generate.main(["--method", "restain", "--data", str(tmp_path / "data"), "--cache", str(tmp_path / "cache"), "--patch",
                   "32", "--count", "60", "--out", str(tmp_path / "out"), "--device", "cpu", "--batch", "7"])
    dataset = load_dataset(tmp_path / "out", require=("train",))
    masks = [np.array(generate.draw.Image.open(roi.mask)) for roi in dataset.rois]
    asked = torch.cat([batch["onehot"] for batch in spy.batches])
    assert np.array_equal(asked.argmax(1).numpy(), np.stack(masks)) and (asked.sum(1) == 1).all()
    olds = torch.cat([batch["image"] for batch in spy.batches])
    assert len(olds) == 60
    # Every instance draws its class anew in every image: 60 first instances, chi-square with 4 degrees of freedom.
    lines = [json.loads(line) for line in (tmp_path / "out/manifest.jsonl").read_text("utf-8").splitlines()]
    counts = np.bincount([next(iter(line["instances"].values()))[1] for line in lines if line["instances"]], minlength=6)[1:]
    assert ((counts - counts.sum() / 5) ** 2 / (counts.sum() / 5)).sum() < 18.5, counts          # p = .001


def test_tissue_without_any_tumor_can_be_painted_too(tmp_path, monkeypatch):
    write_dataset(tmp_path / "data", slides=4, height=64, width=96)
    for path in (tmp_path / "data/masks").iterdir():
        save(path, np.zeros((64, 96), np.uint8))
    monkeypatch.setattr(generate, "make_painter", lambda *_: Spy())
    generate.main(["--method", "restain", "--data", str(tmp_path / "data"), "--cache", str(tmp_path / "cache"), "--patch",
                   "32", "--count", "2", "--sampling", "uniform", "--out", str(tmp_path / "out"), "--device", "cpu"])
    lines = [json.loads(line) for line in (tmp_path / "out/manifest.jsonl").read_text("utf-8").splitlines()]
    assert [line["instances"] for line in lines] == [{}, {}]


@pytest.fixture(scope="module")
def latent_model(tmp_path_factory):
    """The content of a diffusion model with random weights and a latent scale of 1/4."""
    torch.manual_seed(0)
    vq = VQAutoencoder(factor=4, ch=8, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=3, num_codes=64, groups=2)
    vq.quantize.weight.data.normal_()
    ldm = LatentDenoiser(num_classes=6, z_channels=3, model_channels=32, channel_mult=(1,), num_res_blocks=1, stages=2)
    ldm.set_latent_scale(4.0)
    folder = tmp_path_factory.mktemp("latent")
    about = {"classes": [], "split": {}}
    run.save_model(folder / "vq", "autoencoder", vq.config, vq.state_dict(), step=1, **about)
    run.save_model(folder / "ldm", "diffusion", ldm.config, ldm.state_dict(), step=1, drop_label=0.1,
                   schedule=dict(T=1000, zero_terminal_snr=True, parametrisation="v"),
                   autoencoder=run.load_model(folder / "vq", "autoencoder"), **about)
    return run.load_model(folder / "ldm", "diffusion")


def painter_and_batch(content, **fields):
    config = generate.Config(patch=32, device="cpu", **fields)
    painter = generate.DiffusionPainter(content, config, CPU)
    random = torch.Generator().manual_seed(3)
    image = torch.rand(2, 3, 32, 32, generator=random) * 2 - 1
    label = torch.randint(6, (2, 32, 32), generator=random)
    repaint = torch.zeros(2, 32, 32, dtype=torch.bool)
    repaint[:, 8:16, 8:24] = True
    return painter, {"image": image, "label": label, "onehot": onehot_of(label).float(), "seeds": ["a", "b"],
                     "repaint": repaint}


@pytest.mark.parametrize("grain", [True, False])
def test_a_small_inpainted_region_gets_the_noise_of_its_slide(latent_model, tmp_path, monkeypatch, grain):
    """Noise of 6 grey levels on grey, and a painter without any: 3 % of the patch is painted."""
    rng, label = np.random.default_rng(0), np.zeros((64, 64), np.uint8)
    label[20:31, 20:31] = 3
    rows = []
    for k, split in enumerate(("train", "train", "val", "test")):
        save(tmp_path / f"data/{k}.png", (150 + 6 * rng.normal(size=(64, 64, 3))).round().clip(0, 255).astype(np.uint8))
        save(tmp_path / f"data/{k}m.png", label)
        rows.append({"image": f"{k}.png", "mask": f"{k}m.png", "slide": f"s{k}", "split": split})
    write_csv(tmp_path / "data", rows)
    dataset = load_dataset(tmp_path / "data")
    content = {**latent_model, "classes": dataset.classes.to_json(), "split": dataset.slides(), "autoencoder": None}
    monkeypatch.setattr(generate.run, "load_model", lambda *_: content)
    monkeypatch.setattr(generate, "make_painter", lambda *_: Spy())     # grey: 127.5
    (tmp_path / "none").touch()
    generate.main(["--method", "inpaint", "--model", str(tmp_path / "none"), "--data", str(tmp_path / "data"), "--cache",
                   str(tmp_path / "cache"), "--patch", "64", "--count", "8", "--out", str(tmp_path / "out"), "--device",
                   "cpu", "--grain" if grain else "--no-grain"])
    painted = np.concatenate([np.array(generate.draw.Image.open(roi.image))[label > 0]
                              for roi in load_dataset(tmp_path / "out", require=("train",)).rois]).astype(float)
    assert len(painted) == 8 * 121 and abs(painted.mean() - 127.5) < 1
    assert abs(painted.std() - 6) < 0.6 if grain else painted.std() < 0.6


@pytest.mark.parametrize("sampler, steps", [("ddim", 20), ("dpm", 15)])
def test_diffusion_paints_what_its_network_says(latent_model, monkeypatch, sampler, steps):
    """With the exact network for one known latent, the image is that latent decoded, in its own scale."""
    painter, batch = painter_and_batch(latent_model, method="ldm", sampler=sampler, steps=steps, eta=0.0)
    z = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4)) * 4

    def predictor(code, guidance):
        def predict(xt, t):
            signal, noise = painter.schedule.roots(t, xt)
            x0 = z / 4
            return signal * (xt - signal * x0) / noise - noise * x0
        return predict

    monkeypatch.setattr(painter.denoiser, "predictor", predictor)
    with torch.no_grad():
        assert torch.allclose(painter.paint(batch), painter.autoencoder.decode(z).clamp(-1, 1), atol=1e-4)


def test_the_flags_of_sampling_arrive(latent_model, monkeypatch):
    asked, guided = [], []
    painter, batch = painter_and_batch(latent_model, method="inpaint", sampler="heun", steps=7, eta=0.3,
                                       spacing="log-snr", guidance=1.5, dilate=2, erase=True)
    monkeypatch.setattr(generate, "sample", lambda predict, schedule, noise, **more: (
        asked.append(more), torch.zeros(2, 3, 8, 8))[1])
    honest = painter.denoiser.predictor
    monkeypatch.setattr(painter.denoiser, "predictor", lambda code, guidance: (guided.append(guidance), honest(code, guidance))[1])
    with torch.no_grad():
        painter.paint(batch)
        [found] = asked
        assert guided == [1.5]
        assert {key: found[key] for key in ("steps", "eta", "sampler", "spacing")} == {
            "steps": 7, "eta": 0.3, "sampler": "heun", "spacing": "log-snr"}
        erased = generate.inpainting.erase(batch["image"], batch["repaint"])
        assert torch.allclose(found["known"], painter.autoencoder.encode(erased) / 4, atol=1e-5)
        assert torch.equal(found["repaint"], generate.inpainting.repaint_to_latent(batch["repaint"], 4, 2))
        painter.config.erase = False
        painter.paint(batch)
        assert torch.allclose(asked[-1]["known"], painter.autoencoder.encode(batch["image"]) / 4, atol=1e-5)


def test_the_gan_draws_z_from_the_prior_and_from_the_seed_of_the_image(monkeypatch, tmp_path):
    net = SPADEGenerator(6, 1, 4, 32, hidden=1)
    run.save_model(tmp_path, "gan", net.config, net.state_dict(), step=1, classes=[], split={})
    painter = generate.SpadePainter(run.load_model(tmp_path, "gan"), generate.Config(method="gan", patch=32), CPU)
    seen = []
    painter.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    onehot = onehot_of(torch.zeros(2, 32, 32)).float()
    with torch.no_grad():
        painter.paint({"onehot": onehot, "seeds": [5, 6]})
    [(asked, z)] = seen
    assert torch.equal(asked, onehot)
    assert torch.equal(z, torch.stack([torch.randn(4, generator=generator("z", seed)) for seed in (5, 6)]))
