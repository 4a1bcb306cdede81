"""One step of a stage: every process takes its share of the same batch, and all judge the outcome alike."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rpb_retrofit.errors import ConfigError, DataError, TrainingError
from rpb_retrofit.evaluation.speed import is_out_of_memory
from rpb_retrofit.training.batches import Batch, Row, collate, length_of_step
from rpb_retrofit.training.loss_monitor import LossMonitor, first_nonfinite_gradient, first_nonfinite_module
from rpb_retrofit.training.objective import masked
from rpb_retrofit.training.parameters import optimizer_of, rate_factor
from rpb_retrofit.training.processes import Interruption, gathered, shard_tables
from rpb_retrofit.training.recipe import Stage
from rpb_retrofit.training.setup import TrainingSetup
from rpb_retrofit.training.zero import prepare_for_zero


@dataclass
class Progress:
    """What a stage has done so far, as a checkpoint keeps it.

    ``parts`` counts the documents' parts of each length that were attended over: what trained each bucket follows.
    """

    step: int = 0
    scored: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    parts: Counter[int] = field(default_factory=Counter)
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {**self.__dict__, "parts": {str(n): count for n, count in self.parts.items()}}

    @classmethod
    def from_json(cls, settings: dict[str, Any]) -> Progress:
        """The inverse of `to_json`."""
        return cls(**{**settings, "parts": Counter({int(n): count for n, count in settings["parts"].items()})})


class Stepper:
    """Takes the steps of stage ``number`` on ``model``, and notes them in ``progress``."""

    def __init__(self, setup: TrainingSetup, number: int, model: Any) -> None:
        self.setup, self.number = setup, number
        self.accelerator, self.recipe = setup.accelerator, setup.recipe
        self.stage: Stage = setup.recipe.stages[number]
        self.steps = math.ceil(self.stage.tokens / setup.recipe.batch_tokens)
        self.progress, self.monitor = Progress(), LossMonitor(setup.recipe.spike)
        self.signal = 0
        """What any process was sent during the last step, 0 for nothing."""
        for length in self.stage.lengths:
            self._sequences(length)  # says what does not divide before anything runs
        if setup.recipe.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.trains = any(parameter.requires_grad for parameter in model.parameters())
        model.train()
        if not self.trains:  # a control while tables are trained, which it has not: the data goes by
            self.model, self.optimizer = self.accelerator.prepare_model(model, evaluation_mode=True), None
            return
        shard_tables(self.accelerator, model)
        prepare_for_zero(self.accelerator, self.recipe)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer_of(model, self.stage, self.recipe))
        if setup.recipe.compile:
            self.model.compile()
        # Accelerate's own clipping knows how each mode holds its gradients.
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def _sequences(self, length: int) -> int:
        """Sequences of one step, all processes together; ConfigError where they cannot be shared out."""
        count, world = self.recipe.batch_tokens // length, self.accelerator.num_processes
        if count % world:
            raise ConfigError(
                f"batch_tokens={self.recipe.batch_tokens}: {count} sequences of {length} tokens cannot be shared out "
                f"to {world} processes: make it a multiple of {length * world}"
            )
        return count

    def take(self, interruption: Interruption) -> tuple[int, float]:
        """One step of all processes together: tokens seen, and the mean loss of its scored tokens."""
        step, world, rank = self.progress.step, self.accelerator.num_processes, self.accelerator.process_index
        length = length_of_step(self.stage, self.recipe.seed, self.number, step)
        count = self._sequences(length)
        rows = self.setup.rows.take(count, length)
        batch = collate(rows, length, self.setup.layout)
        if self.recipe.objective == "masked":
            seed = f"{self.recipe.seed}/{self.number}/{step}"
            batch = masked(batch, self.setup.tokenizer, self.recipe.mask_share, seed)
        if not (scored := batch.scored):
            raise DataError(f"step {step + 1} of stage {self.number + 1} has no token to score: give longer documents")
        share = batch.part(slice(rank, None, world)).to(self.accelerator.device)
        for group in self.optimizer.param_groups if self.optimizer is not None else ():
            group["lr"] = group["peak"] * rate_factor(self.stage, step, self.steps)
        total = self._accumulate(share, length, scored)
        own = torch.tensor([[total.item(), float(interruption.signal or 0)]], dtype=torch.float64)
        by_rank = self.accelerator.gather(own.to(self.accelerator.device, torch.float32)).cpu()
        loss = by_rank[:, 0].double().sum().item() / scored
        self.signal = int(by_rank[:, 1].max())
        if (wrong := self._try_step(loss, rows, scored)) is not None:
            self._refuse(wrong, loss, by_rank[:, 0], share, scored)
        self.progress.losses.append(loss)
        self.progress.step += 1
        return sum(len(part) for row in rows for part in row), loss

    def _accumulate(self, batch: Batch, length: int, scored: int) -> Tensor:
        """Forward and backward of this process's share; the sum of its losses."""
        at_once = max(1, (self.recipe.micro_tokens or length * len(batch)) // length)
        parts = [batch.part(slice(i, i + at_once)) for i in range(0, len(batch), at_once)]
        total = torch.zeros((), device=self.accelerator.device)
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            with contextlib.nullcontext() if last or not self.trains else self.accelerator.no_sync(self.model):
                try:
                    total += self._pass(part, scored)
                except (torch.OutOfMemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                    raise self._too_large(part, length, scored) from error
        return total

    def _pass(self, batch: Batch, scored: int) -> Tensor:
        if not self.trains:
            with torch.no_grad(), self.accelerator.autocast():
                return self.setup.objective(self.model, batch)
        with self.accelerator.autocast():
            loss = self.setup.objective(self.model, batch)
        # Processes average their gradients; the mean over all scored tokens is wanted.
        self.accelerator.backward(loss * (self.accelerator.num_processes / scored))
        return loss.detach()

    def _too_large(self, batch: Batch, length: int, scored: int) -> ConfigError:
        """The error for a pass that did not fit, with the largest that does."""
        fits, tried = 0, len(batch) // 2
        while tried and not fits:
            if self.optimizer is not None:
                self.optimizer.zero_grad()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            try:
                self._pass(batch.part(slice(0, tried)), scored)
                fits = tried
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                tried //= 2
        what = f"{len(batch)} sequences of {length} tokens at once do not fit into memory"
        if fits:
            return ConfigError(f"{what}; {fits} do: set micro_tokens={fits * length}")
        return ConfigError(
            f"{what}, nor does one: use shorter lengths, gradient_checkpointing, precision=bf16 or FSDP2"
        )

    def _try_step(self, loss: float, rows: Sequence[Row], scored: int) -> str | None:
        """Clip the gradients, and take the step unless something is wrong with it: what that is."""
        if self.optimizer is None:
            self.progress.scored += scored
            return None
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.recipe.clip)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm) if norm is not None else 0.0
        overflow = self.accelerator.scaler is not None and math.isinf(norm)  # float16, whose scaler takes no step then
        if not overflow and (wrong := self.monitor.problem(loss, norm)) is not None:
            return wrong
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.scored += scored
        self.progress.parts.update(len(part) for row in rows for part in row)
        return None

    def _refuse(self, wrong: str, loss: float, by_rank: Tensor, share: Batch, scored: int) -> None:
        """Say where a step went wrong; TrainingError unless the recipe skips such steps.

        ``by_rank``: the sum of each process's losses, (processes,); ``share``: what this process computed its own on;
        ``scored``: targets of all of them.
        """
        assert self.optimizer is not None, "what takes no step cannot take a bad one"
        if not math.isfinite(loss):
            culprit = first_nonfinite_module(self.model, lambda: self.setup.objective(self.model, share))
            what = "module"
        else:
            self.optimizer.zero_grad()  # clipping has spread what is not finite over all of them
            self._accumulate(share, share.input_ids.shape[1], scored)
            culprit, what = first_nonfinite_gradient(self.model), "gradient"
        culprits = [name for name in gathered(self.accelerator, culprit) if name]
        place = f"; the first {what} with a non-finite value is {culprits[0]}" if culprits else ""
        ranks = [str(rank) for rank, total in enumerate(by_rank.tolist()) if not math.isfinite(total)]
        where = f" on rank {', '.join(ranks)}" if ranks else ""
        message = f"step {self.progress.step + 1} of stage {self.number + 1}{where}: {wrong}{place}"
        self.optimizer.zero_grad()
        if self.recipe.on_bad_step == "stop":
            raise TrainingError(
                f"{message}. Lower the rates, or set on_bad_step=skip; the last checkpoint is beside OUT, in OUT.run"
            )
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        self.progress.skipped.append(message)
        if self.accelerator.is_main_process:
            tqdm.write(f"skipped {message}")
