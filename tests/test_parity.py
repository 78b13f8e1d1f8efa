"""Every component agrees with its reference implementation, number for number.

Runs over tests/golden/ (a compact selection that travels with the project) and over the complete set if there
is one: the folder named by $HER2_GOLDEN_DIR, or ../shared/golden. meta['runner'] says what a file records;
tests/parity_*.py hold the functions that compute the same with our code, in RUNNERS:

    name -> function(meta, sd, inp, out, out64, tolerance) -> {output name: our value}

and every recorded output must be among them: none is passed over.

Limits: 1e-4 relative for networks and training steps (the runners in NETWORKS of the parity files), 1e-5 for
pure mathematics, and more only where the reference's own rounding demands it (golden_reader.mismatch).
"""

import importlib

import pytest
from golden_reader import HERE, folders, load, mismatch, tolerances

RUNNERS, NETWORKS = {}, set()
for file in sorted(HERE.glob("parity_*.py")):
    part = importlib.import_module(file.stem)
    assert not RUNNERS.keys() & part.RUNNERS.keys(), f"{file.name}: defined twice: {part.RUNNERS.keys()}"
    RUNNERS.update(part.RUNNERS)
    NETWORKS |= set(part.NETWORKS)

FILES = [path for folder in folders() for path in sorted(folder.glob("*.npz"))]


@pytest.mark.parametrize("path", FILES, ids=[f"{path.parent.parent.name}/{path.stem}" for path in FILES])
def test_agrees_with_the_reference(path):
    meta, sd, inp, out, out64 = load(path)
    runner = meta["runner"]
    if runner == "module":
        runner = f"module:{meta['config']['build']}"
    assert runner in RUNNERS, f"{path}: no runner '{runner}'; there are {sorted(RUNNERS)}"
    assert out, f"{path}: records no output"
    rounding = tolerances(path)
    limit = 1e-4 if runner in NETWORKS else 1e-5
    ours = RUNNERS[runner](meta, sd, inp, out, out64, rounding)

    missing = sorted(out.keys() - ours.keys())
    assert not missing, f"{path}: recorded but not computed: {missing}"
    lines = [mismatch(name, ours[name], out[name], out64.get(name), rounding.get(name, 0.0), limit)
             for name in out]
    lines = [line for line in lines if line]
    assert not lines, f"{path}: {len(lines)} of {len(out)} outputs disagree:\n" + "\n".join(lines[:40])
