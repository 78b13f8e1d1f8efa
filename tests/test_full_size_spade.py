"""The SPADE networks and the PatchGAN at the paper's size, on torch's meta device: shapes only, no memory."""

import hashlib
import json

import pytest
import torch
from golden_reader import folders

from her2.discriminator import MultiscaleDiscriminator, PatchGAN
from her2.spade import SPADEGenerator, VAEEncoder

# Name of the reference (keys/*.json of the complete golden set): network, arguments, number of parameters,
# number of tensors in the state_dict, start of the SHA-256 over all their names and shapes.
FULL_SIZE = {
    "spade_G_ngf64_crop512_vae_syncbatch": (SPADEGenerator, {}, 159464131, 234, "c4431e73259fb43c"),
    "spade_G_ngf64_crop512_more_vae_syncbatch": (SPADEGenerator, {"upsampling": "more"}, 108935875, 234,
                                                 "04b1efe8daac25ea"),
    "spade_G_ngf64_crop256_vae_syncbatch": (SPADEGenerator, {"size": 256}, 108935875, 234,
                                            "04b1efe8daac25ea"),
    "spade_E_ngf64": (VAEEncoder, {}, 10463424, 22, "aaabe9c9d7814dfd"),
    "spade_D_ndf64_9ch": (MultiscaleDiscriminator, {}, 5539970, 26, "92a2daf306958047"),
    "patchgan_ndf64_n3": (PatchGAN, {}, 2765633, 22, "3144427cf32b20b0"),
    "patchgan_ndf64_n2": (PatchGAN, {"num_layers": 2}, 663361, 16, "701535504d95a214"),
}


def build(name: str):
    cls, kwargs, *_ = FULL_SIZE[name]
    with torch.device("meta"):
        return cls(**kwargs)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_has_the_official_tensors(name):
    network, (_, _, parameters, tensors, digest) = build(name), FULL_SIZE[name]
    shapes = {key: list(value.shape) for key, value in network.state_dict().items()}
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert len(shapes) == tensors
    assert hashlib.sha256(json.dumps(sorted(shapes.items())).encode()).hexdigest()[:16] == digest
    for folder in folders():
        recorded = folder / "keys" / f"{name}.json"
        if recorded.is_file():
            content = json.loads(recorded.read_text(encoding="utf-8"))
            assert content["parameters"] == parameters and content["keys"] == shapes


def test_output_shapes_at_512_pixels_and_batch_16():
    shapes = (16, 6, 512, 512), (16, 3, 512, 512), (16, 256)
    onehot, image, z = (torch.empty(shape, device="meta") for shape in shapes)
    for name in ("spade_G_ngf64_crop512_vae_syncbatch", "spade_G_ngf64_crop512_more_vae_syncbatch"):
        assert build(name)(onehot, z).shape == (16, 3, 512, 512)
    mu, logvar = build("spade_E_ngf64")(image)
    assert mu.shape == logvar.shape == (16, 256)
    scales = build("spade_D_ndf64_9ch")(torch.cat([onehot, image], dim=1))
    assert [[tuple(feature.shape[1:]) for feature in scale] for scale in scales] == [
        [(64, 257, 257), (128, 129, 129), (256, 65, 65), (512, 66, 66), (1, 67, 67)],
        [(64, 129, 129), (128, 65, 65), (256, 33, 33), (512, 34, 34), (1, 35, 35)]]
    assert build("patchgan_ndf64_n3")(image).shape == (16, 1, 62, 62)
    assert build("patchgan_ndf64_n2")(image).shape == (16, 1, 126, 126)
