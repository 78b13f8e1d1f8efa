"""Our SPADE networks, PatchGAN and adversarial losses on the recorded inputs; see test_parity.py."""

import re

import torch
import torch.nn.functional as F
from golden_reader import gradient_outputs, later_overwritten, module_outputs, probes

from her2.discriminator import MultiscaleDiscriminator, PatchGAN, discriminate
from her2.gan_losses import HINGE, adversarial_loss, feature_matching, kl_divergence
from her2.spade import SPADEGenerator, SPADENorm, SPADEResBlock, VAEEncoder, reparameterize

# The other choices of the official code: least squares, cross-entropy (not saturating), Wasserstein without
# its penalty.
KINDS = {
    "hinge": HINGE,
    "ls": {"real": lambda x: (x - 1) ** 2, "fake": lambda x: x ** 2, "generator": lambda x: (x - 1) ** 2},
    "original": {"real": lambda x: F.softplus(-x), "fake": F.softplus, "generator": lambda x: F.softplus(-x)},
    "w": {"real": lambda x: -x, "fake": lambda x: x, "generator": lambda x: -x},
}


def loss_of_kind(logits, role: str, kind: str) -> torch.Tensor:
    assert kind in KINDS, f"found kind {kind!r}; kinds are {list(KINDS)}"
    return adversarial_loss(logits, role, KINDS[kind])


def norm_of(text: str) -> str:
    """'batch' or 'instance' of an option like 'spectralspadesyncbatch3x3' (on one device sync = plain)."""
    kind = re.fullmatch(r"(?:spectral)?spade(?:sync)?(batch|instance)3x3", text)
    assert kind, f"norm option {text!r}"
    return kind.group(1)


def with_official_counters(ours: dict, sd: dict, text: str, prefix: str) -> dict:
    """The official synchronised batch norm never advances num_batches_tracked, ours does: undo that there."""
    if "syncbatch" in text:
        for name in ours:
            if name.startswith(prefix) and name.endswith("num_batches_tracked"):
                ours[name] = sd[name[len(prefix):]]
    return ours


def spade_norm(meta, sd, inp, out):
    config = meta["config"]
    norm = SPADENorm(config["norm_nc"], config["label_nc"], norm_of(config["config_text"]),
                     hidden=len(sd["mlp_shared.0.weight"]))
    norm.load_state_dict(sd)
    return with_official_counters(module_outputs(norm, meta, inp), sd, config["config_text"], "train/buf/")


def spade_block(meta, sd, inp, out):
    config, text = meta["config"], meta["config"]["opt"]["norm_G"]
    block = SPADEResBlock(config["fin"], config["fout"], config["opt"]["semantic_nc"], norm_of(text))
    block.load_state_dict(sd)
    return with_official_counters(module_outputs(block, meta, inp), sd, text, "train/buf/")


def build_generator(opt: dict) -> SPADEGenerator:
    width, ratio = opt["crop_size"], opt.get("aspect_ratio", 1.0)           # the official way to say (H, W)
    return SPADEGenerator(opt["semantic_nc"], opt.get("ngf", 64), opt.get("z_dim", 256),
                          (round(width / ratio), width), norm_of(opt["norm_G"]), opt.get("use_vae", False),
                          opt.get("num_upsampling_layers", "normal"))


def spade_generator(meta, sd, inp, out):
    opt = meta["config"]["opt"]
    generator = build_generator(opt)
    generator.load_official_state_dict(sd)
    return with_official_counters(module_outputs(generator, meta, inp), sd, opt["norm_G"], "train/buf/")


def build_encoder(opt: dict, sd: dict) -> VAEEncoder:
    """The official encoder resizes to 256 x 256 and is 256 wide, whatever crop_size and z_dim say."""
    encoder = VAEEncoder(opt.get("ngf", 64), z_dim=len(sd["fc_mu.bias"]), size=256)
    encoder.load_official_state_dict(sd)
    return encoder


def spade_encoder(meta, sd, inp, out):
    return module_outputs(build_encoder(meta["config"]["opt"], sd), meta, inp)


def build_discriminator(opt: dict, sd: dict) -> MultiscaleDiscriminator:
    in_channels = sd["discriminator_0.model0.0.weight"].shape[1]
    discriminator = MultiscaleDiscriminator(in_channels, opt.get("ndf", 64),
                                            opt.get("n_layers_D", 4), opt.get("num_D", 2))
    discriminator.load_official_state_dict(sd)
    return discriminator


def spade_discriminator(meta, sd, inp, out):
    return module_outputs(build_discriminator(meta["config"]["opt"], sd), meta, inp)


def patchgan(meta, sd, inp, out):
    config = meta["config"]["disc"]
    network = PatchGAN(config["input_nc"], config["ndf"], config["n_layers"])
    network.load_official_state_dict(sd)
    return module_outputs(network, meta, inp)


