"""One dataclass per script is its whole configuration; command line, presets and --help follow from it.

    @dataclass
    class Config:
        steps: int = 1000                            # optimiser steps
        amp: Literal["auto", "off"] = "auto"         # mixed precision

Every field is a flag (`--steps`), its trailing comment is the help text, `Literal` lists the allowed values,
a `bool` becomes `--flag / --no-flag`. A preset is a dict of overrides; the order is: dataclass < preset <
flag. An unknown key in a preset is a TypeError: a renamed field cannot be silently ignored.
"""

import argparse
import dataclasses
import glob
import inspect
import math
import re
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from her2.run_errors import UserError, script_line
from her2.run_provenance import trained_with

OUT = {"generate.py": "data/synth", "train_seg.py": "runs/seg", "train_ldm.py": "runs/ldm"}     # + its source
SOURCES = ("model", "autoencoder", "synthetic")     # fields that name what a run builds on
# What a number of this name may be, wherever it appears: (lowest, highest), both included.
RANGES = {name: ends for ends, names in {
    (1, 10**9): "steps batch accumulate sample_steps log_every save_every seeds repeats jobs",
    (0, 10**9): "trial warmup count disc_start min_area latent_pool", (0, 2**31 - 1): "seed split_seed",
    (1e-12, 1e3): "lr disc_lr", (1e-12, 1e12): "clip beta", (1e-12, 1.0): "threshold",
    (0.0, 1.0): "eta dice_weight jitter uniform", (0.0, 0.9): "drop_label", (0.0, 0.999999): "ema",
    (0.0, 1e6): "lambda_feat lambda_kld lambda_vgg lambda_lpips lambda_edge disc_weight guidance t_spread "
                "simplify", (1e-12, math.inf): "ratio",
    (16, 8192): "patch", (8, 1024): "width", (1, 4096): "disc_width hidden z_dim", (1, 16): "blocks",
    (2, 2**20): "codes timesteps", (0, 255): "classes workers dilate", (0, 4096): "overlap blend",
}.items() for name in names.split()}


class Parser(argparse.ArgumentParser):
    """argparse, but a bad flag is a UserError: one line instead of the usage text."""

    def __init__(self, remedy="see --help", **options):
        self.remedy = remedy
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        raise UserError(f"{self.prog}: {message}; {self.remedy}")


def field_help(cls) -> dict:
    """{field: its trailing comment, with the comment lines below}, read from the source of the dataclass."""
    bases = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]
    found = re.findall(r"^ +(\w+)\s*:[^#\n]*=[^#\n]*#(.*(?:\n +# (?!----).*)*)",     # "# ----" begins a group
                       "\n".join(map(inspect.getsource, bases)), re.MULTILINE)
    return {name: re.sub(r"\s*\n +#\s*", " ", text).strip() for name, text in found}


def add_fields(parser, cls, presets: dict) -> None:
    """One flag per field of `cls`; the help names the default, and the presets' values where they differ."""
    texts = field_help(cls)
    for name, kind in get_type_hints(cls).items():
        values = [f"{key}: {preset[name]}" for key, preset in presets.items() if name in preset]
        text = f"{texts[name]} [{'; '.join([repr(getattr(cls, name)), *values])}]".replace("%", "%%")
        if kind is bool:
            form = {"action": argparse.BooleanOptionalAction}
        elif get_origin(kind) is Literal:
            form = {"choices": get_args(kind), "type": type(get_args(kind)[0])}
        else:
            form = {"type": kind, "metavar": kind.__name__.upper()}
        parser.add_argument("--" + name.replace("_", "-"), default=None, help=text, **form)


def say_done(config, script: str, *flags) -> None:
    """Print that a run is done and the command that goes on: `flags`, a free --out, what `config` chose."""
    words, name = [*flags], Path(config.out).name.removeprefix("synth-")
    words += ["--out", f"{OUT[script]}-{name}".replace("ldm-vq", "ldm")] if script in OUT else []
    for name in ("data", "preset", "device", "amp", "cache"):       # the split is the one of what is named
        if getattr(config, name) != getattr(type(config), name):
            words += ["--" + name, getattr(config, name)]
    print(f"done: {config.out}; next: {script_line(script, *words)}")


