"""Evaluate segmentation runs: one table, the paper's figures, and what synthetic images changed.

    python evaluate.py                                              runs/seg alone: runs/report
    python evaluate.py runs/seg* --out runs/report
    python evaluate.py runs/seg* --synthetic data/synth-gan data/synth-ldm data/synth-inpaint

Every run predicts the whole val and test ROIs. Pixels are counted per true subtype and predicted probability,
so that each figure, at any threshold, follows from counts; these are kept in the run's metrics.json and not
computed again while model, data and settings stay the same. Runs are grouped by configuration and seed.

    results.json    every figure of every run, also at the false-positive rate of the subtype-sampled baseline
    results.csv     a row per run and split, and per run and ROI: the figures at threshold 0.5; the worst test
                    ROIs of a run are drawn in its own folder, worst.png
    report.md       tables (mean and standard deviation over seeds, change against the baseline) and figures
    fig2.png fig5.png fig6.png, and with --synthetic fig4.png staining.png
"""

from her2 import run_config as configuration         # first: it makes Ctrl-C one line, also during imports
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from her2 import draw, draw_charts, report, report_images, report_staining, run, run_distributed, run_training
from her2.data_classes import csv_text
from her2.data_folder import load_dataset, load_synthetic, read_split
from her2.run_errors import UserError, atomic_write, command
from her2.metrics import ProbabilityHistogram
from her2.run_provenance import changed_since, data_hashes, file_hash, locate, read_record, trained_with
from her2.data_mapped import open_region
from her2.data_regions import open_roi, region_files
from her2.segmenter import STRIDE, UNet, choose_tiles, predict_roi


@dataclass
class Config(configuration.Tiles):  # device, preset, size and number of the tiles, as in her2.predict
    data: str = ""                  # dataset folder; empty: the one that the runs were trained on
    out: str = "runs/report"        # folder of the report
    seed: int = 0                   # which examples Fig. 4 shows, and which real patches the judge sees
    judge: str = ""                 # run of train_seg.py on other tissue, which looks at --synthetic: do the
                                    # images obey their masks, how far are they from real patches?
    cache: str = "cache"            # folder for the decoded images


PRESETS = {"tiny": {}, "small": {}, "paper": dict(batch=4)}
# Fields of a run that are read here, and what they must be.
NEEDED = {"data": str, "seed": int, "steps": int, "patch": int, "sampling": str, "synthetic": str,
          "ratio": (int, float)}
WORST, CELL = 4, 320        # ROIs in worst.png, and pixels a side there


