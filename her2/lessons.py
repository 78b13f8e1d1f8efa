"""A weekend with this code: for every module one figure, three sentences, and an exercise.

    python -m her2.lessons                      the timetable
    python -m her2.lessons relabel              a figure (runs/lesson_relabel.png), what it shows, an exercise
    python -m her2.lessons relabel --answer     the same, with the answer to the exercise

Seconds each, on one CPU core, without data and without training: where a trained network would stand, there
is one that is exact for a small made-up law, or one with random weights where only structure is at issue.

A lesson is a function lesson() -> (rows of the figure, rows that the answer adds, numbers) in a module
lessons_*.py that calls the code it explains. Its docstring is what is printed, with the numbers filled in.
"""

import inspect
import re
import textwrap
from pathlib import Path

import numpy as np

from her2 import lessons_diffusion as noise
from her2 import lessons_networks as networks
from her2 import lessons_tissue as tissue
from her2.draw import image_grid, save_png
from her2.lessons_forks import forks
from her2.run_config import Parser
from her2.run_errors import UserError, command

# By the start of a session: minutes to read the file, see the figure and try the exercise. The scripts have
# neither: their loops are what the lessons before explain, put together.
TIMETABLE = {
    "Sat  9:00": {tissue.phantom: 20, tissue.relabel: 15, tissue.stains: 20, tissue.polygons: 40,
                  tissue.patches: 25},
    "Sat 11:00": {noise.diffusion: 40, noise.samplers: 45, noise.inpainting: 20},
    "Sat 14:00": {noise.quantizer: 25, networks.autoencoder: 40, noise.denoiser: 45},
    "Sun  9:00": {networks.spade: 45, networks.discriminator: 25, networks.gan_losses: 25,
                  networks.seeds: 10},
    "Sun 11:00": {networks.segmenter: 40, networks.losses: 30, networks.metrics: 30, networks.frechet: 15},
    "Sun 14:00": {"train_seg.py": 20, "train_gan.py": 20, "train_ldm.py": 30, "generate.py": 20,
                  "evaluate.py": 15, "her2/study.py": 15},
    "Sun 16:00": {forks: 120}}
LESSONS = {draw.__name__: draw for session in TIMETABLE.values() for draw in session if callable(draw)}
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
        room = width - strip.shape[1]
        assert room >= 0, f"{captions} do not fit"
        strips.append(np.pad(strip, ((0, 0), (room // 2, room - room // 2), (0, 0)), constant_values=255))
    # 64 levels per channel instead of 256: half the bytes of a PNG of tissue, and no eye sees it.
    return np.rint(np.rint(np.concatenate(strips) / 255 * 63) * (255 / 63)).astype(np.uint8)


def main(argv=None) -> int:
    parser = Parser(prog="python -m her2.lessons", description=__doc__)
    parser.add_argument("name", nargs="?", help="a lesson; none: the timetable")
    parser.add_argument("--answer", action="store_true", help="the exercise's answer, computed")
    parser.add_argument("--out", metavar="FILE.png", help="the figure [runs/lesson_NAME.png]")
    args = parser.parse_args(argv)
    if args.name is None:
        print(f"{'when':11}{'minutes':>7}  {'lesson':15}file to read")
        for when, session in TIMETABLE.items():
            for item, minutes in session.items():
                name = item.__name__ if callable(item) else ""
                print(f"{when:11}{minutes:7}  {name:15}{FILES.get(name, item)}")
                when = ""                       # the next begins when this one is done
        print("\na figure, three sentences and an exercise: python -m her2.lessons NAME")
        return 0
    if args.name not in LESSONS:
        raise UserError(f"lesson {args.name!r}: unknown; choose one of {', '.join(LESSONS)}")
    out = Path(args.out or f"runs/lesson_{args.name}.png")
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: the figure is a PNG file; give a name that ends in .png")
    rows, answer_rows, numbers = LESSONS[args.name]()
    save_png(out, sheet(rows + answer_rows if args.answer else rows))
    for paragraph in texts(args.name, numbers)[:3 if args.answer else 2]:
        print(textwrap.fill(paragraph, 100), end="\n\n")
    print(f"figure: {out}; code: {FILES[args.name]}")
    return 0


if __name__ == "__main__":
    command(main)
