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
from collections import namedtuple
from pathlib import Path

import numpy as np

from her2 import lessons_diffusion as noise
from her2 import lessons_networks as networks
from her2 import lessons_tissue as tissue
from her2.draw import image_grid, save_png
from her2.lessons_forks import forks
from her2.run_config import Parser
from her2.run_errors import UserError, command

# When it starts, minutes to read the file (in her2/), see the figure and try the exercise, and the function.
Lesson = namedtuple("Lesson", "when minutes file draw")
LESSONS = {
    "phantom": Lesson("Sat  9:00", 20, "phantom.py", tissue.phantom),
    "relabel": Lesson("Sat  9:20", 15, "relabel.py", tissue.relabel),
    "stains": Lesson("Sat  9:35", 20, "stains.py", tissue.stains),
    "polygons": Lesson("Sat  9:55", 40, "polygons.py", tissue.polygons),
    "patches": Lesson("Sat 10:35", 25, "data_patches.py", tissue.patches),
    "diffusion": Lesson("Sat 11:00", 40, "diffusion.py", noise.diffusion),
    "samplers": Lesson("Sat 11:40", 45, "samplers.py", noise.samplers),
    "inpainting": Lesson("Sat 12:25", 20, "inpainting.py", noise.inpainting),
    "quantizer": Lesson("Sat 14:00", 25, "quantizer.py", noise.quantizer),
    "autoencoder": Lesson("Sat 14:25", 40, "autoencoder.py", networks.autoencoder),
    "denoiser": Lesson("Sat 15:05", 45, "denoiser.py", noise.denoiser),
    "spade": Lesson("Sun  9:00", 45, "spade.py", networks.spade),
    "discriminator": Lesson("Sun  9:45", 25, "discriminator.py", networks.discriminator),
    "gan_losses": Lesson("Sun 10:10", 25, "gan_losses.py", networks.gan_losses),
    "seeds": Lesson("Sun 10:35", 10, "run_seeds.py", networks.seeds),
    "segmenter": Lesson("Sun 11:00", 40, "segmenter.py", networks.segmenter),
    "losses": Lesson("Sun 11:40", 30, "losses.py", networks.losses),
    "metrics": Lesson("Sun 12:10", 30, "metrics.py", networks.metrics),
    "frechet": Lesson("Sun 12:40", 15, "frechet.py", networks.frechet),
    "forks": Lesson("Sun 14:00", 120, "lessons_forks.py", forks),
}


def texts(name: str, numbers: dict) -> list:
    """The text of a lesson, its exercise and its answer, with the numbers in their places."""
    parts = re.split(r"\n(?=Exercise: |Answer: )", inspect.getdoc(LESSONS[name].draw))
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
        for name, lesson in LESSONS.items():
            print(f"{lesson.when:11}{lesson.minutes:7}  {name:15}her2/{lesson.file}")
        print("\na figure, three sentences and an exercise: python -m her2.lessons NAME")
        return 0
    if args.name not in LESSONS:
        raise UserError(f"lesson {args.name!r}: unknown; choose one of {', '.join(LESSONS)}")
    out = Path(args.out or f"runs/lesson_{args.name}.png")
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: the figure is a PNG file; give a name that ends in .png")
    rows, answer_rows, numbers = LESSONS[args.name].draw()
    save_png(out, sheet(rows + answer_rows if args.answer else rows))
    for paragraph in texts(args.name, numbers)[:3 if args.answer else 2]:
        print(textwrap.fill(paragraph, 100), end="\n\n")
    print(f"figure: {out}; code: her2/{LESSONS[args.name].file}")
    return 0


if __name__ == "__main__":
    command(main)
