"""Files as users have them: read to the same pixels as the plain kind, or refused with a working remedy."""

import gzip
import json
import os
import re
import struct
import unicodedata

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
from data_exports import write_export
from data_factory import png, rectangles, save, write_csv, write_dataset

from her2 import data, data_images, data_regions
from her2.data_classes import DEFAULT_CLASSES, IGNORE, load_classes
from her2.data_folder import inspect_dataset, load_dataset
from her2.data_formats import read_file
from her2.data_index import ANNOTATIONS, ENDINGS, files_by_stem
from her2.data_regions import in_threads, read_roi, region_files
from her2.data_slides import read_slides
from her2.run_errors import UserError, command

RGB = np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)
LABEL = rectangles(40, 60, (1, 2, 3, 4, 5))


def pyramid(path, sizes, **options):
    """A TIFF of one page per size, level 0 first; the content of level 0 is RGB."""
    first, *rest = [PIL.Image.fromarray(RGB if k == 0 else np.full((*size, 3), k, np.uint8))
                    for k, size in enumerate(sizes)]
    first.save(path, save_all=True, append_images=rest, **options)
    return path


def ome_tiff(path):
    """An OME-TIFF as QuPath and Bio-Formats write it: one page, its smaller level in a SubIFD behind it."""
    level = RGB[::2, ::2]

    def directory(at, image, extra):
        height, width = image.shape[:2]
        bits, pixels = at + 2 + 12 * (10 + len(extra)) + 4, at + 2 + 12 * (10 + len(extra)) + 4 + 6
        entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, bits), (259, 3, 1, 1), (262, 3, 1, 2),
                   (273, 4, 1, pixels), (277, 3, 1, 3), (278, 4, 1, height), (279, 4, 1, image.size),
                   (284, 3, 1, 1), *extra]
        body = struct.pack("<H", len(entries))
        body += b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
        return body + struct.pack("<I", 0) + struct.pack("<3H", 8, 8, 8) + image.tobytes()

    main = directory(8, RGB, [(330, 4, 1, 0)])
    main = directory(8, RGB, [(330, 4, 1, 8 + len(main))])
    smaller = directory(8 + len(main), level, [(254, 4, 1, 1)])
    path.write_bytes(struct.pack("<2sHI", b"II", 42, 8) + main + smaller)
    return path


GOOD_IMAGES = {
    "opaque alpha": lambda path: save(path.with_suffix(".png"), np.dstack([RGB, RGB[..., 0] * 0 + 255])),
    "opaque alpha, TIFF": lambda path: save(path, np.dstack([RGB, RGB[..., 0] * 0 + 255])),
    "pyramid": lambda path: pyramid(path, [(24, 30), (12, 15), (6, 7)]),
    "pyramid, compressed": lambda path: pyramid(path, [(24, 30), (12, 15)], compression="tiff_lzw"),
    "level, thumbnail, levels": lambda path: pyramid(path, [(24, 30), (9, 9), (12, 15), (6, 7), (8, 12)]),
    "OME-TIFF": lambda path: ome_tiff(path.with_suffix(".ome.tif")),
    "BigTIFF": lambda path: (PIL.Image.fromarray(RGB).save(path, big_tiff=True), path)[1],
}


@pytest.mark.parametrize("name", GOOD_IMAGES)
def test_images_as_scanners_and_programs_write_them(tmp_path, name):
    path = GOOD_IMAGES[name](tmp_path / "a.tif")
    assert data_images.read_size(path) == (24, 30)
    assert np.array_equal(data_images.read_image(path), RGB)


@pytest.mark.parametrize("sizes", [[(24, 30), (24, 30)], [(24, 30), (12, 30)], [(24, 30), (48, 60)]])
def test_pages_that_are_no_levels_are_refused(tmp_path, sizes):
    with pytest.raises(UserError, match="frames or pages"):
        data_images.read_image(pyramid(tmp_path / "a.tif", sizes))


