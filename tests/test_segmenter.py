"""The U-Net, its weights, and inference on whole ROIs."""

import hashlib
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from her2 import segmenter
from her2.run_errors import UserError
from her2.losses import constant_prediction_loss, dice_cross_entropy
from her2.segmenter import UNet, choose_tiles, encoder_weights, predict_roi, tile_spans

# Names and shapes as in torchvision's file, at a reduced width: the encoder's own plus the classifier.
WIDTH = 8


def small(seed=0, **options):
    torch.manual_seed(seed)
    return UNet(width=WIDTH, **options)


def settled(seed=0):
    """A network in eval mode with running statistics that fit: initial ones let its logits explode."""
    model = small(seed).train()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    model(torch.rand(4, 3, 64, 64) * 2 - 1)
    return model.eval()


def torchvision_file(model):
    weights = {name: torch.rand_like(value) if value.is_floating_point() else value + 7
               for name, value in model.encoder.state_dict().items()}
    return {**weights, "fc.weight": torch.zeros(1000, 8 * WIDTH), "fc.bias": torch.zeros(1000)}


# ---- the network
# ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [(32, 64), (64, 64), (96, 32), (160, 96)])
def test_every_size_divisible_by_32(size):
    model = small().eval()
    image = torch.rand(2, 3, *size) * 2 - 1
    features = model.encoder(image)
    channels = [3, WIDTH, WIDTH, 2 * WIDTH, 4 * WIDTH, 8 * WIDTH]
    assert [tuple(f.shape[1:]) for f in features] == [
        (c, size[0] >> i, size[1] >> i) for i, c in enumerate(channels)]
    assert model(image).shape == (2, 2, *size)


@pytest.mark.parametrize("size", [(33, 64), (64, 48), (16, 16)])
def test_other_sizes_are_refused(size):
    with pytest.raises(AssertionError, match="divisible by 32"):
        small()(torch.zeros(1, 3, *size))


def test_normalisation_is_imagenets():
    model = settled().double()
    image = torch.rand(2, 3, 64, 32).double() * 2 - 1
    rgb = (image + 1) / 2
    x = torch.stack([(rgb[:, c] - mean) / std for c, (mean, std) in
                     enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)])], 1)
    torch.testing.assert_close(model(image), model.segmentation_head(model.decoder(model.encoder(x))),
                               rtol=1e-5, atol=1e-5)


def test_prediction_does_not_depend_on_the_rest_of_the_batch():
    model = settled().double()
    image = torch.rand(3, 3, 64, 64).double() * 2 - 1
    torch.testing.assert_close(model(image)[1:2], model(image[1:2]))


def test_decoder_channels_scale_with_the_width():
    assert UNet(width=64).config["decoder_channels"] == [256, 128, 64, 32, 16]
    assert UNet(width=32).config["decoder_channels"] == [128, 64, 32, 16, 16]
    model = small(num_classes=3, decoder_channels=(16, 8, 8, 8, 4))
    assert UNet(**model.config).state_dict().keys() == model.state_dict().keys()
    assert model(torch.zeros(2, 3, 32, 64)).shape == (2, 3, 32, 64)
    with pytest.raises(AssertionError, match="decoder_channels"):
        UNet(decoder_channels=(16, 8))


def test_initial_weights_follow_the_generator():
    def drawn(seed):
        torch.manual_seed(seed)
        segmenter.he_init(model)
        return torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    model = small()
    first = drawn(1)
    assert not torch.equal(first, drawn(2)) and torch.equal(first, drawn(1))


def test_the_first_gradient_reaches_every_parameter():
    # A head that starts at zero would let none through to the rest of the network.
    model = small().train()
    dice_cross_entropy(model(torch.rand(4, 3, 64, 64) * 2 - 1),
                       torch.randint(0, 2, (4, 64, 64)))[0].backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("seed", [0, 1])