def parse(cls, presets: dict, argv, description: str, prog: str, more=None):
    """`argv` -> an instance of the dataclass `cls`; UserError for anything that is wrong. What a network or a
    synthetic set that it names was made with stands between preset and flags: a network is used on its own
    data, with their split, and at its own size. `more`: what is no field, {name or --flag: keywords of
    add_argument}; then (instance, *their values)."""
    parser = Parser(prog=prog, description=inspect.cleandoc(description or ""))  # None under -OO
    for name, form in (more or {}).items():
        parser.add_argument(name, **form)
    add_fields(parser, cls, presets)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    values = [given.pop(name.lstrip("-")) for name in more or ()]
    preset = presets and presets[given.get("preset", cls.preset)]       # attributes: a dataclass's defaults
    config = cls(**{**preset, **given})
    source = next(filter(None, (getattr(config, name, "") for name in SOURCES)), None)
    if source and hasattr(config, "split_seed"):
        config = cls(**{**preset, **trained_with(source, config), **given})
    for name, value in vars(config).items():
        low, high = RANGES.get(name, (-math.inf, math.inf))
        if type(value) in (int, float) and not low <= value <= high:        # NaN fails too
            raise UserError(f"--{name.replace('_', '-')}: found {value}; "
                            f"give a number between {low:g} and {high:g}")
    return (config, *values) if more else config


def named_paths(names) -> list[Path]:
    """The files and folders of a command line. Not every shell replaces `runs/seg*`; what exists under a name
    is taken by it, whatever brackets that has."""
    return [Path(path) for name in names
            for path in ([name] if Path(name).exists() else sorted(glob.glob(name)) or [name])]


@dataclasses.dataclass
class Machine:
    """Fields that many commands share. The result does not depend on these, but for the rounding."""
    device: Literal["auto", "cpu", "cuda"] = "auto"     # auto: the GPU when there is one
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"  # mixed precision; auto: where it is fast


@dataclasses.dataclass
class Tiles(Machine):
    """The fields of what predicts whole images, tile by tile."""
    preset: Literal["tiny", "small", "paper"] = "tiny"  # of the network: decides the tiles at a time
    batch: int = 16                 # tiles at a time; changes nothing but speed and memory
    tile: int = 0                   # side of the tiles in which an image is predicted, divisible by 32;
                                    # 0: that of the patches on which the network was trained
    overlap: int = 0                # pixels that neighbouring tiles share; only their centres are kept;
                                    # 0: a quarter of the tile, at least 32


@dataclasses.dataclass
class Patches(Machine):
    """The fields of what draws patches from training slides."""
    data: str = ""                  # dataset folder; empty: the phantom of this preset, made on first use
    preset: Literal["tiny", "small", "paper"] = "tiny"  # sizes for minutes of CPU, a small study, the paper
    seed: int = 0                   # decides all that is random: weights, patches, noise, new subtypes
    split_seed: int = 0             # decides the split of slides when slides.csv has none
    patch: int = 64                 # side of a patch in pixels; a multiple of 32 suits every network
    sampling: Literal["tumor", "subtype", "uniform"] = "subtype"  # where patches are centred: any tumor
                                    # pixel, a subtype drawn uniformly (the paper's baselines), or anywhere
    uniform: float = 0.0            # share of the real patches taken from anywhere, whatever --sampling is
    cache: str = "cache"            # folder for the decoded images


@dataclasses.dataclass
class Training(Patches):
    """The fields that all training scripts share."""
    accumulate: int = 1             # pieces in which a batch passes, one after the other: less memory, the
                                    # same gradient (but batch norm sees each piece by itself)
    compile: bool = False           # torch.compile: fewer, larger kernels after a minute or more of compiling
    log_every: int = 20             # steps between two lines of the log
    workers: int = 0                # processes that read patches ahead
