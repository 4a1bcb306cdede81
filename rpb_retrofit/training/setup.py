"""What the stages of a run share: the text as rows of tokens, the objective, what is kept apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from rpb_retrofit.errors import ConfigError, DataError, UnsupportedModelError
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.text.repeats import NOISE
from rpb_retrofit.text.tokens import bos_policy, special_ids, special_tokens, tokenise
from rpb_retrofit.training.batches import Layout, RowRepeats, Rows, layout_of
from rpb_retrofit.training.documents import Mixture, open_sources
from rpb_retrofit.training.held_out import HeldOut, held_out_for
from rpb_retrofit.training.objective import Objective, objective_for
from rpb_retrofit.training.recipe import Recipe


@dataclass(frozen=True)
class TrainingSetup:
    """What the stages of a run have in common. ``label`` is what the model is called in what is shown."""

    accelerator: Accelerator
    recipe: Recipe
    rows: Rows
    layout: Layout
    tokenizer: Any
    objective: Objective
    held_out: HeldOut | None
    label: str


def open_setup(
    accelerator: Accelerator,
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: Any,
    teacher: PreTrainedModel | None,
    label: str,
    say: Callable[[str], None],
) -> TrainingSetup:
    """What ``model``, called ``label``, is trained with; the same for every model of one tokenizer.

    Raises ConfigError, DataError or UnsupportedModelError for wrong text and tokenizers, before anything is trained.
    """
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{type(model).__name__}: only decoders and encoders can be fine-tuned here")
    embeddings: Any = model.get_input_embeddings()
    size = embeddings.weight.shape[0]
    if len(tokenizer) > size:
        raise DataError(
            f"the tokenizer of '{model.name_or_path}' has {len(tokenizer)} tokens, its model {size}: wrong tokenizer"
        )
    before, after = special_tokens(tokenizer)
    lengths = [length for stage in recipe.stages for length in stage.lengths]
    _check_lengths(lengths, len(before) + len(after), teacher or (model if label == "control" else None), say)
    layout = layout_of(model, tokenizer, before, after)
    sources, weights, apart = open_sources(recipe)

    def encode(documents: Sequence[str]) -> list[torch.Tensor]:
        encoded = tokenise(tokenizer, documents)
        return [torch.cat([before, ids, after]) if layout.packed and len(ids) else ids for ids in encoded]

    objective = objective_for(recipe, model, layout.causal, teacher)
    held = held_out_for(recipe, tokenise(tokenizer, apart), objective, layout, bos_policy(tokenizer, "auto"))
    stream = Mixture(sources, weights, encode)
    if (tokens := stream.count_up_to(longest := max(lengths))) < longest:
        raise DataError(
            f"the training text has {tokens} tokens, fewer than one sequence of {longest}: give more text or "
            "shorter lengths"
        )
    rows = Rows(stream, layout, _repeats(recipe, tokenizer))
    return TrainingSetup(accelerator, recipe, rows, layout, tokenizer, objective, held, label)


def _repeats(recipe: Recipe, tokenizer: Any) -> RowRepeats | None:
    if not recipe.repeats:
        return None
    taught = recipe.objective == "distillation" and recipe.distillation_share == 1
    return RowRepeats(recipe.repeats, recipe.seed, special_ids(tokenizer), NOISE if taught else 0.0)


def _check_lengths(
    lengths: Sequence[int], special: int, source: PreTrainedModel | None, say: Callable[[str], None]
) -> None:
    """``source`` is whatever takes part with its own positions, as a teacher or a control."""
    if min(lengths) <= special + 1:
        raise ConfigError(f"lengths: {min(lengths)} tokens leave no room beside {special} special ones: make it longer")
    if source is None:
        return
    anatomy = Anatomy.of(source)
    family, context = anatomy.family, anatomy.context
    if context is None or max(lengths) <= context:
        return
    if family.mechanism in ("learned", "sinusoidal"):
        raise ConfigError(
            f"lengths: {max(lengths)} tokens, and the source has {context} {family.mechanism} positions: it can "
            "neither teach nor be a control beyond them; make it shorter, or choose next-token or masked"
        )
    say(f"sequences of {max(lengths)} tokens are longer than the source's context of {context}")
