"""One dataclass per script is its whole configuration; command line, presets and --help follow from it.

    @dataclass
    class Config:
        steps: int = 1000                            # optimiser steps
        amp: Literal["auto", "off"] = "auto"         # mixed precision

Every field is a flag (`--steps`), its trailing comment is the help text, `Literal` lists the allowed values,
a `bool` becomes `--flag / --no-flag`. A preset is a dict of overrides; the order is: dataclass < preset <
flag. An unknown key in a preset is an error, so that a renamed field cannot be silently ignored.
"""

import argparse
import dataclasses
import inspect
import math
import re
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from her2.run_errors import UserError, script_line
from her2.run_provenance import trained_with

OUT = {"generate.py": "data/synth", "train_seg.py": "runs/seg", "train_ldm.py": "runs/ldm"}     # + its source
SOURCES = ("model", "autoencoder", "synthetic", "reconstruct")  # fields that name what a run builds on
# What a number of this name may be, wherever it appears: (lowest, highest), both included.
POSITIVE = (1e-12, 1e12)
RATE = (1e-12, 1e3)
COUNT = (1, 10**9)
SHARE = (0.0, 1.0)
RANGES = {
    "steps": COUNT, "batch": COUNT, "accumulate": COUNT, "patch": (16, 8192), "lr": RATE,
    "seed": (0, 2**31 - 1), "trial": (0, 10**9), "seeds": COUNT, "jobs": COUNT,
    "split_seed": (0, 2**31 - 1), "blend": (0, 1024),
    "blocks": (1, 16), "hidden": (1, 4096), "disc_lr": RATE, "disc_width": (1, 1024),
    "ratio": (0.0, math.inf), "ema": (0.0, 0.999999), "drop_label": (0.0, 0.9), "guidance": (0.0, 100.0),
    "sample_steps": COUNT, "eta": SHARE, "warmup": (0, 10**9), "clip": POSITIVE, "log_every": COUNT,
    "save_every": COUNT, "workers": (0, 256), "dice_weight": SHARE, "jitter": (0.0, 1.0), "uniform": SHARE,
    "codes": (2, 2**20), "width": (8, 1024), "z_dim": (1, 4096), "count": (0, 10**9), "overlap": (0, 4096),
    "timesteps": (2, 100000), "disc_start": (0, 10**9), "disc_weight": (0.0, 100.0), "dilate": (0, 64),
    "latent_pool": (0, 10**7), "lambda_feat": (0.0, 1e6), "lambda_kld": (0.0, 1e6), "lambda_vgg": (0.0, 1e6),
    "lambda_lpips": (0.0, 1e6), "lambda_edge": (0.0, 1e6), "t_spread": (0.0, 10.0),
    "beta": POSITIVE, "threshold": SHARE, "min_area": (0, 10**9),
    "simplify": (0.0, 1000.0),
}


class Parser(argparse.ArgumentParser):
    """argparse, but a bad flag is a UserError: one line instead of the usage text."""

    def __init__(self, remedy="see --help", **options):
        self.remedy = remedy
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        raise UserError(f"{self.prog}: {message}; {self.remedy}")


def field_help(cls) -> dict:
    """{field: its trailing comment}, read from the source of the dataclass, and the comment lines below."""
    texts, name = {}, None
    bases = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]
    for line in "\n".join(inspect.getsource(base) for base in bases).splitlines():
        match = re.match(r"\s+(\w+)\s*:[^#]*=[^#]*#\s*(.*)", line)
        more = re.match(r"\s+# (?!----)\s*(.*)", line)          # "# ----" begins a group of fields
        if match:
            name = match[1]
            texts[name] = match[2].strip()
        elif more and name:
            texts[name] += " " + more[1].strip()
        else:
            name = None
    return texts


def add_fields(parser, cls, presets: dict) -> None:
    """One flag per field of `cls`; the help names the default, and the presets' values where they differ."""
    hints, texts = get_type_hints(cls), field_help(cls)
    for field in dataclasses.fields(cls):
        kind, flag = hints[field.name], "--" + field.name.replace("_", "-")
        values = {name: preset[field.name] for name, preset in presets.items() if field.name in preset}
        default = "; ".join([repr(field.default), *(f"{name}: {value}" for name, value in values.items())])
        text = f"{texts[field.name]} [{default}]".replace("%", "%%")
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif get_origin(kind) is Literal:
            parser.add_argument(flag, choices=get_args(kind), type=type(get_args(kind)[0]), default=None,
                                help=text)
        else:
            parser.add_argument(flag, type=kind, default=None, metavar=kind.__name__.upper(), help=text)


def check_ranges(config) -> None:
    """A number outside its range (or NaN) is a UserError that names the flag and the range."""
    for name, value in vars(config).items():
        if name in RANGES and isinstance(value, (int, float)) and not isinstance(value, bool):
            low, high = RANGES[name]
            if not low <= value <= high:
                allowed = (f"greater than 0 and at most {high:g}" if low == POSITIVE[0]
                           else f"between {low} and {high}")
                raise UserError(f"--{name.replace('_', '-')}: found {value}; give a number {allowed}")


def build(cls, presets: dict, given: dict):
    """The configuration: the dataclass's defaults, then the preset, then the flags that were given.

    What a trained network or a synthetic set that it names was made with stands above the preset: a network
    is used on its own data, with their split, and at its own size.
    """
    names = {field.name for field in dataclasses.fields(cls)}
    preset = given.get("preset") or next(f.default for f in dataclasses.fields(cls) if f.name == "preset")
    unknown = set(presets[preset]) - names
    assert not unknown, f"preset {preset!r} of {cls.__name__} sets unknown fields {sorted(unknown)}"
    given = {name: value for name, value in given.items() if value is not None}
    config = cls(**{**presets[preset], **given})
    source = next(filter(None, (getattr(config, name, "") for name in SOURCES)), None)
    if source and "split_seed" in names:
        config = cls(**{**presets[preset], **trained_with(source, config), **given})
    check_ranges(config)
    return config


def say_done(config, script: str, *flags) -> None:
    """Print that a run is done and the command that goes on: `flags`, a free --out, what `config` chose."""
    words, name = [*flags], Path(config.out).name.removeprefix("synth-")
    words += ["--out", f"{OUT[script]}-{name}".replace("ldm-vq", "ldm")] if script in OUT else []
    for name in ("data", "split_seed", "preset", "device", "amp", "cache"):
        value = getattr(config, name)
        if value != getattr(type(config), name) and (name, script) != ("split_seed", "evaluate.py"):
            words += ["--" + name.replace("_", "-"), value]
    model = Path(config.out) / "model.pt"
    print(f"done: {model if model.exists() else config.out}; next: {script_line(script, *words)}")


def parse(cls, presets: dict, argv, description: str, prog: str):
    """`argv` -> an instance of the dataclass `cls`. UserError for anything that is wrong in it."""
    parser = Parser(prog=prog, description=inspect.cleandoc(description or ""))
    add_fields(parser, cls, presets)
    return build(cls, presets, vars(parser.parse_args(argv)))
