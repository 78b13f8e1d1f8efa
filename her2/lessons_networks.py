"""Lessons about networks, their losses and their seeds (see `lessons`).

The networks have random weights: what is asked is what their structure can see and pass on.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from her2.autoencoder import VQ_F4, VQ_F8, Attention, VQAutoencoder
from her2.discriminator import MultiscaleDiscriminator
from her2.draw import CYCLE, GREY, INK, Canvas, fit, tint
from her2.draw_charts import plot, sheet
from her2.lessons_diffusion import FLOWER
from her2.lessons_tissue import region
from her2.net_blocks import SpectralConv2d, init_weights
from her2.quantizer import Codebook, count_codes, restart_dead_codes, vq_loss
from her2.run_seeds import generator
from her2.spade import SPADENorm


def quantizer(answer):
    """A latent is replaced by the nearest of K codes, so the plane falls into cells, one colour per code. A
    code moves to the mean of what it wins, and one that wins nothing never moves: of 16 codes that start near
    zero {used_plain} are in use after 200 steps, {used} when dead ones restart at latents of the data.
    Weighing the codes' term by 0.25 (the official default) makes the first step of SGD {slow[SGD]:.1f} times
    shorter, that of Adam {slow[Adam]:.1f} times: Adam cancels the scale of a loss.

    Exercise: with beta on the commitment, a latent that wants to be at x (loss |z - x|^2) settles between x
    and its code. Where, for beta 0.05, 0.25 and 4?

    Answer: at {rest[0]:.2f}, {rest[1]:.2f} and {rest[2]:.2f} of the way from x to the code: beta / (1 +
    beta). A large beta makes the encoder obey codes that are still bad, a small one lets latents drift away
    from them.
    """
    data = torch.randn(300, 2, generator=generator("latents")) * 0.3 + FLOWER.means[:2].repeat(150, 1).float()
    latents = data.T[None, :, None]                                                     # (1, 2, 1, 300)
    grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 2.5, 200)] * 2, indexing="xy"))[None]

    def train(steps, restart=False, kind=torch.optim.Adam, legacy=False):
        """The codebook after `steps`, and its loss at each."""
        torch.manual_seed(0)
        book, history = Codebook(16, 2), []
        optimizer, usage = kind([book.weight], lr=0.02), torch.zeros(16)
        for step in range(steps):
            indices = book.nearest(latents)
            usage += count_codes(indices, 16)
            loss = vq_loss(latents, book.lookup(indices), legacy=legacy)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
            if restart and step % 50 == 49:
                restart_dead_codes(book, usage, latents, generator("restart", step), optimizer)
                usage.zero_()
        return book, history

    def picture(book):
        shade = np.array([tint(color, amount) for amount in (0.2, 0.4, 0.6) for color in CYCLE[:6]], np.uint8)
        image = shade[book.nearest(grid)[0].numpy()]
        for points, color, size in ((data.numpy(), GREY, 1), (book.weight.detach().numpy(), INK, 3)):
            for x, y in ((points + 1) / 3.5 * 200).clip(size, 199 - size).astype(int):
                image[y - size:y + size, x - size:x + size] = color
        return image

    def settled(beta):              # where z ends that is pulled to x = 0 and committed to the code 1
        z, code = torch.zeros(1, requires_grad=True), torch.ones(1)
        optimizer = torch.optim.SGD([z], lr=0.05)
        for _ in range(100):
            optimizer.zero_grad()
            (z.square().mean() + vq_loss(z, code, beta)).backward()
            optimizer.step()
        return z.item()

    start, plain, restarted = train(0)[0], train(200)[0], train(200, restart=True)[0]
    kinds = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}
    slow = {}                       # how much longer the first step is without the weight of 0.25
    for key, kind in kinds.items():
        full, weighted = ((train(1, False, kind, legacy)[0].weight - start.weight).norm().item()
                          for legacy in (False, True))
        slow[key] = full / weighted
    betas, rest = np.geomspace(0.01, 10, 50), [settled(beta) for beta in (0.05, 0.25, 4)]
    chart = {f"{key}{', 0.25' * legacy}": (range(60), train(60, False, kind, legacy)[1])
             for key, kind in kinds.items() for legacy in (False, True)}
    if answer:
        chart = {"b / (1 + b)": (betas, betas / (1 + betas)), "trained": ((0.05, 0.25, 4), rest, "dots")}
    title, x_label = ("way to the code", "beta") if answer else ("loss", "steps")
    chart = plot(chart, title, x_label, size=(215, 225), log_x=answer)
    pictures = {"start": start, "200 steps": plain, "with restarts": restarted}
    used = [len(book.nearest(latents).unique()) for book in (plain, restarted)]
    return sheet([[*((name, picture(book)) for name, book in pictures.items()), chart]]), {
        "used_plain": used[0], "used": used[1], "rest": rest, "slow": slow}


def seen_pixels(network, outputs, side: int, channels: int = 3) -> np.ndarray:
    """(side, side): how much each pixel moves the middle of `outputs(network, image)`, (1, C, h, w)."""
    image = torch.rand(1, channels, side, side, generator=generator("image"), requires_grad=True)
    result = outputs(network, image)
    result[:, :, result.shape[2] // 2, result.shape[3] // 2].sum().backward()
    return image.grad.abs().sum(1)[0].numpy()


def without(network, *kinds):
    """`network` with every layer of `kinds` replaced by the identity, in place."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, kinds):
                setattr(module, name, nn.Identity())
    return network


