"""The study with one command: does the paper's method do on tissue that anyone can make what the paper says?

    python -m her2.study --preset tiny                                  one seed, few arms: a demonstration
    python -m her2.study --preset small --jobs 2                        the study
    python -m her2.study --preset small --seed 15 --seeds 3 --jobs 2    three more seeds, added to it
    python -m her2.study --preset small --data my_data                  on real patients

Plan of the analysis, fixed before the first of the seeds from 10 on was rendered.

Unit      A seed: its own phantom, autoencoder, diffusion model, GAN, synthetic sets and segmenters. Nothing
          is shared between seeds but this code. Five seeds at least, 10 to 14; others may be added later.
Arms      `tumor` and `subtype` (real patches; how they are drawn), gan, ldm, inpaint x 50, 100, 200, 400 %
          (synthetic patches on top of `subtype`), and controls: `oracle-100` (the phantom renders the source
          patches again in their new subtypes: no generator can do better), `fresh-100` (new slides),
          `restain-100` (colour deconvolution, no network), `reconstruct-100` (autoencoder alone),
          `ldm-100-same` (diffusion, labels kept), `subtype-2x` (twice the steps).
Same      In all arms: the optimiser steps, the real half of every batch, a quarter of the real patches (and
          of the sources of synthetic ones) from anywhere, averaged weights. Nothing is chosen by a test
          figure.
Outcomes  Dice at the threshold that is best on val (primary), at 0.5 (the paper's) and at the false-positive
          rate of `subtype` on test; log ratio of the subtype variance at that rate (primary) and at 0.5;
          recalls, precision, false-positive rate, average precision.
Primary   P1 Dice subtype > tumor. P2 variance subtype < tumor. P3 Dice ldm-100 > subtype. P4 variance ldm-100
          < subtype. Paired over seeds, t intervals, Holm at .05 over the four.
Verdict   reproduced: sign as in the paper, adjusted interval without 0, same sign at the matched rate, at
          least +.005 Dice or a ratio of at most .8. Not answerable: the oracle's interval includes 0.
          Contradicted: the interval excludes even that much while the oracle shows it. Else undecided.
Others    with intervals only: all further comparisons of `report_study`.
Pilot     Seeds 0 to 3 chose the amount of tissue and the steps, by `subtype` and `oracle-100`; generators by
          image measures. Those seeds enter no result. At 2400 steps recall of 0 was .57 .62 .62 .89, the
          false-positive rate .020 .025 .024 .053, and the oracle's variance at equal rate x .31 .13 .05 .47;
          at 1600 steps (seeds 0, 1) the baseline was less overfitted (.70 .70) and the oracle lost Dice at
          equal rate, so 2400 was taken. The phantom's law is unchanged.
Changes   2026-11-25, before a generator of a final seed was trained: 3000 steps of diffusion for 1500 (pilot
          images at 400 steps had the staining, but no cells), and DPM-Solver++ in 15 steps for DDIM in 50 (64
          images of seed 0: obedience .829 against .812, kernel distance 43 against 50, a third of the time).
          2026-11-25, before a network of a final seed was trained: `--amp bf16` in all arms, with which
          a CPU with avx512_bf16 trains 1.4 to 1.5 times as fast. The pilot ran in fp32.
          2026-11-25, after the results of seeds 10 to 14: `--repeats M` trains M segmenters per arm and
          seed, whose figures are averaged; the unit stays the seed. Two more runs of seed 14 on the same
          images moved the recall of 0 from .75 to .92 and .96 (`subtype`) and from .43 to .92 and .95
          (`oracle-100`). For seeds 10 to 14 it is exploratory, and reported beside the one-run verdicts.
          2026-11-28, on the wording of "the real half of every batch": a place of a batch is real with
          probability 1 / (1 + ratio), half of them at 100 % alone. Equal in all arms of synthetic patches and
          `subtype` are the real patches themselves, as augmented, at the places and steps that are real.
          2026-11-28: inpainted tumor that fills less than an eighth of its patch (3.4 % of the patches of
          seed 10) got too little of the sensor's noise in seeds 10 to 14 and 77; mended for later ones.
          2026-11-29, after seed 77: networks trained on 64 px are judged on tiles of 256 px, to which not
          every one extrapolates: `fresh-100` had a Dice of .65 on val so, and .93 on tiles of 64 px. Both
          evaluations of seed 77 are reported; those of seeds 10 to 14 cannot be made again.
          2026-11-29, before seed 20 was rendered: tiles of the patches' size, 64 px. Chosen by val on pilot
          seeds, `subtype` of 0, 1, 2 and `oracle-100` of 0, 1: Dice .948 .914 .944 and .950 .928 for .949
          .899 .939 and .946 .912 on 256 px. On test the baseline's recall of 0 is .77 .67 .70 for .59 .46
          .66 (so a part of what looked overfitted was this), the oracle's variance x .25 and .08. Seeds 20
          to 24 are a second study, with the same outcomes and verdicts; those of 10 to 14 stand.

Every stage is a command that is printed first and can be run by hand; what it says is kept in OUT/logs. What
is complete is not run again; what was interrupted goes on; seeds and arms can be added. A seed leaves
seeds/seedN.json, of which `report_study` makes the report: seeds may come from several machines.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from her2 import report, report_study, run, run_config as configuration
from her2.data_folder import load_dataset
from her2.data_slides import SPLITS
from her2.run_errors import UserError, command
from her2.run_provenance import data_hashes
from her2.study_jobs import Record, Stage, run_stages

METHODS = tuple(report.METHODS)
RATIOS = (50, 100, 200, 400)                            # per cent; paper, section 3
PAPER_ARMS = ["tumor", "subtype", *(f"{method}-{ratio}" for ratio in RATIOS for method in METHODS)]
CONTROLS = ["oracle-100", "fresh-100", "restain-100", "reconstruct-100", "ldm-100-same", "subtype-2x"]
# Not among "all", to be named: no real patch (ldm-only-32: 32 images); other classes (`her2.cluster`).
EXPLORATORY = ["ldm-only", "gan-only", "oracle-only", "ldm-100-clusters", "ldm-100-stained"]
REGROUPED = {"clusters": ["--classes", 4], "stained": ["--merge", "non-stained=0; stained=1+,2+,3+"]}
NEEDS_PHANTOM = {"oracle", "fresh"}                     # sets that real data cannot have
# What the 2x arm needs to know: the optimiser steps of train_seg.py's presets.
STEPS = {"tiny": 240, "small": 2400, "paper": 100_000}
JUDGE_SEED = 0                  # of the tissue on which the judge of images is trained; 1 for seed 0 itself
# Seconds per stage of `small`, one thread of an AMD EPYC at 2.6 GHz, for the first guess of the time left.
COST = {"phantom": 50, "autoencoder": 600, "diffusion": 900, "GAN": 600, "images": 150,
        "segmentation": 240, "evaluation": 120}
# May change from one start to the next: seeds, arms and repeats are added to what is there. The other fields
# stand in the commands of the stages: all would be made again.
FREE = ("seed", "seeds", "arms", "repeats", "jobs")
UNIFORM = ["--uniform", "0.25"]


@dataclass
class Config(configuration.Machine):        # device and amp
    data: str = ""                  # dataset folder; empty: a phantom per seed, made in OUT/seedN/phantom
    out: str = "runs/study"         # folder for everything; the same command again goes on where it stopped
    preset: Literal["tiny", "small", "paper"] = "tiny"  # tiny: a demonstration; small: the study; paper: its
                                    # sizes, for a GPU
    seed: int = 10                  # first seed
    seeds: int = 1                  # number of seeds: SEED, SEED + 1, ...
    arms: str = ""                  # comma-separated names; empty: those of the preset; all: every arm
    repeats: int = 1                # segmenters per arm and seed; their figures are averaged
    jobs: int = 1                   # stages side by side, one thread each on a CPU, one GPU each with several
    split_seed: int = 0             # decides the split of slides when slides.csv has none
    trial: int = 0                  # optimiser steps of every training, to try the whole chain;
                                    # 0: as the preset says
    cache: str = "cache"            # folder for the decoded images


PRESETS = {"tiny": dict(arms="tumor,subtype,gan-100,ldm-100,inpaint-100,oracle-100,reconstruct-100"),
           "small": dict(seeds=5, arms="all"), "paper": dict(seeds=5, arms="all")}


def chosen_arms(config) -> dict:
    """{arm: (synthetic set or "", its ratio)} of the command line, without those that --data cannot have.
    `subtype` is always among them. UserError for a name that is no arm."""
    every, known = PAPER_ARMS + CONTROLS, PAPER_ARMS + CONTROLS + EXPLORATORY
    found = {"subtype": ("", 0.0)}
    for arm in every if config.arms == "all" else filter(None, map(str.strip, config.arms.split(","))):
        if re.sub(r"(?<=-only)-[1-9]\d*$", "", arm) not in known:
            raise UserError(f"--arms: {arm!r} is unknown; known are {', '.join(known)}, and all")
        method, percent, *variant = [*arm.split("-"), ""]
        if method in ("tumor", "subtype"):                                              # or subtype-2x
            found[arm] = "", 0.0
        elif not (config.data and method in NEEDS_PHANTOM):
            ratio = math.inf if percent == "only" else int(percent) / 100
            found[arm] = "-".join(filter(None, [method, *variant])), ratio
        elif config.arms not in ("all", PRESETS["tiny"]["arms"]):       # named by the user
            raise UserError(f"--arms: {arm!r} is painted by the phantom, --data has none; leave it out")
    return found


def stages(config, seed: int, keys: tuple = ("", "")) -> list:
    """The stages of one seed, each behind those that it needs, and those of the judge."""
    root = Path(config.out) / f"seed{seed}"
    data = config.data or root / "phantom"
    sizes = ["--preset", config.preset]
    machine = ["--device", config.device, "--amp", config.amp, "--cache", config.cache]
    unseeded = [*sizes, "--data", data, "--split-seed", config.split_seed, *machine, "--seed"]
    common = [*unseeded, seed]
    short = ["--steps", config.trial] if config.trial else []
    plan = []

    def add(kind, name, line, folder, *needs, root=root, owner=f"seed {seed}: "):
        line = tuple(map(str, [*line, "--out", root / folder]))
        plan.append(Stage(owner + name, kind, line, root / folder, tuple(filter(None, needs)),
                          keys[kind == "evaluation"]))
        return plan[-1]

    def train_ldm(name, flags, folder, *needs):
        stage = name.split()[0]
        return add(stage, name, ["train_ldm.py", "--stage", stage, *flags, *UNIFORM, *short], folder, *needs)

    tissue = None if config.data else add(
        "phantom", "phantom", ["-m", "her2.phantom", *sizes, "--seed", seed], "phantom")
    arms = chosen_arms(config)
    amount = {}     # one set per method, of the largest size: arms that are added take more of its images
    for name, ratio in arms.values():
        least = max(RATIOS) / 100 if name in METHODS and config.preset != "tiny" else 1.0
        amount[name] = max(0.0 if ratio == math.inf else ratio, least, amount.get(name, 0.0))
    vq, diffusion, images = None, None, {}              # images: {set: the stage that makes it}
    for name in filter(None, amount):
        method, kind = name.partition("-")[::2]
        network, flags, source = None, common, tissue
        if method in ("ldm", "inpaint", "reconstruct"):
            network = vq = vq or train_ldm("autoencoder", common, "vq", tissue)
        if kind in REGROUPED:                           # the same tissue in other classes, its own diffusion
            other = config.data or config.cache != Config.cache         # than the defaults of her2.cluster
            where = ["--split-seed", config.split_seed, "--cache", config.cache] if other else []
            source = add("phantom", f"classes {kind}", ["-m", "her2.cluster", data, *REGROUPED[kind], *where],
                         kind, tissue)
            flags = [source.folder if one is data else one for one in common]
            network = train_ldm(f"diffusion {kind}", ["--autoencoder", vq.folder, *flags], f"ldm-{kind}",
                                source, vq)
        elif method in ("ldm", "inpaint"):
            network = diffusion = diffusion or train_ldm(
                "diffusion", ["--autoencoder", vq.folder, *common], "ldm", tissue, vq)
        elif method == "gan":
            network = add("GAN", "GAN", ["train_gan.py", *common, *UNIFORM, *short], "gan", tissue)
        model = ["--model", network.folder] if network else []
        keep = ["--no-relabel"] if kind == "same" else []
        number = ["--count", kind] if kind.isdigit() else ["--ratio", amount[name]]
        images[name] = add("images", f"images {name}", [
            "generate.py", "--method", method, *model, *keep, *flags, "--sampling", "subtype", *UNIFORM,
            *number], f"synth-{name}", source, network)
    runs = []
    for arm, (name, ratio) in arms.items():
        steps = ["--steps", 2 * (config.trial or STEPS[config.preset])] if arm.endswith("-2x") else short
        synthetic = ["--synthetic", images[name].folder, "--ratio", ratio] if name else []
        sampling = "tumor" if arm == "tumor" else "subtype"
        for again in range(config.repeats):
            more = f"-again{again}" if again else ""
            runs.append(add("segmentation", f"segmentation {arm}{more}", [
                "train_seg.py", *unseeded, seed + 1000 * again, "--sampling", sampling, *UNIFORM, *steps,
                *synthetic, "--name", arm], f"seg-{arm}{more}", tissue, images.get(name)))
    # The judge of images: a segmenter of other tissue, which never saw a slide of this seed, real or
    # generated, so it likes neither. Real data have no other tissue: their own baseline has to do.
    judge = runs[0]
    if not config.data:
        number = JUDGE_SEED + (seed == JUDGE_SEED)
        name = f"judge{number or ''}"
        place = dict(root=Path(config.out) / name, owner="")
        other = add("phantom", f"{name}'s phantom", ["-m", "her2.phantom", *sizes, "--seed", number],
                    "phantom", **place)
        judge = add("segmentation", name, ["train_seg.py", *sizes, "--data", other.folder, *machine,
                                           "--seed", number, *UNIFORM, *short], "seg", other, **place)
    shown = [stage.folder for name, stage in images.items() if "-" not in name]
    looks = ["--synthetic", *shown, "--judge", judge.folder] if shown else []
    # The tiles are those of the patches anyway. Named, they make this another command than that of older
    # code, which took 256 px: its seeds are judged again, and can stand beside new ones.
    add("evaluation", "evaluation", ["evaluate.py", *(one.folder for one in runs), *looks, *sizes, *machine,
                                     "--tile", 0, "--seed", seed], "report", *runs, *images.values(), judge)
    return plan


def main(argv):
    config = configuration.parse(Config, PRESETS, argv, __doc__, "python -m her2.study")
    config.out = str(Path(config.out))          # "runs/study/" is the same folder
    out, seeds, keys = Path(config.out), range(config.seed, config.seed + config.seeds), ("", "")
    if config.data:
        # All stages read the training data, the evaluation all data. (A phantom is decided by its command.)
        dataset = load_dataset(config.data, seed=config.split_seed)
        keys = [json.dumps(data_hashes(dataset, config.cache, splits)) for splits in (("train",), SPLITS)]
    plan = list({stage.name: stage for seed in seeds for stage in stages(config, seed, keys)}.values())
    run.open_run("her2.study", config, config.device, ["-m", "her2.study", *argv], free=FREE)
    record = Record(out / "stages.json")

    def finished(stage):
        if stage.kind == "evaluation":                  # at once, so that a finished seed is never lost
            owner = stage.name.split(":")[0]            # such as "seed 10"
            report_study.write_seed(config, int(owner.split()[1]), {
                name: seconds for name, seconds in record.seconds.items()
                if name.startswith((f"{owner}:", "judge"))})

    failed = run_stages(plan, config.jobs, record, out / "logs", COST, finished)
    files = sorted((out / "seeds").glob("seed*.json"))
    if files:
        report_study.write_report(files, out)
        print(f"\ndone: {out / 'report.md'}, {out / 'results.json'} and the figures; seeds: {len(files)}")
    if failed:
        raise UserError(f"{'; '.join(failed)}; all that does not need this is complete, repair the cause and "
                        "run the same command again")


if __name__ == "__main__":
    command(main)
