"""Ctrl-C, SIGTERM, a reader that went away, poor consoles, `python -OO`; and runs that are lengthened."""

import ast
import os
import signal
import subprocess
import sys
import time

import pytest

from her2 import run
from run_kill_harness import ROOT, command_line, differences, in_process, progress, start

POSIX = os.name == "posix"                  # Windows knows no signals to send


@pytest.mark.skipif(not POSIX, reason="no signals")
@pytest.mark.parametrize("name, number", [("GAN", signal.SIGINT), ("diffusion", signal.SIGTERM)])
def test_a_stopped_run_saves_its_step_and_ends_with_the_same_bits(root, name, number):
    """The first log line comes after step 3, the first ordinary checkpoint after step 4."""
    out = f"{name}-{number}"
    folder, errors = root / out, root / f"{out}.err"
    process = start(command_line(name, root, out), errors)
    before = 0
    while process.poll() is None and progress(folder) < before + 200:
        time.sleep(0.002)
        before = before or progress(folder)
    process.send_signal(number)
    assert process.wait() == 128 + number
    said = errors.read_text(encoding="utf-8")
    assert "Traceback" not in said and said.count("stopped at step") == 1 and "goes on: python" in said
    step = int(said.split("stopped at step ")[1].split(",")[0])
    assert run.load_file(folder / "last.pt")["step"] == step > 0
    assert in_process(command_line(name, root, out)) == 0
    assert differences(root / name, folder) == []


@pytest.mark.skipif(not POSIX, reason="no signals")
def test_a_signal_to_the_workers_too_ends_no_run_before_it_is_saved(root):
    """A terminal and a scheduler send to every process of the group."""
    out = "workers"
    line = [sys.executable, *command_line("segmentation", root, out), "--workers", "1"]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               start_new_session=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"})
    while process.poll() is None and not (root / out / "last.pt").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    said = process.communicate()[1]
    assert process.returncode == 143 and "Traceback" not in said and said.count("stopped at step") == 1, said
    assert in_process(command_line("segmentation", root, out)) == 0
    assert differences(root / "segmentation", root / out) == []


BROKEN_LOADER = """
from her2.data_patches import loader
from her2.run_errors import command
class Sampler:
    def __getitem__(self, key):
        if key[0] == 3:
            raise ERROR
        return key[0]
if __name__ == "__main__":
    command(lambda argv: [one for one in loader(Sampler(), 0, 100000, [0], workers=1)] and None)
"""


@pytest.mark.parametrize("error, words", [
    ("MemoryError('three')", "memory is not enough"),
    ("FileNotFoundError(2, 'No such file', 'cache/a.tile')", "error: cache/a.tile: No such file")])
def test_a_run_whose_loader_fails_ends_in_one_line(tmp_path, error, words):
    """Its worker still waits for work, and hears no signal."""
    (tmp_path / "script.py").write_text(BROKEN_LOADER.replace("ERROR", error), encoding="utf-8")
    done = python(tmp_path / "script.py", env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_second_ctrl_c_does_not_wait():
    from her2.run_errors import Stopped, asked_to_stop
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background jobs begin without one
    with asked_to_stop() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked == [signal.SIGINT]
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def python(*arguments, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, **options)


def test_a_training_outlives_the_reader_of_its_output(root):
    line = command_line("segmentation", root, "piped")
    process = subprocess.Popen([sys.executable, *line], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read() and process.wait() == 0
    assert (root / "piped" / "model.pt").exists() and "step" in (root / "piped" / "log.txt").read_text()


def test_other_commands_end_in_silence_when_their_reader_goes_away(tmp_path):
    program = ("from her2.run_errors import command\n"
               "command(lambda argv: [print('x' * 1000) for _ in range(1000)] and 0)\n")
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 0


def test_ctrl_c_during_the_imports_is_one_line():
    done = python("-c", "import her2; raise KeyboardInterrupt", capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr.count("\n") == 1 and "interrupted" in done.stderr
    for script in ("train_seg.py", "train_gan.py", "train_ldm.py", "generate.py", "evaluate.py"):
        imports = [node for node in ast.parse((ROOT / script).read_text(encoding="utf-8")).body
                   if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert imports[0].module == "her2", f"{script}: torch would be imported before Ctrl-C is one line"


def test_a_console_that_knows_few_letters():
    program = "from her2.run_errors import command\ncommand(lambda argv: print('Gewebe: größer, 组织'))\n"
    done = python("-c", program, capture_output=True, text=True, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "gr\\xf6\\xdfer" in done.stdout


def test_without_docstrings_and_assertions():
    program = ("import train_ldm, train_seg\nfrom her2.run_errors import command\n"
               "for script in (train_seg, train_ldm):\n    try:\n        command(script.main, ['--help'])\n"
               "    except SystemExit as stop:\n        print('ended', stop.code)\n")
    done = python("-OO", "-c", program, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("ended 0") == 2, done.stderr
    assert done.stdout.count("--device {auto,cpu,cuda}") >= 2


CONSTANT = {"segmentation": ["--schedule", "constant"], "diffusion": ["--schedule", "constant"], "GAN": []}


@pytest.mark.parametrize("name", CONSTANT)
def test_a_finished_run_can_be_lengthened(root, name):
    """As if it had been begun with as many steps: the same weights."""
    short, whole = f"{name}-short", f"{name}-whole"
    longer = [*command_line(name, root, short), *CONSTANT[name], "--steps", "6"]
    assert in_process([*command_line(name, root, short), *CONSTANT[name], "--steps", "4"]) == 0
    assert in_process(longer) == 0
    assert in_process([*command_line(name, root, whole), *CONSTANT[name], "--steps", "6"]) == 0
    assert (root / short / "model.pt").read_bytes() == (root / whole / "model.pt").read_bytes()
    assert run.read_json(root / short / "config.json")["fields"]["steps"] == 6
    assert in_process(longer) == 0          # complete
    assert in_process([*longer[:-1], "5"]) == 2


def test_where_more_steps_would_have_changed_the_first_ones_it_says_so(root, capsys):
    for name, more, why in (("diffusion", [], "cosine"),
                            ("autoencoder", ["--schedule", "constant"], "unused codes")):
        out = f"{name}-fixed"
        assert in_process([*command_line(name, root, out), *more, "--steps", "1"]) == 0
        capsys.readouterr()
        assert in_process([*command_line(name, root, out), *more, "--steps", "2"]) == 2
        told = capsys.readouterr().err
        assert why in told and "--steps 1" in told and told.count("\n") == 1