def autoencoder(answer):
    """Halving the image twice makes one latent cell of 4 x 4 pixels, and by its convolutions a cell sees
    {sees} x {sees} pixels. GroupNorm divides by statistics of the whole map, and attention mixes all cells,
    so that in truth every pixel has a say, faintly: {far:.0%} of the influence in a network with random
    weights lies outside that square. That is how old tumor leaks into the cells beside it.

    Exercise: how many parameters do vq-f4 and vq-f8 have, and how many numbers does each keep of a 512 px
    image?

    Answer: {f4:,} and {f8:,} parameters: one level and wider latents more, attention at the lowest
    resolution. A latent of f4 is 128 x 128 x 3 = {kept4:,} numbers, of f8 64 x 64 x 4 = {kept8:,}: a third.
    """
    maps = {}
    for name, removed in (("convolutions alone", (nn.GroupNorm, Attention)), ("+ GroupNorm", (Attention,)),
                          ("+ attention", ())):
        torch.manual_seed(0)
        network = without(VQAutoencoder(4, ch=8, num_codes=4), *removed)
        maps[name] = seen_pixels(network, VQAutoencoder.encode, 128)
    square = np.flatnonzero(maps["convolutions alone"].any(axis=0))
    inside = np.zeros((128, 128), bool)
    inside[square[0]:square[-1] + 1, square[0]:square[-1] + 1] = True
    pictures = []
    for name, one in maps.items():
        level = np.log10(np.maximum(one / one.max(), 1e-6)) / 6 + 1     # 0 .. 1: six decades
        pictures.append((f"{name} (log)", fit((255 - 255 * level).astype(np.uint8), 150)))
    with torch.device("meta"):
        counts = [sum(p.numel() for p in VQAutoencoder(**options).parameters()) for options in (VQ_F4, VQ_F8)]
    canvas = Canvas(290, 150)
    for column, (name, options) in enumerate((("vq-f4", VQ_F4), ("vq-f8", VQ_F8))):
        sizes = [f"{512 >> k} px: {options['ch'] * m}" for k, m in enumerate(options["ch_mult"])]
        latent = f"latent: {512 // options['factor']} px x {options['z_channels']}"
        canvas.text(74 + 144 * column, 4, "\n".join([f"{name}, channels", *sizes, latent]), 13, anchor="ma")
    whole = maps["+ attention"]
    return sheet([[*pictures, canvas.array()]]), {
        "sees": int(square[-1] - square[0] + 1), "far": float(whole[~inside].sum() / whole.sum()),
        "f4": counts[0], "f8": counts[1], "kept4": 128 * 128 * 3, "kept8": 64 * 64 * 4, "maps": maps}


