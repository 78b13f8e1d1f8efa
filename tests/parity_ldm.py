"""Recorded numbers of latent-diffusion, taming-transformers and diffusers, recomputed with our code.

Where ours differs on purpose, the official variant is an argument: Codebook(legacy=True), spacing "leading",
final_alpha_bar, blend "after". See test_parity.py for the protocol.
"""

import math
import re

import numpy as np
import torch
import torch.nn.functional as F
from golden_reader import gradient_outputs, module_outputs, probes
from her2.autoencoder import VQAutoencoder
from her2.denoiser import Denoiser, LabelCode, LatentDenoiser, time_embedding
from her2.diffusion import Schedule, denoising_loss
from her2.discriminator import PatchGAN
from her2.gan_losses import adaptive_weight, adversarial_loss, pulls
from her2.net_blocks import load_strict
from her2.quantizer import Codebook, count_codes
from her2.samplers import ddim_tables, ddim_timesteps, trajectory
from her2.run_training import EMA


def schedule_of(config: dict) -> Schedule:
    return Schedule(config["timesteps"], config["linear_start"], config["linear_end"])


def toy_network(xt, t):
    """The stand-in for a network in all recorded trajectories."""
    return 0.3 * xt.tanh() + 0.1 * t.view(-1, 1, 1, 1) / 1000


def replay(start, step, known=None):
    """Recorded noise as the function that the samplers ask."""
    tables = {"start": [start], "step": step, "known": known}
    return lambda purpose, i: tables[purpose][i]


def states(**arguments):
    """-> xT and every latent after it (S+1, B, C, h, w); every guess at x0 (S, B, C, h, w)."""
    with torch.no_grad():
        steps = list(trajectory(**arguments))
    latents = [arguments["noise"]("start", 0)] + [xt for xt, _ in steps]
    return torch.stack(latents), torch.stack([x0 for _, x0 in steps])


def autoencoder_of(ddconfig: dict, embed_dim: int, num_codes: int) -> VQAutoencoder:
    levels = [i for i in range(len(ddconfig["ch_mult"]))
              if ddconfig["resolution"] / 2 ** i in ddconfig["attn_resolutions"]]
    return VQAutoencoder(2 ** (len(ddconfig["ch_mult"]) - 1), ddconfig["ch"], ddconfig["ch_mult"],
                         ddconfig["num_res_blocks"], ddconfig["z_channels"], num_codes, levels,
                         embed_dim=embed_dim)


def unet_of(config: dict) -> Denoiser:
    assert not {2 ** i for i in range(len(config["channel_mult"]))} & set(config["attention_resolutions"])
    return Denoiser(config["in_channels"], config["out_channels"], config["model_channels"],
                    config["channel_mult"], config["num_res_blocks"], config["num_heads"])


def run_unet(meta, sd, inp, out):
    module = unet_of(meta["config"]["unet"])
    load_strict(module, sd)
    return module_outputs(module, meta, inp)


def run_rescaler(meta, sd, inp, out):
    config = meta["config"]["rescaler"]
    module = LabelCode(config["in_channels"], config["out_channels"], config["n_stages"])
    load_strict(module, sd)
    return module_outputs(module, meta, inp)


def q_mean_variance(s, x0, t):
    """Mean, variance and its logarithm of q(xt | x0)."""
    variance = 1 - s.alpha_bar
    return s.roots(t, x0)[0] * x0, s.at(variance, t, x0), s.at(variance.log(), t, x0)


def vlb_weight(s):
    """(T,) weights that turn the L2 loss on eps into the variational bound; officially only logged.

    At t = 0, where the posterior has no width, the weight of t = 1 stands. float32, as officially, loses four
    digits in 1 - alpha_bar, so in float64 too.
    """
    beta, variance, alpha, alpha_bar = (table.to(torch.float32) for table in (
        s.beta, s.posterior_variance, s.alpha, s.alpha_bar))
    weight = beta ** 2 / (2 * variance * alpha * (1 - alpha_bar))
    return torch.cat([weight[1:2], weight[1:]])


def code_statistics(counts):
    """-> (perplexity, number of codes used): exp of the entropy of the codes' frequencies."""
    frequency = counts.double() / counts.sum().clamp(min=1)
    perplexity = torch.exp(-(frequency * torch.log(frequency + 1e-10)).sum())
    return perplexity.item(), int((counts > 0).sum())


