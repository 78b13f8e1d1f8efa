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
import re
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

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


# --- The comparison. Four runs of the same code: in float32, as users run it; in float64; in float64 with a
# rounding of float32's size after every layer (the conditioning); in float64 with exp of the time embedding
# off by one ulp of float32. The last three are the same on every machine, so the limits are.

UNIT = 2.0 ** -24           # float32 moves a number by at most this share of it
MARGIN = 64                 # a layer sums many roundings, the emulation makes one: the largest ratio was 20


def recast(tensors: dict, jitter=lambda x: x) -> dict:
    """Copies for a run in float64: floats as float64, through `jitter`; the rest as it is."""
    return {name: jitter(value.double()) if torch.is_tensor(value) and value.is_floating_point()
            else value.clone() if torch.is_tensor(value) else value for name, value in tensors.items()}


@contextmanager
def float64_run(seed=None, exp_ulps: int = 0):
    """Code inside computes in float64 -> a function that rounds a tensor (nothing without a seed).

    Where our code says .float() it means "no less than float32", so that becomes .double(). With a seed,
    every layer's output moves by up to one rounding of float32, and through autograd the gradient that comes
    back by the same. exp_ulps: torch.exp of float32 numbers (the embedding's frequencies) is off by so many.
    """
    generator = torch.Generator().manual_seed(seed or 0)
    exp, to_float = torch.exp, torch.Tensor.float

    def jitter(x):
        if seed is None or not torch.is_tensor(x) or x.dtype != torch.float64:
            return x
        return x * (1 + UNIT * (2 * torch.rand(x.shape, generator=generator) - 1))

    def exp_off(x):
        ulps = torch.randint(-exp_ulps, exp_ulps + 1, x.shape, generator=generator)
        return exp(x) * (1 + 2 * UNIT * ulps).to(x.dtype) if x.dtype == torch.float32 else exp(x)

    def rounded_gradients(optimizer, *_):       # Adam makes a whole step of a gradient that is only rounding
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]
                     if p.grad is not None]
        floor = 256 / MARGIN * UNIT * 0.1 * max(float(g.abs().max()) for g in gradients)
        for g in gradients if seed is not None else ():
            g += floor * (2 * torch.rand(g.shape, generator=generator) - 1)

    hooks = [register_module_forward_hook(lambda module, inputs, output: jitter(output)),
             register_optimizer_step_pre_hook(rounded_gradients)]
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float, torch.exp = torch.Tensor.double, exp_off
    try:
        yield jitter
    finally:
        for hook in hooks:
            hook.remove()
        torch.set_default_dtype(torch.float32)
        torch.Tensor.float, torch.exp = to_float, exp


def disagreements(path, run, network: bool, only: str = "", again: bool = False) -> list:
    """One line for everything in which run(meta, sd, inp, out) and the file of recorded numbers differ.

    Text and integers must be equal, and so must what is not finite. For floats, three questions:
    1 our float64 against the recorded float32: the rounding of the recording, the same on every machine;
    2 our float64 against the reference's, where recorded (networks): the same up to 1e-9;
    3 our float32 here against our float64: the rounding of this machine, whatever its kernels and threads.
    The limit of 1 and 3 is the conditioning: MARGIN times what one rounding per layer moves, plus what one
    ulp of exp moves (t = 999 makes an angle of 1e-4 of it), plus a few roundings of the largest value; in 1
    also the reference's recorded own error. A gradient sums up to 2^16 places, which lose sqrt(2^16) = 256
    roundings of their size even where they cancel to 0: a tenth of the group's largest gradient is that size.

    only      a pattern: look at these outputs alone, and of a training at its first step
    again     the code has been changed since `expectation` was computed: question 1 and 2 for what it is now
    """
    expected = expectation(path, run, only)
    if again:
        with float64_run():
            ours = exact = run(expected["meta"], *map(recast, load(path)[1:3]), expected["out"])
    else:
        ours, exact = expected["ours"], expected["exact"]
    own_error, out64 = tolerances(path), expected["out64"] if network else {}
    lines = [mismatch(name, as_array(ours[name]), as_array(exact[name]), as_array(theirs),
                      as_array(out64[name]) if name in out64 else None, expected["limits"][name],
                      own_error.get(name, 0.0)) for name, theirs in expected["out"].items()]
    return [line for line in lines if line]


