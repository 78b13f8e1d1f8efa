"""One training, several processes:  torchrun --nproc-per-node N train_seg.py ...

The batch of a step is divided: N processes compute the step that one would. Batch b, process r of N, has the
samples rows_r, a share s_r = |rows_r| / b of them, and computes its part of the loss. The parts add up:

    loss = sum_r s_r mean over rows_r          gradient = sum_r gradient of (s_r mean over rows_r)

so one `all_reduce` of all gradients, laid end to end, gives every process the gradient of the whole batch,
and the weights stay the same without being sent. Random numbers (t, noise, z) are drawn for the whole batch
from the step's key and cut. What is no mean over samples needs sums over the whole batch before it is formed:
Dice (WholeSums), the ratio of gradients that weighs the autoencoder's adversarial loss, batch norm
(BatchNormOfAll), the codebook's restarts (`gather`).

`--accumulate A` cuts the batch into A pieces first, one after the other through the network: memory of a
piece, gradient of the whole, with the same sums. Batch norm sees each piece by itself (over all processes).
Process 0 alone writes files; what it finds or makes first (phantom, cache, checkpoint) stands in a file
system that all nodes share. Backend: NCCL between GPUs, gloo between CPUs.

Cost, on paper: a ring all_reduce sends 8 (N - 1) / N bytes per parameter through each link, after the
backward pass. `paper` has 24 M (segmenter) to 215 M parameters (diffusion): at N = 64, 0.19 to 1.7 GB a step,
so 1 to 8 ms at 200 GB/s (inside a node) and 15 to 136 ms at 12.5 GB/s (100 Gbit/s between nodes). The batch
is divided, not multiplied: 16 patches occupy 16 processes at most.
"""

import os
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from her2 import run_errors
from her2.run_errors import UserError


def start(device: torch.device) -> torch.device:
    """Join the processes that torchrun has started, if it has; returns this one's own device."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return device
    if device.type == "cuda":
        device, count = torch.device("cuda", int(os.environ["LOCAL_RANK"])), torch.cuda.device_count()
        if device.index >= count:
            raise UserError(f"--nproc-per-node: found {count} CUDA devices; give that many, or --device cpu")
        torch.cuda.set_device(device)
    store, number, size = next(dist.rendezvous("env://"))
    # The others wait while process 0 looks at whole ROIs; a process that died is noticed by torchrun.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store,
                            rank=number, world_size=size, timeout=timedelta(days=1))
    run_errors.speaks = lambda: store.add("spoken", 1) == 1         # one line, from whoever is first
    if number:
        run_errors.silence(run_errors.sys.stdout)
    return device


def rank() -> int:
    """Number of this process, 0 for the first or only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until all processes are here."""
    any_of_all(False)


@contextmanager
def in_turn():
    """Process 0 first, then the others, which find what it has made."""
    rank() and barrier()
    yield
    rank() or barrier()


def any_of_all(flag: bool) -> bool:
    """True everywhere where one process says True."""
    return flag if world() == 1 else bool(total(torch.tensor([int(flag)])))      # CPU: no GPU waits for it


def gather_objects(value) -> list:
    """[value of process 0, value of process 1, ...] everywhere."""
    found = [value] * world()
    if world() > 1:
        dist.all_gather_object(found, value)
    return found


class Part(NamedTuple):
    batch: dict         # some samples of the step's batch
    rows: slice         # where they stand in it
    share: float        # how much of it they are
    first: bool         # of the parts of this step


def divide(config) -> list:
    """The slices of a batch that belong to this process, one for each of the --accumulate pieces."""
    pieces = config.accumulate
    if config.batch // pieces < world():
        raise UserError(f"--batch: found {config.batch}; give {pieces * world()} or more, one for each of "
                        f"{pieces} piece(s) in {world()} process(es)")
    ends = [config.batch * k // pieces for k in range(pieces + 1)]
    return [slice(*(low + (high - low) * r // world() for r in (rank(), rank() + 1)))
            for low, high in zip(ends, ends[1:])]


def indices(config) -> list:
    """The numbers of the samples that this process draws, in the order of `divide`."""
    return [i for rows in divide(config) for i in range(rows.start, rows.stop)]


def parts(batch: dict, config) -> list:
    """The drawn samples as a list of Parts: one, unless --accumulate asks for more."""
    found, start = [], 0
    for rows in divide(config):
        count = rows.stop - rows.start
        drawn = {name: value[start:start + count] for name, value in batch.items()}
        found.append(Part(drawn, rows, count / config.batch, first=not found))
        start += count
    return found


def gather(pieces: list, config) -> torch.Tensor:
    """The tensors (b_k, ...) of this process's parts -> (B, ...), of the whole batch, everywhere."""
    whole = pieces[0].new_zeros(config.batch, *pieces[0].shape[1:])
    for rows, piece in zip(divide(config), pieces):
        whole[rows] = piece
    return total(whole)


def total(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, without gradient."""
    tensor = tensor.detach()
    if world() > 1:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(tensor)
    return tensor


def sum_gradients(parameters) -> None:
    """Replace every gradient by its sum over all processes, all in one message."""
    if world() > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        whole = total(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        for gradient, summed in zip(gradients, whole.split([g.numel() for g in gradients])):
            gradient.copy_(summed.view(gradient.shape))


class WholeSums:
    """Sums over a part -> sums over the whole batch, for a loss that is no mean over samples. The gradient is
    the part's, over the share that its loss will be multiplied by. known: the whole sums (--accumulate)."""

    def __init__(self, share: float, known=None):
        self.share, self.known = share, known and iter(known)

    def __call__(self, sums: torch.Tensor) -> torch.Tensor:
        whole = next(self.known) if self.known else total(sums)
        return whole + (sums - sums.detach()) / self.share


class BatchNormOfAll(nn.BatchNorm2d):
    """Batch norm with the mean and variance of all processes' samples. (torch's SyncBatchNorm needs GPUs.)"""

    def forward(self, x: torch.Tensor) -> torch.Tensor:                                 # (B, C, h, w)
        if not self.training or world() == 1:
            return super().forward(x)
        count = x.numel() // x.shape[1]
        var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)                  # (C,), (C,)
        var, mean = var.double(), mean.double()     # the whole variance is a difference of large numbers
        sums = torch.cat([mean.new_tensor([count]), count * mean, count * (var + mean ** 2)])
        if sums.requires_grad:          # every process's loss depends on all sums: its gradient on all losses
            sums.register_hook(total)
        whole = total(sums) + (sums - sums.detach())    # the sum of all, with the gradient of `sums`
        count, mean, square = whole.split([1, x.shape[1], x.shape[1]])
        mean, var = mean / count, square / count - (mean / count) ** 2                  # (C,), (C,)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.float(), self.momentum)
            self.running_var.lerp_((var * count / (count - 1)).float(), self.momentum)
        y = (x.float() - mean.float()[:, None, None]) * (var + self.eps).rsqrt().float()[:, None, None]
        if self.affine:
            y = y * self.weight[:, None, None] + self.bias[:, None, None]
        return y.to(x.dtype)                                                            # (B, C, h, w)


def same_start(*networks) -> None:
    """Weights and buffers of process 0 everywhere; from here on batch norm is of all processes."""
    for network in networks if world() > 1 else ():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.data.copy_(total(torch.zeros_like(tensor) if rank() else tensor))
        for layer in network.modules():
            if type(layer) is nn.BatchNorm2d:
                layer.__class__ = BatchNormOfAll        # the same tensors, another forward
