"""What a user can get wrong ends in one clear line and exit status 2; what a crash leaves behind is whole.

Three ideas used by everything else, with no import from the rest of the project:

    UserError     an input problem: the message says which file, what was found, what to do
    command       turns a `main(argv)` into an entry point that keeps that promise
    atomic_write  a file is either the old one or the new one, never half of it
"""

import errno
import os
import sys
from pathlib import Path


class UserError(Exception):
    """Bad input: one line that names the file, what was found in it and what to do about it."""


def one_line(text) -> str:
    """`text` with every run of white space folded, so that a message stays a single line."""
    return " ".join(str(text).split())


def command(main, argv=None):
    """Run `main(argv)` as a program: exit status 0, or 2 with one line on stderr, or 130 after Ctrl-C.

    Only what a user or the machine can cause is caught (UserError, a full disk, no permission, Ctrl-C).
    Everything else is a defect of this code and keeps its traceback.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        status = main(argv) or 0
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        again = " ".join([Path(sys.argv[0]).name, *argv])
        print(f"interrupted: the same command goes on from the last checkpoint: python {again}", file=sys.stderr)
        status = 130
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "no permission to write"
        print(f"error: {error.filename or 'output'}: {what} ({error.strerror}); nothing that was complete is lost, "
              "make room or choose another --out, then run the same command again", file=sys.stderr)
        status = 2
    sys.exit(status)


def atomic_write(path, write) -> None:
    """Create or replace the file `path` so that a crash at any moment leaves the old or the new content.

    `write` is bytes, a str (UTF-8), or a function that is given the open binary file. The temporary
    file lies in the same folder, is flushed to the disk and then renamed over `path` (os.replace is
    atomic on every platform); on any failure it is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            if callable(write):
                write(file)
            else:
                file.write(write.encode("utf-8") if isinstance(write, str) else write)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
