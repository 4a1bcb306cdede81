"""The source as the teacher of its retrofit, in no more memory than what differs between the two."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from rpb_retrofit.checkpoint.load import open_model
from rpb_retrofit.errors import CheckpointError, ConfigError


def open_teacher(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The source of a retrofit, in evaluation mode, without gradients, in float32 as the one that learns.

    Raises CheckpointError where it cannot be found, ConfigError where its vocabulary is another one.
    """
    try:
        teacher, _ = open_model(name)
    except CheckpointError as error:
        raise CheckpointError(f"the source to learn from: {error}; give it as --source") from error
    if teacher.config.vocab_size != model.config.vocab_size:
        raise ConfigError(
            f"the source '{name}' has {teacher.config.vocab_size} tokens and the retrofit {model.config.vocab_size}: "
            "give its own source as --source"
        )
    if (teacher.get_output_embeddings() is None) != (model.get_output_embeddings() is None):
        raise ConfigError(
            f"the source '{name}' is a {type(teacher).__name__} and the retrofit a {type(model).__name__}: give its "
            "own source as --source"
        )
    return teacher.float().requires_grad_(False).eval()


def share_weights(teacher: PreTrainedModel, student: nn.Module) -> int:
    """Let the teacher read the student's tensors where both hold the same numbers and the student's are not trained.

    Returns how many bytes that spares.
    """
    frozen = {
        _without_peft(name): parameter
        for name, parameter in student.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad
    }
    spared, seen = 0, set()
    for name, parameter in teacher.named_parameters():
        twin = frozen.get(name)
        if twin is not None and twin.dtype == parameter.dtype and torch.equal(twin, parameter):
            parameter.data = twin.data
            if twin.data_ptr() not in seen:
                seen.add(twin.data_ptr())
                spared += twin.numel() * twin.element_size()
    return spared


def _without_peft(name: str) -> str:
    """A parameter's name without what PEFT puts around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
