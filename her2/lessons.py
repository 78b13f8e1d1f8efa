"""A weekend with this code: for every module one figure, three sentences, and an exercise.

    python -m her2.lessons                      the lessons in reading order, with their files
    python -m her2.lessons relabel              a figure (runs/lesson_relabel.png), what it shows, an exercise
    python -m her2.lessons relabel --answer     the same, with the answer to the exercise

Seconds each, on one CPU core, without data and without training: where a trained network would stand, there
is one that is exact for a small made-up law, or one with random weights where only structure is at issue.

A lesson is a function lesson() -> (rows of the figure, numbers) in a module lessons_*.py that calls the code
it explains. Its docstring is what is printed, with the numbers filled in.
"""

import inspect
import re
import textwrap
from pathlib import Path

import numpy as np

from her2 import lessons_diffusion as noise, lessons_networks as networks, lessons_tissue as tissue
from her2.draw import image_grid, save_png
from her2.lessons_forks import forks
from her2.run_config import Parser
from her2.run_errors import command

# In the order of the README's weekend. The scripts have no lesson: their loops are what the lessons before
# explain, put together.
LESSONS = {lesson.__name__: lesson for lesson in (
    tissue.phantom, tissue.relabel, tissue.stains, tissue.polygons, tissue.patches,
    noise.diffusion, noise.samplers, noise.inpainting, noise.quantizer, networks.autoencoder, noise.denoiser,
    networks.spade, networks.discriminator, networks.gan_losses, networks.seeds,
    networks.segmenter, networks.losses, networks.metrics, networks.frechet, forks)}
FILES = {**{name: f"her2/{name}.py" for name in LESSONS}, "patches": "her2/data_patches.py",
         "seeds": "her2/run_seeds.py", "forks": "her2/lessons_forks.py"}


def texts(name: str, numbers: dict) -> list:
    """The text of a lesson, its exercise and its answer, with the numbers in their places."""
    parts = re.split(r"\n(?=Exercise: |Answer: )", inspect.getdoc(LESSONS[name]))
    return [" ".join(part.split()).format(**numbers) for part in parts]


def sheet(rows, width=830) -> np.ndarray:
    """The figure: rows of charts, (h, w, 3) uint8, and of (caption, picture), in cells of equal width."""
    strips = []
    for row in rows:
        captions, images = zip(*(item if isinstance(item, tuple) else ("", item) for item in row))
        strip = image_grid([images], column_captions=captions, cell=min(width // len(row) - 8, 405))
        strips.append(np.pad(strip, ((0, 0), (0, width - strip.shape[1]), (0, 0)), constant_values=255))
    return np.concatenate(strips)


def main(argv=None):
    parser = Parser(prog="python -m her2.lessons", description=__doc__)
    parser.add_argument("name", nargs="?", choices=LESSONS, help="none: the list")
    parser.add_argument("--answer", action="store_true", help="the exercise's answer, computed")
    args = parser.parse_args(argv)
    if args.name is None:
        print("\n".join(f"{name:15}{file}" for name, file in FILES.items()))
        print("\na figure, three sentences and an exercise: python -m her2.lessons NAME")
        return
    out, (rows, numbers) = Path(f"runs/lesson_{args.name}.png"), LESSONS[args.name]()
    save_png(out, sheet(rows))
    for paragraph in texts(args.name, numbers)[:3 if args.answer else 2]:
        print(textwrap.fill(paragraph, 100), end="\n\n")
    print(f"figure: {out}; code: {FILES[args.name]}")


if __name__ == "__main__":
    command(main)
