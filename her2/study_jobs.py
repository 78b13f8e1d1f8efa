"""Many commands that wait for each other, side by side: what is ready runs, what fails names itself.

A stage is complete when it is recorded with the same key; the key hashes its command, the keys of what it
needs and the hash of the data, so that changing one input makes exactly what depends on it again. With `jobs`
> 1 each gets one thread, and one GPU where there are several: two processes of one thread each do about 1.6
times the work of one with two.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from tqdm import tqdm

from her2 import run
from her2.run_errors import ROOT, script_line


@dataclass(frozen=True, eq=False)
class Stage:
    name: str               # unique, such as "seed 10: diffusion"
    kind: str               # stages of one kind cost about the same: "diffusion"
    line: tuple             # command line after `python`: a script and its flags, or -m and a module
    folder: Path            # what it fills
    needs: tuple = ()       # other stages
    data: str = ""          # hash of the user's data that it reads

    @property
    def command(self) -> str:
        return script_line(*self.line)          # to be run by hand, from wherever the study was started

    @cached_property
    def key(self) -> str:
        # Quoted in one way on all systems: what the first studies completed stays complete.
        line = subprocess.list2cmdline(["python", *self.line])
        parts = [line, self.data, *(stage.key for stage in self.needs)]
        return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()[:16]


class Record:
    """stages.json: {stage: {"key", "command"}} of what began, with "seconds" where it is complete."""

    def __init__(self, path):
        self.path = Path(path)
        self.known = run.read_json(path) if self.path.exists() else {}

    @property
    def seconds(self) -> dict:              # of what is complete
        return {name: one["seconds"] for name, one in self.known.items() if "seconds" in one}

    def complete(self, stage) -> bool:
        one = self.known.get(stage.name, {})
        return "seconds" in one and one["key"] == stage.key and stage.folder.exists()

    def write(self, stage, **seconds) -> None:
        self.known[stage.name] = {"key": stage.key, "command": stage.command, **seconds}
        run.write_json(self.path, self.known)

    def begin(self, stage) -> None:
        """A folder begun from other inputs makes room: its script would refuse to go on in it."""
        if self.known.get(stage.name, {}).get("key", stage.key) != stage.key and stage.folder.exists():
            old = stage.folder.with_name(stage.folder.name + ".stale")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(stage.folder, old)
            print(f"{stage.name}: its inputs or its command changed; the old folder is now {old}", flush=True)
        self.write(stage)


def seconds_left(waiting, running, done, cost: dict, jobs: int) -> float:
    """Expected seconds until all is finished: `cost` {kind: seconds}, scaled by what finished stages took.
    running: {stage: seconds so far}; done: {kind: [seconds]} of this run."""
    expected = sum(cost[kind] * len(times) for kind, times in done.items())
    pace = sum(map(sum, done.values())) / expected if expected else 1.0
    work = sum(pace * cost[stage.kind] for stage in waiting)
    work += sum(max(pace * cost[stage.kind] - spent, 0) for stage, spent in running.items())
    return work / jobs


class Job:
    """A running stage, which writes into a file of its own. Beside others (`jobs` > 1) it has one thread and,
    where there are several GPUs, the one of its `slot`."""

    def __init__(self, stage, jobs: int, slot: int, logs):
        self.stage, self.clock = stage, time.perf_counter()
        self.log = Path(logs) / (re.sub(r"\W+", "-", stage.name) + ".txt")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        line = stage.line if stage.line[0] == "-m" else (str(ROOT / stage.line[0]), *stage.line[1:])
        # `her2` is found wherever the study is started from. Threads that wait should sleep: busy waiting
        # costs a factor of ten when something else runs on the same cores.
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONPATH": path}
        if jobs > 1:
            environment["OMP_NUM_THREADS"] = "1"
            if (count := torch.cuda.device_count()) > 1:        # of those that the user left visible
                visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
                environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % count]
        # A session of its own: Ctrl-C comes from `run_stages`, and not a second time from the terminal.
        with open(self.log, "wb") as output:
            self.process = subprocess.Popen([sys.executable, *line], env=environment, stdout=output,
                                            stderr=subprocess.STDOUT, start_new_session=True)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.clock

    def last_line(self, start: str) -> str:
        """The last line of its log that begins with `start`, the last at all where there is none."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        lines = [line.split("\r")[-1].strip() for line in lines if line.strip()] or [""]
        return next((line for line in reversed(lines) if line.startswith(start)), lines[-1])


def run_stages(stages, jobs: int, record: Record, logs, cost: dict, finished) -> list:
    """Run what is not complete, up to `jobs` at a time. Returns one line per stage that failed.
    `finished(stage)` is called for every stage that is complete, also for those that were before. What needs
    a failed stage is left out; what does not goes on. Ctrl-C stops all jobs, each of which saves a checkpoint
    of its own, and is raised again."""
    waiting = [stage for stage in stages if not record.complete(stage)]
    ready, failed, running, times = {stage.name for stage in stages if stage not in waiting}, [], {}, {}
    for stage in stages:
        if stage.name in ready:
            finished(stage)
    # One line per job and one for the whole on a terminal; elsewhere a line when a stage begins and ends.
    bars = [tqdm(position=k, bar_format="{desc}", leave=False)
            for k in range(jobs + 1 if sys.stderr.isatty() else 0)]

    def say(text):
        tqdm.write(text) if bars else print(text, flush=True)

    def left():
        spent = {job.stage: job.seconds for job in running.values()}
        return f"about {seconds_left(waiting, spent, times, cost, jobs) / 60:.0f} min left"

    if ready:
        say(f"{len(ready)} of {len(stages)} stages are complete")
    try:
        while True:
            for slot in set(range(jobs)) - set(running):
                stage = next((s for s in waiting if all(need.name in ready for need in s.needs)), None)
                if stage is None:
                    break
                waiting.remove(stage)
                record.begin(stage)
                number = len(ready) + len(running) + 1
                say(f"\n[{number}/{len(stages)}] {stage.name}\n$ {stage.command}")
                running[slot] = Job(stage, jobs, slot, logs)
            if not running:             # all is complete, or waits for what failed
                return failed
            time.sleep(0.1)
            for slot, job in list(running.items()):
                stage, status = job.stage, job.process.poll()
                if status is None:
                    continue
                del running[slot]
                if status:
                    failed.append(f"stage '{stage.name}' ended with exit status {status}, it says: "
                                  f"{job.last_line('error')}")
                    say(f"FAILED: {failed[-1]}")
                    continue
                # Of a stage that went on from a checkpoint, the seconds are those since then.
                record.write(stage, seconds=round(job.seconds, 1))
                times.setdefault(stage.kind, []).append(job.seconds)
                ready.add(stage.name)
                finished(stage)
                say(f"{stage.name}: {job.seconds / 60:.1f} min; {len(ready)} of {len(stages)} stages are "
                    f"complete, {left()}")
            for slot, bar in enumerate(bars):
                text = "-" if slot < jobs else f"{len(ready)}/{len(stages)} stages, {left()}"
                if slot in running:
                    job = running[slot]
                    text = f"{job.stage.name} ({job.seconds:.0f} s): {job.last_line('step')}"
                bar.set_description_str(text[:shutil.get_terminal_size()[0] - 1])
    finally:
        for job in running.values():        # not SIGINT, which what a shell starts with & does not hear
            job.process.terminate()
        for job in running.values():
            job.process.wait()
        for bar in bars:
            bar.close()
