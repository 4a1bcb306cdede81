"""DeepSpeed's ZeRO: what its engine must be told, and what it would do to a retrofit in its own way."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator, DistributedType
from accelerate.utils import InitProcessGroupKwargs
from transformers.integrations import unset_hf_deepspeed_config

from rpb_retrofit.errors import ConfigError
from rpb_retrofit.training.recipe import Recipe

CONFLICTING = {
    "gradient_accumulation_steps": "the recipe's batch_tokens says how much a step sees: set it to 1",
    "fp16": "rounded weights would be saved: disable it, and set the recipe's precision",
    "bf16": "rounded weights would be saved: disable it, and set the recipe's precision",
    "optimizer": "the recipe's rates make the optimizer: leave it out",
    "scheduler": "the recipe's warmup and decay say how rates change: leave it out",
    "tensor_parallel": "the tables would not be sharded with their heads: leave it out",
    "sequence_parallel_size": "its attention takes no additive bias, so the bias would be lost: set it to 1",
}
"""Keys of DeepSpeed's settings that contradict a recipe or lose the bias, and the remedy."""


def on_cpu() -> InitProcessGroupKwargs:
    """What Accelerate must be given so that DeepSpeed's processes find one another without a GPU.

    Raises ImportError where DeepSpeed is not installed.
    """
    import deepspeed

    # It would first compile, for minutes, a kernel that only its inference calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return InitProcessGroupKwargs(backend="gloo")


def check_zero(accelerator: Accelerator, recipe: Recipe) -> None:
    """ConfigError for what the launcher's settings of DeepSpeed, or its engine, would do in their own way.

    Models are opened whole from here on, whatever `zero3_init_flag` says, as some are compared and written; Accelerate
    cuts the one that is trained to pieces.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    unset_hf_deepspeed_config()
    if recipe.micro_tokens is not None or recipe.on_bad_step == "skip":
        raise ConfigError(
            "DeepSpeed accumulates and takes its steps inside its backward pass: leave out micro_tokens and "
            "on_bad_step=skip, or use FSDP2"
        )
    if recipe.precision == "fp16":
        raise ConfigError("precision='fp16': DeepSpeed would save rounded weights; choose bf16 or no, or use FSDP2")
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    for key, remedy in CONFLICTING.items():
        if _on(settings.get(key)):
            raise ConfigError(f"DeepSpeed's {key}={settings[key]!r}: {remedy}")


def _on(value: Any) -> bool:
    """Whether a setting of DeepSpeed asks for more than nothing."""
    if isinstance(value, dict):
        return bool(value.get("enabled", value.get("autotp_size", 2) > 1))
    return value not in (None, 0, 1, "auto")


def prepare_for_zero(accelerator: Accelerator, recipe: Recipe) -> None:
    """Tell DeepSpeed what it would read off a data loader, how to compute, and to hand out whole weights."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    settings["train_micro_batch_size_per_gpu"] = 1  # counts samples in its logs, nothing else
    settings["gradient_clipping"] = recipe.clip
    settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True  # in the dtype that they have
    # Its own bf16 rounds weights and tables, and keeps its float32 masters to itself.
    settings["torch_autocast"] = {"enabled": recipe.precision == "bf16", "dtype": "bfloat16"}
