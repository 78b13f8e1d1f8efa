"""slides.csv, the split, labels from masks and polygons, the cache of mapped regions, leaks into training."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from data_factory import memory_dataset, rectangles, save, write_csv, write_dataset, write_manifest
from her2 import data_regions, data_mapped
from her2.data_classes import DEFAULT_CLASSES
from her2.data_folder import (empty_splits, inspect_dataset, load_dataset, load_synthetic,
                          read_split, write_split)
from her2.run_errors import UserError
from her2.data_images import read_image
from her2.data_regions import open_roi, read_roi, region_file
from her2.data_patches import SAMPLINGS, MixedSampler, PatchSampler, iterate_rois
from her2.data_slides import SPLITS, assign_splits

REAL = Path(__file__).resolve().parents[2] / "shared" / "real_her2"


# ---------------------------------------------------------------- the split

@pytest.mark.parametrize("counts", [(1, 1, 1), (3,), (1, 2, 2, 1), (10, 10, 10, 10), (7, 1, 1, 13), (1, 30),
                                    (5, 4, 3, 2, 1)])
def test_split_is_stratified_60_20_20_and_never_empty(counts):
    scores = {f"slide{s}-{k}": f"{s}+" for s, count in enumerate(counts) for k in range(count)}
    n = len(scores)
    for seed in range(40):
        split = assign_splits(scores, seed)
        sizes = Counter(split.values())
        assert set(split) == set(scores) and all(sizes[name] >= 1 for name in SPLITS)
        assert sizes["val"] == sizes["test"] == max(1, math.floor(0.2 * n + 0.5))
        for s, count in enumerate(counts):
            held = Counter(split[slide] for slide in scores if scores[slide] == f"{s}+")
            share = count * 2 * sizes["val"] / n
            assert math.floor(share) <= held["val"] + held["test"] <= math.ceil(share), (seed, s, held)
            assert abs(held["val"] - held["test"]) <= 1


def test_split_of_the_paper_has_equal_scores():
    split = assign_splits({f"{k}": f"{k % 4}+" for k in range(40)}, seed=3)
    assert Counter((split[f"{k}"], k % 4) for k in range(40)) == {
        (name, score): size for name, size in (("train", 6), ("val", 2), ("test", 2)) for score in range(4)}


def test_split_is_a_function_of_slides_and_seed_alone():
    scores = {f"s{k}": str(k % 3) for k in range(11)}
    reference = assign_splits(scores, 5)
    assert reference == assign_splits(dict(reversed(scores.items())), 5)
    assert len({tuple(sorted(assign_splits(scores, seed).items())) for seed in range(20)}) > 15
    for size in (0, 1, 2):
        with pytest.raises(AssertionError, match="cannot be split"):
            assign_splits({f"s{k}": "" for k in range(size)}, 0)


def test_every_slide_is_held_out_equally_often():
    scores = {f"s{k}": str(k % 3) for k in range(10)}
    counts, seeds = Counter(), 1000
    for seed in range(seeds):
        counts.update((slide, split) for slide, split in assign_splits(scores, seed).items())
    deviation = math.sqrt(seeds * 0.2 * 0.8)
    for slide in scores:
        for name in ("val", "test"):
            assert abs(counts[slide, name] - 0.2 * seeds) < 5 * deviation, (slide, name, counts[slide, name])


def test_split_column_is_obeyed_and_a_split_can_be_taken_from_another_run(tmp_path):
    rows = write_dataset(tmp_path, slides=8)
    dataset = load_dataset(tmp_path, seed=9)
    assert dataset.slides() == {row["slide"]: row["split"] for row in rows} and not dataset.notes
    assert [roi.name for roi in dataset.split("val")] == ["images/roi2.png", "images/roi6.png"]

    write_dataset(tmp_path, slides=8, split=False)
    first = load_dataset(tmp_path, seed=1)
    assert first.slides() == assign_splits({row["slide"]: row["score"] for row in rows}, 1)
    assert "no split column" in first.notes[0]
    write_split(tmp_path / "split.json", first)
    other = next(seed for seed in range(9) if load_dataset(tmp_path, seed=seed).slides() != first.slides())
    assert (load_dataset(tmp_path, seed=other, split=read_split(tmp_path / "split.json")).slides()
            == first.slides())
    write_dataset(tmp_path, slides=9, split=False)
    with pytest.raises(UserError, match="'s8' is not in the split of the other run"):
        load_dataset(tmp_path, split=read_split(tmp_path / "split.json"))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"slides": 3}', '{"slides": {"a": "training"}}'])
def test_a_broken_split_file_is_one_line(tmp_path, text):
    (tmp_path / "split.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="split.json"):
        read_split(tmp_path / "split.json")


# ---------------------------------------------------------------- slides.csv

def test_csv_with_byte_order_mark_crlf_quotes_and_blank_lines(tmp_path):
    write_dataset(tmp_path, slides=4)
    reference = load_dataset(tmp_path)
    text = (tmp_path / "slides.csv").read_text(encoding="utf-8")
    lines = text.splitlines()
    variants = {
        "byte-order mark": b"\xef\xbb\xbf" + text.encode(),
        "CRLF": "\r\n".join(lines).encode(),
        "quotes": "\n".join(",".join(f'"{cell}"' for cell in line.split(",")) for line in lines).encode(),
        "blank lines and spaces": "\n\n".join(
            line.replace(",", " , ") for line in lines).encode() + b"\n,,,,\n",
        "capitals": "\n".join([lines[0].upper(),
                               *(line.replace("train", "Train") for line in lines[1:])]).encode(),
        "backslashes": text.replace("/", "\\").encode(),
        "empty columns of a spreadsheet": "\n".join(line + ",,," for line in lines).encode(),
        "dot": text.replace("images/", "./images/").encode(),
    }
    for name, content in variants.items():
        (tmp_path / "slides.csv").write_bytes(content)
        assert load_dataset(tmp_path).rois == reference.rois, name


def test_numbers_names_and_notes_of_a_row(tmp_path):
    write_dataset(tmp_path, slides=3)
    write_csv(tmp_path, [{"image": "images/roi0.png", "mask": "masks/roi0.png", "slide": "Jäger, 7",
                          "x": "12.5", "y": "-3", "downsample": "2e0", "score": "1+", "split": "train",
                          "comment": "nice"},
                         {"image": "images/roi1.png", "slide": "b", "split": "val"}])
    dataset = load_dataset(tmp_path, require=("train", "val"))
    first, second = dataset.rois
    assert ((first.slide, first.x, first.y, first.downsample, first.score)
            == ("Jäger, 7", 12.5, -3.0, 2.0, "1+"))
    assert (first.height, first.width) == (40, 60)
    assert (second.x, second.y, second.downsample, second.score, second.mask) == (0.0, 0.0, 1.0, "", None)
    assert any("'comment'" in note for note in dataset.notes)
    assert any("neither annotations nor mask" in note and "roi1" in note for note in dataset.notes)
    label, instance = read_roi(second, dataset.classes)[1:]
    assert not label.any() and not instance.any()
    assert len(empty_splits(dataset)) == 1 and "'test'" in empty_splits(dataset)[0]


def test_all_problems_are_listed_and_a_script_names_the_first(tmp_path):
    rows = write_dataset(tmp_path, slides=6)
    (rows[0]["image"], rows[1]["mask"], rows[2]["split"],
     rows[3]["downsample"]) = "none.png", "../x.png", "tset", "0"
    rows[4]["image"] = rows[5]["image"]
    write_csv(tmp_path, rows)
    dataset, problems = inspect_dataset(tmp_path)
    assert len(problems) == 5 and [roi.name for roi in dataset.rois] == ["images/roi5.png"]
    expected = ("line 2: image 'none.png'", "line 3: mask '../x.png'", "line 4: split is 'tset'",
                "line 5: downsample is '0'", "line 7: image images/roi5.png stands in line 6")
    for problem, words in zip(problems, expected):
        assert words in problem, problem
    with pytest.raises(UserError, match=r"line 2.*4 more problems: python -m her2.data"):
        load_dataset(tmp_path)


def test_links_must_stay_in_the_users_own_files(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home/me")
    data = tmp_path / "project/data"
    write_dataset(data, slides=3)
    outside = save(tmp_path / "secret.png", np.zeros((40, 60, 3), np.uint8))
    (data / "images/roi0.png").unlink()
    (data / "images/roi0.png").symlink_to(outside)
    assert "link that leads out of your own files" in inspect_dataset(data)[1][0]
    for own in (tmp_path / "home/me/a.png", tmp_path / "project/b.png"):
        save(own, np.zeros((40, 60, 3), np.uint8))
        (data / "images/roi0.png").unlink()
        (data / "images/roi0.png").symlink_to(own)
        assert not inspect_dataset(data)[1]
    (data / "images").rename(tmp_path / "home/me/images")
    (data / "images").symlink_to(tmp_path / "home/me/images", target_is_directory=True)
    assert not inspect_dataset(data)[1], "a whole folder may be a link, too"


def test_links_and_the_same_image_twice(tmp_path):
    write_dataset(tmp_path / "data", slides=3)
    (tmp_path / "data/images/roi0.png").unlink()
    (tmp_path / "data/images/roi0.png").symlink_to(tmp_path / "data/images/roi1.png")
    assert "stands in line" in inspect_dataset(tmp_path / "data")[1][0], "the same image under two names"
    (tmp_path / "link").symlink_to(tmp_path / "data", target_is_directory=True)
    write_dataset(tmp_path / "data2", slides=3)
    (tmp_path / "link2").symlink_to(tmp_path / "data2", target_is_directory=True)
    assert not inspect_dataset(tmp_path / "link2")[1], "the dataset folder itself may be a link"


def test_random_damage_to_the_text_files_is_one_line_or_harmless(tmp_path):
    """Property: whatever happens to a byte, a stretch or the end of a file, there is no traceback."""
    write_dataset(tmp_path / "real", slides=8)
    real = load_dataset(tmp_path / "real")
    folder = synthetic_folder(tmp_path, [("images/roi0.png", "s0")])
    write_split(folder / "split.json", real)

    def use_synthetic():
        load_synthetic(folder, real)

    rng, refused = np.random.default_rng(3), Counter()
    for path, use in ((tmp_path / "real/slides.csv", lambda: load_dataset(tmp_path / "real")),
                      (folder / "slides.csv", use_synthetic), (folder / "manifest.jsonl", use_synthetic),
                      (folder / "split.json", use_synthetic)):
        whole = path.read_bytes()
        for _ in range(250):
            content, at = bytearray(whole), int(rng.integers(len(whole)))
            end = at + int(rng.integers(1, 30))
            content[at:end] = ([rng.integers(0, 256)], whole[at:at + 1] * 40, b"", b',"\n', rng.bytes(5),
                               whole[end:2 * end - at])[rng.integers(6)]
            path.write_bytes(content)
            try:
                use()
            except UserError as error:
                refused[path.name] += 1
                assert "\n" not in str(error) and ";" in str(error), error
        path.write_bytes(whole)
        use()
    assert min(refused.values()) > 100, refused


# ---------------------------------------------------------------- pixels

def square(x0, y0, x1, y1, name, key=1):
    points = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    vector = {f"{axis}{k + 1}": value for k, point in enumerate(points) for axis, value in zip("xy", point)}
    return {"id": key, "deleted": False, "vector": vector,
            "annotation_type": {"name": name, "vector_type": 5}}


def test_polygons_land_where_x_y_and_downsample_say(tmp_path):
    """A crop at (1000, 2000), two annotation pixels per image pixel, not square; stroma inside the nest."""
    save(tmp_path / "a.png", np.zeros((30, 50, 3), np.uint8))
    (tmp_path / "a.json").write_text(json.dumps({"results": [
        square(1020, 2010, 1060, 2050, "HER2 2+", 1), square(1030, 2020, 1040, 2030, "Stroma", 2),
        square(1080, 2010, 1100, 2060, "DCIS", 3)]}), encoding="utf-8")
    write_csv(tmp_path, [{"image": "a.png", "annotations": "a.json", "x": 1000, "y": 2000, "downsample": 2,
                          "slide": "s", "split": "train"}])
    dataset = load_dataset(tmp_path, require=("train",))
    _, label, instance = read_roi(dataset.rois[0], dataset.classes)
    expected = np.zeros((30, 50), np.uint8)
    expected[5:25, 10:30], expected[10:15, 15:20], expected[5:30, 40:50] = 3, 0, 5
    assert np.array_equal(label, expected)
    assert np.array_equal(instance, (expected == 3) * 1 + (expected == 5) * 3)
    counts = open_roi(dataset.rois[0], dataset.classes, tmp_path / "cache").row_counts.sum(axis=1)
    assert counts.tolist() == [1500 - 375 - 250, 0, 0, 375, 0, 250]


def test_masks_with_and_without_instances(tmp_path):
    label = np.zeros((20, 30), np.uint8)
    label[2:8, 2:8], label[2:8, 8:14], label[12:18, 2:8], label[12:18, 20:26] = 1, 2, 1, 1
    numbers = label.astype(np.uint16)
    numbers[12:18, 20:26], numbers[12:18, 2:8] = 70, 70      # one instance of two parts, ids with a gap
    dataset = memory_dataset(tmp_path, [(np.zeros((20, 30, 3), np.uint8), label)], DEFAULT_CLASSES)
    roi = dataset.rois[0]
    _, read, instance = read_roi(roi, DEFAULT_CLASSES)
    assert np.array_equal(read, label)
    assert len(np.unique(instance)) == 5, (
        "touching classes are two instances, and so are two places of one class")

    path = save(tmp_path / "instances.png", numbers)
    numbered = type(roi)(**{**vars(roi), "instances": path})
    assert np.array_equal(read_roi(numbered, DEFAULT_CLASSES)[2], numbers)
    for change, words in ((lambda n: n.__setitem__((3, 3), 2), "spans two classes"),
                          (lambda n: n.__setitem__((0, 0), 5), "1 pixels where only one"),
                          (lambda n: n.__setitem__((3, 3), 0), "1 pixels where only one")):
        wrong = numbers.copy()
        change(wrong)
        save(path, wrong)
        with pytest.raises(UserError, match=words):
            read_roi(numbered, DEFAULT_CLASSES)


def random_label(rng, height, width, blobs):
    label = np.zeros((height, width), np.uint8)
    for _ in range(blobs):
        y, x = rng.integers(height), rng.integers(width)
        label[y:y + rng.integers(1, 9), x:x + rng.integers(1, 9)] = rng.integers(0, 6)
    return label


@pytest.mark.parametrize("blobs, dtype", [(6, np.uint8), (900, np.uint16)])
def test_windows_of_a_mapped_region_are_windows_of_the_decoded_one(tmp_path, blobs, dtype):
    rng = np.random.default_rng(blobs)
    size = (37, 53) if blobs < 10 else (150, 210)
    image, label = rng.integers(0, 256, (*size, 3), dtype=np.uint8), random_label(rng, *size, blobs)
    dataset = memory_dataset(tmp_path, [(image, label)], DEFAULT_CLASSES)
    _, _, instance = read_roi(dataset.rois[0], DEFAULT_CLASSES)
    tile = open_roi(dataset.rois[0], DEFAULT_CLASSES, tmp_path / "cache")
    assert tile.instance.dtype == dtype and (tile.height, tile.width) == size
    for _ in range(50):
        h, w = rng.integers(1, size[0] + 1), rng.integers(1, size[1] + 1)
        y, x = rng.integers(size[0] - h + 1), rng.integers(size[1] - w + 1)
        area = slice(y, y + h), slice(x, x + w)
        for found, expected in zip(tile.window(y, x, h, w), (image[area], label[area], instance[area])):
            assert np.array_equal(found, expected)
    for group in ([1], [2, 4], [0], [1, 2, 3, 4, 5]):
        pixels = np.argwhere(np.isin(label, group)).tolist()
        assert tile.row_counts[group].sum() == len(pixels)
        ranks = range(len(pixels)) if len(pixels) < 500 else rng.integers(len(pixels), size=300)
        assert all(list(tile.pixel(group, rank)) == pixels[rank] for rank in ranks)


def test_a_region_is_decoded_once_and_again_when_anything_it_depends_on_changes(tmp_path, monkeypatch):
    write_dataset(tmp_path, slides=1)
    (tmp_path / "a.json").write_text(json.dumps({"results": [square(5, 5, 20, 20, "1+")]}), encoding="utf-8")
    rows = [{"image": "images/roi0.png", "annotations": "a.json", "slide": "s", "split": "train"}]
    decoded = []
    monkeypatch.setattr(data_regions, "read_image", lambda path: decoded.append(path) or read_image(path))

    def use(**change):
        write_csv(tmp_path, [{**rows[0], **change}])
        dataset = load_dataset(tmp_path, require=("train",))
        before = len(decoded)
        path = region_file(dataset.rois[0], dataset.classes, tmp_path / "cache")
        assert path.is_file() and path.parent == tmp_path / "cache"
        return len(decoded) > before

    assert use() and not use(), "decoded twice"
    assert use(x=1) and use(downsample=2) and use(y=3) and not use(x=1)
    (tmp_path / "a.json").write_text(json.dumps({"results": [square(5, 5, 20, 21, "1+")]}), encoding="utf-8")
    assert use()
    (tmp_path / "classes.json").write_text(json.dumps({"aliases": {"odd": "3+"}}), encoding="utf-8")
    assert use()
    assert use(annotations="", mask="masks/roi0.png")
    save(tmp_path / "masks/roi0.png", rectangles(40, 60, (5, 4)))
    assert use(annotations="", mask="masks/roi0.png")
    numbers = rectangles(40, 60, (1, 2))
    labelled = dict(annotations="", mask="masks/roi0.png", instances="numbers.png")
    for factor in (1, 2):                       # the same mask, other instances
        save(tmp_path / "numbers.png", np.where(rectangles(40, 60, (5, 4)), factor * numbers.astype(np.uint16), 0))
        assert use(**labelled) and not use(**labelled)
    save(tmp_path / "masks/roi0.png", (rectangles(40, 60, (5, 4)) > 0).astype(np.uint8))
    (tmp_path / "classes.json").write_text(json.dumps({"masks": "score"}), encoding="utf-8")
    for score in ("1+", "3+"):                  # the score says what the mask shows
        assert use(annotations="", mask="masks/roi0.png", score=score)
    save(tmp_path / "images/roi0.png", np.zeros((40, 60, 3), np.uint8))
    assert use() and not use()


def test_damaged_cache_files_are_made_again(tmp_path, capsys):
    rng = np.random.default_rng(1)
    label = random_label(rng, 30, 40, 8)
    dataset = memory_dataset(tmp_path, [(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8), label)],
                             DEFAULT_CLASSES)
    path = region_file(dataset.rois[0], DEFAULT_CLASSES, tmp_path / "cache")
    whole = path.read_bytes()
    cases = [b"", b"x", whole[:-1], whole + b"\0", b"\0" * len(whole), whole[200:],
             *(whole[:n] for n in range(1, 900, 60))]
    for content in cases:
        data_mapped.open_region.cache_clear()
        path.unlink()
        path.write_bytes(content)
        assert region_file(dataset.rois[0], DEFAULT_CLASSES, tmp_path / "cache") == path
        assert path.read_bytes() == whole
        assert "made again" in capsys.readouterr().err
    header = bytearray(whole)
    for at in range(0, 300):                                  # every byte of the first headers
        header[at] ^= 0x21
        data_mapped.open_region.cache_clear()
        path.write_bytes(header)
        region_file(dataset.rois[0], DEFAULT_CLASSES, tmp_path / "cache")
        assert path.read_bytes() == whole, at
        header[at] ^= 0x21
    data_mapped.open_region.cache_clear()
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [path.name]


def test_a_crash_while_writing_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError):         # when the header is written
        data_mapped.write_region(tmp_path / "a.tile", [[1], [2, 3]], np.zeros((4, 5), np.uint8),
                                 np.zeros((4, 5), np.int32), 6)
    assert not list(tmp_path.iterdir())


def test_patches_need_no_decoder(tmp_path, monkeypatch):
    write_dataset(tmp_path, slides=4)
    dataset = load_dataset(tmp_path)
    sampler = PatchSampler(dataset, "train", 16, cache=tmp_path / "cache")
    monkeypatch.setattr("PIL.Image.open", lambda *args, **options: pytest.fail("an image was decoded"))
    assert sampler.batch(0, 8)["image"].shape == (8, 3, 16, 16)
    assert PatchSampler(dataset, "train", 16, cache=tmp_path / "cache").batch(0, 8)["names"]


# ---------------------------------------------------------------- leaks

def synthetic_folder(tmp_path, sources, count=4):
    """A synthetic folder whose images come from `sources`, [(source image, source slide), ...] in turn."""
    folder = tmp_path / "synth"
    write_dataset(folder, slides=count, split=False, seed=5)
    write_manifest(folder, [(f"images/roi{k}.png", *sources[k % len(sources)]) for k in range(count)])
    return folder


def test_synthetic_images_must_come_from_training_slides(tmp_path):
    write_dataset(tmp_path / "real", slides=8)              # s0, s1, s4, s5 train; s2, s6 val; s3, s7 test
    real = load_dataset(tmp_path / "real")
    good = ("images/roi0.png", "s0")
    folder = synthetic_folder(tmp_path, [good, ("images/roi5.png", "s5")])
    synthetic, entries = load_synthetic(folder, real)
    assert {roi.split for roi in synthetic.rois} == {"train"}
    assert entries.keys() == {roi.name for roi in synthetic.rois}
    for bad, words in ((("images/roi2.png", "s2"), r"slide s2, no training slide of .* \(val\)"),
                       (("images/roi7.png", "s7"), r"\(test\)"),
                       (("images/roi7.png", "s0"), "not in it"), (("images/other.png", "s0"), "not in it")):
        with pytest.raises(UserError, match=words):
            load_synthetic(synthetic_folder(tmp_path, [good, good, bad]), real)

    folder = synthetic_folder(tmp_path, [good])
    lines = (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    for text, words in (("\n".join(lines[:-1]), "nothing about images/roi3.png"), ("", "nothing about"),
                        ("\n".join([*lines[:2], "{", lines[3]]), "line 3"),
                        ("\n".join([*lines[:2], '{"image": "images/roi2.png"}', lines[3]]), "line 3 has no")):
        (folder / "manifest.jsonl").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=words):
            load_synthetic(folder, real)
    (folder / "manifest.jsonl").unlink()
    with pytest.raises(UserError, match="manifest.jsonl"):
        load_synthetic(folder, real)


def test_the_generating_network_must_not_have_seen_held_out_slides(tmp_path):
    """Another split seed at the generator: its images come from common training slides, the net saw more."""
    write_dataset(tmp_path / "real", slides=8)
    real = load_dataset(tmp_path / "real")
    folder = synthetic_folder(tmp_path, [("images/roi0.png", "s0")])
    write_split(folder / "split.json", real)
    load_synthetic(folder, real)
    (folder / "split.json").write_text(json.dumps({"slides": {**real.slides(), "s3": "train"}}),
                                       encoding="utf-8")
    with pytest.raises(UserError, match="trained on slide s3, a test slide"):
        load_synthetic(folder, real)


def test_a_synthetic_folder_with_held_out_images_is_refused(tmp_path):
    write_dataset(tmp_path / "real", slides=8)
    folder = synthetic_folder(tmp_path, [("images/roi0.png", "s0")])
    write_dataset(folder, slides=4)                             # with a split column that has val and test
    with pytest.raises(UserError, match="synthetic images are for training only"):
        load_synthetic(folder, load_dataset(tmp_path / "real"))


def test_no_pixel_of_a_held_out_slide_reaches_training(tmp_path):
    """Taint: val and test images are 255, training images below 200; labels of tainted slides are class 5."""
    rng, rows = np.random.default_rng(0), write_dataset(tmp_path, slides=8)
    for row in rows:
        tainted = row["split"] != "train"
        pixels = np.full((40, 60, 3), 255) if tainted else rng.integers(0, 200, (40, 60, 3))
        save(tmp_path / row["image"], pixels.astype(np.uint8))
        save(tmp_path / row["mask"], rectangles(40, 60, (5,) if tainted else (1, 2, 3, 4)))
    dataset = load_dataset(tmp_path)
    folder = synthetic_folder(tmp_path, [("images/roi0.png", "s0")], count=40)
    for roi in load_synthetic(folder, dataset)[0].rois:
        save(roi.image, rng.integers(0, 200, (40, 60, 3)).astype(np.uint8))
        save(roi.mask, rectangles(40, 60, (1, 2, 3, 4)))
    for sampling in SAMPLINGS:
        real = PatchSampler(dataset, "train", 24, sampling, cache=tmp_path / "cache")
        mixed = MixedSampler(real, load_synthetic(folder, dataset)[0], 1.0, cache=tmp_path / "cache")
        for sampler in (real, mixed):
            for step in range(20):
                batch = sampler.batch(step, 16)
                assert batch["image"].max() < 200 / 127.5 - 1 and (batch["label"] != 5).all()
    held_out = PatchSampler(dataset, "val", 24, cache=tmp_path / "cache").batch(0, 8)
    assert (held_out["image"] == 1).all() and (held_out["label"] == 5).any(), (
        "the taint shows where it should")


# ---------------------------------------------------------------- real tissue

def test_real_tissue_when_it_is_there(tmp_path):
    """Two annotation formats, JPEG, a hole: every patch and region agrees with a direct decode."""
    if not REAL.is_dir():
        pytest.skip("no shared/real_her2 beside the checkout")
    dataset = load_dataset(REAL)
    assert len(dataset.slides()) == 6 and len(dataset.rois) == 8 and all(map(dataset.split, SPLITS))
    sampler = PatchSampler(dataset, "train", 64, "subtype", seed=1, flips=False, cache=tmp_path)
    decoded = {roi.name: read_roi(roi, dataset.classes) for roi in sampler.rois}
    batch = sampler.batch(0, 8)
    for k, name in enumerate(batch["names"]):
        name, x, y = (part.split("=")[-1] for part in name.split())
        area = slice(int(y), int(y) + 64), slice(int(x), int(x) + 64)
        image, label, instance = decoded[name]
        assert np.allclose((batch["image"][k].permute(1, 2, 0).numpy() + 1) * 127.5, image[area], atol=1e-3)
        assert (np.array_equal(batch["label"][k], label[area])
                and np.array_equal(batch["instance"][k], instance[area]))
    for roi, image, label, instance in iterate_rois(dataset, "test", cache=tmp_path):
        assert image.shape == (1, 3, 720, 1280) and label.shape == instance.shape == (1, 720, 1280)
        assert torch.equal(label > 0, instance > 0)
