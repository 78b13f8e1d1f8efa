"""The pictures of the README, from one finished seed of the study.

    python -m her2.study_pictures runs/study/seed10 --out .github

    strip.png       a region with its polygons, a label map, what each method painted for it, tumor found
    progress.png    what the samples of the generators look like, from the first checkpoint to the last
"""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from her2 import draw, run
from her2.data_folder import load_dataset
from her2.data_regions import read_roi
from her2.run_config import Parser
from her2.run_errors import UserError, command
from her2.segmenter import UNet, predict_roi

PAINTED = {"gan": "GAN", "ldm": "diffusion", "inpaint": "inpainting", "oracle": "oracle"}


def pixels(path) -> np.ndarray:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; finish the study first: python -m her2.study")
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def strip(seed: Path) -> np.ndarray:
    """One row: real tissue, the label map asked for, an image per method, the tumor found in a test ROI."""
    dataset = load_dataset(seed / "phantom")
    path = seed / "synth-ldm" / "manifest.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    # The patch with the most classes asked for, and of those the one that is nearest to half background.
    def rank(k):
        with Image.open(seed / "synth-ldm" / lines[k]["image"].replace("images", "masks")) as mask:
            label = np.array(mask)
        return len(np.unique(label)), -abs((label == 0).mean() - 0.5)

    best = max(range(min(100, len(lines))), key=rank)
    source = next(roi for roi in dataset.rois if roi.name == lines[best]["source_image"])
    name = Path(lines[best]["image"]).name
    row = [draw.outline(*read_roi(source, dataset.classes)[:2], dataset.classes,
                        read_roi(source, dataset.classes)[2]),
           pixels(seed / "synth-ldm" / "masks" / name)]
    row += [pixels(seed / f"synth-{method}" / "images" / name) for method in PAINTED]
    content = run.load_model(seed / "seg-ldm-100", "segmenter")
    roi = max(dataset.split("test"), key=lambda one: np.unique(read_roi(one, dataset.classes)[1]).size)
    image = read_roi(roi, dataset.classes)[0]
    network = run.build_model(UNet, content, seed)
    found = predict_roi(network, torch.from_numpy(image).permute(2, 0, 1), 256, 64) >= 0.5
    tinted = image.copy()
    tinted[np.asarray(found)] = tinted[np.asarray(found)] // 2 + np.array([110, 20, 20], np.uint8)
    captions = ["real, annotated", "label asked for", *PAINTED.values(), "tumor found"]
    return draw.image_grid([[*row, tinted]], column_captions=captions, cell=112,
                           legend=draw.class_legend(dataset.classes, tumor_only=True))


def progress(seed: Path) -> np.ndarray:
    """Rows: the last row of the sample pictures of autoencoder, diffusion and GAN, at each checkpoint."""
    rows, captions = [], []
    for folder, title in (("vq", "autoencoder"), ("ldm", "diffusion"), ("gan", "GAN")):
        pictures = sorted((seed / folder / "samples").glob("step*.png"))
        if not pictures:
            raise UserError(f"{seed / folder / 'samples'}: no pictures; finish the study first")
        for path in sorted({pictures[0], pictures[len(pictures) // 2], pictures[-1]}):
            rows.append([pixels(path)])
            captions.append(f"{title}\nstep {int(path.stem[4:])}")
    return draw.image_grid(rows, captions, cell=720)


def main(argv):
    parser = Parser(prog="python -m her2.study_pictures", description=__doc__.split("\n\n")[0])
    parser.add_argument("seed", type=Path, help="folder of a finished seed, such as runs/study/seed10")
    parser.add_argument("--out", type=Path, default=Path(".github"), help="folder for them [%(default)s]")
    args = parser.parse_args(argv)
    for name, picture in (("strip.png", strip), ("progress.png", progress)):
        draw.save_png(args.out / name, picture(args.seed))
        print(f"done: {args.out / name}")
    return 0


if __name__ == "__main__":
    command(main)
