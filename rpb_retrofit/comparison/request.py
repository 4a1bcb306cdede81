"""What a user asks of a comparison, checked before anything slow, and turned into a plan of measurements."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpb_retrofit.comparison.arms import ARMS, parse
from rpb_retrofit.comparison.candidates import Constraints
from rpb_retrofit.comparison.healing import Healing, check_rates
from rpb_retrofit.comparison.measures import ComparisonPlan
from rpb_retrofit.config import written_count
from rpb_retrofit.errors import ConfigError
from rpb_retrofit.evaluation.inputs import GivenText, OpenModel, check_bos, check_least, check_lengths, given_text
from rpb_retrofit.evaluation.retrieval import check_kind
from rpb_retrofit.tables.calibrate import SHORTEST
from rpb_retrofit.text.reading import Text
from rpb_retrofit.training.recipe import read_recipe

LONGEST_PROBED = 2048
"""Tokens of the longest prompts that are timed and asked about unless others are wanted: both are slow on a CPU."""

LONGEST_TRAINED = 512
"""Tokens of the sequences that are trained on where no recipe says."""


@dataclass(frozen=True)
class Request:
    """The arguments of `rpb_retrofit.compare`, which documents them, by their names.

    ConfigError for settings that mean nothing, or that contradict each other.
    """

    target_length: int | None
    max_slowdown: float | None
    must_keep: float | None
    train_tokens: int | None
    arms: Sequence[str] | None
    data: GivenText
    lengths: Sequence[int] | None
    tokens: int | None
    calibration: GivenText
    calibration_tokens: int
    calibration_length: int | None
    heal: int | None
    train_data: str | os.PathLike[str] | None
    recipe: str | os.PathLike[str] | None
    rates: Sequence[float]
    seeds: int
    retrieval: Sequence[str]
    items: int
    asked: Sequence[int] | None
    timed: Sequence[int] | None
    rounds: int
    bos: str
    seed: int

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Request:
        """The request that is in the arguments of `rpb_retrofit.compare`, which has a few more."""
        return cls(**{name: arguments[name] for name in cls.__dataclass_fields__})

    def __post_init__(self) -> None:
        self._check_numbers()
        most = self.constraints.train_tokens  # constraints check their own values
        if self.heal is not None and most is not None and self.heal > most:
            raise ConfigError(
                f"--heal {written_count(self.heal)} and --train-tokens {written_count(most)} contradict "
                "each other: no arm that is trained could be taken; lower the one or raise the other"
            )
        if self.heal is not None and self.train_data is None:
            raise ConfigError("--heal needs text to train on, other text than is scored: give --train-data FILE")
        if self.heal is None and (self.train_data is not None or self.recipe is not None):
            idle = "--train-data" if self.train_data is not None else "--recipe"
            raise ConfigError(f"{idle} would go unused: it says how to train, which --heal asks for; give both")
        for name in self.names:
            parse(name)
        if self.max_slowdown is not None and not self.rounds:
            raise ConfigError(
                f"--max-slowdown {self.max_slowdown} and --rounds 0 contradict each other: nothing would be timed"
            )
        for kind in self.retrieval:
            check_kind(kind)

    def _check_numbers(self) -> None:
        check_bos(self.bos)
        check_rates(self.rates)
        check_least(target_length=(self.target_length, 2), tokens=(self.tokens, 1), heal=(self.heal, 1))
        check_least(train_tokens=(self.train_tokens, 0), seeds=(self.seeds, 1), items=(self.items, 0))
        check_least(calibration_tokens=(self.calibration_tokens, 1), rounds=(self.rounds, 0))
        check_least(calibration_length=(self.calibration_length, SHORTEST))
        for option in ("lengths", "asked", "timed"):
            if (lengths := getattr(self, option)) is not None:
                check_lengths(lengths, f"--{option}")

    @property
    def constraints(self) -> Constraints:
        """What the user can't do without."""
        return Constraints(self.max_slowdown, self.train_tokens, self.must_keep)

    @property
    def names(self) -> list[str]:
        """The arms, all the usual ones unless the user names some."""
        return list(self.arms) if self.arms else [name for name, arm in ARMS.items() if arm.usual]

    def texts(self) -> tuple[Text, Text]:
        """What is scored, and what arms are fitted to: never the same. ConfigError where they are one text."""
        for option, text in (("--calibration", self.calibration), ("--train-data", self.train_data)):
            if _same(text, self.data):
                what = f"'{text}'" if isinstance(text, str | os.PathLike) else "list"
                raise ConfigError(
                    f"{option} {what} is the --data too: arms that are fitted to the text they are scored on look "
                    "better than they are; give another file"
                )
        scored, fitted = given_text(self.data), given_text(self.calibration, "--calibration")
        if self.data is None and self.calibration is None:
            (whole,) = scored.documents
            half = len(whole) // 2
            scored = Text(f"the first half of {scored.name}", [whole[:half]])
            fitted = Text(f"the second half of {fitted.name}", [whole[half:]])
        return scored, fitted

    def plan(self, name: str, context: int | None) -> ComparisonPlan:
        """What is measured on a source of that name, trained for ``context`` tokens (None: nothing says)."""
        target = self.target_length or 2 * (context or 0)
        if target < 2:
            raise ConfigError(f"'{name}' does not say for how many tokens it was trained: give --target-length")
        usual = [n for n in ((context or target) // 4, context or target) if 2 <= n < target]
        lengths = sorted({*(self.lengths or usual), target})
        if self.must_keep is not None and context is not None and min(lengths) > context:
            raise ConfigError(
                f"--must-keep {self.must_keep} and --lengths {','.join(map(str, self.lengths or lengths))} contradict "
                f"each other: none lies within the context of {context}; add one that does"
            )
        short = tuple(n for n in lengths if n <= LONGEST_PROBED) or (min(LONGEST_PROBED, lengths[0]),)
        return ComparisonPlan(
            target,
            tuple(lengths),
            self.tokens or max(8192, target),
            short if self.asked is None else tuple(check_lengths(self.asked)),
            tuple(dict.fromkeys(self.retrieval)),
            self.items,
            short if self.timed is None else tuple(check_lengths(self.timed)),
            self.rounds,
            self.seed,
        )

    def healing(self, source: OpenModel, context: int | None) -> Healing | None:
        """The budget of training: the recipe's stages, scaled to so many tokens; None where nothing is trained."""
        if self.heal is None or self.train_data is None:
            return None
        settings: dict[str, Any] = {"data": [{"name": os.fspath(self.train_data)}]}
        if self.recipe is None:
            length = min(context or LONGEST_TRAINED, LONGEST_TRAINED)
            stage = {"train": "all", "tokens": self.heal, "lengths": {length: 1.0}}
            settings |= {"objective": "next-token", "stages": [stage], "seed": self.seed}
        recipe = read_recipe(None if self.recipe is None else Path(self.recipe), settings)
        share = self.heal / recipe.tokens
        stages = [stage.model_copy(update={"tokens": max(1, round(stage.tokens * share))}) for stage in recipe.stages]
        recipe = recipe.model_copy(update={"stages": stages})
        teacher = source.network if recipe.objective == "distillation" else None
        return Healing(recipe, list(self.rates), self.seeds, source.tokenizer, teacher)


def _same(text: GivenText, scored: GivenText) -> bool:
    """Whether both are one file, or one list of documents."""
    if text is None or scored is None:
        return False
    if isinstance(text, str | os.PathLike) or isinstance(scored, str | os.PathLike):
        files = [Path(one).absolute() for one in (text, scored) if isinstance(one, str | os.PathLike)]
        return len(files) == 2 and files[0] == files[1]
    return list(text) == list(scored)