def main(argv):
    config, names, synthetic_folders = configuration.parse(Config, PRESETS, argv, __doc__, "evaluate.py", {
        "runs": dict(nargs="*", default=["runs/seg"], metavar="RUN",
                     help="run folders of train_seg.py [runs/seg]"),
        "--synthetic": dict(nargs="+", default=[], metavar="DIR",
                            help="folders made by generate.py, for Fig. 4 and their staining")})
    each = {path.resolve(): path for path in configuration.named_paths(names)}
    folders = list(each.values())
    device, precision = run_training.pick_device(config.device, config.amp)

    # ---- 1 runs and data: may these be compared at all? ----------------------------------------------------
    runs = [read_run(folder) for folder in folders]
    tiles = [choose_tiles(config.tile, config.overlap, one.fields["patch"]) for one in runs]
    dataset = shared_dataset(runs, folders, config)         # one split: nobody is tested on what it learned
    notes = report.check_comparable(runs)                   # other steps or patches: said, not refused
    for folder in folders:
        notes += changed_since(folder, dataset, config.cache)
    synthetic = read_synthetic(synthetic_folders, dataset)
    for images, _ in synthetic.values() if config.judge else ():
        if len(images.rois) < 2 or any(roi.height % STRIDE or roi.width % STRIDE for roi in images.rois):
            raise UserError(f"{images.root}: --judge needs two images at least, with sides that are "
                            f"multiples of {STRIDE}; make others with generate.py, or leave --judge out")

    # ---- 2 predict: counts per subtype and probability, from which every figure follows --------------------
    hashes = json.dumps(data_hashes(dataset, config.cache, ("val", "test"))).encode()
    key = {"data": hashlib.sha256(hashes).hexdigest(), "precision": str(precision)}
    for one, (tile, overlap) in zip(runs, tiles):           # all that the counts depend on
        key |= {"model": file_hash(Path(one.folder) / "model.pt"), "tile": tile, "overlap": overlap,
                "steps": one.fields["steps"]}           # another number asked for: `predict` looks again
        if not read_metrics(one, key, dataset):             # prediction is what takes the time
            predict(one, dataset, config, (tile, overlap), device, precision)
            run_distributed.rank() or write_metrics(one, key)
        if one.whole("test").report()["dice"] < 0.05:       # a failed run among good ones ruins every mean
            notes.append(f"{one.folder} finds hardly any tumor: its training failed or was too short, see "
                         "its curves.png")

    # ---- 3 report: tables and figures, by one process ------------------------------------------------------
    if run_distributed.rank():
        return
    out = Path(config.out)
    results = report.collect(runs)                          # seeds of one configuration become one row
    pictures = report.figures(out, results["configs"], dataset.classes)
    parts = {"train + val": dataset.split("train") + dataset.split("val"), "test": dataset.split("test")}
    areas = {name: sum(open_region(file).row_counts.sum(axis=1)                # (K,) pixels per class
                       for file in region_files(rois, dataset.classes, config.cache))
             for name, rois in parts.items()}
    draw.save_png(out / "fig2.png", draw_charts.distribution(areas, dataset.classes))
    pictures.append(("fig2.png", "Fig. 2 of the paper: shares of the subtypes in the annotated tumor area."))
    if synthetic:
        pictures += draw_synthetic(out, results, synthetic, dataset, config, device)
    run.write_json(out / "results.json", results)
    atomic_write(out / "results.csv", table(runs))
    study = report.study_of(runs, dataset)
    atomic_write(out / "report.md", "\n\n".join([
        "# Segmentation with and without synthetic images",
        f"{len(runs)} runs, test split of `{dataset.root}`, pixels pooled. \u00b1 is the standard deviation "
        "over seeds, brackets are 95 % intervals of the paired difference. Variance is that of the recalls "
        f"of the HER2 subtypes: lower is better. Equal FPR is that of `{report.BASELINE}` of the same seed: "
        "a gain that is not there was a shift of the operating point. n/a: nothing to compute it from.",
        *(f"- **Note:** {note}" for note in notes),
        *report.sections(study, report.compare(study), results, pictures)]) + "\n")

    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    # What fits a terminal. Whoever calls more of the tissue tumor finds more of each subtype, at 0.5: so
    # report.md compares at one price as well.
    print(report.plain([{title: row[title] for title in row if not title.endswith(("threshold", "FPR"))}
                        for row in report.arm_table(study)]))
    print(f"\ndone: {out / 'report.md'}, {out / 'results.json'}")


# ---- runs and data -----------------------------------------------------------------------------------------
def read_run(folder) -> report.Run:
    """A finished run of train_seg.py, not yet evaluated."""
    if not (folder / "model.pt").exists():
        run.load_model(folder, "segmenter")         # says what is missing and which command makes it
    record = read_record(folder)
    fields, script = record["fields"], record["script"]
    if script != "train_seg.py":
        raise UserError(f"{folder / 'config.json'}: of a run of {script}, not of train_seg.py; leave it out")
    if fields.get("ratio") == "inf":                # synthetic images alone; JSON has no infinity
        fields["ratio"] = float("inf")
    missing = [name for name, kind in NEEDED.items() if not isinstance(fields.get(name), kind)]
    if missing:
        raise UserError(f"{folder / 'config.json'}: no good field {', '.join(missing)}; "
                        "it was made by another version of the code, train again")
    # The set may have been trained on under any folder name: how it was made is what the arm is called by.
    named = fields["synthetic"]                     # it may have moved
    method = synthetic_method(locate(folder, "synthetic") or named) if named else ""
    return report.Run(str(folder), fields, method, {"val": {}, "test": {}})


def synthetic_method(folder) -> str:
    """How generate.py made the images in `folder`: 'gan', 'ldm', ...; '-same' when it kept the labels."""
    fields = read_record(folder)["fields"]
    method = fields.get("method")
    if method not in report.TITLES:
        raise UserError(f"{folder}: not a folder made by generate.py, its method is unknown; make it again")
    # With the labels kept, any gain is one of the images; with new ones it may be one of the balance.
    return method if fields.get("relabel", True) or method == "reconstruct" else f"{method}-same"


