"""Healing: every arm trained on the same tokens, in the same order, by the same recipe, in memory.

The loop is that of `rpb finetune`; only nothing is saved, since an arm is trained to be measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate.utils import set_seed
from transformers import PreTrainedModel

from rpb_retrofit.errors import ConfigError, TrainingError
from rpb_retrofit.evaluation.nll import check_length
from rpb_retrofit.files.temporary import temporary_folder
from rpb_retrofit.training.parameters import merged, prepare
from rpb_retrofit.training.processes import open_accelerator
from rpb_retrofit.training.recipe import Recipe
from rpb_retrofit.training.setup import open_setup
from rpb_retrofit.training.stage import StageRun

SEARCHED = 4
"""A rate is tried on one token in so many of the budget."""


@dataclass(frozen=True)
class Healed:
    """What training did: ``held_out`` is the loss at its end on text kept apart, in nats a token."""

    held_out: float | None
    seconds: float


@dataclass(frozen=True)
class Healing:
    """The budget of every arm: a recipe, the ``rates`` of the weights that are tried, and how many ``seeds``.

    ``teacher``: the source, where the recipe distils it.
    """

    recipe: Recipe
    rates: Sequence[float]
    seeds: int
    tokenizer: Any
    teacher: PreTrainedModel | None = None

    def __post_init__(self) -> None:
        check_rates(self.rates)
        if self.seeds < 1:
            raise ConfigError(f"seeds {self.seeds}: at least 1")

    def search(self, model: PreTrainedModel, rate: float, label: str, say: Callable[[str], None]) -> float:
        """The held-out loss after a share of the budget at one rate; infinite where it diverges."""
        recipe = self._recipe(rate, 0, SEARCHED)
        try:
            held_out = heal(model, self.tokenizer, recipe, label, say, self.teacher)[1].held_out
        except TrainingError:
            return float("inf")
        if held_out is None:
            raise ConfigError("rates can only be compared on text that is kept apart: set evaluate_tokens above 0")
        return held_out

    def heal(
        self, model: PreTrainedModel, rate: float, seed: int, label: str, say: Callable[[str], None]
    ) -> tuple[PreTrainedModel, Healed]:
        """The model after the whole budget. Each seed begins where the one before it ended: in another order of the
        documents, or, of one document, at another place."""
        recipe = self._recipe(rate, seed)
        return heal(model, self.tokenizer, recipe, label, say, self.teacher, skip=seed * recipe.tokens)

    def _recipe(self, rate: float, seed: int, part: int = 1) -> Recipe:
        stages = [
            stage.model_copy(update={"rate": rate, "tokens": max(1, stage.tokens // part)})
            for stage in self.recipe.stages
        ]
        never = sum(stage.tokens for stage in stages) + 1
        return self.recipe.model_copy(
            update={
                "stages": stages,
                "seed": self.recipe.seed + seed,
                "save_every": never,
                "evaluate_every": never,
                "trackers": [],
            }
        )


def check_rates(rates: Sequence[float]) -> None:
    """ConfigError for none, or for one that is no learning rate."""
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise ConfigError(f"rates {list(rates)}: give at least one, above 0 and finite")


def heal(
    model: PreTrainedModel,
    tokenizer: Any,
    recipe: Recipe,
    label: str,
    say: Callable[[str], None],
    teacher: PreTrainedModel | None = None,
    skip: int = 0,
) -> tuple[PreTrainedModel, Healed]:
    """Train a model in memory, in place but for LoRA, on what follows the first ``skip`` tokens of the text.

    Raises what `rpb finetune` raises.
    """
    check_length(model, longest := max(length for stage in recipe.stages for length in stage.lengths))
    with temporary_folder() as folder:
        accelerator = open_accelerator(recipe, str(folder))
        setup = open_setup(accelerator, recipe, model, tokenizer, teacher, label, say)
        setup.rows.take(skip // longest, longest)
        seconds, held_out = 0.0, None
        for number, stage in enumerate(recipe.stages):
            set_seed(recipe.seed + number)
            student = prepare(model.float(), stage, recipe, setup.objective.kind).to(accelerator.device)
            run = StageRun(setup, number, student, folder / str(number), say)
            run.run()
            seconds += run.progress.seconds
            if run.progress.evaluations:
                held_out = run.progress.evaluations[-1]["loss"]
            accelerator.free_memory()
            model = merged(student)
    return model.eval(), Healed(held_out, seconds)
