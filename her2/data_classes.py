"""The class table: one list of tissue classes for drawing, sampling, one-hot coding, metrics and figures.

A pixel's label is the id of a class, 0 = background. The default table (`DEFAULT_CLASSES`) is the paper's
(section 2.1): the four HER2 scores and the carcinoma in situ, a tumor class that has no score and is not in
the subtype variance. Where the paper samples or relabels "subtypes", we take all five tumor classes.

A dataset may bring `classes.json`, in one of three forms:

    [{"id": 0, "name": "Background", "tumor": false, "variance": false, "color": [255, 255, 255],
      "aliases": ["Stroma"]}, ...]                                      replaces the table
    {"classes": [...as above...], "aliases": {"Normal duct": "Background"}}   the same, aliases apart
    {"aliases": {"Tumor three plus": "3+"}}                             the default table with more names

In the last two, "masks": "score" says that what is not 0 in a mask is tumor, of the subtype in the column
score of slides.csv (a mask with instances beside it always holds ids), "masks": "ids" that a mask of 0 and
255 is background and pixels to be ignored. A mask in color is a picture in the classes' colors; an alias
"#fa3253" gives a further color its class. Case and white space do not count in names. The default aliases
follow a class that keeps its id and name, unless the file says otherwise.

What nobody can tell (folds, blur; the alias of "ignore") has the label IGNORE and no class: it is never the
pixel around which a patch is drawn, has no one-hot code, and enters neither losses nor metrics.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as show   # short, whatever the length or the depth of the value

import numpy as np

from her2.run_errors import UserError, one_line

IGNORE = 255       # the label of pixels that neither train nor count
NO_CLASS = "(none)"  # the name of no class in messages and aliases
MAX_TEXT = 1 << 30  # bytes of a gzipped file
IGNORE_COLOR = (150, 150, 150)
REMEDY = ('write a list of {"id", "name", "tumor", "variance", "color", "aliases"}, or {"aliases": {"your '
          'name": "class name"}}, or remove the file to get the default table')


@dataclass(frozen=True)
class TissueClass:
    id: int                       # the pixel value in labels and masks
    name: str                     # in tables and in results.json
    tumor: bool                   # False: background for the segmentation network
    variance: bool                # its recall enters the subtype variance
    color: tuple[int, int, int]   # RGB, 0..255


def normal_form(name: str) -> str:
    """`name` without white space and case: the form in which names are compared."""
    return "".join(name.split()).casefold()                             # "HER2 1+" = "her2 1+" = "HER21+"


class ClassTable:
    """Classes with ids 0..K-1, found by id or by name. ValueError where the table contradicts itself.

    aliases  further names and their ids        colors      (256, 3) uint8: colors[label] is a picture
    masks    "score", "ids", or "" = not said   len(table)  K, the channels of a one-hot map"""

    def __init__(self, classes, aliases=(), masks: str = ""):
        self.classes, self.masks = list(classes), masks
        self.names, ids = [c.name for c in self.classes], [c.id for c in self.classes]
        self.tumor_ids = [c.id for c in self.classes if c.tumor]
        self.variance_ids = [c.id for c in self.classes if c.variance]
        if ids != list(range(len(ids))) or not 2 <= len(ids) <= IGNORE:
            raise ValueError(f"ids are {ids}; they must be 0, 1, 2, ... in order, 2 to {IGNORE} classes")
        if self.classes[0].tumor:
            raise ValueError(f"class 0 ({self.classes[0].name!r}) is the background and cannot be tumor")
        if not self.tumor_ids:
            raise ValueError('no class is tumor; at least one must have "tumor": true')
        if len(set(c.color for c in self.classes)) < len(ids):
            raise ValueError("two classes have the same color; give each its own")
        if odd := [c.name for c in self.classes if c.variance and not c.tumor]:
            raise ValueError(f'class {odd[0]!r} has "variance": true but is no tumor')
        colors = [c.color for c in self.classes] + [IGNORE_COLOR] * (256 - len(ids))
        self.colors = np.array(colors, np.uint8)
        self.aliases, self._ids = dict(aliases), {}                     # _ids: normal form of a name -> id
        for name, class_id in [*zip(self.names, ids), *aliases]:
            if not normal_form(name) or class_id not in (*ids, IGNORE):
                raise ValueError(f"name {name!r} is empty or means class {class_id}, not 0 to {len(ids) - 1}")
            known = self._ids.setdefault(normal_form(name), class_id)
            if known != class_id:               # case and spaces do not count
                raise ValueError(f"name {name!r} has two meanings: class {known} and class {class_id}")
        # Which names are ignored says how annotations are read, not what an id means to a network.
        self._meaning = self.classes, {name: k for name, k in self._ids.items() if k != IGNORE}

    def __len__(self) -> int:
        return len(self.classes)

    def __eq__(self, other) -> bool:
        return isinstance(other, ClassTable) and self._meaning == other._meaning

    def id_of(self, name: str) -> int:
        """The id of the class of this name or alias, or IGNORE. KeyError when there is none."""
        return self._ids[normal_form(name)]

    def knows(self, name: str) -> bool:
        return normal_form(name) in self._ids                           # a class, an alias, or one to ignore

    def to_json(self) -> list[dict]:
        """What `from_json` and `classes.json` take."""
        return [{"id": c.id, "name": c.name, "tumor": c.tumor, "variance": c.variance, "color": list(c.color),
                 "aliases": [alias for alias, class_id in self.aliases.items() if class_id == c.id]}
                for c in self.classes]

    @staticmethod
    def from_json(obj, path="classes.json") -> "ClassTable":
        """The table in `obj` (see the module's docstring for the forms). `path` names it in the UserError."""
        try:
            return _table_from_json(obj)
        except ValueError as error:
            raise UserError(f"{path}: {one_line(error)}; {REMEDY}") from error


def _table_from_json(obj) -> ClassTable:
    obj = obj if isinstance(obj, dict) else {"classes": obj}            # the three forms become one
    if not obj or obj.keys() - {"classes", "aliases", "masks"}:
        raise ValueError(f'the object is not made of "classes", "aliases" and "masks": {show(obj)}')
    default = [{**row, "aliases": []} for row in DEFAULT_CLASSES.to_json()]  # aliases: below
    rows, more = obj.get("classes", default), obj.get("aliases", {})    # more: aliases beside the classes
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"the classes are {show(rows)}, not a list of objects")
    if obj.get("masks", "ids") not in ("score", "ids"):
        raise ValueError(f'"masks" is {show(obj["masks"])}, not "score" or "ids"')
    if not isinstance(more, dict):
        raise ValueError(f'"aliases" is {show(more)}, not an object of alias: class name')
    classes = [_class_from_json(row) for row in rows]
    by_name = {"ignore": IGNORE, **{normal_form(c.name): c.id for c in classes}}
    aliases = [(alias, row["id"]) for row in rows for alias in row.get("aliases", [])]
    for alias, target in more.items():
        class_id = by_name.get(normal_form(target)) if isinstance(target, str) else target
        if type(class_id) is not int:
            raise ValueError(f"alias {alias!r} means {show(target)}, which is no class name and no id")
        aliases.append((alias.strip() or NO_CLASS, class_id))
    taken = {normal_form(name) for name in [*(c.name for c in classes), *(alias for alias, _ in aliases)]}
    inherited = [(alias, class_id) for alias, class_id in DEFAULT_ALIASES.items()
                 if normal_form(alias) not in taken and (class_id == IGNORE or
                 classes[class_id:] and classes[class_id].name == DEFAULT_CLASSES.names[class_id])]
    return ClassTable(classes, aliases + inherited, obj.get("masks", ""))


