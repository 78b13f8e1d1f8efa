"""The U-Net at its official size, on torch's meta device (no memory): names, shapes, parameters, cost."""

import hashlib
import json

import torch

from her2.segmenter import UNet

# From state_dict lists of segmentation-models-pytorch 0.6.0 and torchvision, recorded at full size:
# number of tensors, and the start of sha256 over the JSON of {name: shape}, names sorted.
SMP = (278, "746e1ea129a8952c")
TORCHVISION = (218, "16fb9c65cd10f7b0")


def digest(shapes):
    text = json.dumps({name: list(shape) for name, shape in shapes.items()}, sort_keys=True)
    return len(shapes), hashlib.sha256(text.encode()).hexdigest()[:16]


def full_size():
    with torch.device("meta"):
        return UNet()


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_and_names_are_the_official_ones():
    model = full_size()
    assert count(model) == 24_436_514
    assert count(model.encoder) == 21_284_672
    assert digest({name: value.shape for name, value in model.state_dict().items()}) == SMP
    encoder = {name: value.shape for name, value in model.encoder.state_dict().items()}
    assert count(model.encoder) + 512 * 1000 + 1000 == 21_797_672
    assert digest({**encoder, "fc.weight": (1000, 512), "fc.bias": (1000,)}) == TORCHVISION


def test_shapes_at_paper_size():
    image = torch.empty(16, 3, 512, 512, device="meta")
    model = full_size()
    assert model(image).shape == (16, 2, 512, 512)
    assert [tuple(f.shape) for f in model.encoder(image)] == [
        (16, 3, 512, 512), (16, 64, 256, 256), (16, 64, 128, 128), (16, 128, 64, 64),
        (16, 256, 32, 32), (16, 512, 16, 16)]


def test_multiplications_at_paper_size():
    model, total = full_size(), []
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda layer, _, y: total.append(y.numel() * layer.weight[0].numel()))
    model(torch.empty(1, 3, 512, 512, device="meta"))
    assert round(sum(total) / 1e9, 1) == 31.3
