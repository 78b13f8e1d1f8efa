"""What a result was made from: the content of files, the commit of this code, the packages' versions."""

import hashlib
import platform
import subprocess
from pathlib import Path

import numpy as np
import PIL
import torch


def file_hash(path) -> str:
    """SHA-256 of a file, or "" where there is none."""
    if not Path(path).is_file():
        return ""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def git_commit() -> str:
    """The commit of this code, '+' when the working tree differs from it; 'unknown' outside a repository."""
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True,
                                check=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True,
                               text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def versions() -> dict:
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "pillow": PIL.__version__}
