"""The rules that keep the code readable, read off the code itself: imports point down, packages stay few."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = {path.stem: path for path in sorted((ROOT / "her2").glob("*.py")) if path.stem != "__init__"}
SCRIPTS = ["train_gan.py", "train_ldm.py", "train_seg.py", "generate.py", "evaluate.py"]
# The mathematics and the networks: each can be copied into another project with at most one sibling. Not
# counted is run_errors: it imports nothing, and an exception of one's own could replace its UserError.
CORE = ["diffusion", "losses", "gan_losses", "metrics", "polygons", "relabel", "stains", "frechet",
        "quantizer", "spade", "autoencoder", "denoiser", "segmenter", "discriminator", "net_perceptual",
        "samplers", "inpainting"]
METHODS = set(CORE) - {"net_perceptual"}
COMMANDS = {"data", "phantom", "study", "predict", "lessons", "benchmark", "audit", "cluster"}
FAMILIES = ("data", "phantom", "draw", "run", "report", "net", "study", "lessons")


def imports(path) -> set:
    """Top-level names of all modules that a file imports; modules of this project as 'her2.NAME'."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"her2.{a.name}" for a in node.names} if node.module == "her2" else {node.module}
    return {name if name.startswith("her2.") else name.split(".")[0] for name in found}


def siblings(name) -> set:
    return {item.split(".")[1] for item in imports(MODULES[name]) if item.startswith("her2.")} & set(MODULES)


def test_imports_have_no_cycle():
    done, path = set(), []

    def visit(name):
        assert name not in path, f"import cycle: {' -> '.join([*path, name])}"
        if name not in done:
            path.append(name)
            for other in siblings(name):
                visit(other)
            done.add(path.pop())

    for name in MODULES:
        visit(name)


def test_a_plain_name_is_a_method_or_a_command_and_what_serves_carries_its_family():
    for name in MODULES:
        family = name.split("_")[0] in FAMILIES
        assert name in METHODS | COMMANDS or family, f"her2/{name}.py: neither method, command nor family"


def test_tests_follow_the_families():
    topics = {*MODULES, *(script[:-3] for script in SCRIPTS), "evaluate"}
    general = {"structure", "parity", "full"}           # of the whole project: no single file is their topic
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        topic = path.stem.removeprefix("test_")
        known = any(topic == t or topic.startswith(t + "_") for t in topics) or topic.split("_")[0] in general
        assert known, f"tests/{path.name}: its name says no module or family"


def test_no_module_imports_a_script_and_only_the_study_stands_on_top():
    for name, path in MODULES.items():
        assert not {script[:-3] for script in SCRIPTS} & imports(path), f"{name} imports a script"
        assert "study" not in siblings(name), f"{name} imports study"


@pytest.mark.parametrize("name", CORE)
def test_core_files_can_be_copied_alone(name):
    assert len(siblings(name) - {"run_errors"}) <= 1, f"{name} needs {siblings(name)}"


@pytest.mark.parametrize("path", [*MODULES.values(), *(ROOT / s for s in SCRIPTS),
                                  *sorted((ROOT / "tests").glob("*.py"))],
                         ids=lambda path: path.name)
def test_only_the_five_packages(path):
    local = ({p.stem for p in (ROOT / "tests").glob("*.py")} | {"her2", "tests"}
             | {script[:-3] for script in SCRIPTS})
    packages = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - local
    assert packages <= {"torch", "numpy", "PIL", "tqdm", "pytest"}


def test_layout_is_the_fixed_one():
    assert sorted(p.name for p in ROOT.glob("*.py")) == sorted(SCRIPTS)
    pins = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert (sorted(re.match(r"[a-z]+", pin)[0] for pin in pins)
            == ["numpy", "pillow", "pytest", "torch", "tqdm"])
    assert "torch==2.13.0" in pins


def test_lines_and_files_stay_short():
    for path in [*MODULES.values(), *(ROOT / s for s in SCRIPTS)]:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert max(map(len, lines)) <= 110, f"{path.name}: a line of {max(map(len, lines))} characters"
        limit = 300 if path.parent.name == "her2" else 400
        assert len(lines) <= limit, f"{path.name}: {len(lines)} lines"


def test_files_are_loaded_without_running_code():
    """Every torch.load says weights_only=True, and nothing that executes data is called anywhere."""
    for path in [*MODULES.values(), *(ROOT / s for s in SCRIPTS)]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "os.system"), (
                    f"{path.name}: {name}")
                if name == "torch.load":
                    assert "weights_only=True" in ast.unparse(node), (
                        f"{path.name}: torch.load without weights_only")
                if name == "np.load":
                    assert "allow_pickle=True" not in ast.unparse(node), f"{path.name}: np.load with pickle"
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{path.name}: bare except in line {node.lineno}"
                body = [item for item in node.body if not isinstance(item, ast.Pass)]
                assert body, f"{path.name}: swallowed error in line {node.lineno}"


def test_pictures_of_the_readme_are_there_small_and_referenced():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\]\((\.github/[^)]+\.png)\)", text))
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / ".github").rglob("*.png")}
    assert named == there
    for name in there:
        assert (ROOT / name).stat().st_size < 300_000, f"{name} is larger than 300 KB"
    assert len(text.splitlines()) < 300
