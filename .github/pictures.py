"""The README's pictures, from a finished seed of the study: python .github/pictures.py runs/study/seed10

strip.png is Fig. 4 of that seed; progress.png shows the samples of the generators at their first, a middle and
their last checkpoint.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from her2 import draw  # noqa: E402


def progress(seed) -> np.ndarray:
    """One row per checkpoint: what the network made, out of the sample picture that the training wrote."""
    rows, captions = [], []
    for folder, title, made, of in (("vq", "autoencoder", 1, 2), ("gan", "GAN", 2, 4), ("ldm", "diffusion", 2, 3)):
        pictures = sorted((seed / folder / "samples").glob("step*.png"))
        for path in dict.fromkeys([pictures[0], pictures[len(pictures) // 2], pictures[-1]]):
            image = np.array(Image.open(path).convert("RGB"))
            high = image.shape[0] // of
            rows.append([image[made * high:(made + 1) * high, 100:]])
            captions.append(f"{title}\nstep {int(path.stem[4:])}")
    return draw.image_grid(rows, captions, cell=420)


if __name__ == "__main__":
    seed = Path(sys.argv[1])
    strip = np.array(Image.open(seed / "report" / "fig4.png").convert("RGB"))
    for name, picture in (("strip", draw.fit(strip, 660)), ("progress", progress(seed))):
        # 64 levels per channel: half the bytes of a picture of tissue, and no eye sees it.
        draw.save_png(HERE / f"{name}.png", np.rint(np.rint(picture / 255 * 63) * (255 / 63)).astype(np.uint8))
