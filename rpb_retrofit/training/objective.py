"""What a step minimises: the next token, masked tokens, or the distance from the source's predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from rpb_retrofit.errors import ConfigError
from rpb_retrofit.training.attention import AttentionMatch
from rpb_retrofit.training.batches import IGNORED, Batch
from rpb_retrofit.training.divergence import divergence
from rpb_retrofit.training.recipe import Recipe, Stage
from rpb_retrofit.training.relations import Relations

Model = Callable[..., Any]


@dataclass(frozen=True)
class Objective:
    """The recipe's objective for one kind of model. ``teacher`` is the source, where it is distilled.

    ``relations``, where there are any, count ``weight`` times their divergence a token besides. ``match``, where there
    is one, is all that counts.
    """

    kind: str  # "next-token", "masked", "predictions" or "states"
    share: float
    teacher: PreTrainedModel | None
    weight: float = 0.0
    relations: Relations | None = None
    match: AttentionMatch | None = None

    def __call__(self, model: Model, batch: Batch) -> Tensor:
        """The sum over scored targets of the loss, a float32 scalar: divide by `Batch.scored` for the mean."""
        if self.match is not None:
            return self.match(model, batch)
        loss = self._distance(model, batch)
        if self.relations is None:
            return loss
        return loss + self.weight * batch.scored * self.relations.apart()

    def _distance(self, model: Model, batch: Batch) -> Tensor:
        scored = batch.target != IGNORED
        if self.kind == "states":
            return _states_distance(model, self.teacher, batch, scored)
        output = model(**batch.inputs, use_cache=False)
        logits = output.logits[scored].float()
        if self.teacher is None:
            return F.cross_entropy(logits, batch.target[scored], reduction="sum")
        loss = self.share * divergence(logits, self._teacher_output(batch).logits[scored])
        if self.share < 1:
            loss = loss + (1 - self.share) * F.cross_entropy(logits, batch.target[scored], reduction="sum")
        return loss

    @torch.no_grad()
    def _teacher_output(self, batch: Batch) -> Any:
        assert self.teacher is not None
        return self.teacher(**batch.inputs, use_cache=False)


def _states_distance(model: Model, teacher: Model | None, batch: Batch, scored: Tensor) -> Tensor:
    """The squared distance of two models' states after each layer, over the taught ones' size: the mean over layers.

    The layers of a retrofit are its source's, so each has a state to match, not only the last (FitNets, Romero et al.
    2014, arXiv:1412.6550; TinyBERT, Jiao et al. 2019, arXiv:1909.10351).
    """
    assert teacher is not None
    learnt = model(**batch.inputs, output_hidden_states=True).hidden_states[1:]
    with torch.no_grad():
        taught = teacher(**batch.inputs, output_hidden_states=True).hidden_states[1:]
    total = torch.zeros((), device=scored.device)
    for state, wanted in zip(learnt, taught, strict=True):
        state, wanted = state[scored].float(), wanted[scored].float()
        total = total + ((state - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-12)).sum()
    return total / len(learnt)


@contextmanager
def comparing_attention(objective: Objective, student: PreTrainedModel, stage: Stage) -> Iterator[Objective]:
    """Inside, the objective compares the attention of ``student`` with its teacher's, where it is to: beside what they
    predict, or, where the stage trains attention by itself, instead of it."""
    if stage.train == "attention":
        assert objective.teacher is not None, "only distillation trains attention by itself"
        with closing(AttentionMatch(student, objective.teacher)) as match:
            yield replace(objective, match=match)
        return
    if not objective.weight:
        yield objective
        return
    assert objective.teacher is not None, "only distillation has a weight"
    with closing(Relations(student, objective.teacher)) as relations:
        yield replace(objective, relations=relations)


def objective_for(recipe: Recipe, model: PreTrainedModel, causal: bool, teacher: PreTrainedModel | None) -> Objective:
    """The recipe's objective for a model; ConfigError where the model has nothing that it could be computed from."""
    name, wanted, head = type(model).__name__, recipe.objective, model.get_output_embeddings() is not None
    if wanted == "distillation":
        return Objective("predictions" if head else "states", recipe.distillation_share, teacher, recipe.relations)
    if not head:
        raise ConfigError(f"objective={wanted}: {name} has no language head; choose distillation")
    if (wanted == "next-token") != causal:
        kind, other = ("causal", "next-token") if causal else ("bidirectional", "masked")
        raise ConfigError(f"objective={wanted}: {name} has {kind} attention; choose {other} or distillation")
    return Objective(wanted, 0.0, None)


def masked(batch: Batch, tokenizer: Any, share: float, seed: str) -> Batch:
    """The batch with a share of its tokens hidden behind the mask token, which alone are targets (BERT: 80% masked, 10%
    another token, 10% themselves; Devlin et al. 2018, arXiv:1810.04805)."""
    if tokenizer.mask_token_id is None:
        raise ConfigError("objective=masked: this tokenizer has no mask token; choose distillation")
    generator = torch.Generator().manual_seed(int.from_bytes(seed.encode()) % (2**63))
    special = torch.isin(batch.input_ids, torch.tensor(tokenizer.all_special_ids))
    draw, how = (torch.rand(batch.input_ids.shape, generator=generator) for _ in range(2))
    chosen = (draw < share) & (batch.target != IGNORED) & ~special
    other = torch.randint(len(tokenizer), batch.input_ids.shape, generator=generator)
    ids = torch.where(chosen & (how < 0.8), tokenizer.mask_token_id, batch.input_ids)
    ids = torch.where(chosen & (how >= 0.9), other, ids)
    return replace(batch, input_ids=ids, target=torch.where(chosen, batch.target, IGNORED))
