"""One process at a time in a run folder.

Two processes that train into the same folder would mix their logs and checkpoints: a second start by
mistake, or a stage that lives on after the study that started it was killed. The first one holds a lock
of the operating system on config.json, which ends with the process however it ends, so that no stale lock
can ever be in the way.
"""

import errno
import sys
from pathlib import Path

from her2.run_errors import UserError

try:
    import fcntl
except ImportError:                         # Windows
    fcntl = None
    import msvcrt

FAR = 1 << 30       # Windows locks bytes against reading too, so a byte is taken that no file has
_held = {}          # {path: open file}; open until the process ends


def hold(folder) -> None:
    """Take the lock of a run folder that holds config.json. UserError while another process has it."""
    path = (Path(folder) / "config.json").resolve()
    if path in _held:
        return
    file = open(path, "r+b")
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            file.seek(FAR)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        file.close()
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            raise UserError(f"{folder}: another process is working in this folder; "
                            "wait until it is done, or stop it and run the same command again") from None
        print(f"note: {folder}: this file system knows no locks ({error.strerror}); "
              "do not start a second process in this folder", file=sys.stderr)
        return
    _held[path] = file
