"""A model in evaluation mode, or with eager attention, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from rpb_retrofit.instruments.attributes import set_attribute
from rpb_retrofit.runtime.anatomy import Anatomy


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, no module of the model trains; then each does what it did before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def eager(anatomy: Anatomy) -> Iterator[None]:
    """Inside, a model that does not use the interface runs its eager attention, which hands out its weights."""
    with ExitStack() as undo:
        for config in anatomy.configs:
            set_attribute(undo, config, "_attn_implementation_internal", "eager")
        yield
