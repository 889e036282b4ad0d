"""One run on several devices: the processes of ``torchrun``, and what they tell each other.

Outside of ``torchrun`` there is one process, and everything here is what it would be anyway.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed, nn

__all__ = ["is_first", "joined", "of_all", "process", "processes", "sum_over_all", "wrapped"]

_PATIENCE = timedelta(minutes=30)

T = TypeVar("T")


def _active() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def processes() -> int:
    """How many processes train one model together."""
    return distributed.get_world_size() if _active() else 1


def process() -> int:
    """The number of this one, from 0."""
    return distributed.get_rank() if _active() else 0


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return process() == 0


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that ``torchrun`` started with this one; nothing to join without it.

    Each takes the GPU of its number on its machine, where there are GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1 or "RANK" not in os.environ or _active():
        yield
        return
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    # Objects travel by gloo also where gradients travel by nccl.
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    distributed.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def of_all(value: T) -> T:
    """The first process's value, in every one.

    Args:
        value: what can be pickled; looked at in the first process alone.
    """
    if processes() == 1:
        return value
    held = [value if is_first() else None]
    distributed.broadcast_object_list(held, src=0, device=torch.device("cpu"))
    found: T = held[0]  # type: ignore[assignment]
    return found


def sum_over_all(value: torch.Tensor) -> torch.Tensor:
    """The sum of a value over the processes.

    Shape:
        - value, output: any
    """
    if processes() > 1:
        value = value.clone()
        distributed.all_reduce(value)
    return value


def wrapped(model: nn.Module, device: torch.device) -> nn.Module:
    """The model as one of several that share their gradients; itself where it is alone.

    On GPUs batch norms take their statistics over the batches of all; on the CPU, for which torch
    has no such norm, each over its share.

    Args:
        model: on its device.
        device: of this process.
    """
    if processes() == 1:
        return model
    if device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    ids = [torch.cuda.current_device()] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids)
