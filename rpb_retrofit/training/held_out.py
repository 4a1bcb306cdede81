"""The text that is kept apart: what training does to the loss on it, and where in the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from rpb_retrofit.errors import DataError
from rpb_retrofit.evaluation.nll import LengthResult, Windows, nll_at_length
from rpb_retrofit.training.batches import Layout, collate
from rpb_retrofit.training.objective import Objective
from rpb_retrofit.training.recipe import Recipe


@dataclass(frozen=True)
class HeldOut:
    """Documents as tokens, and the lengths of the windows that are scored."""

    documents: Sequence[Tensor]
    lengths: Sequence[int]
    tokens: int
    objective: Objective
    layout: Layout
    bos: int | None

    @torch.no_grad()
    def measure(self, model: Any, accelerator: Accelerator) -> tuple[float, list[LengthResult]]:
        """The mean of the next-token loss by length, in nats a token, and its parts; for other models the objective's
        mean and nothing more. All processes compute the same."""
        if self.layout.causal and self.objective.kind != "states":
            plain = accelerator.unwrap_model(model)
            with accelerator.autocast():
                results = [
                    nll_at_length(
                        plain,
                        self.documents,
                        Windows(n, n - (self.bos is not None), self.bos),
                        self.tokens,
                        "held-out text, windows of ",
                        quiet=not accelerator.is_main_process,
                    )
                    for n in self.lengths
                ]
            return results[-1].nll, results
        room = self.lengths[-1] - len(self.layout.before) - len(self.layout.after)
        total, scored = 0.0, 0
        for document in self.documents:
            for part in document.split(room):
                if scored >= self.tokens:
                    break
                row = [torch.cat([self.layout.before, part, self.layout.after])]
                batch = collate([row], self.lengths[-1], self.layout).to(accelerator.device)
                with accelerator.autocast():
                    total += self.objective(model, batch).item()
                scored += batch.scored
        return total / max(scored, 1), []


def held_out_for(
    recipe: Recipe, documents: Sequence[Tensor], objective: Objective, layout: Layout, bos: int | None
) -> HeldOut | None:
    """What the recipe evaluates on, in windows of its lengths; None where it does not want to.

    Raises DataError where no document fills the shortest; longer ones that none fills are left out.
    """
    lengths = sorted({length for stage in recipe.stages for length in stage.lengths})
    if not recipe.evaluate_tokens:
        return None
    longest = max(map(len, documents), default=0)
    if layout.causal and objective.kind != "states":
        if longest < lengths[0] or recipe.evaluate_tokens < lengths[0]:
            raise DataError(
                f"held-out text: its longest document has {longest} tokens, evaluate_tokens={recipe.evaluate_tokens}, "
                f"and a window takes {lengths[0]}: give more text, a held_out file, or evaluate_tokens=0"
            )
        lengths = [n for n in lengths if n <= min(longest, recipe.evaluate_tokens)]
    return HeldOut(documents, lengths, recipe.evaluate_tokens, objective, layout, bos)
