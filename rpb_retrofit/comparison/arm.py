"""An arm of a comparison: one positional choice, put into a twin of the source.

A twin is a model of its own that shares the source's weights, so an arm is undone by letting go of it: the source is
never touched, and a dozen arms fit where one model does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor
from transformers import PreTrainedModel

from rpb_retrofit.errors import ConfigError
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.runtime.families import Family


@dataclass(frozen=True)
class Situation:
    """What an arm is told: the ``source``, the ``target`` length in tokens, and text to calibrate on.

    ``windows`` are token ids (n,); ``number`` is what the user wrote behind the arm's name, if anything.
    """

    source: PreTrainedModel
    target: int
    windows: Sequence[Tensor] = ()
    number: float | None = None

    @cached_property
    def anatomy(self) -> Anatomy:
        """What the source is made of."""
        return Anatomy.of(self.source)

    @property
    def family(self) -> Family:
        """How positions enter the source."""
        return self.anatomy.family

    @cached_property
    def context(self) -> int:
        """Tokens that the source was trained for; ConfigError where nothing says."""
        if (context := self.anatomy.context) is None:
            raise ConfigError(f"'{self.source.name_or_path}' does not say for how many tokens it was trained")
        return context

    @property
    def reach(self) -> int:
        """The longest window of calibration: farther offsets were never seen."""
        return max(map(len, self.windows), default=self.context)


Apply = Callable[[PreTrainedModel, Situation], str]
"""Changes a twin in place, and says how a user gets the same model. ConfigError or UnsupportedModelError, as one line,
where the arm does not apply to the source."""


@dataclass(frozen=True)
class Arm:
    """A positional choice.

    ``about``: what it is, in a sentence, with its source. ``number``: what the number behind its name means; empty
    where it takes none. ``needed``: without that number there is no such arm. ``rewrites``: it changes some of the
    source's weights. ``usual``: it is tried where the user names no arms.
    """

    name: str
    about: str
    apply: Apply
    number: str = ""
    needed: bool = False
    rewrites: bool = False
    usual: bool = True


def twin(source: PreTrainedModel, shared: bool = True) -> PreTrainedModel:
    """A model like ``source`` with modules of its own, whose weights are the source's, or, not ``shared``, copies."""
    memo = {id(tensor): tensor for tensor in source.parameters()} if shared else {}
    return copy.deepcopy(source, memo)


def share(model: PreTrainedModel, source: PreTrainedModel) -> None:
    """Let a twin's weights that equal the source's be the source's: copies of what did not change go."""
    source_parameters = dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        other = source_parameters.get(name)
        if other is not None and other.shape == parameter.shape and bool((other == parameter).all()):
            parameter.data = other.data
