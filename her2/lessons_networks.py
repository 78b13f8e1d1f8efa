"""Lessons about networks, their losses and their seeds (see `lessons`).

The networks have random weights: what is asked is what their structure can see and pass on.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from her2.autoencoder import VQ_F4, VQ_F8, Attention, VQAutoencoder
from her2.discriminator import MultiscaleDiscriminator
from her2.draw import CYCLE, GREY, INK, Canvas, fit, image_grid, tint
from her2.draw_charts import plot, sheet
from her2.lessons_diffusion import FLOWER
from her2.lessons_tissue import region
from her2.net_blocks import init_weights
from her2.quantizer import Codebook, count_codes, restart_dead_codes, vq_loss
from her2.run_seeds import generator
from her2.spade import SPADENorm


def quantizer(answer):
    """A latent is replaced by the nearest of K codes: the plane falls into cells, one colour per code. A code
    moves to the mean of what it wins, and one that wins nothing never moves: of 16 that start near zero
    {used[0]} are in use after 200 steps, {used[1]} when dead ones restart at latents of the data. A weight of
    0.25 on the codes' term (the official default) makes the first step of SGD {slow[SGD]:.1f} times shorter,
    that of Adam {slow[Adam]:.1f} times: Adam cancels the scale of a loss.

    Exercise: with beta on the commitment, a latent that wants to be at x (loss |z - x|^2) settles between x
    and its code. Where, for beta 0.05, 0.25 and 4?

    Answer: at {rest[0]:.2f}, {rest[1]:.2f} and {rest[2]:.2f} of the way from x to the code, beta / (1 +
    beta): a large beta makes the encoder obey codes that are still bad, a small one lets latents drift away.
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
            loss = vq_loss(latents, book.lookup(indices), legacy=legacy)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
            usage += count_codes(indices, 16)
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

    def settled(beta):              # z between x = 0 and its code 1: where the slope, linear in z, is 0
        z = torch.tensor([0.0, 1.0], requires_grad=True)
        at_x, at_code = torch.autograd.grad((z ** 2).mean() + vq_loss(z, torch.ones(2), beta), z)[0]
        return float(at_x / (at_x - at_code))

    books = {"start": train(0)[0], "200 steps": train(200)[0], "with restarts": train(200, True)[0]}
    slow, chart = {}, {}            # how much longer the first step is without the weight of 0.25
    for kind in (torch.optim.SGD, torch.optim.Adam):
        moved = []
        for legacy in (False, True):
            moved.append((train(1, False, kind, legacy)[0].weight - books["start"].weight).norm().item())
            chart[kind.__name__ + ", 0.25" * legacy] = range(60), train(60, False, kind, legacy)[1]
        slow[kind.__name__] = moved[0] / moved[1]
    return sheet([[*((name, picture(book)) for name, book in books.items()),
                   plot(chart, "loss", "steps", size=(215, 225))]]), {
        "used": [len(book.nearest(latents).unique()) for book in list(books.values())[1:]], "slow": slow,
        "rest": [settled(beta) for beta in (0.05, 0.25, 4)]}


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

    Answer: {count[0]:,} and {count[1]:,} parameters: one level more, and attention at the lowest resolution.
    A latent of f4 is 128 x 128 x 3 = 49,152 numbers, of f8 64 x 64 x 4 = 16,384: a third.
    """
    kinds = {"convolutions alone": (nn.GroupNorm, Attention), "+ GroupNorm": (Attention,), "+ attention": ()}
    maps, pictures = [], []
    for name, removed in kinds.items():
        torch.manual_seed(0)
        network = without(VQAutoencoder(4, ch=8, num_codes=4), *removed)
        maps.append(seen_pixels(network, VQAutoencoder.encode, 128))
        level = np.log10(np.maximum(maps[-1] / maps[-1].max(), 1e-6)) / 6 + 1       # 0 .. 1: six decades
        pictures.append((f"{name} (log)", fit((255 - 255 * level).astype(np.uint8), 128)))
    canvas, inside = Canvas(290, 128), np.outer(maps[0].any(axis=1), maps[0].any(axis=0))
    with torch.device("meta"):
        count = [sum(p.numel() for p in VQAutoencoder(**options).parameters()) for options in (VQ_F4, VQ_F8)]
    for column, options in enumerate((VQ_F4, VQ_F8)):
        sizes = [f"{512 >> k} px: {options['ch'] * m}" for k, m in enumerate(options["ch_mult"])]
        latent = f"latent: {512 // options['factor']} px x {options['z_channels']}"
        text = "\n".join([f"vq-f{options['factor']}, channels", *sizes, latent])
        canvas.text(74 + 144 * column, 4, text, 13, anchor="ma")
    return sheet([[*pictures, canvas.array()]]), {
        "sees": int(inside.any(axis=0).sum()), "far": float(maps[2][~inside].sum() / maps[2].sum()),
        "count": count, "maps": maps}


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
    label = torch.zeros(3, 64, 64, dtype=torch.long)    # all of class 0, all of 3+, and one half of each
    label[1], label[2, :, 32:] = 4, 4
    onehot = F.one_hot(label, 6).movedim(-1, 1).float()                                 # (3, 6, 64, 64)
    with torch.no_grad():
        plain, usual = F.instance_norm(x), F.instance_norm(convolution(onehot))         # usual (3, 8, 64, 64)
        told, gamma = layer(x.expand(3, -1, -1, -1), onehot), layer.mlp_gamma(layer.mlp_shared(onehot))
        spread = [float(plain.std())]
        for _ in range(3):
            x = F.instance_norm(x) * gamma[1:2]
            spread.append(float(x.std()))
    pictures = [(f"{caption}\n{name}", fit((128 + 60 * one[0]).clamp(0, 255).byte(), 128))
                for caption, maps in (("conv + norm", usual), ("1e4 (SPADE - norm)", 1e4 * (told - plain)))
                for name, one in zip(("class 0", "class 3+", "halves"), maps)]
    chart = plot({"with the 1": (range(4), [1.0] * 4), "without": (range(4), spread)},
                 "signal after n layers", "layers", size=(400, 220), log_y=True)
    return sheet([pictures, *([[chart]] if answer else [])]), {
        "washed": float(abs(usual[0] - usual[1]).max()), "kept": float(abs(told[0] - told[1]).mean()),
        "spread": spread, "gamma": float(gamma.std()), "told": told, "plain": plain}


def discriminator(answer):
    """A discriminator of patches has one logit per window. On the image a window is {one} pixels wide:
    texture, a few cells; on the half-size copy the same layers see {two} pixels of the image: a nest and its
    border. Two scales ask two questions: is this stained as cells are, and do these cells form a nest?

    Exercise: keep one scale, but make its window as large as that of the other. What does it cost?

    Answer: one more layer of stride 2 sees {deeper} pixels. With the official 64 channels it has {deep:,}
    parameters, the two scales {parameters:,}; and each logit is now about a whole nest: no loss is left that
    looks at fine texture on its own.
    """
    def window(layers, scale):
        network = without(MultiscaleDiscriminator(3, 2, layers), nn.InstanceNorm2d)     # norms see everything
        for name, weight in network.named_parameters():
            weight.data.fill_(0.1)      # positive weights cannot cancel, and no ReLU is dead
        seen = seen_pixels(network.eval(), lambda net, image: net(image)[scale][-1], 352)
        return int(seen.any(axis=0).sum())

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
    return sheet([[("two windows", image), *crops]]), {
        "one": one, "two": two, "deeper": deeper, "parameters": parameters, "deep": deep}


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
    figure = image_grid([[fit(tile, 44) for tile in tiles] for tiles in rows.values()], list(rows),
                        [f"step {k}" for k in range(12)], cell=44)
    return figure, {"same": equal[1], "again": equal[3], "state": len(state), "restored": equal[4],
                    "shifted": equal[5]}
