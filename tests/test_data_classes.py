"""The class table: the default, aliases, classes.json in its three forms, and what a broken one says."""

import json

import numpy as np
import pytest

from her2.data_classes import (DEFAULT_CLASSES, IGNORE, ClassTable, TissueClass, load_classes, parse_json,
                               read_text)
from her2.run_errors import UserError

ROW = {"id": 0, "name": "Glass", "tumor": False, "variance": False, "color": [255, 255, 255]}
ROWS = [ROW, {"id": 1, "name": "Nest", "tumor": True, "variance": True, "color": "#FF0080"}]


def test_the_default_is_the_papers():
    table = DEFAULT_CLASSES
    assert table.names == ["Background", "0", "1+", "2+", "3+", "LCIS/DCIS"] and len(table) == 6
    assert table.tumor_ids == [1, 2, 3, 4, 5] and table.variance_ids == [1, 2, 3, 4]
    assert [c.id for c in table.classes] == list(range(6))
    assert table.colors.shape == (256, 3) and table.colors.dtype == np.uint8
    assert [tuple(color) for color in table.colors[:6].tolist()] == [c.color for c in table.classes]
    assert table.colors.shape == (256, 3)


@pytest.mark.parametrize("class_id, names", [
    (0, ["Background", "background", "Hard Negative", "hardnegative", "NECROSIS", "To Verify"]),
    (0, ["Stroma", "Normal"]),
    (1, ["0", "HER2 0", "her20", "negative", " Her2\t0 "]),
    (2, ["1+", "1", "HER2 1+", "HER2  1 +"]), (3, ["2+", "2", "her2 2+"]), (4, ["3+", "3", "HER23+"]),
    (5, ["DCIS", "lcis", "LCIS/DCIS", "dcis / lcis"]),
])
def test_names_and_aliases_ignore_case_and_spaces(class_id, names):
    assert [DEFAULT_CLASSES.id_of(name) for name in names] == [class_id] * len(names)


@pytest.mark.parametrize("name", ["", "4+", "0+", "Tumor", "HER2", "-1"])
def test_an_unknown_name_is_a_key_error(name):
    with pytest.raises(KeyError):
        DEFAULT_CLASSES.id_of(name)


def test_json_round_trip_and_equality():
    table = ClassTable.from_json(json.loads(json.dumps(DEFAULT_CLASSES.to_json())))
    assert table == DEFAULT_CLASSES and table.classes == DEFAULT_CLASSES.classes
    assert set(DEFAULT_CLASSES.to_json()[0]) == {"id", "name", "tumor", "variance", "color", "aliases"}
    other = ClassTable.from_json({"aliases": {"scar": "Background"}})
    assert other != DEFAULT_CLASSES


def test_the_three_forms_of_the_file(tmp_path):
    def load(obj):
        (tmp_path / "classes.json").write_text(json.dumps(obj), encoding="utf-8")
        return load_classes(tmp_path)

    assert load_classes(tmp_path / "no such folder") is DEFAULT_CLASSES

    table = load([dict(ROW, aliases=["Background"]), ROWS[1]])
    assert table.names == ["Glass", "Nest"] and table.classes[1].color == (255, 0, 128)
    assert table.id_of("background") == 0 and table.tumor_ids == table.variance_ids == [1]
    for old in ("2+", "3+", "DCIS", "Stroma", "negative"):   # aliases of classes that are no more
        with pytest.raises(KeyError):
            table.id_of(old)

    table = load({"classes": ROWS, "aliases": {"invasive": "nest", "air": 0}})
    assert table.id_of("Invasive") == 1 and table.id_of("air") == 0

    table = load({"aliases": {"Tumor three plus": "3+", "Stroma": "0"}})
    assert table.id_of("TUMOR THREE PLUS") == 4 and table.id_of("HER2 2+") == 3
    assert table.id_of("stroma") == 1, "the file's meaning of an alias wins over the default"
    assert table.id_of("Ignore") == table.id_of("Ignore*") == IGNORE