def gan_losses(meta, sd, inp, out):
    """Recorded with several scales of several features each; the official loss of a list has shape (1,)."""
    config = meta["config"]
    scales, layers = range(config["nd"]), range(config["nf"])

    def features(name):
        return [[inp[f"{name}{i}_{j}"].clone().requires_grad_() for j in layers] for i in scales]

    ours = {}
    fake, real = features("fake"), features("real")
    single_fake, single_real = fake[0][-1], real[0][-1]
    for kind in KINDS:
        ours[f"{kind}/D_fake"] = loss_of_kind(fake, "fake", kind)[None]
        ours[f"{kind}/D_real"] = loss_of_kind(real, "real", kind)[None]
        ours[f"{kind}/G"] = loss_of_kind(fake, "generator", kind)[None]
        ours[f"{kind}/single_G"] = loss_of_kind(single_fake, "generator", kind)
        ours[f"{kind}/single_D_real"] = loss_of_kind(single_real, "real", kind)
    (adversarial_loss(real, "real") + adversarial_loss(fake, "fake")).backward()
    for i in scales:
        ours[f"hinge/gradD_fake{i}"] = fake[i][-1].grad
        ours[f"hinge/gradD_real{i}"] = real[i][-1].grad

    fake, real = features("fake"), features("real")
    adversarial = adversarial_loss(fake, "generator")
    matching = feature_matching(fake, real, config["lambda_feat"])
    (adversarial + matching).backward()
    assert all(feature.grad is None for scale in real for feature in scale), "real features must be detached"
    ours.update({"G_losses/GAN": adversarial[None], "G_losses/GAN_Feat": matching[None]})
    ours.update({f"G_losses/gradfake{i}_{j}": fake[i][j].grad for i in scales for j in layers})

    mu, logvar = inp["mu"].clone().requires_grad_(), inp["logvar"].clone().requires_grad_()
    ours["kld"] = kl_divergence(mu, logvar, reduction="sum")
    ours["kld"].backward()
    ours["kld_gradmu"], ours["kld_gradlogvar"] = mu.grad, logvar.grad
    return ours


def spade_step(meta, sd, inp, out):
    """The official training loop: generator step, then discriminator step with a forward of its own.

    With use_vae off there is no encoder, no z and no KL divergence: the image follows from the label map.
    """
    opt = meta["config"]["opt"]
    nets = {letter: {name[2:]: value for name, value in sd.items() if name[0] == letter} for letter in "GDE"}
    generator = build_generator(opt)
    generator.load_official_state_dict(nets["G"])
    networks = {"G": generator, "D": build_discriminator(opt, nets["D"])}
    if opt.get("use_vae", False):
        networks["E"] = build_encoder(opt, nets["E"])
    discriminator, encoder = networks["D"], networks.get("E")
    lr = opt["lr"]                                           # TTUR: half of it for G and E, twice for D
    painting = [p for letter in "GE" if letter in networks for p in networks[letter].parameters()]
    adam_g = torch.optim.Adam(painting, lr=lr / 2, betas=(0.0, 0.9))
    adam_d = torch.optim.Adam(discriminator.parameters(), lr=lr * 2, betas=(0.0, 0.9))
    onehot = F.one_hot(inp["label"][:, 0].long(), opt["semantic_nc"]).permute(0, 3, 1, 2).float()

    def paint(real, name, index=None):
        """-> fake image, and the KL term (None without an encoder); `name` is the recorded noise."""
        if encoder is None:
            return generator(onehot), None
        mu, logvar = encoder(real)
        noise = inp[name] if index is None else inp[name][index]
        kl = kl_divergence(mu, logvar, reduction="sum")
        return generator(onehot, reparameterize(mu, logvar, noise)), kl

    ours = {}
    for step in range(meta["config"]["steps"]):
        real = inp["image"][step]
        fake, kl = paint(real, "eps", 2 * step)
        fake_features, real_features = discriminate(discriminator, onehot, fake, real)
        matching = feature_matching(fake_features, real_features, opt.get("lambda_feat", 10.0))
        losses = {"GAN": adversarial_loss(fake_features, "generator")[None], "GAN_Feat": matching[None]}
        if kl is not None:
            losses["KLD"] = opt.get("lambda_kld", 0.05) * kl
        adam_g.zero_grad()
        sum(losses.values()).mean().backward()
        if step == 0:
            ours["fake0"] = fake.detach()
            for letter in networks.keys() & {*"GE"}:
                gradients = {name: p.grad for name, p in networks[letter].named_parameters()}
                ours.update(gradient_outputs(f"step0/{letter}/", gradients))
        adam_g.step()

        with torch.no_grad():
            fake, _ = paint(real, "eps", 2 * step + 1)
        fake_features, real_features = discriminate(discriminator, onehot, fake, real)
        loss_real, loss_fake = adversarial_loss(real_features, "real"), adversarial_loss(fake_features, "fake")
        losses.update({"D_real": loss_real[None], "D_Fake": loss_fake[None]})
        adam_d.zero_grad()
        (losses["D_Fake"] + losses["D_real"]).mean().backward()
        if step == 0:
            gradients = {name: p.grad for name, p in discriminator.named_parameters()}
            ours.update(gradient_outputs("step0/D/", gradients))
            if later_overwritten(out, "step0/D/"):           # then views of ours go the same way
                ours.update({f"step0/D/grad/{name}": gradient for name, gradient in gradients.items()})
        adam_d.step()
        ours.update({f"loss{step}/{name}": value.detach() for name, value in losses.items()})

    for letter, network in networks.items():
        names, rows = probes(dict(network.named_parameters()))
        ours.update({f"final/{letter}/param_names": names, f"final/{letter}/param_probes": rows})
        buffers = {f"final/{letter}/buf/{name}": value for name, value in network.named_buffers()}
        ours.update(buffers)
        network.eval()
    with torch.no_grad():                                    # officially z comes from the encoder here too
        ours["final/fake_eval"] = paint(inp["image"][0], "eps_test")[0]
    ours["lr"] = torch.tensor([adam_g.param_groups[0]["lr"], adam_d.param_groups[0]["lr"]])
    return ours


RUNNERS = {"module:spade_norm": spade_norm, "module:spade_block": spade_block,
           "module:spade_gen": spade_generator, "module:spade_enc": spade_encoder,
           "module:spade_dis": spade_discriminator, "module:nlayer": patchgan,
           "gan_losses": gan_losses, "spade_step": spade_step}
NETWORKS = {*RUNNERS} - {"gan_losses"}
