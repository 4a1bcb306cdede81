"""Neutralising a source's positional mechanism, without touching a single weight.

A token's position reaches the model through a function of its position index. Give every token the same index, or
the mean over all of them, and the mechanism says nothing any more, whatever its form. The source's weights stay as
they are, so a retrofit shares them with its source and can be reverted exactly.

=============  =====================================================================================================
rope           every token gets index 0: each rotation, of any type, partial, interleaved, complex or rescaled by
               length, becomes the identity times the type's own attention scaling. The highest frequencies may be
               left rotating (see rotation.py): they tell neighbours apart and never leave the angles that training
               showed
learned,       every token gets the mean of the position vectors, each as often as its position occurs, so that
sinusoidal     activations keep their statistics, and a text may be longer than the table was
alibi          the argument that carries the slopes arrives as zeros (or is replaced by the bias, see attach.py)
t5             the module of its own table makes way for the new one
=============  =====================================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from .anatomy import Anatomy, unused_rows
from .errors import PartialMatchError
from .positions import parameters
from .rotation import FEWER, KEPT, Fewer, position_zero, rotate_highest, scaling_of, take_fewer

MEAN = "rpb_mean"
"""Attribute of position embeddings: lengths of texts, and the share of all tokens that lie in texts of each."""


def neutralise(
    anatomy: Anatomy, kept: dict[str, int], lengths: list[tuple[int, float]], in_layers: Sequence[int] = ()
) -> None:
    """Switch the source's mechanism off in place, but for the rotary frequencies that are ``kept``, by buffer.

    ``lengths`` of texts, and the share of all tokens in each, say which positions occur; empty: all alike.
    ``in_layers``: how many each attention keeps, in their order, where not all keep as many as their buffer.

    Raises PartialMatchError where its modules are not found.
    """
    model, family, holders = anatomy.model, anatomy.family, anatomy.position_modules
    if not family.positions:
        return  # ALiBi and T5 live in the attention modules and their arguments: see attach.py
    if not holders:
        raise PartialMatchError(
            f"{type(model).__name__}: no module named '{family.positions}' holds its {family.mechanism} positions"
        )
    for name, holder in holders.items():
        if kept:
            setattr(holder, KEPT, kept)
            holder.register_forward_hook(rotate_highest, with_kwargs=True)
        elif family.mechanism == "rope":
            holder.register_forward_pre_hook(position_zero, with_kwargs=True)
        else:
            holder.__class__ = constant_positions(type(holder))
            setattr(holder, MEAN, lengths)
            parent = model.get_submodule(name.rpartition(".")[0])
            if hasattr(parent, "position_ids"):  # a buffer as long as the table, which would bound the length
                parent.register_forward_pre_hook(unbounded_positions, with_kwargs=True)
    for name, count in zip(anatomy.attentions, in_layers, strict=False):
        _keep_fewer(anatomy, name, count, kept)


def _keep_fewer(anatomy: Anatomy, name: str, count: int, kept: dict[str, int]) -> None:
    """Let an attention keep ``count`` frequencies, where its rotary module keeps more."""
    buffer = anatomy.rotary_buffers[name]
    if count == kept[buffer]:
        return
    rotary = next(module for module in anatomy.position_modules.values() if hasattr(module, buffer))
    module = anatomy.attentions[name]
    setattr(module, FEWER, Fewer(count, anatomy.rotary_counts[buffer], scaling_of(rotary, buffer)))
    module.register_forward_pre_hook(take_fewer, with_kwargs=True)


def hand_over(module: Any, other: Any) -> None:
    """Let ``other`` stand in a position module's place: it is neutralised by the same hooks, which read the same."""
    for name in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        setattr(other, name, getattr(module, name))
    for name in ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        setattr(other, name, getattr(module, name))
    for name in (KEPT, MEAN):
        if name in vars(module):
            setattr(other, name, getattr(module, name))


def restore(model: nn.Module) -> None:
    """Undo `neutralise`."""
    for module in model.modules():
        remove_hooks(module, position_zero, unbounded_positions, rotate_highest, take_fewer)
        for name in (KEPT, FEWER, MEAN):
            vars(module).pop(name, None)
        if isinstance(module, ConstantPositions):
            module.__class__ = cast(Any, type(module).source_class)


def remove_hooks(module: nn.Module, *functions: Any) -> None:
    """Take these functions off a module's forward hooks and pre-hooks."""
    for hooks, with_kwargs in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        for key in [key for key, hook in hooks.items() if hook in functions]:
            del hooks[key]
            with_kwargs.pop(key, None)


def unbounded_positions(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
    """Forward pre-hook of an embedding layer: its own position index, which ends with the table, is not consulted."""
    kwargs = {**dict(zip(parameters(module.__class__), args, strict=False)), **kwargs}
    tokens = kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs["inputs_embeds"]
    kwargs["position_ids"] = torch.zeros(1, tokens.shape[1], dtype=torch.long, device=tokens.device)
    return (), kwargs


class ConstantPositions(nn.Module):
    """A position embedding that gives every token the mean of its vectors, each as often as its position occurs.

    Mixed into the class of the source's own module, so its weight keeps its name, its initialisation and its gradient.
    """

    source_class: type[nn.Module]
    weight: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Whatever the source's module is called with -> (1, 1, hidden), which broadcasts over batch and tokens."""
        vectors, lengths = self.weight[unused_rows(self) :], getattr(self, MEAN)
        if not lengths:
            return vectors.mean(0)[None, None]
        return sum((share * vectors[:length].mean(0) for length, share in lengths), vectors.new_zeros(()))[None, None]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_constant_positions, (type(self).source_class,), self.__dict__


def constant_positions(source: Any) -> Any:
    """The class of position embeddings ``source``, made constant."""
    return _constant_positions(source)


@cache
def _constant_positions(source: Any) -> Any:
    return type(f"Constant{source.__name__}", (ConstantPositions, source), {"source_class": source})


def _new_constant_positions(source: Any) -> Any:
    cls = constant_positions(source)
    return cls.__new__(cls)
