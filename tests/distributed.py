"""Running a test's function in several gloo ranks."""

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from utils import fsdp_utils
from utils.ray_utils import free_port

# Imported once in the fork server: every rank of every test then starts in milliseconds instead of 10 s.
PRELOAD = [
    "peft",
    "prismatic.extern.hf.modeling_prismatic",
    "ppo.learner",
    "torch.distributed.fsdp",
]


def in_ranks(
    world_size: int, function: Callable[..., None], *args: Any, device_type: str = "cpu"
) -> None:
    """Run `function(rank, *args)` in `world_size` processes joined by gloo; a failure in one fails the test.

    `device_type="cuda"`: each process has a GPU, and NCCL for it.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    mp.start_processes(
        _in_group,
        (world_size, free_port(), device_type, function, args),
        nprocs=world_size,
        start_method="forkserver",
    )


def _in_group(
    rank: int,
    world_size: int,
    port: int,
    device_type: str,
    function: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["LOCAL_RANK"] = str(rank)
    fsdp_utils.setup_distributed(device_type=device_type)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()
