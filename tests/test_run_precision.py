"""Half precision: taken where the hardware computes it, float32 where sums need it, resumable bit by bit.

The loops run in bf16 on the CPU here, whatever CPU it is: slower than float32 on many, and the same chain of
types as on a GPU.
"""

import importlib

import pytest
import torch
from torch import nn

from her2 import run
from her2.net_blocks import SpectralConv2d
from her2.quantizer import Codebook
from her2.run_errors import UserError
from her2.run_training import Precision
from run_kill_harness import LOOPS, command_line, differences, in_process, one_thread, prepare

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TRAINING = [name for name in LOOPS if name != "generate"]


@pytest.mark.parametrize("cpu, amp, dtype", [
    ({"amx_bf16": True, "avx512_bf16": True}, "auto", torch.bfloat16), ({"amx_bf16": True}, "off", None),
    ({"amx_bf16": False, "avx512_f": True}, "auto", None), ({}, "auto", None), ({}, "off", None),
    ({}, "bf16", torch.bfloat16)])
def test_a_cpu_takes_bf16_when_it_has_tiles_or_is_told_to(monkeypatch, cpu, amp, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    precision = Precision(CPU, amp)
    assert precision.dtype is dtype and not precision.scaler().is_enabled()
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (dtype or torch.float32)


@pytest.mark.parametrize("native, amp, dtype", [
    (True, "auto", torch.bfloat16), (False, "auto", torch.float16), (True, "fp16", torch.float16),
    (False, "bf16", torch.bfloat16), (True, "off", None)])
def test_a_gpu_takes_bf16_when_it_does_not_emulate_it(monkeypatch, native, amp, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native)
    assert Precision(GPU, amp).dtype is dtype


def test_fp16_on_a_cpu_is_refused_in_one_line():
    with pytest.raises(UserError, match="--amp bf16, or --amp off"):
        Precision(CPU, "fp16")


def start(name, root, out):
    """Exit status of a loop in bf16, run inside this process."""
    return in_process([*command_line(name, root, out), "--amp", "bf16"])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bf16")
    prepare(folder)
    with one_thread():
        for name in TRAINING:
            assert start(name, folder, name) == 0
        yield folder


@pytest.mark.parametrize("name", TRAINING)
def test_convolutions_are_bf16_and_losses_weights_and_sums_are_not(root, name, monkeypatch):
    seen, backward = {}, torch.Tensor.backward

    def watch(module, inputs, output):
        if isinstance(module, (nn.Conv2d, SpectralConv2d)) and module.training:
            seen.setdefault("convolution", set()).add(output.dtype)
        if isinstance(module, Codebook):
            seen.setdefault("vq_loss", set()).add(output[2].dtype)

    def note(loss, *rest, **options):
        seen.setdefault("loss", set()).add(loss.dtype)
        return backward(loss, *rest, **options)

    monkeypatch.setattr(torch.Tensor, "backward", note)
    hook = nn.modules.module.register_module_forward_hook(watch)
    try:
        assert start(name, root, f"{name}-watched") == 0
    finally:
        hook.remove()
    assert seen.pop("convolution") == {torch.bfloat16}
    assert set(seen) >= {"loss"} and all(dtypes == {torch.float32} for dtypes in seen.values()), seen
    assert differences(root / name, root / f"{name}-watched") == []

    def tensors(value):
        if isinstance(value, dict):
            return [tensor for item in value.values() for tensor in tensors(item)]
        return [value] if torch.is_tensor(value) and value.is_floating_point() else []

    kept = tensors(run.load_file(root / name / "last.pt"))
    assert len(kept) > 20 and {tensor.dtype for tensor in kept} <= {torch.float32, torch.float64}


@pytest.mark.parametrize("name", LOOPS)
def test_an_interrupted_run_in_bf16_ends_with_the_bits_of_a_whole_one(root, name, monkeypatch):
    """Stopped after the checkpoint of step 4, or after the fourth picture of generate.py."""
    module, count = ((run, 1), (importlib.import_module("generate").draw, 10))[name == "generate"]
    call = "save_png" if name == "generate" else "save_checkpoint"
    original, calls = getattr(module, call), []

    def stopping(*arguments, **options):
        original(*arguments, **options)
        calls.append(None)
        if len(calls) == count:
            raise KeyboardInterrupt

    if name == "generate":
        assert start(name, root, name) == 0
    monkeypatch.setattr(module, call, stopping)
    assert start(name, root, f"{name}-stopped") == 130
    monkeypatch.undo()
    assert differences(root / name, root / f"{name}-stopped")
    assert start(name, root, f"{name}-stopped") == 0
    assert differences(root / name, root / f"{name}-stopped") == []


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(3, affine=False, momentum=1.0), nn.GroupNorm(3, 3)])
def test_statistics_are_summed_in_float32(norm):
    """A bf16 sum of 65,536 values near 1 would stop at 256; mean and spread must be those of the values."""
    x = (1 + 0.1 * torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = norm(x.contiguous(memory_format=torch.channels_last))
    exact = x.double()
    mean, deviation = exact.mean((0, 2, 3)), exact.std((0, 2, 3), correction=0)
    expected = (exact - mean[:, None, None]) / deviation[:, None, None]
    assert (y.double() - expected).abs().max() < 0.03                         # bf16 has 8 bits: 4.5 +- 0.016
    assert (y.double() - expected).mean((0, 2, 3)).abs().max() < 1e-3
    if isinstance(norm, nn.BatchNorm2d):
        torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(norm.running_var.double(), exact.var((0, 2, 3)), rtol=1e-4, atol=0)
