"""What the benchmark counts, against the allocator and closed forms; what it prints against an earlier run."""

import json

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from her2 import benchmark
from her2.benchmark import LOOPS, LiveBytes, count, one_step, script_config
from her2.run_errors import UserError


@pytest.mark.parametrize("loop", LOOPS)
def test_memory_on_meta_is_what_the_allocator_hands_out(loop):
    """torch's profiler sees every allocation of a real step, and kernels' workspaces too; within 10 %."""
    c = script_config(loop, "tiny")
    trained, *_, step = one_step(loop, c, "cpu")
    step(8)                                                     # oneDNN makes its workspaces
    for network in trained:
        network.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(8)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert count(loop, c, [8])["step_bytes"][8] == pytest.approx(peak, rel=0.1)


def test_bytes_live_until_their_storage_dies():
    with LiveBytes() as live:
        a = torch.empty(1000, device="meta")                    # 4000 bytes
        b = a.view(10, 100) + 1                                 # a view is no storage; 4000 more
        del a
        assert (live.now(), live.peak) == (4000, 8000)
        del b
    assert (live.now(), live.peak) == (0, 8000)


def test_arithmetic_is_that_of_the_convolutions():
    """2 k^2 Cin Cout per output pixel forward, as much for either gradient; the image needs none."""
    c, total = script_config("segmenter", "tiny"), 0
    (network,), _, step = one_step("segmenter", c, "cpu")

    def add(module, inputs, output):
        nonlocal total
        forward = 2 * module.weight.numel() * output[:, 0].numel()
        total += forward * (3 if inputs[0].requires_grad else 2)

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(add)
    step(2)
    assert count("segmenter", c, [1, 2])["flops"] == total


def test_parameters_at_the_papers_size_are_the_official_numbers():
    numbers = {}
    for loop in ("gan", "segmenter"):
        trained, *_ = one_step(loop, script_config(loop, "paper"), "meta")
        numbers[loop] = sum(p.numel() for network in trained for p in network.parameters())
    assert numbers["gan"] == 159464131 + 10463424 + 5539970
    assert numbers["segmenter"] == pytest.approx(24.4e6, rel=0.01)      # smp's U-Net with ResNet-34


def test_the_table_is_written_and_compared_with_an_earlier_one(tmp_path, monkeypatch, capsys):
    speeds = iter([2.0, 3.0, 4.0])
    monkeypatch.setattr(benchmark, "measure", lambda *rest: iter(
        [("gan training", "patches", {"samples_per_s": next(speeds), "steps_per_s": 1.0, "memory_mib": None})]))
    monkeypatch.setattr(benchmark, "count_table", lambda preset, batch: {})
    first, second = tmp_path / "one.json", tmp_path / "new" / "two.json"
    benchmark.main(["--out", str(first)])
    benchmark.main(["--out", str(second), "--against", str(first)])
    assert "1.50 times the earlier rate" in capsys.readouterr().out
    content = json.loads(second.read_text(encoding="utf-8"))
    assert content["rows"]["gan training"]["samples_per_s"] == 3.0 and content["settings"]["preset"] == "tiny"
    first.write_text('{"rows": {"gan training": {}}}', encoding="utf-8")     # cut by hand: nothing to compare
    benchmark.main(["--against", str(first)])
    assert "times the earlier" not in capsys.readouterr().out
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match="not written by her2.benchmark"):
        benchmark.main(["--against", str(tmp_path / "list.json")])
