"""What a user can get wrong ends in one clear line and exit status 2; what a crash leaves behind is whole.

Everything else may use it, and it imports nothing from the rest of the project. So it is not counted where a
method file says to need one sibling at most: only `segmenter` raises its UserError, and another would do.
"""

import errno
import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

# What the machine or a wrong path can cause; every other OSError is a defect of this code.
MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENAMETOOLONG, errno.ENOENT,
           errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)
ROOT = Path(__file__).resolve().parents[1]              # where the five scripts lie


class UserError(Exception):
    """Bad input: one line that names the file, what was found in it and what to do about it."""


class Stopped(KeyboardInterrupt):
    """The signal `number` has ended the run; `step`: the last finished one, when that is saved."""

    def __init__(self, number: int = signal.SIGINT, step=None):
        self.number, self.step = int(number), step


@contextmanager
def handling(handler, *numbers):
    """`handler` for these signals inside the block."""
    with ExitStack() as stack:
        for number in numbers:
            stack.callback(signal.signal, number, signal.signal(number, handler))
        yield


@contextmanager
def asked_to_stop():
    """Gives a list in which Ctrl-C and SIGTERM (schedulers send it before they kill) are noted inside the
    block, for the loop to look at between two steps. A second Ctrl-C interrupts at once (not under torchrun,
    which sends on what the terminal has sent already, and kills after 30 seconds)."""
    asked = []

    def note(number, frame):
        if asked and number == signal.SIGINT and "WORLD_SIZE" not in os.environ:
            raise Stopped(number)
        asked.append(number)

    with handling(note, signal.SIGINT, signal.SIGTERM):
        yield asked


def silence(stream) -> None:
    """Nobody reads `stream` any more (`| head`): what is written to it from now on goes nowhere."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def one_line(text) -> str:
    """`text` with every run of white space folded, so that a message stays a single line."""
    return " ".join(str(text).split())


def shell(words) -> str:
    """A command line to paste into this system's shell, whatever blanks and quotes its paths hold."""
    words = [str(word) for word in words]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def check_line(root) -> str:
    """The command line that checks the dataset in `root`."""
    return script_line("-m", "her2.data", root)


def script_line(script: str, *flags) -> str:
    """The command line that runs one of the five scripts, or "-m" and a module, from here."""
    return shell(["python", script if script == "-m" or Path.cwd() == ROOT else ROOT / script, *flags])


def speaks() -> bool:
    """Whether this process is the one that says what went wrong; run_distributed puts a better one here."""
    return os.environ.get("RANK", "0") == "0"


def say(text) -> None:
    """One line on stderr, once, however many processes share the run."""
    if speaks():
        print(one_line(text), file=sys.stderr, flush=True)


def command(main, argv=None):
    """Run `main(argv)` as a program. Exit status: 0; 2 with one line on stderr for what a user or the machine
    can cause; 130 after Ctrl-C, 143 after SIGTERM. Any other error is a defect and keeps its traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if hasattr(sys.stdout, "reconfigure"):      # a console that knows no umlauts shows them as \xfc
        sys.stdout.reconfigure(errors="backslashreplace")

    def end(number, frame):
        raise Stopped(number)

    try:
        with handling(end, signal.SIGTERM):
            status = main(argv) or 0
        sys.stdout.flush()
        sys.exit(status)
    except UserError as error:
        say(f"error: {error}")
    except KeyboardInterrupt as error:
        spec = sys.modules["__main__"].__spec__     # python -m her2.study: argv[0] would be the module's file
        program = ["-m", spec.name] if spec is not None and spec.name.startswith("her2.") else [sys.argv[0]]
        step = getattr(error, "step", None)
        said = ("interrupted: nothing that was saved is lost" if step is None
                else f"stopped at step {step}, all of it is saved")
        if speaks():            # not by say(): a name in the command may have two blanks, which it would fold
            print(f"{said}, this command goes on: {shell(['python', *program, *argv])}", file=sys.stderr)
        sys.exit(128 + getattr(error, "number", signal.SIGINT))
    except BrokenPipeError:
        silence(sys.stdout)
        sys.exit(0)
    except OSError as error:
        said = str(error).strip()           # from a loader's worker it comes as a text alone
        number = error.errno or int((re.findall(r"\[Errno (\d+)\]", said) or [0])[-1])
        if number not in MACHINE:
            raise
        where = error.filename or (re.findall(r"'([^']+)'$", said) or ["output"])[-1]
        say(f"error: {where}: {os.strerror(number)}; nothing that was complete is lost, mend that or choose "
            "another folder, then run the same command again")
    except (MemoryError, RuntimeError) as error:
        # torch has no classes of its own for memory on the CPU, and for a process that no longer answers.
        if isinstance(error, MemoryError) or re.search("(out of|allocate|enough) memory", str(error)):
            said = str(error).strip().rpartition("\n")[2]       # of a loader's worker: below its traceback
            say(f"error: the memory is not enough ({one_line(said)[:120]}); "
                "use a smaller --batch, --patch or --width")
        elif "WORLD_SIZE" in os.environ and re.search("gloo|NCCL|onnection (closed|reset)", str(error)):
            say("error: another process of this run has ended; nothing that was saved is lost, the same "
                "command goes on")
        else:
            raise
    sys.exit(2)


def atomic_write(path, write) -> None:
    """Create or replace the file `path` so that a crash at any moment leaves the old or the new content.
    `write` is bytes, a str (UTF-8), or a function that is given the open binary file. A temporary file in the
    same folder is flushed to the disk and then renamed over `path`; on any failure it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            if callable(write):     # without a descriptor: Pillow would write past Python, and hide the error
                write(SimpleNamespace(write=file.write, flush=file.flush))
            else:
                file.write(write.encode("utf-8") if isinstance(write, str) else write)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