def spade(answer):
    """Told the label only at its input, a network forgets it: a map of one class through convolution and
    normalisation gives the same values for every class (difference {washed:.0e}). SPADE normalises without
    parameters and lets the label map set scale and shift at every layer and pixel, so the class survives
    (difference {kept:.0e} with the initial weights). At the start gamma is of size {gamma:.0e}: SPADE begins
    as plain normalisation.

    Exercise: write norm(x) * gamma + beta, without the 1. What does the first image look like, and its
    gradient?

    Answer: one layer lets a signal of standard deviation {spread[0]:.2f} become {spread[1]:.0e}, and three of
    them {spread[3]:.0e}: nothing reaches the image, and gradients shrink by the same factors on their way
    back.
    """
    torch.manual_seed(0)
    convolution = nn.Conv2d(6, 8, 3, padding=1, padding_mode="replicate")
    layer = SPADENorm(8, 6, "instance", hidden=16)
    init_weights(layer, generator("lesson", "spade"))
    x = torch.randn(1, 8, 64, 64, generator=generator("lesson", "x"))
    half = torch.zeros(64, 64, dtype=torch.long)
    half[:, 32:] = 4
    labels = {"class 0": torch.zeros_like(half), "class 3+": torch.full_like(half, 4), "halves": half}
    usual, told, gammas = {}, {}, []
    with torch.no_grad():
        for name, label in labels.items():
            onehot = F.one_hot(label, 6).permute(2, 0, 1)[None].float()                 # (1, 6, 64, 64)
            usual[name] = F.instance_norm(convolution(onehot))                          # (1, 8, 64, 64)
            told[name] = layer(x, onehot)
            gammas.append(layer.mlp_gamma(layer.mlp_shared(onehot)))
        signals = [F.instance_norm(x)]
        for _ in range(3):
            signals.append(F.instance_norm(signals[-1]) * gammas[1])
    spread = [float(one.std()) for one in signals]
    pictures = [(f"{caption}\n{name}", fit((128 + 60 * one[0, 0]).clamp(0, 255).byte(), 128))
                for caption, row in (("conv + norm", usual), ("1e4 (SPADE - norm)", told))
                for name, one in ((name, 1e4 * (one - signals[0]) if row is told else one)
                                  for name, one in row.items())]
    chart = plot({"with the 1": (range(4), [1.0] * 4), "without": (range(4), spread)},
                 "signal after n layers", "layers", size=(400, 220), log_y=True)
    return sheet([pictures, *([[chart]] if answer else [])]), {
        "washed": float(abs(usual["class 0"] - usual["class 3+"]).max()), "told": told, "plain": signals[0],
        "kept": float(abs(told["class 0"] - told["class 3+"]).mean()), "spread": spread,
        "gamma": float(torch.cat(gammas).std())}