def shared_dataset(runs, folders, config):
    """The dataset of all runs. UserError when they were trained on different data or splits of them."""
    # Data may have moved with the run.
    places = [config.data or trained_with(folder, config)["data"] for folder in folders]
    for other, place in zip(folders, places):
        if Path(place).resolve() != Path(places[0]).resolve():
            raise UserError(f"{folders[0]} and {other}: trained on different data ({places[0]} and {place}); "
                            "evaluate them apart, or give --data")
    splits = [read_split(folder / "split.json") for folder in folders]
    dataset = load_dataset(places[0], split=splits[0])
    for one, split in zip(runs, splits):
        for slide, part in dataset.slides().items():        # slides added since the training belong to no one
            if split.get(slide, part) != part:
                raise UserError(f"{one.folder}: slide {slide} was a {split[slide]} slide in training, and is "
                                f"a {part} slide of {dataset.root}; evaluate runs of one split only")
    return dataset


def read_synthetic(folders, dataset) -> dict:
    """{method: (synthetic Dataset, {image name: line of its manifest})}, one folder per method."""
    found = {}
    for folder in configuration.named_paths(folders):
        method = synthetic_method(folder).split("-")[0]
        if method in found:
            raise UserError(f"{found[method][0].root} and {folder}: both are made by --method {method}; give "
                            "one folder per method")
        found[method] = load_synthetic(folder, dataset)
    return {method: found[method] for method in report.TITLES if method in found}      # the paper's order


# ---- prediction --------------------------------------------------------------------------------------------
def predict(one, dataset, config, tiles, device, precision) -> None:
    """Fill one.slides, over the whole ROIs, and one.rois. Under torchrun each process predicts some ROIs, and
    gets the counts of all."""
    content = run.load_model(one.folder, "segmenter")
    # Arms are compared at equal steps: the last save of an interrupted run would lose for the wrong reason.
    if content.get("step", 0) < one.fields["steps"]:
        raise UserError(f"{one.folder}: stopped at step {content.get('step', 0)} of {one.fields['steps']}; "
                        "give its command again to finish it (it stands in its config.json), or leave it out")
    run_training.refuse_other_classes(content, dataset, one.folder)
    network = run.build_model(UNet, content, one.folder, device)
    rois = [*dataset.split("val"), *dataset.split("test")]
    mine, counts, worst = list(enumerate(rois))[run_distributed.rank()::run_distributed.world()], [], []
    for k, roi in tqdm(mine, desc=Path(one.folder).name, unit="ROI", leave=False, disable=None):
        image, label, _ = open_roi(roi, dataset.classes, config.cache).whole()      # (H, W, 3), (H, W) uint8
        # Tiles overlap and only their centres count: at a border a network with padding sees less.
        with precision.autocast():
            prob = predict_roi(network, torch.from_numpy(image).permute(2, 0, 1), *tiles, config.batch,
                               device)                                              # (H, W)
        # Counts, for one matrix of the whole split: in a mean of Dice an almost empty ROI weighs in full.
        counts.append((k, ProbabilityHistogram(dataset.classes).add(prob, label).counts))
        if roi.split == "test":
            share, pictures = draw.errors(image, label, prob.numpy(), dataset.classes, CELL)
            # Not all stay in memory. Ties by name: the same whatever the number of processes.
            worst = sorted([*worst, (-share, roi.name, pictures)])[:WORST]
    counts, worst = map(sum, zip(*run_distributed.gather_objects((counts, worst))), ([], []))
    for k, part in sorted(counts, key=lambda item: item[0]):        # by slide, the unit of the bootstrap
        roi, part = rois[k], ProbabilityHistogram(dataset.classes, part)
        slides = one.slides[roi.split]
        slides[roi.slide] = part + slides.get(roi.slide, 0)
        one.rois.append({"split": roi.split, "slide": roi.slide, "roi": roi.name, **part.report()})
    worst = sorted(worst)[:WORST]
    run_distributed.rank() or draw.save_png(Path(one.folder) / "worst.png", draw.image_grid(
        [pictures for *_, pictures in worst], [f"{name}\n{-share:.1%} wrong" for share, name, _ in worst],
        ["Image", "Annotated", "Errors"], cell=CELL, legend=[
            *draw.class_legend(dataset.classes, True), ("missed", draw.BLUE), ("false", draw.VERMILION)]))


