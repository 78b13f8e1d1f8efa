"""What several networks share: spectral normalisation, weight initialisation, strict loading of weights.

Spectral normalisation (Miyato et al., ICLR 2018, algorithm 1) divides a weight matrix W by its largest
singular value sigma, so that the layer cannot stretch any input by more than 1. One step of power iteration
per training forward tracks sigma; no gradient flows through u and v, and eval mode uses them as they are:

    v = W^T u / |W^T u|        u = W v / |W v|        sigma = u . (W v)        weight = W / sigma

Differs from the official code (NVlabs/SPADE, which uses torch's hook): written out as a layer; products are
taken element by element and then summed, because autocast would turn a matrix product into half precision;
`init_weights` ends with a few power iterations, because an untrained network in eval mode would otherwise
divide by what two random directions happen to give, which may be any small number of either sign.
"""

import re
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn


class SpectralConv2d(nn.Module):
    """A convolution whose weight is divided by its largest singular value; arguments as nn.Conv2d."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride=1, padding=0, bias=True):
        super().__init__()
        self.stride, self.padding = stride, padding
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.weight_orig = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
        nn.init.kaiming_uniform_(self.weight_orig, a=5 ** 0.5)         # torch's default for convolutions
        self.register_buffer("weight_u", F.normalize(torch.randn(out_channels), dim=0))
        self.register_buffer("weight_v", F.normalize(torch.randn(in_channels * kernel * kernel), dim=0))

    @torch.no_grad()
    def power_iteration(self, steps: int = 1) -> None:
        """Turn weight_u and weight_v towards the singular vectors of the largest singular value."""
        matrix = self.weight_orig.flatten(1)                                                # (out, in*k*k)
        for _ in range(steps):
            self.weight_v.copy_(F.normalize((matrix * self.weight_u[:, None]).sum(0), dim=0, eps=1e-12))
            self.weight_u.copy_(F.normalize((matrix * self.weight_v).sum(1), dim=0, eps=1e-12))

    def weight(self) -> torch.Tensor:
        """The weight in use, (out, in, k, k). One step of power iteration when in training mode."""
        if self.training:
            self.power_iteration()
        # outer() is a copy: a second forward before the backward changes u and v in place.
        sigma = (self.weight_orig.flatten(1) * self.weight_u.outer(self.weight_v)).sum()
        return self.weight_orig / sigma

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight(), self.bias, self.stride, self.padding)


@torch.no_grad()
def init_weights(module: nn.Module, generator: torch.Generator, gain: float = 0.02, kind="xavier") -> None:
    """Draw every weight of `module` anew from `generator` (CPU); biases become 0, affine norms N(1, gain).

    "xavier": normal with variance gain^2 * 2 / (fan_in + fan_out): SPADE's default for G, D and E, gain 0.02.
    "normal": normal with standard deviation `gain`: the PatchGAN of the VQ autoencoder, as in pix2pix."""
    assert kind in ("xavier", "normal"), f"kind is 'xavier' or 'normal', found {kind!r}"
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear, SpectralConv2d)):
            weight, mean, deviation = getattr(layer, "weight_orig", layer.weight), 0.0, gain
            if kind == "xavier":
                deviation = gain * (2 / (weight[0].numel() + weight[:, 0].numel())) ** 0.5   # fan in, fan out
        elif isinstance(layer, (nn.BatchNorm2d, nn.GroupNorm)) and layer.weight is not None:
            weight, mean, deviation = layer.weight, 1.0, gain
        else:
            continue
        weight.copy_(torch.randn(weight.shape, generator=generator) * deviation + mean)
        if layer.bias is not None:
            layer.bias.zero_()
        if isinstance(layer, SpectralConv2d):
            layer.power_iteration(steps=5)


def power_iterations(on: bool, *modules: nn.Module) -> None:
    """Let training forwards of the spectral norms in `modules` turn u and v, or not: once per step is due."""
    for layer in nn.ModuleList(modules).modules():
        if isinstance(layer, SpectralConv2d):
            layer.train(on)


@contextmanager
def kept_buffers(module: nn.Module):
    """Around the first pass of --accumulate, a forward that is made again: batch norm remembers that one."""
    before = [buffer.clone() for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in zip(module.buffers(), before):
            buffer.copy_(value)


@contextmanager
def frozen(module: nn.Module):
    """`with frozen(discriminator):` around the forward of a G step: gradients pass through, D keeps none."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)                         # all of it: a discriminator has no fixed part


def load_strict(module: nn.Module, state_dict: dict, rename=()) -> None:
    """Copy `state_dict` into `module`: every tensor of the module, no other, each with its exact shape.

    rename: (regular expression, replacement) pairs, applied in order, that turn official names into ours.
    ValueError lists all missing, unexpected and misshapen tensors; nothing is copied then."""
    own, given, clashes = module.state_dict(), {}, []
    for name, tensor in state_dict.items():
        for pattern, replacement in rename:
            name = re.sub(pattern, replacement, name)
        if name in given:
            clashes.append(name)
        given[name] = tensor
    shapes = {name: tuple(tensor.shape) if torch.is_tensor(tensor) else type(tensor).__name__
              for name, tensor in given.items()}
    wrong = {"missing": sorted(own.keys() - given.keys()), "unexpected": sorted(given.keys() - own.keys()),
             "misshapen": [f"{name} {shapes[name]} instead of {tuple(own[name].shape)}" for name in
                           sorted(own.keys() & given.keys()) if shapes[name] != tuple(own[name].shape)],
             "given twice": clashes}
    problems = [f"{len(names)} {what}: {', '.join(names)}" for what, names in wrong.items() if names]
    if problems:
        raise ValueError(f"weights do not fit {type(module).__name__}: " + "; ".join(problems))
    # On the meta device there is no memory to copy into: such a module takes over the tensors themselves.
    module.load_state_dict(given, assign=any(tensor.is_meta for tensor in own.values()))
