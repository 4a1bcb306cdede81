"""The state of a training on disk, without pickle: weights, optimizer, loss scale and random numbers.

One process and DDP write whole tensors; FSDP2 writes each process's shards, by PyTorch's distributed checkpoints in
safetensors, which any number of processes can read. DeepSpeed's engine knows no other files than its own, which are
PyTorch's: of those nothing is read but tensors and plain values.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, DistributedType
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from rpb_retrofit.files.record import DamagedError, pack, unpack

WEIGHTS, OPTIMIZER, SCALE = "model.safetensors", "optimizer.safetensors", "scale.safetensors"
SHARDS, ENGINE = "shards", "deepspeed"
"""Folders of FSDP2 and of DeepSpeed."""

FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""PyTorch's switch that makes every `torch.load` refuse what is not a tensor or a plain value."""


def save_state(accelerator: Accelerator, model: Any, optimizer: Any, folder: Path) -> None:
    """Write the state into a folder; every process calls it."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        model.save_checkpoint(str(folder), ENGINE)
    elif accelerator.distributed_type == DistributedType.FSDP:
        tensors, rest = _sharded(model, optimizer)
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder / SHARDS), save_distributed=True))
        if accelerator.is_main_process:
            save_file(pack(rest), folder / OPTIMIZER)
    elif accelerator.is_main_process:
        save_model(accelerator.unwrap_model(model), str(folder / WEIGHTS))
        save_file(pack(optimizer.state_dict()), folder / OPTIMIZER)
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED  # which keeps its own
    if accelerator.scaler is not None and accelerator.is_main_process and not deepspeed:
        save_file(pack(accelerator.scaler.state_dict()), folder / SCALE)
    save_file(pack(_random_states(accelerator)), _random_file(folder, accelerator))


def load_state(accelerator: Accelerator, model: Any, optimizer: Any, folder: Path) -> bool:
    """Take up the state in a folder; every process calls it. False where it has no random states for this process,
    since it was written by fewer."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        with _tensors_only():
            loaded, _ = model.load_checkpoint(str(folder), ENGINE)
        if loaded is None:
            raise DamagedError(f"'{folder}' holds nothing that DeepSpeed can go on from: --restart")
        return _take_random_states(accelerator, folder)
    if accelerator.scaler is not None:  # before an FSDP2 optimizer, whose loading takes a step of nothing
        accelerator.scaler.load_state_dict(unpack(load_file(folder / SCALE)))
        accelerator.scaler._lazy_init_scale_growth_tracker(accelerator.device)
    if accelerator.distributed_type == DistributedType.FSDP:
        _load_shards(model, optimizer, folder)
    else:
        load_model(accelerator.unwrap_model(model), str(folder / WEIGHTS))
        optimizer.load_state_dict(unpack(load_file(folder / OPTIMIZER)))
    return _take_random_states(accelerator, folder)


def _take_random_states(accelerator: Accelerator, folder: Path) -> bool:
    if not (file := _random_file(folder, accelerator)).exists():
        return False
    _set_random_states(accelerator, unpack(load_file(file)))
    return True


def _sharded(model: Any, optimizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of weights and optimizer by name, and the optimizer's single numbers, which are not sharded."""
    tensors = {f"model.{name}": tensor for name, tensor in get_model_state_dict(model).items()}
    rest: dict[str, Any] = {}
    states: Any = get_optimizer_state_dict(model, _unwrapped(optimizer))["state"]
    for parameter, state in states.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim:
                tensors[f"optimizer.{parameter}.{name}"] = value
            else:
                rest[f"optimizer.{parameter}.{name}"] = value
    return tensors, rest


def _load_shards(model: Any, optimizer: Any, folder: Path) -> None:
    tensors, _ = _sharded(model, optimizer)
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder / SHARDS)))
    numbers = unpack(load_file(folder / OPTIMIZER))
    set_model_state_dict(model, {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    state_dict: Any = get_optimizer_state_dict(model, _unwrapped(optimizer))
    for parameter, state in state_dict["state"].items():
        for name in state:
            key = f"optimizer.{parameter}.{name}"
            state[name] = tensors[key] if key in tensors else numbers[key]
    set_optimizer_state_dict(model, _unwrapped(optimizer), state_dict)


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer that Accelerate wrapped."""
    return getattr(optimizer, "optimizer", optimizer)


def _random_file(folder: Path, accelerator: Accelerator) -> Path:
    return folder / f"random-{accelerator.process_index}.safetensors"


def _random_states(accelerator: Accelerator) -> dict[str, Any]:
    """Of Python, NumPy, PyTorch and its accelerator."""
    name, keys, *rest = numpy.random.get_state(legacy=True)
    device = _device_module(accelerator)
    return {
        "python": random.getstate(),
        "numpy": (name, [int(key) for key in keys], *rest),
        "torch": torch.get_rng_state(),
        "device": None if device is None else device.get_rng_state_all(),
    }


def _set_random_states(accelerator: Accelerator, states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())
    device = _device_module(accelerator)
    if device is not None and states["device"] is not None:
        device.set_rng_state_all([state.cpu() for state in states["device"]])


def _device_module(accelerator: Accelerator) -> Any:
    """PyTorch's module of the accelerator, where it has random states of its own."""
    module = getattr(torch, accelerator.device.type, None)
    return module if hasattr(module, "get_rng_state_all") else None


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    """Inside, `torch.load` makes tensors, plain values and DeepSpeed's own settings, and calls nothing else, whatever
    its caller, DeepSpeed, asks for."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get(FORCED)
    os.environ[FORCED] = "1"
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        os.environ.pop(FORCED)
        if before is not None:
            os.environ[FORCED] = before
