"""Each attention by itself: given what its source's attention is given, it learns to hand on what that hands on.

So every layer learns at once, from a target of its own, and none has to wait until those below it are right: a far
denser signal than the predictions at the end, which then settle what the layers do together. Others who replaced
attention healed in such stages (RADLADS, Goldstein et al. 2025, arXiv:2505.03005).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rpb_retrofit.errors import ConfigError
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.training.batches import IGNORED, Batch

STATES = "hidden_states"
"""The argument of Transformers' attention modules that is attended over."""

TINY = 1e-12
"""What counts as no variance at all."""


class AttentionMatch:
    """Compares the attention modules of a student with its teacher's, on the teacher's inputs, until `close`.

    ConfigError where a model's attention does more than the attention interface: what it is given besides is its own.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        self.teacher = teacher
        self._given: dict[str, Tensor] = {}
        self._wanted: dict[str, Tensor] = {}
        self._apart: dict[str, Tensor] = {}
        self._scored: Tensor | None = None
        self._spare = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(student.forward).parameters else {}
        with ExitStack() as undo:
            for model, before, after in ((teacher, self._keep, self._want), (student, self._replace, self._compare)):
                anatomy = Anatomy.of(model)
                if not anatomy.family.uses_interface:
                    raise ConfigError(
                        f"train=attention: {type(model).__name__} has attention of its own, which takes more than "
                        "states: choose train=all"
                    )
                for name, module in anatomy.attentions.items():
                    hooks: tuple[Any, ...] = (
                        module.register_forward_pre_hook(partial(before, name), with_kwargs=True),
                        module.register_forward_hook(partial(after, name)),
                    )
                    for hook in hooks:
                        undo.callback(hook.remove)
            self.close = undo.pop_all().close

    def __call__(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """The squared distance of the student's outputs from the teacher's, over their variance in the rows that all
        processes run at once: the sum over scored targets of the mean over layers, a float32 scalar."""
        self._scored = batch.target != IGNORED
        with torch.no_grad():
            self.teacher.base_model(**batch.inputs, use_cache=False)
            variance = self._variance()
        model(**batch.inputs, use_cache=False, **self._spare)
        assert self._apart.keys() == self._wanted.keys(), "both models have the same layers, and all ran"
        return torch.stack([self._apart[name] / variance[name] for name in variance]).mean()

    def _variance(self) -> dict[str, Tensor]:
        """Of the teacher's outputs, a scored token: by layer, float32, the same for all processes."""
        assert self._scored is not None
        outputs = [wanted[self._scored].double() for wanted in self._wanted.values()]
        sums = torch.stack([torch.cat([x.sum(0), x.square().sum()[None]]) for x in outputs])
        count = self._scored.sum().to(sums)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
            torch.distributed.all_reduce(count)
        variance = (sums[:, -1] - sums[:, :-1].square().sum(1) / count) / count
        return dict(zip(self._wanted, variance.clamp(min=TINY).float(), strict=True))

    def _keep(self, name: str, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._given[name] = kwargs[STATES] if STATES in kwargs else args[0]

    def _want(self, name: str, module: Any, args: tuple[Any, ...], output: Any) -> None:
        self._wanted[name] = _states(output)

    def _replace(self, name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not module.training:  # a student that is only evaluated has nobody to follow
            return None
        own = kwargs[STATES] if STATES in kwargs else args[0]
        given = self._given[name].to(own.dtype)
        return (args, {**kwargs, STATES: given}) if STATES in kwargs else ((given, *args[1:]), kwargs)

    def _compare(self, name: str, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        """How far the student is; in its place stands the teacher's output, so that no other layer has gradients."""
        if not module.training:
            return None
        assert self._scored is not None
        wanted = self._wanted[name].to(_states(output).dtype)
        own, target = _states(output)[self._scored].float(), wanted[self._scored].float()
        self._apart[name] = (own - target).square().sum()
        return (wanted, *output[1:]) if isinstance(output, tuple) else wanted


def _states(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
