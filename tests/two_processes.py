"""Two processes of one group, as nnU-Net starts one for each GPU, with gloo on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LONGEST_WAIT = timedelta(seconds=180)
"""Of one process for the other: where they do not meet the test fails, and does not hang."""


def in_two_processes(function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What `function(rank, *arguments)` returns in each of them; an error in one fails the test.

    Args:
        folder: for that through which the processes find each other.
    """
    folder = folder / "group"
    folder.mkdir()
    mp.spawn(_process, (function, str(folder), arguments), nprocs=2)
    return [torch.load(folder / f"returned_{rank}.pt", weights_only=False) for rank in range(2)]


def _process(rank: int, function: Callable[..., Any], folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", LONGEST_WAIT, world_size=2, rank=rank)
    try:
        torch.save(function(rank, *arguments), f"{folder}/returned_{rank}.pt")
        dist.barrier()  # the store is the first process's
    finally:
        dist.destroy_process_group()
