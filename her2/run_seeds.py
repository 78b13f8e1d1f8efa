"""Random numbers that depend on what they are for, and on nothing else.

A run must give the same bits whether it was interrupted or not, and whatever the batch size or the number of
processes. So no generator is carried along: each use builds its own from a key that says what the numbers are
for, such as (seed, "patch", step, index). The key is hashed, because neighbouring seeds give correlated
streams in many generators, and hashed keys are never neighbours.

Of a seed torch's CPU generator keeps the lower 32 bits alone (2**40 + 5 draws what 5 draws), numpy's all 63.
So about n^2 / 2^33 pairs among n keys of torch draw the same: 5 among the 200,000 steps of a long run. That
does no harm: the two steps of a pair put the same noise on different patches.
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