@pytest.mark.parametrize("make", [
    lambda path: save(path, np.dstack([RGB, RGB[..., 0]])), lambda path: save(path, RGB[..., 0]),
    lambda path: PIL.Image.fromarray(RGB).convert("P").save(path), lambda path: save(path, RGB[..., 0] > 99),
    lambda path: PIL.Image.fromarray(RGB[..., 0]).convert("LA").save(path),
    lambda path: PIL.Image.fromarray(RGB).save(path, transparency=(1, 2, 3)),
    lambda path: path.write_bytes(png(30, 24, 16, 2, [bytes(range(180))] * 24)),
])
def test_the_python_of_a_remedy_makes_a_readable_picture(tmp_path, make):
    """Transparent, grey, palette, one bit, grey with alpha, a transparent colour, 16 bits a colour."""
    old, new = tmp_path / "a.png", tmp_path / "b.png"
    make(old)
    with pytest.raises(UserError) as error:
        data_images.read_image(old)
    code = str(error.value).partition("in Python: ")[2]
    exec(code, {"PIL": PIL, "old": old, "new": new})
    shown = data_images.read_image(new)
    with PIL.Image.open(old) as picture:
        rgba = np.array(picture.convert("RGBA")).astype(float)
    alpha = rgba[..., 3:] / 255
    assert np.abs(shown - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1, "what a viewer shows"


def test_sixteen_bit_grey_is_refused_without_advice_that_makes_it_white(tmp_path):
    save(tmp_path / "a.png", np.full((9, 9), 40000, np.uint16))
    with pytest.raises(UserError, match="grey values of 16 bits .* in colour from the scanner") as error:
        data_images.read_image(tmp_path / "a.png")
    assert "convert" not in str(error.value)


# ---- masks -----------------------------------------------------------------------------------------------

def with_masks(root, mask, score="2+", classes=None, name="masks/a.png"):
    """(label, instance) of a dataset whose first image has this mask."""
    rows = write_dataset(root, slides=4)
    save(root / name, mask)
    rows[0].update(mask=name, score=score)
    write_csv(root, rows)
    if classes is not None:
        (root / "classes.json").write_text(json.dumps(classes), encoding="utf-8")
    dataset = load_dataset(root)
    return read_roi(dataset.rois[0], dataset.classes)[1:]


SCORE = {"masks": "score"}


@pytest.mark.parametrize("mask, score, class_id", [
    ((LABEL > 0).astype(np.uint8), "2+", 3), ((LABEL > 0).astype(np.uint8) * 255, "3+", 4),
    (LABEL > 0, "0", 1), ((LABEL > 0).astype(np.uint8) * 7, "1", 2), (LABEL * 0, "1+", 0), (LABEL * 0, "", 0),
])
def test_black_and_white_masks_take_the_subtype_of_the_score(tmp_path, mask, score, class_id):
    label, instance = with_masks(tmp_path, mask, score, SCORE)
    assert np.array_equal(label, (LABEL > 0) * class_id * (mask.max() > 0))
    assert instance.max() == (5 if mask.any() else 0)


@pytest.mark.parametrize("mask, score, classes, words", [
    (LABEL, "2+", SCORE, "promises 0 and one other value"), (LABEL > 0, "", SCORE, "score, which is ''"),
    (LABEL > 0, "unknown", SCORE, "write one of 0, 1+"), (LABEL > 0, "2+", None, '{"masks": "score"}'),
    (LABEL * 0 + 255, "2+", None, '{"masks": "ids"}'), (LABEL > 0, "Stroma", SCORE, "which is 'Stroma'"),
])
def test_masks_that_contradict_the_setting(tmp_path, mask, score, classes, words):
    with pytest.raises(UserError) as error:
        with_masks(tmp_path, mask, score, classes)
    assert words in str(error.value)


def test_the_two_remedies_for_black_and_white_masks(tmp_path):
    for k, mask in enumerate([(LABEL > 0).astype(np.uint8) * 255, LABEL > 0]):      # of 8 bits and of one
        assert set(np.unique(with_masks(tmp_path / f"a{k}", mask, "3+", SCORE)[0])) == {0, 4}
        ids = {"masks": "ids"}
        assert set(np.unique(with_masks(tmp_path / f"b{k}", mask, "3+", ids)[0])) == {0, IGNORE}


def test_instances_beside_a_mask_mean_ids_whatever_the_setting(tmp_path):
    """A synthetic folder takes over the classes.json of the dataset that it was made from."""
    rows = write_dataset(tmp_path, slides=4)
    save(tmp_path / "i.png", LABEL.astype(np.uint16))
    rows[0]["instances"] = "i.png"
    write_csv(tmp_path, rows)
    (tmp_path / "classes.json").write_text(json.dumps(SCORE), encoding="utf-8")
    dataset = load_dataset(tmp_path)
    assert np.array_equal(read_roi(dataset.rois[0], dataset.classes)[1], LABEL)


def test_masks_as_pictures_in_the_colours_of_the_table(tmp_path):
    picture = DEFAULT_CLASSES.colors[LABEL]
    assert np.array_equal(with_masks(tmp_path / "a", picture)[0], LABEL)
    opaque = np.dstack([picture, np.full(LABEL.shape, 255, np.uint8)])
    assert np.array_equal(with_masks(tmp_path / "b", opaque, name="masks/a.tif")[0], LABEL)
    frame = np.where(LABEL[..., None] > 0, np.uint8([1, 2, 3]), np.uint8(255))
    label = with_masks(tmp_path / "f", frame, classes={"masks": "score", "aliases": {"#010203": "ignore"}})[0]
    assert np.array_equal(label, (LABEL > 0) * IGNORE), "colours say for themselves what they mean"
    picture[0, :3] = [1, 2, 3]
    with pytest.raises(UserError, match="1 values that are not in the class table .#010203.") as error:
        with_masks(tmp_path / "c", picture)
    remedy = json.loads(re.search(r"\{.*\}", str(error.value))[0])
    label, _ = with_masks(tmp_path / "d", picture, classes=remedy)
    assert (label[0, :3] == IGNORE).all() and np.array_equal(label[1:], LABEL[1:]), "the remedy to the letter"
    with pytest.raises(UserError, match="without smoothing"):
        with_masks(tmp_path / "e", np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", ["masks/a.tif", "masks/a.TIFF", "masks/a.png"])
def test_masks_are_png_or_tiff(tmp_path, name):
    assert np.array_equal(with_masks(tmp_path, LABEL, name=name)[0], LABEL)


# ---- files and names -------------------------------------------------------------------------------------

def test_gzipped_annotations(tmp_path):
    text = json.dumps({"type": "FeatureCollection", "features": []}).encode()
    path = tmp_path / "a.geojson.gz"
    path.write_bytes(gzip.compress(text))
    assert read_file(path).polygons == []
    for broken in (gzip.compress(text)[:-6], gzip.compress(text)[:12], gzip.compress(text)[:-8] + b"\0" * 8):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="cannot be read.*; correct it"):
            read_file(path)


def test_names_that_differ_in_their_unicode_form_alone(tmp_path):
    rows = write_dataset(tmp_path, slides=3)
    decomposed, composed = (unicodedata.normalize(form, "images/Müller é.png") for form in ("NFD", "NFC"))
    (tmp_path / "images/roi0.png").rename(tmp_path / decomposed)
    rows[0]["image"] = composed
    write_csv(tmp_path, rows)
    dataset, problems = inspect_dataset(tmp_path)
    assert not problems and dataset.rois[0].image.exists()


@pytest.mark.parametrize("name, expected", [
    ("a.png", "a"), ("a.ome.tif", "a"), ("a.geojson.gz", "a"), ("a.png.json", "a"), ("a.b.xml", "a.b"),
    ("a.JPG", "a"), (unicodedata.normalize("NFD", "ü.png"), "ü"), ("a 2.5x.png", "a 2.5x"),
])
def test_the_stem_has_no_ending(name, expected, tmp_path):
    (tmp_path / name).touch()
    assert [*files_by_stem(tmp_path, [*ENDINGS, *ANNOTATIONS])] == [expected]


@pytest.mark.parametrize("added", ["", "_mask", "-labels", "_Mask", ".mask", " masks", "-labelmap", "_gt",
                                   "_segmentation", "_seg", "_annotation"])
def test_usual_suffixes_are_paired(tmp_path, capsys, added):
    for k in range(3):
        save(tmp_path / f"images/case{k}_1.png", np.roll(RGB, k))
        save(tmp_path / f"masks/case{k}_1{added}.png", LABEL[:24, :30])
    with pytest.raises(SystemExit) as stopped:
        command(data.main, [str(tmp_path), "--index"])
    assert stopped.value.code == 0, capsys.readouterr().err
    names = [roi.mask.name for roi in load_dataset(tmp_path).rois]
    assert names == [f"case{k}_1{added}.png" for k in range(3)]


def test_an_image_keeps_a_name_that_ends_like_a_suffix(tmp_path, capsys):
    for name in ("a_mask", "a"):
        save(tmp_path / f"images/{name}.png", RGB)
        save(tmp_path / f"masks/{name}.png", LABEL[:24, :30])
    with pytest.raises(SystemExit):
        command(data.main, [str(tmp_path), "--index"])
    rois, _, _ = read_slides(tmp_path)
    assert [(roi.image.name, roi.mask.name) for roi in rois] == [("a.png", "a.png"),
                                                                 ("a_mask.png", "a_mask.png")]


def test_the_draft_needs_no_file_where_all_names_are_known(tmp_path, capsys):
    write_export("exact", tmp_path)
    for argv in (["--index"], ["--draft-classes"]):
        with pytest.raises(SystemExit) as stopped:
            command(data.main, [str(tmp_path), *argv])
        assert stopped.value.code == 0
    assert "no classes.json is needed" in capsys.readouterr().out and not (tmp_path / "classes.json").exists()


# ---- the cache -------------------------------------------------------------------------------------------

def prune(root, cache, capsys):
    with pytest.raises(SystemExit) as stopped:
        command(data.main, [str(root), "--prune-cache", "--cache", str(cache)])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_pruning_keeps_the_regions_of_the_dataset_as_it_is_now(tmp_path, capsys):
    one, other, cache = tmp_path / "one", tmp_path / "other", tmp_path / "cache"
    for root in (one, other):
        write_dataset(root, slides=4)
        region_files(load_dataset(root).rois, DEFAULT_CLASSES, cache)
    save(one / "masks/roi0.png", LABEL[:, ::-1])                                    # changed, decoded again
    kept = set(region_files(load_dataset(one).rois, DEFAULT_CLASSES, cache))
    (cache / "new.tile.77.tmp").write_bytes(b"a program may be writing this now")
    (cache / "old.tile.78.tmp").write_bytes(b"a program was killed")
    os.utime(cache / "old.tile.78.tmp", (0, 0))
    size = sum(path.stat().st_size for path in cache.iterdir())
    said = prune(one, cache, capsys)
    assert f"{4 + 1 + 1} files removed" in said, said               # the other's, the changed one, the remains
    left = set(cache.iterdir())
    assert left == kept | {cache / "new.tile.77.tmp"}
    freed = (size - sum(path.stat().st_size for path in left)) / 1e6
    assert float(re.search(r"\((.*) MB\)", said)[1]) == round(freed, 1)
    region_files(load_dataset(other).rois, DEFAULT_CLASSES, cache)                  # decoded again, where needed
    assert len(list(cache.glob("*.tile"))) == 8


def test_threads_keep_the_order_and_stop_at_the_first_error(tmp_path, monkeypatch):
    write_dataset(tmp_path, slides=12)
    dataset = load_dataset(tmp_path)
    assert in_threads(lambda roi: roi.name, dataset.rois) == [roi.name for roi in dataset.rois]
    files = region_files(dataset.rois, dataset.classes, tmp_path / "cache")
    assert [file.name.split("-")[0] for file in files] == [f"roi{k}" for k in range(12)]
    alone = {file.name: file.read_bytes() for file in files}
    monkeypatch.setattr(data_regions.os, "cpu_count", lambda: 1)
    again = region_files(dataset.rois, dataset.classes, tmp_path / "cache2")
    assert {file.name: file.read_bytes() for file in again} == alone
    save(tmp_path / "masks/roi2.png", LABEL[:9])
    with pytest.raises(UserError, match="roi2.png"):
        region_files(load_dataset(tmp_path).rois, load_classes(tmp_path), tmp_path / "cache3")
