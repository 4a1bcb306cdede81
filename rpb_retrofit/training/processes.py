"""What one process or many do together: modes that can carry the bias, errors that reach every rank, signals."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import ProjectConfiguration, broadcast_object_list
from torch import nn
from torch.distributed.fsdp import fully_shard

from rpb_retrofit.errors import ConfigError, RetrofitError
from rpb_retrofit.files.printable import message_of
from rpb_retrofit.runtime.bias import RelativePositionBias
from rpb_retrofit.runtime.factor import ContentFactor
from rpb_retrofit.training.recipe import Recipe
from rpb_retrofit.training.zero import check_zero, on_cpu

T = TypeVar("T")

SECOND_CTRL_C = 2.0
"""Seconds after the first Ctrl-C from which a second one ends the process."""


def open_accelerator(recipe: Recipe, logs: str) -> Accelerator:
    """Accelerate as the launcher set it up; ConfigError for what cannot carry the bias, and for unknown trackers."""
    cpu, deepspeed = not torch.accelerator.is_available(), _asks_for("DEEPSPEED")
    try:
        if cpu and not deepspeed:
            _allow_fsdp_on_cpu()
        accelerator = Accelerator(
            # Without it several processes on a CPU would not find one another, and each train on its own. With it
            # Accelerate ignores DeepSpeed.
            cpu=cpu and not deepspeed,
            kwargs_handlers=[on_cpu()] if cpu and deepspeed else None,
            mixed_precision="no" if deepspeed else recipe.precision,  # `prepare_for_zero` says so in another way
            log_with=list(recipe.trackers) or None,
            project_config=ProjectConfiguration(project_dir=logs, logging_dir=logs),
        )
    except (ValueError, ImportError) as error:
        raise ConfigError(f"Accelerate refuses the recipe's settings: {message_of(error)}") from error
    if absent := [name for name in recipe.trackers if name not in {str(known) for known in accelerator.log_with}]:
        raise ConfigError(f"trackers: '{absent[0]}' is not installed: install it, or leave it out")
    if recipe.precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("precision='fp16': a CPU has none in training; choose bf16 or no")
    if (launched := int(os.environ.get("WORLD_SIZE", 1))) != accelerator.num_processes:
        raise ConfigError(
            f"the launcher started {launched} processes and Accelerate joined {accelerator.num_processes}: set "
            "distributed_type in its config to one that fits this machine"
        )
    check_mode(accelerator)
    check_stages(accelerator, recipe)
    check_zero(accelerator, recipe)
    return accelerator


def _asks_for(mode: str) -> bool:
    """Whether the launcher was told to run ``FSDP`` or ``DEEPSPEED``."""
    return os.environ.get(f"ACCELERATE_USE_{mode}", "false").lower() == "true"


def _allow_fsdp_on_cpu() -> None:
    """Accelerate turns FSDP on for GPUs only, and otherwise ignores it in silence; FSDP2 itself runs on a CPU as well,
    where a recipe can be tried."""
    state = PartialState(cpu=True)
    if _asks_for("FSDP") and state.distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def check_mode(accelerator: Accelerator) -> None:
    """ConfigError where a way of running several processes would drop the bias or is not known to keep it."""
    parallel = getattr(accelerator, "parallelism_config", None)
    if parallel is not None and getattr(parallel, "cp_size", 1) > 1:
        raise ConfigError(
            f"context parallelism (cp_size={parallel.cp_size}): Accelerate's ring attention takes no additive bias, so "
            "the relative position bias would be lost; shard with FSDP2, or use shorter sequences"
        )
    if parallel is not None and getattr(parallel, "sp_size", 1) > 1:
        raise ConfigError(
            f"sequence parallelism (sp_size={parallel.sp_size}): Accelerate's Ulysses runs its own attention in the "
            "place of the retrofit's, and the relative position bias would be lost; shard with FSDP2 instead"
        )
    if parallel is not None and getattr(parallel, "tp_size", 1) > 1:
        raise ConfigError(
            f"tensor parallelism (tp_size={parallel.tp_size}): the tables would not be sharded with their heads; "
            "shard with FSDP2 instead"
        )
    if _asks_for("DEEPSPEED") and accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise ConfigError("DeepSpeed was asked for, and Accelerate was told to use the CPU without it: unset use_cpu")
    if accelerator.distributed_type == DistributedType.MEGATRON_LM:
        raise ConfigError("Megatron-LM brings its own models, which have no relative position bias: use FSDP2")
    if accelerator.distributed_type == DistributedType.FSDP and accelerator.state.fsdp_plugin.fsdp_version == 1:
        raise ConfigError("fsdp_version=1: it flattens float32 tables with the weights; set fsdp_version: 2")


def check_stages(accelerator: Accelerator, recipe: Recipe) -> None:
    """ConfigError where a stage trains attention by itself and weights are sharded: they come together when a model's
    output asks for gradients, and in such a stage it has none."""
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if sharded and any(stage.train == "attention" for stage in recipe.stages):
        raise ConfigError(
            f"train=attention: not with {accelerator.distributed_type.value}, which gathers weights when a model's "
            "output asks for gradients; run that stage on one process or with DDP, or choose train=all"
        )


def shard_tables(accelerator: Accelerator, model: nn.Module) -> None:
    """Under FSDP2 in half precision: groups of their own for tables and factors, which stay float32 in computation too.

    Must come before the optimizer is made and before Accelerate shards the rest.
    """
    if not accelerator.is_fsdp2 or accelerator.mixed_precision == "no":
        return
    mesh, parallel = accelerator.torch_device_mesh, accelerator.parallelism_config
    if mesh is not None and parallel is not None:
        mesh = mesh[tuple(parallel.fsdp_dim_names)]
    for module in model.modules():
        if isinstance(module, RelativePositionBias | ContentFactor):
            fully_shard(module, mesh=mesh)


def on_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Run on the first process; its result, or its RetrofitError, reaches all."""
    outcome: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            outcome = [function()]
        except RetrofitError as error:
            outcome = [error]
    if accelerator.num_processes > 1:
        outcome = broadcast_object_list(outcome)
    if isinstance(outcome[0], RetrofitError):
        raise outcome[0]
    return outcome[0]


def gathered(accelerator: Accelerator, value: Any) -> list[Any]:
    """The value of every process, by rank."""
    if accelerator.num_processes == 1:
        return [value]
    values: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(values, value)
    return values


class Interruption:
    """Notes SIGTERM and SIGINT while a step runs, so that it can be finished and saved; Ctrl-C again ends at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._noted = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Launchers pass a signal on that each process got already: only somebody who insists is taken at their word.
        if self.signal == number == signal.SIGINT and time.monotonic() - self._noted > SECOND_CTRL_C:
            os._exit(128 + number)
        if self.signal is None:
            self.signal, self._noted = number, time.monotonic()
