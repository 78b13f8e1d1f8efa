"""Random numbers that depend on what they are for, and on nothing else.

A run must give the same bits whether it was interrupted or not, and whatever the batch size or the
number of processes. So no generator is carried along: each use builds its own from a key that says what
the numbers are for, such as (seed, "patch", step, index). The key is hashed, because neighbouring seeds
give correlated streams in many generators, and hashed keys are never neighbours.
"""

import hashlib

import numpy as np
import torch


def hashed_seed(*key) -> int:
    """A 63-bit integer from a key of integers and strings: SHA-256 of its text, truncated."""
    for part in key:
        assert isinstance(part, (int, str)), f"a key holds integers and strings, found {part!r}"
    digest = hashlib.sha256(repr(key).encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*key) -> torch.Generator:
    """A torch generator on the CPU for `key`. CPU on purpose: the same numbers on every device."""
    return torch.Generator().manual_seed(hashed_seed(*key))


def numpy_generator(*key) -> np.random.Generator:
    """A numpy generator (PCG64) for `key`."""
    return np.random.default_rng(hashed_seed(*key))
