"""Run scripts in N processes as torchrun would, without torchrun: python tests/run_processes.py LINES.json

Each process imports torch once and runs all command lines of the file one after the other. What torchrun
passes in the environment (RANK, WORLD_SIZE, ...) is set by `together`.
"""

import importlib
import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def double_precision():
    """All that is float32 elsewhere is float64 inside the block.

    A step is compared with the same step computed in another order. In float32 three steps of a GAN on five
    small patches make 1e-1 of a difference of 1e-7 (L1 has a kink everywhere, batch norm over five values
    divides by next to nothing); in float64 what is left is an error of the arithmetic, not its rounding.
    """
    import torch
    ordinary = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.Tensor.float = ordinary
        torch.set_default_dtype(torch.float32)


def environment(rank: int, world: int, port: int) -> dict:
    return {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE"}


def start(lines: list, world: int, folder) -> list:
    """The processes, running; their output goes to folder/processN-rankK.txt."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = Path(folder) / f"lines{world}-{port}.json"
    path.write_text(json.dumps(lines), encoding="utf-8")
    found = []
    for rank in range(world):
        with open(Path(folder) / f"process{world}-rank{rank}.txt", "wb") as output:
            found.append(subprocess.Popen([sys.executable, __file__, str(path)], cwd=ROOT, stdout=output,
                                          stderr=subprocess.STDOUT, env=environment(rank, world, port)))
    return found


@contextmanager
def together(lines: list, world: int, folder):
    """Run the command lines in `world` processes beside the block; AssertionError where one fails, with what
    it said."""
    processes = start(lines, world, folder)
    yield
    for rank, process in enumerate(processes):
        status = process.wait()
        said = (Path(folder) / f"process{world}-rank{rank}.txt").read_text(encoding="utf-8", errors="replace")
        assert status == 0, f"process {rank} of {world}: {said[-3000:]}"


def main() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from her2.run_errors import command
    lines = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    modules = [importlib.import_module(line[0].removesuffix(".py")) for line in lines]

    def run_all(argv):
        with double_precision():
            return max((module.main(line[1:]) or 0 for module, line in zip(modules, lines)), default=0)

    command(run_all, [])


if __name__ == "__main__":
    main()
