"""Is the staining what was asked for? The amount of DAB in single tumor instances, real and generated.

A generator that is told "3+" must paint brown membranes, and none when it is told "0"; segmentation figures
alone do not show it. For every instance i, with its pixels P_i,

    density_i = mean over P_i of DAB(p)         DAB: optical density after colour deconvolution (stains)

and real instances are grouped by the subtype annotated, generated ones by the subtype asked for. What to
expect: medians that rise 0 < 1+ < 2+ < 3+ with overlap between neighbours, near those of the real instances.

One white point serves all images: a patch full of tumor holds no glass on which to measure its own, and real
and generated instances must be held against the same ruler.
"""

import numpy as np
from tqdm import tqdm

from her2.data_regions import open_roi
from her2.stains import deconvolve, white_point

SMALLEST = 30           # pixels: an instance that a patch only touches says nothing about its staining
MOST_IMAGES = 1000      # images measured per source, evenly spread: quartiles need no more
GRID = 1024             # larger images are sampled on a grid of at least this many points per side


def instance_densities(image, instance, count: int, white, pixel_area: int = 1) -> np.ndarray:
    """Mean DAB density of each instance 0..count-1 of one image; NaN where it has fewer than SMALLEST pixels.

    image (H, W, 3) uint8, instance (H, W) ids; each of their pixels stands for `pixel_area` pixels.
    """
    assert image.shape == (*instance.shape, 3), f"image {image.shape} does not fit instance {instance.shape}"
    dab = deconvolve(image, white)[1]                                                   # (H, W)
    pixels = np.bincount(instance.reshape(-1), minlength=count)                         # (count,)
    total = np.bincount(instance.reshape(-1), weights=dab.reshape(-1), minlength=count)
    return np.where(pixels * pixel_area >= SMALLEST, total / np.maximum(pixels, 1), np.nan)


def median_white(rois, classes, cache="cache") -> np.ndarray:
    """(3,) the median over regions of their white points, 0..255."""
    return np.median([white_point(open_roi(roi, classes, cache).image[::8, ::8]) for roi in rois], axis=0)


def measure(sources: dict, classes, white_rois, cache="cache") -> dict:
    """{source: {class id: [density, ...]}} of the tumor instances of {source: [ROI, ...]}.

    `white_rois` are the regions whose median white point is used for all.
    """
    white, densities = median_white(white_rois, classes, cache), {}
    for source, rois in sources.items():
        densities[source] = {k: [] for k in classes.tumor_ids}
        for roi in tqdm(rois[::-(-len(rois) // MOST_IMAGES)], desc=f"staining, {source}", leave=False,
                        disable=None):
            tile = open_roi(roi, classes, cache)
            step = max(1, min(tile.height, tile.width) // GRID)
            found = instance_densities(tile.image[::step, ::step], np.array(tile.instance[::step, ::step]),
                                       len(tile.class_of), white, step ** 2)
            for k in classes.tumor_ids:
                densities[source][k] += found[(tile.class_of == k) & ~np.isnan(found)].tolist()
    return densities


def summary(densities: dict, classes) -> dict:
    """{source: {subtype: {"n", "q25", "median", "q75"}, "ordered": bool or None}} of what `measure` returns.

    "ordered" tells whether the medians of the HER2 subtypes rise in their order; None when one is absent.
    """
    result = {}
    for source, found in densities.items():
        result[source] = {}
        for k in classes.tumor_ids:
            low, median, high = np.percentile(found[k], [25, 50, 75]).tolist() if found[k] else [None] * 3
            result[source][classes.names[k]] = {"n": len(found[k]), "q25": low, "median": median,
                                                "q75": high}
        medians = [result[source][classes.names[k]]["median"] for k in classes.variance_ids]
        result[source]["ordered"] = None if None in medians else sorted(set(medians)) == medians
    return result


def table(result: dict) -> list:
    """Rows of texts, header first: median density (and number of instances) per source and subtype."""
    subtypes = [name for name in next(iter(result.values())) if name != "ordered"]
    rows = [["images", *subtypes, "rises with the subtype"]]
    for source, found in result.items():
        cells = [(found[name]["median"], found[name]["n"]) for name in subtypes]
        rows.append([source, *("n/a" if median is None else f"{median:.2f} ({n})" for median, n in cells),
                     {True: "yes", False: "no", None: "n/a"}[found["ordered"]]])
    return rows
