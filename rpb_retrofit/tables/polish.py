"""End-to-end polish: all tables at once, so that the retrofit predicts what its source predicts.

Calibration makes what each head hands on like the source's, and cannot know which differences matter for the answer. A
few hundred steps of distillation do: the source's most likely next tokens are kept on disk, then the tables, and
nothing else, follow the gradient of the divergence from them (Hinton et al. 2015, arXiv:1503.02531).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from rpb_retrofit.errors import ConfigError, DataError
from rpb_retrofit.files.spool import Spool
from rpb_retrofit.instruments.modes import evaluating

LENGTH = 512
"""Most tokens of a step."""

TOP = 64
"""Of the source's next-token distribution so many probabilities are kept, and the rest as one."""

RATE = 1e-2
"""Adam's largest step; tables are of the order of one."""


@dataclass(frozen=True)
class PolishReport:
    """What the steps reached on text that none of them saw: the divergence from the source's next-token distribution,
    in nats a token, before and after. ``kept`` is false where they made it worse, and the tables are as before."""

    steps: int
    tokens: int
    before: float
    after: float
    kept: bool

    def __str__(self) -> str:
        text = (
            f"polished in {self.steps} steps, {self.tokens:,} tokens: next-token KL from the source on held-out text "
        )
        text += f"{self.before:.3f} -> {self.after:.3f} nats"
        return text if self.kept else f"{text}; that is no better, so the tables are as they were before it"


class Polish:
    """A polish in two acts: `teach` on the plain model, `apply` on the same model with tables attached."""

    def __init__(self, windows: Sequence[Tensor], steps: int, spool: Spool) -> None:
        pieces = [piece for window in windows for piece in window.split(LENGTH) if len(piece) > 1]
        if len(pieces) < 2:
            raise DataError(
                f"polish={steps}: a single piece of text of at most {LENGTH} tokens; give more, the last one is "
                "held out"
            )
        # The last tenth, one piece at least, only measures.
        held = max(1, len(pieces) // 10)
        self.lessons, self.held_out, self.steps, self.spool = pieces[:-held], pieces[-held:], steps, spool

    @torch.no_grad()
    def teach(self, model: PreTrainedModel) -> None:
        """Keep what the source predicts. ConfigError where it does not predict next tokens."""
        pieces = [*self.lessons[: self.steps], *self.held_out]
        for number, piece in enumerate(tqdm(pieces, desc="source's predictions", unit="text", leave=False)):
            with evaluating(model):
                log = _log_probabilities(model, piece, self.steps)
            self.spool["teacher", number] = tuple(log.topk(min(TOP, log.shape[-1])))

    def apply(self, model: PreTrainedModel, tables: Sequence[str]) -> PolishReport:
        """Train the named tables of an attached model; all other parameters are left alone, gradients included."""
        parameters = {name: model.get_parameter(name) for name in tables}
        start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        lessons = self.lessons[: self.steps]
        before = self._held_out(model, len(lessons))
        if not math.isfinite(before):
            raise ConfigError(
                f"polish={self.steps}: the source's predictions, or the retrofit's, are not finite: does the source "
                "give numbers on this text, in a dtype that holds them?"
            )
        tokens = 0
        with _only(model, parameters), evaluating(model):
            optimizer = torch.optim.Adam(parameters.values(), lr=RATE, betas=(0.9, 0.98))
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=self.steps + 1, pct_start=0.1)
            with tqdm(total=self.steps, desc="polishing", unit="step", leave=False) as bar:
                for step in range(self.steps):
                    number = step % len(lessons)
                    loss = self._divergence(model, lessons[number], number)
                    if not loss.isfinite():
                        break  # the held-out text says what to do about it
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    tokens += len(lessons[number])
                    bar.update(1)
                    bar.set_postfix(KL=f"{loss.item():.3f}")
            optimizer.zero_grad()
        after = self._held_out(model, len(lessons))
        kept = after < before
        if not kept:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(start[name])
        return PolishReport(self.steps, tokens, before, after, kept)

    @torch.no_grad()
    def _held_out(self, model: PreTrainedModel, first: int) -> float:
        with evaluating(model):
            losses = [self._divergence(model, piece, first + i).item() for i, piece in enumerate(self.held_out)]
        return sum(losses) / len(losses)

    def _divergence(self, model: PreTrainedModel, piece: Tensor, number: int) -> Tensor:
        log_p, likely = self.spool["teacher", number]
        log_q = _log_probabilities(model, piece, self.steps).gather(-1, likely)
        rest_p, rest_q = ((1 - log.exp().sum(-1)).clamp(min=1e-6) for log in (log_p, log_q))
        inside = (log_p.exp() * (log_p - log_q)).sum(-1)
        return (inside + rest_p * (rest_p.log() - rest_q.log())).mean()


def _log_probabilities(model: PreTrainedModel, piece: Tensor, steps: int) -> Tensor:
    if model.get_output_embeddings() is None or model.config.is_encoder_decoder:
        raise ConfigError(
            f"polish={steps}: {type(model).__name__} is no plain language model with next tokens "
            "to predict: leave it out"
        )
    output: Any = model(input_ids=piece[None].to(model.device), use_cache=False)
    return output.logits[0].float().log_softmax(-1)


@contextmanager
def _only(model: PreTrainedModel, trained: dict[str, Any]) -> Iterator[None]:
    """Inside, only these parameters have gradients."""
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])