def table(runs) -> str:
    """results.csv. What does not exist (the recall of an absent subtype) is an empty cell."""
    rows = []
    for one in runs:
        whole = [{"split": split, **one.whole(split).report()} for split in one.slides]
        for found in whole + one.rois:      # where a method fails is seen per ROI, whether it does per split
            rows.append({"configuration": one.name, "seed": one.seed, "run": one.folder,
                         **{key: found.get(key) for key in ("split", "slide", "roi")},
                         "pixels": int(np.sum(found["confusion"])),
                         **{key: found[key] for key in ("dice", "subtype_variance", "precision", "fpr")},
                         **{f"recall {name}": value for name, value in found["recall"].items()}})
    return csv_text(rows)


def write_metrics(one, key) -> None:
    """metrics.json: the figures on test, then what they were computed from; one line per entry."""
    content = {"figures": one.whole("test").report(), "key": key, "rois": one.rois,
               **{split: {slide: part.to_json() for slide, part in slides.items()}
                  for split, slides in one.slides.items()}}             # thresholds come from val
    lines = [f"{json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in content.items()]
    atomic_write(Path(one.folder) / "metrics.json", "{\n" + ",\n".join(lines) + "\n}\n")


def read_metrics(one, key, dataset) -> bool:
    """Take val and test from metrics.json when it was computed from the same model, data and settings."""
    path = Path(one.folder) / "metrics.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"key": None}
        if content["key"] != key:           # another model, dataset or tile size: other counts
            return False
        one.rois, one.slides = content["rois"], {
            split: {slide: ProbabilityHistogram.from_json(part, dataset.classes)
                    for slide, part in content[split].items()} for split in one.slides}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"note: {path}: damaged ({error}), computed again", file=sys.stderr)
        return False
    return True


# ---- figures -----------------------------------------------------------------------------------------------
def draw_synthetic(out, results, synthetic, dataset, config, device) -> list:
    """Captions of fig4, staining and old_and_new, drawn into `out`; their numbers go into `results`."""
    classes, train = dataset.classes, dataset.split("train")
    sets = {report.TITLES[method]: images.rois for method, (images, _) in synthetic.items()}
    draw.save_png(out / "fig4.png", report_images.examples(
        synthetic, dataset, report.TITLES, config.seed, config.cache))

    # One white for all: a generated patch that is tumor from edge to edge shows no glass to measure it on.
    white = report_staining.median_white(train, classes, config.cache)
    # What generators learned from is what they can be held against.
    found = report_staining.measure({report.REAL: train, **sets}, classes, white, config.cache)
    densities = {source: report_staining.by_class(found[source], classes) for source in found}
    results["staining"] = report_staining.summary(densities, classes)
    groups = [(classes.names[k], [(source, some[k]) for source, some in densities.items()])
              for k in classes.tumor_ids]
    draw.save_png(out / "staining.png", draw_charts.box_plots(
        [("DAB optical density", groups, None)], {source: report.COLORS[source] for source in densities}))

    results["old and new"] = {
        method: report_staining.transitions(found[report.TITLES[method]], entries, classes)
        for method, (_, entries) in synthetic.items()}
    draw.save_png(out / "old_and_new.png", report_staining.heat_maps(results["old and new"], classes))
    if config.judge:                                        # do images obey their masks?
        network = run.build_model(UNet, run.load_model(config.judge, "segmenter"), config.judge).to(device)
        results["images"] = report_images.measure(sets, dataset, network, device, config.seed, config.cache)
    return [("fig4.png", "Fig. 4 of the paper: images generated for the same label, by method; the original "
             "is the patch whose label was changed. One row per subtype asked for."),
            ("old_and_new.png", "Mean DAB density of generated instances with its 95 % interval, by the "
             "subtype asked for and the one before. What sees the label alone (diffusion, GAN) cannot tell "
             "the rows apart; inpainting may be drawn to its surroundings."),
            ("staining.png", "DAB optical density of single instances by the subtype asked for, beside the "
             "real instances of the training slides.")]


if __name__ == "__main__":
    command(main)
