"""Is the staining what was asked for? The amount of DAB in single tumor instances, real and generated.

A generator that is told "3+" must paint brown membranes, and none when it is told "0"; segmentation figures
alone do not show it. The density of an instance is the mean over its pixels of DAB, the optical density after
colour deconvolution (stains); real instances are grouped by the class annotated, generated ones by the class
asked for. Medians should rise 0 < 1+ < 2+ < 3+, near those of the real instances.
"""

import numpy as np
from tqdm import tqdm

from her2.data_regions import open_roi
from her2.draw_charts import matrices
from her2.report_statistics import t_quantile
from her2.stains import deconvolve, white_point

SMALLEST = 30           # pixels: an instance that a patch only touches says nothing about its staining
MOST_IMAGES = 1000      # images measured per source, evenly spread: quartiles need no more
BROWN = (150, 90, 40)
GRID = 1024             # larger images are sampled on a grid of at least this many points per side


def instance_densities(image, instance, count: int, white, pixel_area: int = 1) -> np.ndarray:
    """Mean DAB density of each instance 0..count-1 of one image; NaN where it has fewer than SMALLEST pixels.
    image (H, W, 3) uint8, instance (H, W) ids; each of their pixels stands for `pixel_area` pixels."""
    assert image.shape == (*instance.shape, 3), f"image {image.shape} does not fit instance {instance.shape}"
    dab = deconvolve(image, white)[1]                                                   # (H, W)
    pixels = np.bincount(instance.reshape(-1), minlength=count)                         # (count,)
    total = np.bincount(instance.reshape(-1), weights=dab.reshape(-1), minlength=count)
    return np.where(pixels * pixel_area >= SMALLEST, total / np.maximum(pixels, 1), np.nan)


def median_white(rois, classes, cache="cache") -> np.ndarray:
    """(3,) median of the white points of regions, 0..255: a patch full of tumor has no glass of its own."""
    return np.median([white_point(open_roi(roi, classes, cache).image[::8, ::8]) for roi in rois], axis=0)


def measure(sources: dict, classes, white, cache="cache") -> dict:
    """{source: [(name of the image, instance id, class id, density), ...]}: tumor in {source: [ROI, ...]}."""
    records = {source: [] for source in sources}
    for source, rois in sources.items():
        some = rois[::-(-len(rois) // MOST_IMAGES)]
        for roi in tqdm(some, f"staining, {source}", leave=False, disable=None):
            region = open_roi(roi, classes, cache)
            step = max(1, min(region.height, region.width) // GRID)
            image, instance = region.image[::step, ::step], np.array(region.instance[::step, ::step])
            found = instance_densities(image, instance, len(region.class_of), white, step ** 2)
            here = np.flatnonzero(np.isin(region.class_of, classes.tumor_ids) & ~np.isnan(found))
            records[source] += [(roi.name, *one) for one in zip(
                here.tolist(), region.class_of[here].tolist(), found[here].tolist())]
    return records


def by_class(records, classes) -> dict:
    """{class id: [density, ...]} of the records of one source."""
    return {k: [density for _, _, class_id, density in records if class_id == k] for k in classes.tumor_ids}


def summary(densities: dict, classes) -> dict:
    """{source: {class: {"n", "q25", "median", "q75"}, "ordered": bool or None}} of {source: `by_class`}.
    "ordered" tells whether the medians of the HER2 subtypes rise in their order; None when one is absent."""
    result = {}
    for source, found in densities.items():
        result[source] = {}
        for k in classes.tumor_ids:
            row = np.percentile(found[k], [25, 50, 75]).tolist() if found[k] else [None] * 3
            result[source][classes.names[k]] = dict(zip(("n", "q25", "median", "q75"), (len(found[k]), *row)))
        medians = [result[source][classes.names[k]]["median"] for k in classes.variance_ids]
        result[source]["ordered"] = None if None in medians else sorted(set(medians)) == medians
    return result


def table(result: dict) -> list:
    """Rows {column: text}: median density (and number of instances) per source and tumor class."""
    return [{"images": source,
             **{name: "n/a" if cell["median"] is None else f"{cell['median']:.2f} ({cell['n']})"
                for name, cell in found.items() if name != "ordered"}} for source, found in result.items()]


def transitions(records, entries: dict, classes) -> dict:
    """{old: {new: {"n", "mean", "half"}}}: density by the class before and the one asked for; `half` the 95 %
    interval to each side. entries: {name of the image: its line of the manifest}."""
    found = {(old, new): [] for old in classes.tumor_ids for new in classes.tumor_ids}
    for name, i, _, density in records:
        pair = tuple(entries[name].get("instances", {}).get(str(i), ()))
        if pair in found:
            found[pair].append(density)
    return by_pair({(classes.names[old], classes.names[new]): some for (old, new), some in found.items()})


def over_seeds(tables) -> dict:
    """{method: `transitions`} of several seeds -> the same, each cell over the seeds' means: n is seeds."""
    found = {}
    for method, rows in (item for one in tables for item in one.items()):
        for old, row in rows.items():
            for new, cell in row.items():
                means = found.setdefault(method, {}).setdefault((old, new), [])
                means += [] if cell["mean"] is None else [cell["mean"]]
    return {method: by_pair(cells) for method, cells in found.items()}


def by_pair(found: dict) -> dict:
    """{(old, new): numbers} -> `transitions`; None where there are too few."""
    result = {}
    for (old, new), values in found.items():
        n = len(values)
        half = t_quantile(0.95, n - 1) * np.std(values, ddof=1) / np.sqrt(n) if n > 1 else None
        result.setdefault(old, {})[new] = {"n": n, "mean": float(np.mean(values)) if n else None,
                                           "half": half and float(half)}
    return result


def heat_maps(found: dict, classes) -> np.ndarray:
    """One map per method of {method: `transitions`}: rows the old class, columns the new one."""
    names = [classes.names[k] for k in classes.tumor_ids]
    panels = [(method, *(np.array([[rows[old][new][key] for new in names] for old in names], dtype=float)
                         for key in ("mean", "half"))) for method, rows in found.items()]
    most = max([0.01, *(np.nanmax(mean) for _, mean, _ in panels if np.isfinite(mean).any())])
    return matrices(panels, names, names, ("before", "painted as"), BROWN, most, (62, 62))
