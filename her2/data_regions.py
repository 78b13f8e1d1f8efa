"""The pixels of one region of interest, with class and instance ids, from whatever format they come in.

    image (H, W, 3) uint8        label (H, W) uint8 class ids        instance (H, W) int32, 0 = none

An instance is what the paper calls a tumor tissue instance (section 2.1): a group of cells of one class,
drawn as one polygon. It is the unit of relabelling, so two rules hold for every image, whatever its format:
instance != 0 exactly where label != 0, and an instance has one class.

`read_roi` decodes; `open_roi` gives the memory-mapped copy of it (see `data_mapped`), made on first use.
"""

import hashlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from her2.data_annotations import check_image, place_polygons, polygon_classes
from her2.data_classes import IGNORE, ClassTable
from her2.data_formats import read_file
from her2.run_errors import UserError
from her2.data_images import read_image, read_instances, read_mask
from her2.polygons import connected_components, paint
from her2.data_slides import ROI
from her2.data_mapped import VERSION, MappedRegion, classes_of, open_region, write_region

OUTSIDE = "outside the image"       # why a polygon of a slide is left out in a crop of it


def read_roi(roi: ROI, classes: ClassTable, annotations=None):
    """Decode one region: image (H, W, 3) uint8, label (H, W) uint8, instance (H, W) int32. `annotations`:
    what `read_polygons` gave for it, where that was asked already."""
    image = read_image(roi.image)
    if image.shape[:2] != (roi.height, roi.width):
        raise UserError(f"{roi.image}: changed while it was used; start again")
    if roi.mask is not None:
        label, instance = _read_mask_and_instances(roi, classes)
    else:
        polygons, class_ids, _ = annotations or read_polygons(roi, classes)
        label, instance = paint([p.rings for p in polygons], class_ids, roi.height, roi.width)
    return image, label, instance


def read_polygons(roi: ROI, classes: ClassTable):
    """The annotations of one region, in pixels of its image: (polygons, class ids, left out). The third is a
    list of (reason, rings, source id); rings is [] for one without outline."""
    if roi.annotations is None:
        return [], [], []
    found = read_file(roi.annotations, image=roi.image)
    place = roi.x, roi.y, roi.downsample
    if place == (0, 0, 1):
        check_image(found, roi.image, roi.slide, roi.height, roi.width)
    polygons, outside = place_polygons(found.polygons, roi.annotations, roi.height, roi.width, *place)
    left_out = [(reason, [(ring - place[:2]) / roi.downsample for ring in rings], "")
                for reason, rings in found.left_out]
    left_out += [(OUTSIDE, p.rings, p.source_id) for p in outside]
    return polygons, polygon_classes(polygons, classes, roi.annotations), left_out


def _read_mask_and_instances(roi, classes):
    """(label uint8, instance int32) of a region with a mask, checked against table, image and each other."""
    mask = _of_size(read_mask(roi.mask), roi.mask, roi)
    colored = mask.ndim == 3
    if colored:                                             # (H, W, 3) -> (H, W) numbers 0xrrggbb
        mask = mask.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    values = np.unique(mask)
    table = np.zeros(int(values[-1]) + 1, np.uint8)         # table[value in the mask] = class id
    table[values] = _class_ids(roi, values.tolist(), colored, classes)
    label = table[mask]                                     # (H, W)
    if roi.instances is None:
        return label, connected_components(label)
    instance = _of_size(read_instances(roi.instances), roi.instances, roi)
    if stray := int(((instance != 0) != (label != 0)).sum()):
        raise UserError(f"{roi.instances}: {stray} pixels where only one of instances and mask is background "
                        "(0); number exactly the pixels that have a class, or leave the instances cell empty")
    if len(torn := np.unique(instance[classes_of(instance, label)[instance] != label])):
        raise UserError(f"{roi.instances}: instance {torn[0]} ({len(torn)} in all) spans two classes of the "
                        "mask; give each class its own instances, or leave the instances cell empty")
    return label, instance