def _class_from_json(row) -> TissueClass:
    """One row of classes.json. Every key is asked for: a forgotten "tumor" must not quietly mean False."""
    keys = ("id", "name", "tumor", "variance", "color")
    missing, unknown = [key for key in keys if key not in row], sorted(row.keys() - {*keys, "aliases"})
    if missing or unknown:                                              # forgotten, misspelt
        raise ValueError(f"class {show(row.get('name', row))} lacks {missing}, has unknown keys {unknown}")
    color, aliases = row["color"], row.get("aliases", [])
    if isinstance(color, str) and re.fullmatch("#[0-9a-fA-F]{6}", color):
        color = list(bytes.fromhex(color[1:]))                          # as CVAT writes it
    rgb = isinstance(color, list) and [type(v) is int and 0 <= v <= 255 for v in color] == [True] * 3
    for key, good, wanted in (                                          # to isinstance, True is the number 1
            ("id", type(row["id"]) is int, "a whole number"),
            ("name", isinstance(row["name"], str), "a text"),
            *((key, isinstance(row[key], bool), "true or false") for key in ("tumor", "variance")),
            ("color", rgb, '[red, green, blue] from 0 to 255 or "#rrggbb"'),
            ("aliases", isinstance(aliases, list) and all(isinstance(alias, str) for alias in aliases),
             "a list of names")):
        if not good:
            raise ValueError(f"class {show(row['name'])}: {key} is {show(row[key])}, not {wanted}")
    return TissueClass(*(row[key] for key in keys[:-1]), tuple(color))


