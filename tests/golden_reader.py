"""Recorded numbers of the reference implementations: reading them, and comparing with ours.

A golden file is one `.npz` without pickles (tests/golden/README.md lists those that travel with the project):

    meta           JSON: runner (the kind of file: dispatch on it), config (the constructor's arguments), ...
    sd/<name>      weights under the official names
    in/<name>      inputs
    out/<name>     outputs of the reference, float32 or integer
    out64/<name>   the same with the reference in float64, where recorded

"Formula" weights are stored as a recipe only: value(i) = shift + scale * h(k, i), where h is the splitmix64
finaliser of (k, i) cut to 24 bits: 25 M weights need no space, and every platform gets the same bits.

Modules share one protocol (`module_outputs`): outputs in eval mode; outputs in train mode; gradients of
sum_i sum(y_i * hash_unit(900 + i)) with respect to every input and parameter (small ones whole, all of them
as four "probes": sum, L1, L2, dot product with hash_unit(12345 + index)); the buffers after that forward.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
GOLDEN_RATIO = 0x9E3779B97F4A7C15
MODULO = 0xFFFFFFFFFFFFFFFF


def hash_unit(k: int, n: int) -> np.ndarray:
    """n reproducible float64 values in [-1, 1), multiples of 2^-23 (exact in float32)."""
    with np.errstate(over="ignore"):
        z = np.arange(1, n + 1, dtype=np.uint64) + np.uint64(int(k) * GOLDEN_RATIO & MODULO)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(40)).astype(np.float64) / 2 ** 23 - 1.0


def formula_array(recipe: dict) -> np.ndarray:
    """The array of one recipe: float64 arithmetic, rounded once to float32."""
    size = int(np.prod(recipe["shape"], dtype=np.int64))
    values = recipe["shift"] + recipe["scale"] * hash_unit(recipe["k"], size)
    values = values.astype(np.float32).reshape(recipe["shape"])
    return values.astype(np.int64) if recipe.get("dtype") == "int64" else values


def as_array(value) -> np.ndarray:
    return value.detach().cpu().numpy() if torch.is_tensor(value) else np.asarray(value)


def probe(array, index: int) -> np.ndarray:
    """Four float64 numbers that stand for a large array: sum, L1, L2, dot with hash_unit(12345 + index)."""
    a = as_array(array).astype(np.float64).ravel()
    dot = (a * hash_unit(12345 + index, a.size)).sum()
    return np.array([a.sum(), np.abs(a).sum(), np.sqrt((a * a).sum()), dot])


def probes(arrays: dict):
    """-> (names, sorted; array (len(names), 4)): the index of a probe is its place in the sorted names."""
    names = sorted(arrays)
    rows = [probe(arrays[name], index) for index, name in enumerate(names)]
    return names, np.stack(rows) if rows else np.zeros((0, 4))


def load(path):
    """-> meta (dict), then sd, inp, out, out64: dicts of torch tensors (numpy arrays if they hold text)."""
    parts = {"sd": {}, "in": {}, "out": {}, "out64": {}}
    with np.load(path, allow_pickle=False) as stored:
        meta = json.loads(str(stored["meta"]))
        for key in stored.files:
            if key != "meta":
                part, name = key.split("/", 1)
                parts[part][name] = stored[key]
    for recipe in meta.get("formula", []):
        parts["sd"][recipe["name"]] = formula_array(recipe)
    for name, recorded in meta.get("sha", {}).items():
        found = hashlib.sha256(np.ascontiguousarray(parts["sd"][name]).tobytes()).hexdigest()[:16]
        assert found == recorded, f"{path}: weight {name} has checksum {found}, recorded is {recorded}"
    tensors = [{name: value if value.dtype.kind in "US" else torch.from_numpy(np.array(value))
                for name, value in parts[part].items()} for part in ("sd", "in", "out", "out64")]
    return (meta, *tensors)


def folders() -> list:
    """The project's own selection, then the complete set if there: $HER2_GOLDEN_DIR or ../shared/golden."""
    named = os.environ.get("HER2_GOLDEN_DIR")
    complete = Path(named) if named else HERE.parent.parent / "shared" / "golden"
    assert complete.is_dir() or not named, f"HER2_GOLDEN_DIR={named}: no such folder"
    return [HERE / "golden"] + ([complete] if complete.is_dir() else [])


def tolerances(path) -> dict:
    """Recorded rounding per output of this file, absolute (4 x the reference's own error); {} if none is."""
    table = Path(path).parent / "tolerances.json"
    return json.loads(table.read_text(encoding="utf-8")).get(Path(path).stem, {}) if table.is_file() else {}


def relative(ours, theirs) -> float:
    """max|a - b| / max(1, max|b|); infinite when the shapes differ or anything is not finite."""
    a, b = as_array(ours).astype(np.float64), as_array(theirs).astype(np.float64)
    if a.shape != b.shape or not np.isfinite(a).all() or not np.isfinite(b).all():
        return float("inf")
    return float(np.abs(a - b).max(initial=0.0) / max(1.0, np.abs(b).max(initial=0.0)))