def _class_ids(roi, values, colored, classes) -> list:
    """The class ids of the values in a mask: colours 0xrrggbb, 0 and one other ("masks": "score"), or ids."""
    names = ", ".join(f"{c.id} = {c.name}" for c in classes.classes)
    remedy = f"correct the mask or add the classes in classes.json ({names})"
    known = {k: k for k in (*range(len(classes)), IGNORE)}
    if colored:
        values = [f"#{value:06x}" for value in values]
        known = {"#%02x%02x%02x" % c.color: c.id for c in classes.classes}
        known |= {name.lower(): class_id for name, class_id in classes.aliases.items()}
        remedy = "save the mask without smoothing, as a PNG in which a pixel's value is its class id"
    elif roi.instances is None and classes.masks == "score":
        score = classes.id_of(roi.score) if classes.knows(roi.score) else 0
        if values[-1] and score not in classes.tumor_ids:
            subtypes = ", ".join(classes.names[k] for k in classes.tumor_ids)
            raise UserError(f"{roi.mask}: its tumor takes the subtype of the slide's score, which is "
                            f"{roi.score!r}; write one of {subtypes} into the column score, or remove "
                            '{"masks": "score"} from classes.json')
        known = {values[-1]: score, 0: 0}                   # 0 is background, be it the only value
        remedy = 'remove {"masks": "score"}, which promises 0 and one other value, from classes.json'
    elif roi.instances is None and classes.masks != "ids" and {*values} <= {0, IGNORE}:
        known = {0: 0}                                      # black and white: nothing says what white means
        remedy = (f"a black-and-white picture? Write the class id into each pixel ({names}), or into "
                  'classes.json {"masks": "score"} if white is tumor of the subtype in the column score, or '
                  '{"masks": "ids"} if white is to be ignored')
    unknown = [str(value) for value in values if value not in known]
    if colored and len(unknown) <= 64:
        aliases = json.dumps({"aliases": dict.fromkeys(unknown[:8], "ignore")})
        remedy = f"give each its class in classes.json: {aliases}"
    if unknown:
        raise UserError(f"{roi.mask}: {len(unknown)} values that are not in the class table "
                        f"({', '.join(unknown[:8])}); {remedy}")
    return [known[value] for value in values]


def _of_size(pixels, path, roi):
    if pixels.shape[:2] != (roi.height, roi.width):
        raise UserError(f"{path}: {pixels.shape[1]} x {pixels.shape[0]} pixels, but its image {roi.name} has "
                        f"{roi.width} x {roi.height}; export both at the same size")
    return pixels


def region_path(roi: ROI, classes: ClassTable, cache="cache") -> Path:
    """Where a region's file lies in `cache`: its name is a hash of all that it depends on, of the labels'
    files whole, of the image's place, size, time and last bytes (in a PNG they hold a checksum)."""
    status = roi.image.stat()
    with open(roi.image, "rb") as file:
        file.seek(max(0, status.st_size - 4096))
        tail = file.read()
    labels = [path.read_bytes() if path else b"" for path in (roi.annotations, roi.mask, roi.instances)]
    text = json.dumps([VERSION, str(roi.image.resolve()), status.st_size, status.st_mtime_ns, roi.x, roi.y,
                       roi.downsample, classes.to_json(), classes.aliases, classes.masks,
                       classes.masks == "score" and roi.score, [len(content) for content in labels]])
    key = hashlib.sha256(b"".join([text.encode(), tail, *labels])).hexdigest()[:24]
    return Path(cache) / f"{roi.image.stem[:60]}-{key}.tile"


def region_file(roi: ROI, classes: ClassTable, cache="cache") -> Path:
    """The mapped file of a region in the folder `cache`, made unless a whole one is there."""
    path = region_path(roi, classes, cache)
    if path.exists():
        try:
            open_region(path)
            return path
        except ValueError as error:
            print(f"note: {path}: damaged cache file ({error}), made again", file=sys.stderr)
    write_region(path, *read_roi(roi, classes), len(classes))
    return path


def in_threads(function, rois: list[ROI], **bar) -> list:
    """[function(roi), ...] in order, with a tqdm bar, by a few threads (decoders and numpy free the lock)."""
    # At most 100 million pixels are worked on at a time, so that large regions do not fill the memory.
    largest = max((roi.height * roi.width for roi in rois), default=1)
    pool = ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1, 10**8 // largest)))
    try:
        return list(tqdm(pool.map(function, rois), total=len(rois), unit="ROI", disable=None, **bar))
    finally:
        pool.shutdown(cancel_futures=True)


def region_files(rois: list[ROI], classes: ClassTable, cache="cache") -> list[Path]:
    """`region_file` for many regions, with a progress bar when it takes longer than a moment."""
    return in_threads(lambda roi: region_file(roi, classes, cache), rois, desc="reading regions", delay=3)


def open_roi(roi: ROI, classes: ClassTable, cache="cache") -> MappedRegion:
    """The memory-mapped region; decoded only on first use."""
    return open_region(region_file(roi, classes, cache))