def discriminator(answer):
    """A discriminator of patches has one logit per window. On the image a window is {one} pixels wide:
    texture, a few cells; on the half-size copy the same layers see {two} pixels of the image: a nest and its
    border. Two scales ask two questions: is this stained as cells are, and do these cells form a nest?

    Exercise: keep one scale, but make its window as large as that of the other. What does it cost?

    Answer: one more layer of stride 2 sees {deeper} pixels. With the official 64 channels it has
    {deep_parameters:,} parameters, the two scales {parameters:,}; and each logit is now about a whole nest:
    no loss is left that looks at fine texture on its own.
    """
    def window(layers, scale):
        network = without(MultiscaleDiscriminator(3, 2, layers), nn.InstanceNorm2d)     # norms see everything
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, SpectralConv2d)):     # positive weights cannot cancel
                (module.weight if isinstance(module, nn.Conv2d) else module.weight_orig).data.fill_(0.1)
        seen = seen_pixels(network.eval(), lambda net, image: net(image)[scale][-1], 352)
        places = np.flatnonzero(seen.any(axis=0))
        return int(places[-1] - places[0] + 1)

    one, two, deeper = window(4, 0), window(4, 1), window(5, 0)
    image, crops = region(2)[0].copy(), []
    for side, color in ((one, CYCLE[0]), (two, CYCLE[1])):
        y, x = 95 - side // 2, 183 - side // 2
        crops.append((f"{side} px", fit(region(2)[0][y:y + side, x:x + side], 282)))
        frame = np.ones((side, side), bool)
        frame[2:-2, 2:-2] = False
        image[y:y + side, x:x + side][frame] = color
    with torch.device("meta"):
        parameters, deep = (sum(p.numel() for p in MultiscaleDiscriminator(9, 64, *size).parameters())
                            for size in ((4, 2), (5, 1)))                               # layers, scales
    return sheet([[("two windows", image), *crops]]), {"one": one, "two": two, "deeper": deeper,
                                                       "parameters": parameters, "deep_parameters": deep}


def seeds(answer):
    """No generator is carried along: the batch of step s comes from a key (seed, "batch", s), hashed. So a
    run that is resumed at step 6 draws the batches that the uninterrupted one drew (rows 1 and 2, {same} of 6
    equal). With one global generator that starts again (row 3) it draws those of the first steps a second
    time, and never the rest.

    Exercise: resume by hand with a global generator. What must a checkpoint hold, and what if another part of
    the program draws a number in between?

    Answer: its state, {state} bytes: put back, row 4 is row 1. But one more draw anywhere before the
    interruption and all later batches differ ({shifted} of 6 equal): the order of draws is part of the state,
    a key is not.
    """
    def batch(random):              # what a step draws: a tile of 6 x 6 grey values
        return torch.randint(256, (6, 6), generator=random).byte()

    def keyed(steps):
        return [batch(generator(0, "batch", step)) for step in steps]

    random = torch.Generator().manual_seed(0)
    before = [batch(random) for _ in range(6)]
    state = random.get_state()

    def after(random, draws=0):     # six more batches, after `draws` numbers for something else
        torch.rand(draws, generator=random)
        return before + [batch(random) for _ in range(6)]

    rows = {"keys": keyed(range(12)), "keys, resumed at 6": keyed(range(6)) + keyed(range(6, 12)),
            "global": after(random), "global, started again": after(torch.Generator().manual_seed(0)),
            "global, state put back": after(torch.Generator().set_state(state)),
            "global, one draw more": after(torch.Generator().set_state(state), 1)}
    equal = [sum(bool((a == b).all()) for a, b in zip(one[6:], rows["global" if k > 1 else "keys"][6:]))
             for k, one in enumerate(rows.values())]
    rows = dict(list(rows.items())[:6 if answer else 4])
    canvas = Canvas(830, 24 + 52 * len(rows))
    for column in range(12):
        canvas.text(196 + 52 * column + 22, 4, f"step {column}", 12, anchor="ma")
    canvas.line([(191 + 52 * 6, 20), (191 + 52 * 6, canvas.height)], CYCLE[1], 2)
    for row, (name, tiles) in enumerate(rows.items()):
        canvas.text(186, 46 + 52 * row, name, 13, anchor="rm")
        for column, tile in enumerate(tiles):
            canvas.paste(fit(tile, 44), 196 + 52 * column, 24 + 52 * row)
    return canvas.array(), {"same": equal[1], "again": equal[3], "state": len(state), "restored": equal[4],
                            "shifted": equal[5]}