@lru_cache(maxsize=None)
def expectation(path, run, only: str = "") -> dict:
    """What `disagreements` compares: recorded outputs, ours in float32 and float64, limits; kept."""
    meta, sd, inp, out, out64 = load(path)
    if only:
        meta["config"]["steps"] = 1
        out = {name: value for name, value in out.items() if re.search(only, name)}
    if all(as_array(value).dtype.kind != "f" for value in out.values()):
        ours = exact = near = off = run(meta, sd, inp, out)
    else:
        with float64_run():
            exact = off = run(meta, recast(sd), recast(inp), out)
        with float64_run(seed=1) as jitter:
            near = run(meta, recast(sd, jitter), recast(inp, jitter), out)
        if "t" in inp:
            with float64_run(exp_ulps=1):
                off = run(meta, recast(sd), recast(inp), out)
        ours = run(meta, sd, inp, out)
    missing = sorted(out.keys() - ours.keys())
    assert not missing, f"{path}: recorded but not computed: {missing}"
    return {"meta": meta, "out": out, "out64": out64, "exact": {name: exact[name] for name in out},
            "ours": {name: ours[name] for name in out},
            "limits": {name: limits_of(name, exact, near, off, out) for name in out}}


def limits_of(name: str, exact: dict, near: dict, off: dict, out: dict):
    """-> the limit of questions 1 and 3, and that of 2: numbers, or of probes a column, one for every row."""
    theirs = as_array(out[name])
    if theirs.dtype.kind != "f" or as_array(exact[name]).shape != theirs.shape:
        return 0.0, 0.0

    def moved(other):
        difference = np.abs(np.nan_to_num(as_array(other[name]) - as_array(exact[name]), posinf=0, neginf=0))
        return difference.max(axis=1, keepdims=True) if probe_rows else difference.max(initial=0.0)

    def size(value):
        return np.abs(np.nan_to_num(as_array(value), posinf=0, neginf=0)).max(initial=0.0)

    probe_rows, gradient = name.endswith("probes"), re.match(r"(.*)grad(in)?/", name)
    if probe_rows:                # row by row against its own L1 norm, so that a large one hides no small one
        scale = np.maximum(0.01 * size(theirs), np.abs(theirs[:, 1:2]))
    elif gradient:
        group = [size(value) for other, value in out.items() if other.startswith(gradient[0])]
        scale = max(size(theirs), 0.1 * max(group))
    else:
        scale = max(1.0, size(theirs))
    rounding, turned = (256 if "grad" in name else 16) * UNIT * scale, 2 * moved(off)
    return MARGIN * moved(near) + turned + rounding, 1e-9 * scale + turned


def mismatch(name: str, ours, exact, theirs, theirs64, limits, own_error: float) -> str:
    """'' when the questions of `disagreements` are answered well, else a line that says by how much not."""
    if ours.shape != theirs.shape:
        return f"{name}: shape {ours.shape}, recorded {theirs.shape}"
    if theirs.dtype.kind != "f":
        different = max(int((run != theirs).sum()) for run in (ours, exact))
        return f"{name}: {different} of {theirs.size} values differ" if different else ""
    finite = np.isfinite(theirs)
    for run in (ours, exact):
        same = np.array_equal(run[~finite], theirs[~finite], equal_nan=True)
        if not (same and np.isfinite(run[finite]).all()):
            return f"{name}: some values are not finite, and not the same in both"
    limit, limit64 = limits
    checks = [("recorded", exact, theirs, np.maximum(limit, own_error)), ("float32 here", ours, exact, limit)]
    if theirs64 is not None:
        checks.append(("float64", exact, theirs64, limit64))
    for what, a, b, allowed in checks:
        error = np.abs(np.where(finite, a, 0.0).astype(np.float64) - np.where(finite, b, 0.0))
        if (error > allowed).any():
            return (f"{name}: {what}: off by {error.max():.3e}, "
                    f"{(error / np.maximum(allowed, 1e-300)).max():.3g} x what is allowed")
    return ""


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