# PAPER: the paper names no class ids; these follow its order of the tumor classes, background first.
# Hard Negative, Necrosis and To Verify are what the authors' annotation server calls background.
DEFAULT_ALIASES = {
    "negative": 1, "HER2 0": 1, "HER2 1+": 2, "1": 2, "HER2 2+": 3, "2": 3, "HER2 3+": 4, "3": 4,
    "DCIS": 5, "LCIS": 5, "DCIS/LCIS": 5,                               # ductal and lobular carcinoma in situ
    "Hard Negative": 0, "Necrosis": 0, "To Verify": 0, "Stroma": 0, "Normal": 0,
    "Ignore": IGNORE, "Ignore*": IGNORE,                                # as QuPath names it
}
DEFAULT_CLASSES = ClassTable([      # id, name, tumor, in the variance, color
    TissueClass(0, "Background", False, False, (255, 255, 255)),        # white, as glass is
    TissueClass(1, "0", True, True, (214, 39, 199)),                    # no staining: shape alone tells it
    TissueClass(2, "1+", True, True, (23, 190, 207)),                   # faint, incomplete membranes
    TissueClass(3, "2+", True, True, (44, 160, 44)),                    # weak to moderate, complete
    TissueClass(4, "3+", True, True, (214, 39, 40)),                    # strong and complete
    TissueClass(5, "LCIS/DCIS", True, False, (240, 200, 20)),           # inside ducts: never scored
], DEFAULT_ALIASES.items())


def read_text(path, remedy: str) -> str:
    """A text file in UTF-8, gzipped or not, with or without a byte-order mark. UserError otherwise."""
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path}: is no ordinary file; {remedy}")       # a pipe would wait for a writer
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.open(io.BytesIO(content)).read(MAX_TEXT)     # a bomb stays a text cut off
        return content.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:    # EOF, zlib: damaged gzip
        why = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{path}: cannot be read as UTF-8 text ({why}); {remedy}") from error


def csv_text(rows: list, columns=None) -> str:
    """A CSV table with its header; what a row {column: value} lacks is left empty."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns or list(rows[0]), restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def parse_json(text: str, path, remedy: str):
    """The value of a JSON text. UserError with `remedy` where it is none, too deep, or names a key twice."""
    def unique(pairs):
        obj = dict(pairs)                             # json itself keeps the last of two equal keys, silently
        if len(obj) < len(pairs):
            [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"the key {twice!r} stands twice in one object")
        return obj

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:   # the first also for a number of thousands of digits
        what = "brackets nested too deeply" if isinstance(error, RecursionError) else f"not JSON ({error})"
        raise UserError(f"{path}: {one_line(what) if text.strip() else 'an empty file'}; {remedy}") from error


def load_classes(folder) -> ClassTable:
    """The class table of a dataset folder: its `classes.json`, or the default. UserError on a bad file."""
    path = Path(folder) / "classes.json"
    if not path.exists():
        return DEFAULT_CLASSES
    return ClassTable.from_json(parse_json(read_text(path, REMEDY), path, REMEDY), path)
