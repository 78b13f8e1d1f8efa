"""One slide under two names: equal images and names that differ in spelling alone.

In two splits they are a problem, for `python -m her2.data` and for every training; in one split a note.
"""

import os
import shutil

import numpy as np
import pytest
from data_factory import save, write_csv, write_dataset
from PIL import Image

import train_gan
from her2 import data
from her2.data_folder import load_dataset
from her2.data_folder import plain_name
from her2.run_errors import UserError, command

# write_dataset: slides s0, s1, s4, s5 are for training, s2, s6 val, s3, s7 test.


def run(capsys, main, *argv):
    with pytest.raises(SystemExit) as stopped:
        command(main, [str(value) for value in argv])
    out, err = capsys.readouterr()
    return stopped.value.code, out, err


def check(capsys, root):
    return run(capsys, data.main, root, "--out", root / "p.png")


def refused(capsys, root, *words):
    """Both the check and a training name the problem in one line and write nothing."""
    out = root / "run"
    for status, _, err in (check(capsys, root), run(capsys, train_gan.main, "--data", root, "--patch", "32",
                                                    "--cache", root / "cache", "--out", out)):
        assert status == 2 and err.count("\n") == 1 and "slides.csv" in err and "; " in err, err
        assert all(word in err for word in words), (words, err)
    assert not out.exists() and not (root / "cache").exists()


def noted(capsys, root, *words):
    status, out, err = check(capsys, root)
    assert status == 0, err
    [line] = [line for line in out.splitlines() if line.startswith("note: ") and words[0] in line]
    assert all(word in line for word in words), line
    load_dataset(root)                                  # and training takes it


# ---- equal images ------------------------------------------------------------------------------------------

def copy(source, target):
    target.unlink()
    shutil.copy(source, target)


def hard_link(source, target):
    target.unlink()
    os.link(source, target)


@pytest.mark.parametrize("double", [copy, hard_link])
def test_the_same_file_in_two_splits(tmp_path, capsys, double):
    write_dataset(tmp_path, slides=8)
    double(tmp_path / "images/roi0.png", tmp_path / "images/roi3.png")
    refused(capsys, tmp_path, "'s0' (images/roi0.png)", "'s3' (images/roi3.png)", "train and test")


def test_the_same_file_in_one_split_is_a_note(tmp_path, capsys):
    write_dataset(tmp_path, slides=8)
    copy(tmp_path / "images/roi0.png", tmp_path / "images/roi4.png")
    noted(capsys, tmp_path, "same image", "'s0'", "'s4'")


def test_the_same_pixels_in_another_format_are_found_by_the_check(tmp_path, capsys):
    rows = write_dataset(tmp_path, slides=8)
    Image.open(tmp_path / "images/roi0.png").save(tmp_path / "images/roi3.tif")
    rows[3]["image"] = "images/roi3.tif"
    write_csv(tmp_path, rows)
    status, _, err = check(capsys, tmp_path)
    assert status == 2 and "'s0' (images/roi0.png)" in err and "roi3.tif" in err and err.count("\n") == 1


def test_equal_images_of_one_slide_are_its_own_business(tmp_path, capsys):
    rows = write_dataset(tmp_path, slides=8)
    rows[4].update(slide="s0", score="0")
    write_csv(tmp_path, rows)
    copy(tmp_path / "images/roi0.png", tmp_path / "images/roi4.png")
    status, out, _ = check(capsys, tmp_path)
    assert status == 0 and "same image" not in out


def test_blank_glass_is_alike_everywhere(tmp_path, capsys):
    write_dataset(tmp_path, slides=8)
    for k in (0, 3):
        save(tmp_path / f"images/roi{k}.png", np.full((40, 60, 3), 255, np.uint8))
    status, out, err = check(capsys, tmp_path)
    assert status == 0 and "same image" not in out, err
    load_dataset(tmp_path)


def test_files_of_one_size_and_end_are_told_apart(tmp_path):
    """Uncompressed TIFF: all have one size, and these differ in one pixel at the start."""
    rows = write_dataset(tmp_path, slides=8)
    pixels = np.array(Image.open(tmp_path / "images/roi0.png"))
    for k in (0, 3):
        pixels[0, 0] = k
        Image.fromarray(pixels).save(tmp_path / f"images/roi{k}.tif")
        rows[k]["image"] = f"images/roi{k}.tif"
    write_csv(tmp_path, rows)
    load_dataset(tmp_path)
    shutil.copy(tmp_path / "images/roi0.tif", tmp_path / "images/roi3.tif")
    with pytest.raises(UserError, match="same image"):
        load_dataset(tmp_path)


def test_the_remedy_for_equal_images_works(tmp_path, capsys):
    rows = write_dataset(tmp_path, slides=8)
    copy(tmp_path / "images/roi0.png", tmp_path / "images/roi3.png")
    refused(capsys, tmp_path, "remove the line of one of the images")
    write_csv(tmp_path, rows[:3] + rows[4:])
    assert check(capsys, tmp_path)[0] == 0


# ---- names -------------------------------------------------------------------------------------------------

ALIKE = [("007", "7"), ("CaseA", "casea"), ("Case 1", "Case1"), ("B\u00e4r", "Ba\u0308r"), ("S01-3", "s1-03"),
         ("A  12", "a 12"), ("STRASSE", "stra\u00dfe"), ("\uff11\uff12", "12")]


@pytest.mark.parametrize("one, other", ALIKE)
def test_names_that_differ_in_spelling_alone(tmp_path, capsys, one, other):
    rows = write_dataset(tmp_path, slides=8)
    rows[0]["slide"], rows[3]["slide"] = one, other
    write_csv(tmp_path, rows)
    refused(capsys, tmp_path, *(" ".join(repr(name).split()) for name in (one, other)), "spelling alone")
    rows[3]["slide"], rows[4]["slide"] = "s3", other                   # both for training
    write_csv(tmp_path, rows)
    noted(capsys, tmp_path, "spelling alone", repr(one), repr(other))


@pytest.mark.parametrize("one, other", [("1 1", "11"), ("10", "1"), ("100", "10"), ("A1", "A2"), ("0", "00x"),
                                        ("1-1", "11"), ("a.b", "ab"), ("s0", "s00a")])
def test_names_of_two_slides_stay_two(one, other):
    assert plain_name(one) != plain_name(other)


def test_the_remedy_for_names_works(tmp_path, capsys):
    rows = write_dataset(tmp_path, slides=8)
    rows[0]["slide"], rows[3].update(slide="S00", score="0")
    write_csv(tmp_path, rows)
    refused(capsys, tmp_path, "write the same slide (and split)")
    write_csv(tmp_path, rows[:3] + [{**rows[3], "slide": "s0", "split": "train"}] + rows[4:])
    assert check(capsys, tmp_path)[0] == 0


def test_without_a_split_column_the_drawn_split_decides(tmp_path):
    """Twelve slides and a double: refused for the seeds that put the two apart, accepted for the others."""
    rows = write_dataset(tmp_path, slides=12, split=False)
    rows[1]["slide"] = "S0"
    write_csv(tmp_path, rows)
    outcome = set()
    for seed in range(12):
        try:
            slides = load_dataset(tmp_path, seed).slides()
            outcome.add("together")
            assert slides["s0"] == slides["S0"]
        except UserError as error:
            assert "spelling alone" in str(error)
            outcome.add("apart")
    assert outcome == {"together", "apart"}