def ddpm_embedding(t, dim):
    """The convention of Ho et al. 2020: [sin, cos], and frequency i is 10000^(-i/(half-1))."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32) * -(math.log(10000.0) / (half - 1))
    angles = t[:, None].float() * torch.exp(exponents)[None]
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


def run_time_embedding(meta, sd, inp, out):
    return {f"{name}/{dim}": embedding(inp["t"], dim) for dim in meta["config"]["dims"]
            for name, embedding in (("openai", time_embedding), ("ddpm_vq_model_py", ddpm_embedding))}


def run_quantizer(meta, sd, inp, out):
    config, ours = meta["config"], {}
    codebook = Codebook(config["n_e"], config["e_dim"], config["beta"])
    codebook.load_state_dict(sd)
    for legacy in (1, 0):
        z = inp["z"].clone().requires_grad_()
        z_q, indices, loss = codebook(z, legacy=bool(legacy))
        grad_z, grad_codes = torch.autograd.grad(loss + (z_q * inp["g"]).sum(), [z, codebook.weight])
        ours.update({f"legacy{legacy}/loss": loss, f"legacy{legacy}/zq": z_q,
                     f"legacy{legacy}/grad_z": grad_z, f"legacy{legacy}/grad_embedding": grad_codes,
                     "indices_sane1": indices, "indices_sane0": indices.flatten()})
    return ours


def run_vq(meta, sd, inp, out):
    config, x = meta["config"], inp["x"]
    model = autoencoder_of(config["ddconfig"], config["embed_dim"], config["n_embed"])
    model.load_official_state_dict(sd)
    model.eval()
    with torch.no_grad():
        z = model.encode(x)
        z_q, indices, loss = model.quantize(z)
        rows, codes = z.movedim(1, -1).flatten(0, 2).double(), model.quantize.weight.double()
        distances = (rows[:, None] - codes).square().sum(2).topk(2, largest=False).values
        ours = {"prequant": z, "quant": z_q, "loss_legacy": model.quantize(z, legacy=True)[2],
                "loss_legacyFalse": loss, "indices": indices.flatten(),
                "index_margin_min": (distances[:, 1] - distances[:, 0]).min(),
                "dec": model.decode_quantized(z_q), "codebook_entry": model.quantize.lookup(indices),
                "iface/encode": model.encode(x), "iface/decode": model.decode(inp["z"]),
                "iface/decode_force_not_quantize": model.decode_quantized(inp["z"])}
    model.train()
    z_q, _, vq_loss = model.quantize(model.encode(x), legacy=True)
    loss = (model.decode_quantized(z_q) - x).abs().mean() + vq_loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {**ours, "train/loss": loss, **gradient_outputs("train/", gradients)}


def run_vq_step(meta, sd, inp, out):
    """Training iterations of the autoencoder and its PatchGAN, each step with its own forward."""
    config, ours = meta["config"], {}
    options = config["loss"]
    model = autoencoder_of(config["ddconfig"], config["embed_dim"], config["n_embed"])
    patchgan = PatchGAN(options["disc_in_channels"], options["disc_ndf"], options.get("disc_num_layers", 3))
    model.load_official_state_dict(sd)
    patchgan.load_official_state_dict(sd)
    optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"], betas=(0.5, 0.9))
    optimizer_d = torch.optim.Adam(patchgan.parameters(), lr=config["lr"], betas=(0.5, 0.9))

    def reconstruct(image):
        z_q, indices, vq_loss = model.quantize(model.encode(image), legacy=True)
        return model.decode_quantized(z_q), indices, vq_loss

    for step in range(config["steps"]):
        image = inp["image"][step].permute(0, 3, 1, 2)
        factor = options.get("disc_factor", 1.0) if step >= options["disc_start"] else 0.0
        reconstruction, indices, vq_loss = reconstruct(image)
        nll = (image - reconstruction).abs().mean()
        g = adversarial_loss(patchgan(reconstruction), "generator")
        weight = adaptive_weight(pulls(nll, g, model.decoder.conv_out.weight)) * options["disc_weight"]
        loss = nll + weight * factor * g + options["codebook_weight"] * vq_loss
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            ours.update(gradient_outputs("step0/opt0/", {n: p.grad for n, p in model.named_parameters()}))
        optimizer.step()
        perplexity, used = code_statistics(count_codes(indices, config["n_embed"]))
        log = dict(total_loss=loss, quant_loss=vq_loss, nll_loss=nll, rec_loss=nll, p_loss=0.0,
                   d_weight=weight, disc_factor=factor, g_loss=g, perplexity=perplexity, cluster_usage=used)

        with torch.no_grad():
            reconstruction = reconstruct(image)[0]
        real, fake = patchgan(image), patchgan(reconstruction)
        loss_d = factor * 0.5 * (adversarial_loss(real, "real") + adversarial_loss(fake, "fake"))
        optimizer_d.zero_grad()
        loss_d.backward()
        if step == 0:
            ours.update(gradient_outputs("step0/opt1/", {f"loss.discriminator.{n}": p.grad
                                                         for n, p in patchgan.named_parameters()}))
        optimizer_d.step()
        log.update(disc_loss=loss_d, logits_real=real.mean(), logits_fake=fake.mean())
        ours.update({f"log{step}/train/{name}": torch.as_tensor(x).detach() for name, x in log.items()})
        ours.update({f"loss{step}/opt0": loss.detach(), f"loss{step}/opt1": loss_d.detach()})

    final = {**dict(model.named_parameters()),
             **{f"loss.discriminator.{name}": parameter for name, parameter in patchgan.named_parameters()}}
    names, rows = probes(final)
    return {**ours, "final/param_names": np.array(names), "final/param_probes": rows,
            **{f"final/disc/buf/{name}": buffer for name, buffer in patchgan.named_buffers()}}


def run_schedule(meta, sd, inp, out):
    s = schedule_of(meta["config"])
    ours = {"betas": s.beta, "alphas_cumprod": s.alpha_bar, "alphas_cumprod_prev": s.alpha_bar_before,
            "sqrt_alphas_cumprod": s.alpha_bar.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - s.alpha_bar).sqrt(),
            "log_one_minus_alphas_cumprod": (1 - s.alpha_bar).log(),
            "sqrt_recip_alphas_cumprod": (1 / s.alpha_bar).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / s.alpha_bar - 1).sqrt(),
            "posterior_variance": s.posterior_variance, "posterior_mean_coef1": s.posterior_x0,
            "posterior_log_variance_clipped": s.posterior_variance.clamp(min=1e-20).log(),
            "posterior_mean_coef2": s.posterior_xt, "lvlb_weights": vlb_weight(s),
            "f64/betas": s.beta, "f64/alphas_cumprod": s.alpha_bar}
    for S in meta["config"]["S"]:
        ours[f"ddim_timesteps/uniform/{S}"] = np.array(ddim_timesteps(s.T, S, "leading"))
        roots = torch.linspace(0, (s.T * 0.8) ** 0.5, S, dtype=torch.float64)       # which nothing here uses
        ours[f"ddim_timesteps/quad/{S}"] = (roots ** 2).long().numpy() + 1
    return ours


def posterior(s, x0, xt, t):
    """Eq. 3 of her2/diffusion.py: mean (B, C, h, w), variance and its logarithm (B, 1, 1, 1).

    At t = 0 the variance is 0; its logarithm is cut off at 1e-20, as official.
    """
    mean = s.at(s.posterior_x0, t, xt) * x0 + s.at(s.posterior_xt, t, xt) * xt
    log_variance = s.posterior_variance.clamp(min=1e-20).log()
    return mean, s.at(s.posterior_variance, t, xt), s.at(log_variance, t, xt)


def run_diffusion_math(meta, sd, inp, out):
    s, t, x0, xt, noise = schedule_of(meta["config"]), *(inp[name] for name in ("t", "x0", "xt", "noise"))
    ours = {"q_sample": s.q_sample(x0, t, noise), "predict_start_from_noise": s.x0_and_eps(noise, xt, t)[0]}
    for name, value in zip(("mean", "variance", "log_variance"), q_mean_variance(s, x0, t)):
        ours[f"q_mean_variance/{name}"] = value
    names = ("mean", "variance", "log_variance_clipped")
    ours.update({f"q_posterior/{name}": value for name, value in zip(names, posterior(s, x0, xt, t))})
    guess = s.x0_and_eps(toy_network(xt, t), xt, t)[0]
    for clip in (0, 1):
        q = posterior(s, guess.clamp(-1, 1) if clip else guess, xt, t)
        ours.update({f"p_mean_variance/clip{clip}/{name}": value for name, value in zip(names, q)})
        mean, _, log_variance = q
        ours[f"p_sample/clip{clip}"] = mean + (t > 0).view(-1, 1, 1, 1) * (0.5 * log_variance).exp() * noise
    output = toy_network(s.q_sample(x0, t, noise), t)
    for kind in ("l1", "l2"):
        loss = denoising_loss(output, s.target(x0, noise, t), kind)
        ours[f"p_losses/{kind}"] = loss.mean()
        ours[f"p_losses/{kind}_vlb"] = (vlb_weight(s)[t] * loss).mean()
    return ours


def run_ddim(meta, sd, inp, out):
    s, ours = schedule_of(meta["config"]), {}
    last = s.alpha_bar[0].item()
    for case in sorted({name.rsplit("/", 1)[0] for name in out}):
        S, eta, inpaint = re.fullmatch(r"S(\d+)/eta([\d.]+)(/inpaint)?", case).groups()
        timesteps = ddim_timesteps(s.T, int(S), "leading")
        region = dict(known=inp["x0"], repaint=inp["mask"] == 0) if inpaint else {}
        noise = replay(inp["x_T"], inp["noise"], inp["qnoise"])
        x, pred_x0 = states(predict=toy_network, schedule=s, timesteps=timesteps, eta=float(eta), noise=noise,
                            final_alpha_bar=last, **region)
        now, before, sigma, _ = ddim_tables(s, timesteps, float(eta), last)
        ours.update({f"{case}/x": x, f"{case}/pred_x0": pred_x0, f"{case}/alphas": now,
                     f"{case}/timesteps": np.array(timesteps[::-1]),
                     f"{case}/alphas_prev": before, f"{case}/sigmas": sigma,
                     f"{case}/sqrt_one_minus_alphas": (1 - now).sqrt()})
    return ours


def run_diffusers_ddim(meta, sd, inp, out):
    """diffusers' DDIMScheduler: S levels T // S apart; `steps_offset` and the end of the last step vary."""
    s, ours = schedule_of(meta["config"]), {}
    for name in out:
        variant, rest = name.split("/", 1)
        flags = meta["config"]["variants"][variant]
        if rest == "alphas_cumprod":
            ours[name] = s.alpha_bar
            continue
        S, eta = re.match(r"S(\d+)/eta([\d.]+)/", rest).groups()
        timesteps = [i * (s.T // int(S)) + flags.get("steps_offset", 0) for i in range(int(S))]
        last = 1.0 if flags.get("set_alpha_to_one", True) else s.alpha_bar[0].item()
        if rest.endswith("timesteps"):
            ours[name] = np.array(timesteps[::-1])
        else:
            ours[name] = states(predict=toy_network, schedule=s, timesteps=timesteps, eta=float(eta),
                                noise=replay(inp["x_T"], inp["noise"]), final_alpha_bar=last)[0]
    return ours


def run_ddpm_loop(meta, sd, inp, out):
    """All T steps: our DDIM with eta 1 on every level is the official ancestral sampler."""
    config, ours = meta["config"], {}
    s = schedule_of(config)
    logged = [0] + [i + 1 for i in range(s.T) if (s.T - 1 - i) % config["log"] == 0 or i == 0]
    common = dict(predict=toy_network, schedule=s, timesteps=ddim_timesteps(s.T, s.T), eta=1.0,
                  noise=replay(inp["x_T"], inp["noise"], inp["qnoise"]))

    def clipped(xt, t):                 # for images, which end at -1 and 1; latents do not
        x0, _ = s.x0_and_eps(toy_network(xt, t), xt, t)
        return s.eps_from_x0(x0.clamp(-1, 1), xt, t)

    for case, options in (("ldm", {}), ("ddpm_clip", dict(predict=clipped)),
                          ("ldm/inpaint", dict(known=inp["x0"], repaint=inp["mask"] == 0, blend="after"))):
        x = states(**{**common, **options})[0]
        ours.update({f"{case}/x": x[logged], f"{case}/final": x[-1]})
    return ours


def run_ldm_step(meta, sd, inp, out):
    """Training iterations of the latent diffusion model, then samples from it."""
    config, ours = meta["config"], {}
    ldm = config["ldm"]
    first, unet = ldm["first_stage_config"]["params"], ldm["unet_config"]["params"]
    rescaler = ldm["cond_stage_config"]["params"]
    s = schedule_of(ldm)
    autoencoder = autoencoder_of(first["ddconfig"], first["embed_dim"], first["n_embed"])
    autoencoder.load_official_state_dict(sd)
    autoencoder.eval()
    model = LatentDenoiser(rescaler["in_channels"], unet["out_channels"], unet["model_channels"],
                           unet["channel_mult"], unet["num_res_blocks"], unet["num_heads"],
                           rescaler["n_stages"], rescaler["out_channels"])
    model.load_official_state_dict(sd, ema=False)
    ema = EMA(model, 0.9999)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"])
    group = optimizer.param_groups[0]
    ours["opt_defaults"] = np.array([group["lr"], *group["betas"], group["eps"], group["weight_decay"]])

    def official(name):
        return (name.replace("unet.", "model.diffusion_model.", 1)
                .replace("label_code.", "cond_stage_model.", 1))

    for step in range(config["steps"]):
        image, onehot = (inp[name][step].permute(0, 3, 1, 2) for name in ("image", "segmentation"))
        t, eps = inp["t"][step], inp["noise"][step]
        with torch.no_grad():
            x0 = autoencoder.encode(image) * model.latent_scale
        code = model.label_code(onehot)
        if step == 0:
            ours.update(z=x0, cond=code.detach())
        output = model(s.q_sample(x0, t, eps), t, code)
        loss = denoising_loss(output, s.target(x0, eps, t), ldm["loss_type"])
        vlb = (vlb_weight(s)[t] * loss.detach()).mean()
        optimizer.zero_grad()
        loss.mean().backward()
        if step == 0:
            ours.update(gradient_outputs("step0/", {official(name): parameter.grad
                                                    for name, parameter in model.named_parameters()}))
        optimizer.step()
        ema.update(model)
        mean = loss.mean().item()
        ours.update({f"loss{step}": mean, f"dict{step}/train/loss": mean, f"dict{step}/train/loss_vlb": vlb,
                     f"dict{step}/train/loss_simple": mean})

    def table(module, prefix, head=""):
        return {head + name.removeprefix(prefix): parameter for name, parameter in module.named_parameters()
                if name.startswith(prefix)}

    names, rows = probes(table(model, "unet.", "diffusion_model."))
    ours.update({"final/model/param_names": np.array(names), "final/model/param_probes": rows})
    names, rows = probes(table(model, "label_code."))
    ours.update({"final/cond/param_names": np.array(names), "final/cond/param_probes": rows,
                 "final/ema_probes": probes(table(ema.module, "unet.", "diffusion_model."))[1],
                 "final/ema_num_updates": np.array(ema.updates, dtype=np.int32)})

    # The samples come from the trained weights themselves, not from their average.
    model.eval()
    last = s.alpha_bar[0].item()
    with torch.no_grad():
        predict = model.predictor(model.label_code(inp["segmentation"][0].permute(0, 3, 1, 2)))
        ours["decode_first_stage"] = autoencoder.decode(inp["zdec"] / model.latent_scale)
    common = dict(predict=predict, schedule=s, timesteps=ddim_timesteps(s.T, config["S"], "leading"), eta=1.0,
                  noise=replay(inp["x_T"], inp["snoise"], inp["qnoise"]), final_alpha_bar=last)
    ours["sample"] = states(**common)[0][-1]
    ours["sample_inpaint"] = states(**common, known=inp["zdec"], repaint=inp["mask"] == 0)[0][-1]
    return ours


RUNNERS = {"module:unet": run_unet, "module:rescaler": run_rescaler, "time_embedding": run_time_embedding,
           "quantizer": run_quantizer, "vq": run_vq, "vq_loss_step": run_vq_step, "schedule": run_schedule,
           "ddpm_math": run_diffusion_math, "ddim": run_ddim, "diffusers_ddim": run_diffusers_ddim,
           "ddpm_loop": run_ddpm_loop, "ldm_step": run_ldm_step}
NETWORKS = {"module:unet", "module:rescaler", "vq", "vq_loss_step", "ldm_step"}