def test_learns_textures_from_scratch(seed):
    # Coarse grains on fine ones: neither colour nor brightness tells them apart. Without warm-up or clipping.
    model = small(seed).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(25):
        field = F.interpolate(torch.randn(8, 1, 4, 4, generator=generator), size=64, mode="bicubic")
        target = (field[:, 0] > 0.4).long()
        fine, white = torch.randn(2, 8, 1, 64, 64, generator=generator)
        coarse = F.avg_pool2d(F.pad(white, (3, 3, 3, 3), mode="reflect"), 7, stride=1) * 7
        image = (0.3 * torch.where(target[:, None] > 0, coarse, fine)).expand(-1, 3, -1, -1).clamp(-1, 1)
        loss, _ = dice_cross_entropy(model(image), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.6 * constant_prediction_loss(target), losses


# ---- weights
# --------------------------------------------------------------------------------------------------

def test_torchvision_file_sets_the_encoder_only():
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = torchvision_file(model)
    model.load_official_state_dict(weights)
    for name, value in model.state_dict().items():
        inside = name.removeprefix("encoder.")
        assert torch.equal(value, weights[inside] if name.startswith("encoder.") else before[name]), name


def test_smp_file_sets_everything():
    model, other = small(0), small(1)
    model.load_official_state_dict(other.state_dict())
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("whole", [True, False])
def test_loading_is_strict_and_lists_everything(whole):
    model = small()
    weights = dict(small(1).state_dict()) if whole else torchvision_file(model)
    prefix = "encoder." if whole else ""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    del weights[f"{prefix}layer1.0.conv1.weight"], weights[f"{prefix}layer4.2.bn2.running_var"]
    del weights[f"{prefix}bn1.num_batches_tracked"]
    weights[f"{prefix}layer5.0.conv1.weight"] = torch.zeros(1)
    weights[f"{prefix}conv1.weight"] = torch.zeros(4, 3, 7, 7)
    with pytest.raises(ValueError) as error:
        model.load_official_state_dict(weights)
    for name in ("layer1.0.conv1.weight", "layer4.2.bn2.running_var", "bn1.num_batches_tracked",
                 "layer5.0.conv1.weight", "conv1.weight (4, 3, 7, 7) instead of (8, 3, 7, 7)"):
        assert name in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_old_files_without_any_batch_counter_load():
    model = small()
    weights = {name: value for name, value in torchvision_file(model).items() if "num_batches" not in name}
    model.load_official_state_dict(weights)
    assert torch.equal(model.encoder.bn1.running_mean, weights["bn1.running_mean"])


def test_encoder_weights_choices(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    assert encoder_weights("none") == "" and encoder_weights("own.pth") == "own.pth"

    def no_network(*arguments, **options):
        raise URLError("no route to host")
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    cached = tmp_path / "hub" / "checkpoints" / "resnet34-b627a593.pth"
    with pytest.raises(UserError) as error:
        encoder_weights("imagenet")
    for part in (str(cached), "no route to host", "https://download.pytorch.org", "--encoder-weights none"):
        assert part in str(error.value)

    cached.write_bytes(b"half of a download")
    with pytest.raises(UserError, match="damaged"):
        encoder_weights("imagenet")
    digest = hashlib.sha256(b"half of a download").hexdigest()[:8]
    monkeypatch.setattr(segmenter, "IMAGENET_URL", f"https://example.org/resnet34-{digest}.pth")
    whole = cached.with_name(f"resnet34-{digest}.pth")
    cached.rename(whole)
    assert encoder_weights("imagenet") == whole


def test_download_goes_to_the_cache(tmp_path, monkeypatch):
    content = b"weights"
    name = f"resnet34-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(segmenter, "IMAGENET_URL", (tmp_path / name).as_uri())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    assert encoder_weights("imagenet").read_bytes() == content


# ---- whole ROIs
# -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tile, overlap", [(64, 0), (64, 32), (96, 10), (128, 96), (512, 128)])
def test_kept_parts_cover_every_pixel_once(tile, overlap):
    for length in [1, 31, 32, 33, 63, 64, 65, 96, 127, 200, 511, 777]:
        size, spans = tile_spans(length, tile, overlap)
        assert size % 32 == 0 and size <= tile
        times = np.zeros(length, int)
        for start, first, stop in spans:
            assert start % 32 == 0 and start <= first < stop <= start + size
            times[first:stop] += 1
        assert (times == 1).all(), (length, spans)
        for (left, _, _), (right, _, _) in zip(spans, spans[1:]):
            assert left + size - right >= overlap
        for (left, _, cut), (right, _, _) in zip(spans, spans[1:]):  # cut in the middle
            assert abs((cut - right) - (left + size - cut)) <= 1


class Pointwise(nn.Module):
    """Looks at single pixels."""

    def forward(self, image):
        return torch.stack([image[:, 0], image[:, 1] - 3 * image[:, 2]], 1)


class FarLook(nn.Module):
    """Looks `radius` pixels away in every direction; zeros outside."""

    def __init__(self, radius):
        super().__init__()
        self.radius = radius

    def forward(self, image):
        r, (height, width) = self.radius, image.shape[2:]
        framed = F.pad(image, (r, r, r, r))
        corners = [framed[:, c, dy:dy + height, dx:dx + width]
                   for c, (dy, dx) in enumerate([(0, r), (2 * r, 2 * r), (r, 0)])]
        return torch.stack([corners[0] + corners[1], image[:, 0] - corners[2]], 1)


class CoarseGrid(nn.Module):
    """Looks at cells of 32 pixels from the corner of what it is given, as a U-Net's lowest level does."""

    def forward(self, image):
        return F.interpolate(F.avg_pool2d(image[:, :2], 32), scale_factor=32) * 9


def whole(model, image):
    """The same in one pass over the whole ROI, continued by reflection to multiples of 32."""
    height, width = image.shape[1:]
    padded = np.pad(image.numpy(), ((0, 0), (0, -height % 32), (0, -width % 32)), "symmetric")
    logits = model(torch.from_numpy(padded)[None])
    return logits.softmax(1)[0, 1, :height, :width]


@pytest.mark.parametrize("size", [(64, 64), (200, 333), (97, 40), (20, 300), (5, 7)])
@pytest.mark.parametrize("tile, overlap", [(64, 0), (64, 32), (96, 20), (512, 128)])
def test_tiles_give_what_one_pass_gives(size, tile, overlap):
    image = torch.rand(3, *size) * 2 - 1
    for model in (Pointwise(), FarLook(overlap // 2), CoarseGrid()):
        prob = predict_roi(model.eval(), image, tile, overlap, batch_size=3)
        assert prob.shape == size and prob.dtype == torch.float32
        torch.testing.assert_close(prob, whole(model, image), rtol=1e-5, atol=1e-6)


def test_a_wider_view_than_the_overlap_shows_at_the_seams():
    image = torch.rand(3, 64, 200) * 2 - 1
    model = FarLook(12).eval()
    difference = (predict_roi(model, image, 64, 0) - whole(model, image)).abs().amax(0)
    assert difference[64 - 12:64].min() > 1e-3 and difference[64 - 13] == 0 and difference[64 + 12] == 0


def test_the_network_itself_on_an_roi_of_one_tile():
    model = settled()
    image = torch.rand(3, 64, 96) * 2 - 1
    direct = model(image[None]).softmax(1)[0, 1].detach()
    torch.testing.assert_close(predict_roi(model, image, 96, 32), direct, rtol=1e-4, atol=1e-5)


def test_uint8_and_float_images_agree():
    pixels = torch.randint(0, 256, (100, 70, 3), dtype=torch.uint8).permute(2, 0, 1)  # as from a mapped file
    model = Pointwise().eval()
    floats = pixels.float() / 127.5 - 1
    assert torch.equal(predict_roi(model, pixels, 64, 32), predict_roi(model, floats, 64, 32))


def test_more_classes_and_half_precision():
    class Half(nn.Module):
        def forward(self, image):
            return torch.cat([image[:, :1], image[:, :1] * 0, image[:, 1:2]], 1).bfloat16()
    image = torch.rand(3, 40, 40) * 2 - 1
    logits = torch.stack([image[0], image[0] * 0, image[1]]).bfloat16().float()
    prob = predict_roi(Half().eval(), image, 32, 0)
    torch.testing.assert_close(prob, 1 - logits.softmax(0)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tile, overlap", [(0, 0), (48, 0), (64, 64), (64, 33), (64, -1)])
def test_impossible_tilings_are_refused(tile, overlap):
    with pytest.raises(UserError, match="tile"):
        predict_roi(Pointwise().eval(), torch.zeros(3, 100, 100), tile, overlap)


@pytest.mark.parametrize("given, patch, chosen", [
    ((0, 0), 64, (64, 32)), ((0, 0), 32, (32, 0)), ((0, 0), 512, (512, 128)), ((0, 64), 96, (96, 64)),
    ((256, 0), 64, (256, 64)), ((256, 96), 64, (256, 96)), ((64, 0), 0, (64, 32))])
def test_tiles_are_of_the_patches_size_unless_told(given, patch, chosen):
    assert choose_tiles(*given, patch) == chosen


def test_training_mode_and_wrong_shapes_are_refused():
    with pytest.raises(AssertionError, match="eval"):
        predict_roi(small(), torch.zeros(3, 64, 64))
    for shape in [(64, 64, 3), (1, 3, 64, 64), (3, 0, 64)]:
        with pytest.raises(AssertionError, match="image is"):
            predict_roi(Pointwise().eval(), torch.zeros(shape))
