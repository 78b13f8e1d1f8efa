"""The official full sizes, on torch's meta device: tensors and their names, outputs at 512 x 512, batch 16.

Numbers recorded from the reference implementation (latent-diffusion a506df5): parameters, number of tensors,
and the start of sha256 over the JSON of {name: shape}, names sorted.
"""

import hashlib
import json

import pytest
import torch
from her2.autoencoder import VQ_F4, VQ_F8, VQAutoencoder
from her2.denoiser import Denoiser, LatentDenoiser

NETWORKS = {
    "vq-f4": (lambda: VQAutoencoder(**VQ_F4), 55_322_782, 205, "a7472e459cd9e054"),
    "vq-f8": (lambda: VQAutoencoder(**VQ_F8), 67_717_295, 299, "d33e0c64fdbe93c8"),
    "U-Net": (lambda: Denoiser(), 215_229_315, 216, "4faf8c970aefdd0c"),
    "U-Net for f8": (lambda: Denoiser(8, 4), 215_232_772, 216, "b45e060ed9b3fad3"),
}


def on_meta(build):
    with torch.device("meta"):
        return build()


@pytest.mark.parametrize("name", NETWORKS)
def test_tensors_are_the_official_ones(name):
    build, parameters, tensors, digest = NETWORKS[name]
    module = on_meta(build)
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters
    shapes = {key: list(tensor.shape) for key, tensor in module.state_dict().items()}
    assert len(shapes) == tensors
    assert hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("config, latent", [(VQ_F4, (3, 128, 128)), (VQ_F8, (4, 64, 64))])
def test_autoencoder_at_paper_size(config, latent):
    model = on_meta(lambda: VQAutoencoder(**config))
    parts = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.encoder, model.decoder)]
    if config is VQ_F4:
        assert [round(part, 1) for part in parts] == [22.3, 33.0]
    image = torch.empty(16, 3, 512, 512, device="meta")
    reconstruction, z, z_q, indices, loss = model(image)
    assert reconstruction.shape == image.shape and z.shape == z_q.shape == (16, *latent)
    assert indices.shape == (16, *latent[1:]) and loss.shape == ()


@pytest.mark.parametrize("z_channels, stages", [(3, 2), (4, 3)])
def test_latent_denoiser_at_paper_size(z_channels, stages):
    model = on_meta(lambda: LatentDenoiser(6, z_channels, stages=stages))
    unet = 215_229_315 if stages == 2 else 215_232_772
    assert sum(parameter.numel() for parameter in model.parameters()) == unet + 6 * z_channels
    size = 512 // 2 ** stages
    code = model.label_code(torch.empty(16, 6, 512, 512, device="meta"))
    assert code.shape == (16, z_channels, size, size)
    xt = torch.empty(16, z_channels, size, size, device="meta")
    assert model(xt, torch.zeros(16, dtype=torch.int64, device="meta"), code).shape == xt.shape