def test_aliases_follow_a_class_that_keeps_id_and_name():
    rows = [dict(row, color=[9 * k, 0, 0]) for k, row in enumerate(DEFAULT_CLASSES.to_json())]
    for row in rows:
        del row["aliases"]
    assert ClassTable.from_json(rows).id_of("HER2 3+") == 4
    swapped = [dict(row) for row in rows]
    swapped[3]["name"], swapped[4]["name"] = "3+", "2+"
    table = ClassTable.from_json(swapped)
    assert table.id_of("3+") == 3
    with pytest.raises(KeyError):   # "3" means the class of id 4 and name 3+, which this table does not have
        table.id_of("3")


def row(**changes):
    return [ROW, dict(ROWS[1], **changes)]


@pytest.mark.parametrize("obj, what", [
    ([], "ids are []"), ([ROW], "2 to 255"), (5, "not a list"), ("text", "not a list"), (None, "not a list"),
    ({}, "not made of"), ({"classes": ROWS, "ignored": []}, "not made of"),
    ({"masks": "binary"}, "masks"), ({"classes": 3}, "not a list"), ([1, 2], "not a list of objects"),
    ({"aliases": ["a"]}, "not an object"), ({"aliases": {"a": "nothing"}}, "no class name"),
    ({"aliases": {"a": 17}}, "class 17"), ({"aliases": {"a": True}}, "no class name"),
    ({"aliases": {"2+": "3+"}}, "two meanings"), ({"aliases": {"A b": 1, "ab": 2}}, "two meanings"),
    (row(id=2), "ids are [0, 2]"), (row(id="1"), "whole number"), (row(id=True), "whole number"),
    (row(id=1.0), "whole number"), (row(name=""), "empty"), (row(name=" glass "), "two meanings"),
    (row(name=None), "not a text"), (row(tumor=False), "variance"), (row(tumor=1), "true or false"),
    (row(tumor=False, variance=False), "no class is tumor"), (row(variance="yes"), "true or false"),
    (row(color=[1, 2]), "color"), (row(color=[1, 2, 256]), "color"), (row(color=[1, 2, 0.5]), "color"),
    (row(color="red"), "color"), (row(color="#12345g"), "color"), (row(color=[255, 255, 255]), "same color"),
    (row(aliases="x"), "not a list"), (row(aliases=[3]), "not a list"),
    (row(aliases=["Glass"]), "two meanings"), ({"classes": None}, "not a list"),
    (row(color=[1.0, 2, 3]), "color"), (row(color=[True, 2, 3]), "color"),
    (row(colour=[1, 2, 3]), "colour"), ([dict(ROW, tumor=True), ROWS[1]], "cannot be tumor"),
    ([{"id": 0, "name": "Glass"}, ROWS[1]], "lacks"), ([ROWS[1], ROW], "ids are [1, 0]"),
])
def test_a_broken_table_names_file_and_remedy(obj, what, tmp_path):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps(obj), encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_classes(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and what in message and "; write a list of" in message
    assert "\n" not in message and len(message) < 500


@pytest.mark.parametrize("content, what", [
    (b"", "empty"), (b" \r\n", "empty"), (b"[{", "not JSON"), (b'[{"id": 0, "id": 1}]', "twice"),
    (b"\xff\xfe[\x00]\x00", "'utf-8' codec"), (b"[" * 100_000, "deep"), (b"9" * 5000, "not JSON"),
])
def test_a_file_that_is_no_json(content, what, tmp_path):
    (tmp_path / "classes.json").write_bytes(content)
    with pytest.raises(UserError, match=what):
        load_classes(tmp_path)


def test_byte_order_mark_and_crlf_are_accepted(tmp_path):
    text = json.dumps(ROWS, indent=1).replace("\n", "\r\n")
    (tmp_path / "classes.json").write_bytes(b"\xef\xbb\xbf" + text.encode("utf-8"))
    assert load_classes(tmp_path).names == ["Glass", "Nest"]


def test_a_folder_in_the_place_of_the_file(tmp_path):
    (tmp_path / "classes.json").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        load_classes(tmp_path)
    with pytest.raises(UserError, match="gone.txt: cannot be read .*; look again"):
        read_text(tmp_path / "gone.txt", "look again")
    assert parse_json('{"a": [1.5, null]}', "f", "") == {"a": [1.5, None]}


def test_the_constructor_guards_itself():
    with pytest.raises(ValueError, match="ids"):
        ClassTable([TissueClass(1, "a", False, False, (0, 0, 0)), TissueClass(2, "b", True, True, (1, 1, 1))])
