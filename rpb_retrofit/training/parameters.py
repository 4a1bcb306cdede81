"""Which parameters a stage trains, at which rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.runtime.families import is_own
from rpb_retrofit.training.recipe import Recipe, Stage


def prepare(model: Any, stage: Stage, recipe: Recipe, objective: str) -> Any:
    """Set what has gradients in a stage; with LoRA the model comes back wrapped by PEFT. Dropout off unless wanted.

    ``objective`` is the kind of `Objective`: hidden states say nothing of a pooler, which then has no gradients (and
    processes that wait for some would wait for ever).
    """
    if not recipe.dropout:
        _disable_dropout(model)
    if stage.train == "all":
        model.requires_grad_(True)
        if objective == "states" and getattr(model, "pooler", None) is not None:
            model.pooler.requires_grad_(False)
        return model
    model.requires_grad_(False)
    if stage.train == "attention":
        for attention in Anatomy.of(model).attentions.values():
            attention.requires_grad_(True)
    if stage.train == "lora":
        from peft import LoraConfig, get_peft_model

        # Exact classes: a router that is a kind of linear layer returns more than one tensor.
        linear = [name for name, m in model.named_modules() if type(m) in (nn.Linear, Conv1D)]
        head = model.get_output_embeddings()
        targets = [name for name in linear if model.get_submodule(name) is not head]
        settings = LoraConfig(r=stage.lora_rank, lora_alpha=2 * stage.lora_rank, target_modules=targets)
        model = get_peft_model(model, settings)
    for name, parameter in model.named_parameters():
        if is_own(name):
            parameter.requires_grad_(True)
    return model


def merged(model: Any) -> Any:
    """The plain model of a stage: low-rank updates become part of the weights they update."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def groups(model: nn.Module, stage: Stage, recipe: Recipe) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: tables, tails and factors at their own rate and without decay; weights; the rest of
    the weights (norms, offsets), without decay. Each group's ``peak`` is the rate that `rate_factor` scales."""
    by_group: dict[str, list[nn.Parameter]] = {"tables": [], "weights": [], "no decay": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            by_group["tables" if is_own(name) else "weights" if parameter.ndim > 1 else "no decay"].append(parameter)
    rates = {"tables": stage.table_rate, "weights": stage.rate, "no decay": stage.rate}
    return [
        {
            "params": parameters,
            "name": name,
            "lr": rates[name],
            "peak": rates[name],
            "weight_decay": recipe.weight_decay if name == "weights" else 0.0,
        }
        for name, parameters in by_group.items()
        if parameters
    ]


def rate_factor(stage: Stage, step: int, steps: int) -> float:
    """What multiplies the peak rates at ``step`` of ``steps``: a function of the two, so there is no state to keep."""
    rising = round(stage.warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    done = (step - rising) / max(steps - rising, 1)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[stage.decay]


def _disable_dropout(model: nn.Module) -> None:
    """No dropout, in modules and in attributes that attention reads, whose slow way it would be."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def optimizer_of(model: nn.Module, stage: Stage, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW over the stage's groups."""
    return torch.optim.AdamW(groups(model, stage, recipe), betas=(0.9, 0.98))
