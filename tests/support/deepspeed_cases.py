"""Runs under DeepSpeed on a CPU, in processes of their own: its process group and its patches stay with a process."""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ZERO3 = Path(__file__).parents[2] / "scripts" / "configs" / "deepspeed-zero3-cpu.json"
"""Settings that cut the smallest parameters to pieces too."""


def under_deepspeed(processes: int, function: Callable[..., None], *args: Any) -> None:
    """Call ``function(*args)`` in so many processes, as `accelerate launch` would start them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.training_cases"])
    port = random.randint(20_000, 60_000)
    started = [
        context.Process(target=_joined, args=(rank, processes, port, function, *args)) for rank in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        process.kill()  # one that waits for another that failed
    assert [process.exitcode for process in started] == [0] * processes


def _joined(rank: int, processes: int, port: int, function: Callable[..., None], *args: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_DEEPSPEED": "true",
        "DS_ACCELERATOR": "cpu",
        "TQDM_DISABLE": "1",
    }
    function(*args)


def choose(zero: int) -> None:
    """Have the runs that follow use ZeRO-2 or ZeRO-3."""
    for name in ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ACCELERATE_DEEPSPEED_ZERO_STAGE"):
        os.environ.pop(name, None)
    if zero == 3:
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(ZERO3)
    else:
        os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(zero)
