"""What the README says came out is what the files of the seeds say."""

import json
import re
from collections import namedtuple
from pathlib import Path

import pytest

from her2 import report_study

ROOT = Path(__file__).resolve().parents[1]
STUDY = ROOT / ".github" / "study"
# The section of the README, and the folder whose seeds it tells.
PUBLISHED = {"What came out": STUDY, "The second study": STUDY / "second"}
Published = namedtuple("Published", "results page section folder")


@pytest.fixture(scope="module", params=PUBLISHED)
def report(request, tmp_path_factory):
    """Results and report.md made again from the files of the seeds; section of the README; their folder."""
    out, folder = tmp_path_factory.mktemp("report"), PUBLISHED[request.param]
    results = report_study.write_report(sorted(folder.glob("seed*.json")), out)
    text = (ROOT / "README.md").read_text(encoding="utf-8").split(f"## {request.param}")[1].split("\n## ")[0]
    return Published(results, (out / "report.md").read_text("utf-8"), text, folder)


def tables(text) -> list:
    """[[{header: cell}, ...], ...] of the tables in markdown."""
    found, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            found.append([dict(zip(rows[0], row)) for row in rows[2:]])
            rows = []
    return found


def same(one, other) -> bool:
    """Equal but for the last digits, in which machines differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) or isinstance(other, float):
        return one == pytest.approx(other, rel=1e-9, abs=1e-12)
    return one == other


def test_the_published_results_follow_from_the_seeds(report):
    published = json.loads((report.folder / "results.json").read_text(encoding="utf-8"))
    assert same(published, json.loads(json.dumps(report.results)))
    changed = json.loads(json.dumps(report.results))
    changed["verdicts"][0]["mean"] += 1e-4
    assert not same(published, changed)


def test_every_verdict_stands_in_the_readme_word_by_word(report):
    for claim in report.results["verdicts"]:
        assert claim["sentence"] in report.section


def test_every_cell_is_the_one_of_the_report(report):
    """The tables of the README are rows and columns of those in report.md, named by their first cell."""
    known = {}
    for table in tables(report.page):
        for row in table:
            first = next(iter(row))
            known.setdefault((first, row[first]), {}).update(row)
    shown = tables(report.section)
    assert shown and all(shown)
    for row in (row for table in shown for row in table):
        first = next(iter(row))
        assert row.items() <= known[first, row[first]].items(), row


def test_no_number_comes_from_elsewhere(report):
    """Every number with a decimal point in the prose stands in the report too, or in a command beside it."""
    prose, known = re.sub(r"```.*?```", "", report.section, flags=re.S), set(re.findall(r"\d*\.\d+", report.page))
    for number in re.findall(r"\d*\.\d+", prose):
        assert number in known, number


def test_the_seed_with_all_arms_is_reported_as_its_files_say(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## All 20 arms")[1].split("\n## ")[0]
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| tiles")]
    for folder, row in zip((STUDY / "all-arms", STUDY / "all-arms" / "tiles-64"), rows, strict=True):
        report_study.write_report([folder / "seed77.json"], tmp_path)
        assert (tmp_path / "report.md").read_text("utf-8") == (folder / "report.md").read_text("utf-8")
        found = {one["arm"]: one for one in tables((folder / "report.md").read_text("utf-8"))[0]}
        names = ["subtype", "tumor", *(f"{method}-{ratio}" for method in ("gan", "ldm", "inpaint") for ratio in (50, 100, 200, 400)),
                 *(f"{control}-100" for control in ("oracle", "fresh", "restain", "reconstruct")), "ldm-100-same", "subtype-2x"]
        assert " ".join(row[2:]).split() == [found[name]["dice at 0.5"] for name in names]
        if folder.name == "all-arms":
            assert found["fresh-100"]["dice val-best threshold"] == "0.806" and found["fresh-100"]["recall 0"] == "0.197"


def test_what_is_said_beyond_the_paper_stands_in_the_exploratory_reports(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("Beyond the paper")[1].split("\n## ")[0]
    known = set()
    for folder in (STUDY / "exploratory", STUDY / "exploratory" / "tiles-64"):
        report_study.write_report(sorted(folder.glob("seed*.json")), tmp_path)
        page = (tmp_path / "report.md").read_text("utf-8")
        assert page == (folder / "report.md").read_text("utf-8")
        known |= set(map(float, re.findall(r"\d*\.\d+", page)))
    for question in ("| Can clusters", "| Synthetic images alone"):
        row = next(line for line in text.splitlines() if line.startswith(question))
        said = row.split("|")[3].split("adjusted Rand")[0]              # which her2.cluster prints
        numbers = set(map(float, re.findall(r"\d*\.\d+", re.sub(r"\(\[.*?\)", "", said))))
        assert len(numbers) > 2 and numbers <= known, numbers - known


def test_the_published_page_is_that_of_the_seeds(report):
    """Word by word, and the numbers but for a rounding at their last digit."""
    published, made = (re.split(r"(\d+\.\d+)", text) for text in (
        (report.folder / "report.md").read_text(encoding="utf-8"), report.page))
    assert published[::2] == made[::2]
    for one, other in zip(published[1::2], made[1::2]):
        assert abs(float(one) - float(other)) < 1.5 * 10.0 ** -len(one.split(".")[1])


def test_every_figure_is_small_and_shown_or_linked():
    for path in STUDY.rglob("*.png"):
        assert path.stat().st_size < 300_000, path.name