def mismatch(name: str, ours, theirs, exact64, tolerance: float, limit: float) -> str:
    """'' when `ours` agrees with the recorded `theirs`, else one line that says by how much it does not.

    Text and integers must be equal. Floats: max|a - b| <= limit * max(1, max|b|); more is allowed only where
    the reference's own rounding demands it: the recorded absolute `tolerance`, or 4 max|float32 - float64| of
    the reference. Values that are not finite must be the same. Probes of gradients are judged row by row,
    against the L1 norm of their own array, so that a large one hides no small one; but no finer than 1 % of
    the largest, because a gradient that is 0 by mathematics is the rounding of the others.
    """
    a, b = as_array(ours), as_array(theirs)
    if a.shape != b.shape:
        return f"{name}: shape {a.shape}, recorded {b.shape}"
    if b.dtype.kind != "f":
        different = int((a != b).sum())
        return f"{name}: {different} of {b.size} values differ" if different else ""
    a, b = a.astype(np.float64), b.astype(np.float64)
    odd = ~np.isfinite(b) | ~np.isfinite(a)
    if not np.array_equal(a[odd], b[odd], equal_nan=True):
        return f"{name}: {int(odd.sum())} values are not finite, and not the same in both"
    a, b = np.where(odd, 0.0, a), np.where(odd, 0.0, b)
    scale = np.maximum(1.0, np.abs(b).max(initial=0.0))
    if name.endswith("grad_probes"):
        scale = np.maximum(np.maximum(1.0, 0.01 * scale), b[:, 1:2])
    rounding = tolerance
    if exact64 is not None:
        own_error = np.where(odd, 0.0, as_array(theirs) - as_array(exact64))
        rounding = max(rounding, 4.0 * np.abs(own_error).max(initial=0.0))
    if (np.abs(a - b) <= np.maximum(limit * scale, rounding)).all():
        return ""
    return (f"{name}: off by {np.abs(a - b).max():.3e} (scale {scale.max():.3g}, allowed {limit:g} of it, "
            f"rounding {rounding:.1e})")


def flatten(value, path="y") -> dict:
    """{'y': t} for one tensor, {'y0': t, 'y1': t} for a tuple, {'y0_0': t, ...} for a tuple of tuples."""
    if torch.is_tensor(value):
        return {path: value}
    flat = {}
    for index, item in enumerate(value):
        flat.update(flatten(item, f"{path}{index}" if path == "y" else f"{path}_{index}"))
    return flat


def gradient_outputs(prefix: str, gradients: dict) -> dict:
    """A table of gradients (official name -> tensor) under the names in which golden files record it."""
    names, rows = probes(gradients)
    return {f"{prefix}grad_names": np.array(names), f"{prefix}grad_probes": rows,
            **{f"{prefix}grad/{name}": gradient.clone() for name, gradient in gradients.items()}}


def later_overwritten(out: dict, prefix: str) -> bool:
    """Whether recorded gradient arrays contradict their own probes.

    They do in spade_step files: the recorder kept views of D's gradients, into which the generator step of
    the next iteration added its own before they were written. The probes were taken in time and are right.
    """
    names = [str(name) for name in out[f"{prefix}grad_names"]]
    return any(relative(probe(out[f"{prefix}grad/{name}"], index), out[f"{prefix}grad_probes"][index]) > 1e-5
               for index, name in enumerate(names) if f"{prefix}grad/{name}" in out)


def module_outputs(module, meta: dict, inp: dict, forward=None, official=lambda name: name) -> dict:
    """Everything that a module file records, computed with our `module` (weights already loaded), by name.

    forward(module, *inputs in the order of config.args) -> output(s); default: module(*inputs).
    official(name of our parameter or buffer) -> its name in the reference.
    """
    forward = forward or (lambda module, *inputs: module(*inputs))
    names = meta["config"]["args"]
    module.eval()
    with torch.no_grad():
        outputs = flatten(forward(module, *[inp[name] for name in names]))
    ours = {f"eval/{key}": y for key, y in outputs.items()}
    if not meta["config"].get("train", True):
        return ours

    module.train()
    module.zero_grad(set_to_none=True)
    inputs = {name: inp[name].clone().requires_grad_(inp[name].is_floating_point()) for name in names}
    outputs = flatten(forward(module, *inputs.values()))
    ours.update({f"train/{key}": y.detach() for key, y in outputs.items()})
    ours.update({f"train/buf/{official(name)}": buffer.clone() for name, buffer in module.named_buffers()})
    weights = [torch.from_numpy(hash_unit(900 + i, y.numel())).float().reshape(y.shape)
               for i, y in enumerate(outputs.values())]
    sum((y * weight).sum() for y, weight in zip(outputs.values(), weights)).backward()
    ours.update({f"train/gradin/{name}": x.grad for name, x in inputs.items() if x.grad is not None})
    gradients = {official(name): parameter.grad for name, parameter in module.named_parameters()
                 if parameter.grad is not None}
    return {**ours, **gradient_outputs("train/", gradients)}
