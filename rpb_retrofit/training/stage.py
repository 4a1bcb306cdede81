"""The training loop of one stage, on one process or many: steps, checkpoints, evaluation, and going on after a stop."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from rpb_retrofit.errors import ConfigError, InterruptedRunError, TrainingError
from rpb_retrofit.evaluation.nll import LengthResult
from rpb_retrofit.runtime.bias import RelativePositionBias
from rpb_retrofit.training.batches import Batch, Layout, Rows, collate, length_of_step, pairs_by_bucket
from rpb_retrofit.training.checkpoints import Checkpoints, attempt
from rpb_retrofit.training.guard import Guard, first_bad_gradient, first_bad_module
from rpb_retrofit.training.held_out import HeldOut
from rpb_retrofit.training.objective import Objective, masked
from rpb_retrofit.training.parameters import optimizer_of, rate_factor
from rpb_retrofit.training.processes import Interruption, is_out_of_memory, prepare_for_deepspeed, shard_tables
from rpb_retrofit.training.recipe import Recipe, Stage


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


@dataclass(frozen=True)
class Setting:
    """What the stages of a run have in common."""

    accelerator: Accelerator
    recipe: Recipe
    rows: Rows
    layout: Layout
    tokenizer: Any
    objective: Objective
    held_out: HeldOut | None
    label: str


class StageRun:
    """Stage ``number`` of a run: trains ``model``, and keeps checkpoints in ``folder``."""

    def __init__(self, setting: Setting, number: int, model: Any, folder: Path, say: Callable[[str], None]) -> None:
        self.setting, self.number, self.say = setting, number, say
        self.accelerator, self.recipe = setting.accelerator, setting.recipe
        self.stage: Stage = setting.recipe.stages[number]
        self.steps = math.ceil(self.stage.tokens / setting.recipe.batch_tokens)
        self.progress, self.guard = Progress(), Guard(setting.recipe.spike)
        self.checkpoints = Checkpoints(folder, setting.recipe.keep)
        for length in self.stage.lengths:
            self._sequences(length)  # says what does not divide before anything runs
        if setting.recipe.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.trains = any(parameter.requires_grad for parameter in model.parameters())
        model.train()
        if not self.trains:  # a control while tables are trained, which it has not: the data goes by
            self.model, self.optimizer = self.accelerator.prepare_model(model, evaluation_mode=True), None
            return
        shard_tables(self.accelerator, model)
        prepare_for_deepspeed(self.accelerator, self.recipe)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer_of(model, self.stage, self.recipe))
        if setting.recipe.compile:
            self.model.compile()
        # Accelerate's own clipping knows how each mode holds its gradients.
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def resume(self) -> bool:
        """Go on from the last whole checkpoint, if there is one."""
        saved = self.checkpoints.last()
        if saved is None:
            return False
        if self.trains:
            self.accelerator.load_state(str(saved.folder))
        self.progress = Progress.from_json(saved.meta["progress"])
        self.setting.rows.restore(saved.meta["rows"])
        self.guard.recent.extend(saved.meta["recent"])
        return True

    def run(self) -> None:
        """All steps that are left. Raises TrainingError for a bad step, InterruptedRunError after SIGTERM; both leave
        the last checkpoint in place."""
        before = sum(math.ceil(s.tokens / self.recipe.batch_tokens) for s in self.recipe.stages[: self.number])
        bar = tqdm(
            total=self.steps,
            initial=self.progress.step,
            desc=f"{self.setting.label}, stage {self.number + 1} ({self.stage.train})",
            unit="step",
            disable=None if self.accelerator.is_main_process else True,
        )
        with bar, Interruption() as interruption:
            if self.progress.step == 0 and self.number == 0:
                self._evaluate()
            while self.progress.step < self.steps:
                start = time.perf_counter()
                tokens, loss = self._step(interruption)
                seconds = time.perf_counter() - start
                self.progress.seconds += seconds
                self.progress.step += 1
                step = self.progress.step
                bar.update(1)
                bar.set_postfix({"loss": f"{loss:.3f}", "tokens/s": f"{tokens / seconds:.0f}"})
                rates = (
                    {}
                    if self.optimizer is None
                    else {f"rate/{group['name']}": group["lr"] for group in self.optimizer.param_groups}
                )
                self.accelerator.log({"loss": loss, "tokens_per_second": tokens / seconds, **rates}, step=before + step)
                due = step % self.recipe.evaluate_every == 0 or step == self.steps
                if due and (found := self._evaluate()):
                    trained = [count > 0 for count in found["pairs_by_bucket"]]
                    logged = {"held_out": found["loss"], "buckets_trained": sum(trained)}
                    self.accelerator.log(logged, step=before + step)
                    if bar.disable:  # a log file, say, where no bar is drawn
                        self.say(f"step {step} of {self.steps}: loss {loss:.4f}, held-out {found['loss']:.4f}")
                if self._stopped is not None:
                    self.save()
                    name = signal.Signals(self._stopped).name
                    raise InterruptedRunError(
                        f"stopped by {name} after step {step} of {self.steps} of stage {self.number + 1}; the same "
                        "command goes on from there"
                    )
                if step % self.recipe.save_every == 0 and step < self.steps:
                    self.save()

    _stopped: int | None = None

    # --- a step ----------------------------------------------------------------------------------------------------

    def _sequences(self, length: int) -> int:
        """Sequences of one step, all processes together; ConfigError where they cannot be shared out."""
        count, world = self.recipe.batch_tokens // length, self.accelerator.num_processes
        if count % world:
            raise ConfigError(
                f"batch_tokens={self.recipe.batch_tokens}: {count} sequences of {length} tokens cannot be shared out "
                f"to {world} processes: make it a multiple of {length * world}"
            )
        return count

    def _step(self, interruption: Interruption) -> tuple[int, float]:
        """One step of all processes together: tokens seen, and the mean loss of its scored tokens."""
        step, world, rank = self.progress.step, self.accelerator.num_processes, self.accelerator.process_index
        length = length_of_step(self.stage, self.recipe.seed, self.number, step)
        count = self._sequences(length)
        rows = self.setting.rows.take(count, length)
        batch = collate(rows, length, self.setting.layout)
        if self.recipe.objective == "masked":
            seed = f"{self.recipe.seed}/{self.number}/{step}"
            batch = masked(batch, self.setting.tokenizer, self.recipe.mask_share, seed)
        scored = batch.scored
        mine = batch.part(slice(rank, None, world)).to(self.accelerator.device)
        for group in self.optimizer.param_groups if self.optimizer is not None else ():
            group["lr"] = group["peak"] * rate_factor(self.stage, step, self.steps)
        total = self._accumulate(mine, length, scored)
        told = torch.tensor([[total.item(), float(interruption.signal or 0)]], dtype=torch.float64)
        told = self.accelerator.gather(told.to(self.accelerator.device, torch.float32)).cpu()
        loss = told[:, 0].double().sum().item() / max(scored, 1)
        self._stopped = int(told[:, 1].max()) or None
        self._take(loss, told[:, 0], mine, rows, scored, step)
        self.progress.losses.append(loss)
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
                return self.setting.objective(self.model, batch)
        with self.accelerator.autocast():
            loss = self.setting.objective(self.model, batch)
        # Processes average their gradients; the mean over all scored tokens is wanted.
        self.accelerator.backward(loss * (self.accelerator.num_processes / max(scored, 1)))
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
        said = f"{len(batch)} sequences of {length} tokens at once do not fit into memory"
        if fits:
            return ConfigError(f"{said}; {fits} do: set micro_tokens={fits * length}")
        return ConfigError(
            f"{said}, nor does one: use shorter lengths, gradient_checkpointing, precision=bf16 or FSDP2"
        )

    def _take(self, loss: float, by_rank: Tensor, batch: Batch, rows: Sequence[Any], scored: int, step: int) -> None:
        """Clip, judge, and take or refuse the step."""
        if self.optimizer is None:
            self.progress.scored += scored
            return
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.recipe.clip)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm) if norm is not None else 0.0
        if (complaint := self.guard.complaint(loss, norm)) is None:
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.progress.scored += scored
            self.progress.parts.update(len(part) for row in rows for part in row)
            return
        bad = [rank for rank, sum_ in enumerate(by_rank.tolist()) if not math.isfinite(sum_)]
        where = f" on rank {', '.join(map(str, bad))}" if bad else ""
        if not math.isfinite(loss):
            culprit = first_bad_module(self.model, lambda: self.setting.objective(self.model, batch))
            what = "module"
        else:
            culprit, what = first_bad_gradient(self.model), "gradient"
        found = [name for name in self._gathered(culprit) if name]
        place = f"; the first {what} with a non-finite value is {found[0]}" if found else ""
        said = f"step {step + 1} of stage {self.number + 1}{where}: {complaint}{place}"
        self.optimizer.zero_grad()
        if self.recipe.on_bad_step == "stop":
            raise TrainingError(
                f"{said}. Lower the rates, or set on_bad_step=skip; the last checkpoint is in {self.checkpoints.folder}"
            )
        self.progress.skipped.append(said)
        if self.accelerator.is_main_process:
            tqdm.write(f"skipped {said}")

    def _gathered(self, value: str | None) -> list[str | None]:
        if self.accelerator.num_processes == 1:
            return [value]
        found: list[Any] = [None] * self.accelerator.num_processes
        torch.distributed.all_gather_object(found, value)
        return found

    # --- evaluation and checkpoints --------------------------------------------------------------------------------

    def _evaluate(self) -> dict[str, Any] | None:
        if self.setting.held_out is None:
            return None
        with self._evaluating():
            loss, by_length = self.setting.held_out.measure(self.model, self.accelerator)
        table = next((m for m in self.model.modules() if isinstance(m, RelativePositionBias)), None)
        found = {
            "step": self.progress.step,
            "loss": loss,
            "by_length": [_plain(result) for result in by_length],
            "pairs_by_bucket": [] if table is None else pairs_by_bucket(self.progress.parts, table.bucketing),
        }
        self.progress.evaluations.append(found)
        return found

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.model.eval()
        try:
            yield
        finally:
            self.model.train()

    def save(self) -> None:
        """Write a checkpoint; TrainingError where the disk is full, with the last one intact."""
        step, accelerator = self.progress.step, self.accelerator
        part = self.checkpoints.partial(step)
        if accelerator.is_main_process:
            self.checkpoints.discard(step)
            part.mkdir(parents=True, exist_ok=True)
        accelerator.wait_for_everyone()
        wrong = attempt(lambda: accelerator.save_state(str(part))) if self.trains else None
        if (failure := next(filter(None, self._gathered(wrong)), None)) is None:
            meta = {
                "progress": self.progress.to_json(),
                "rows": self.setting.rows.state(),
                "recent": list(self.guard.recent),
            }
            if accelerator.is_main_process:
                wrong = attempt(lambda: self.checkpoints.publish(step, meta))
            failure = next(filter(None, self._gathered(wrong)), None)
        if failure is not None:
            if accelerator.is_main_process:
                self.checkpoints.discard(step)
            last = self.checkpoints.last()
            kept = f"the last one, {last.folder}, is whole" if last else "there is none yet"
            raise TrainingError(
                f"the checkpoint of step {step} could not be written ({failure}); {kept}: make space, then give the "
                "same command"
            )


def _plain(result: LengthResult) -> dict[str, Any]:
    return {
        "length": result.length,
        "nll": result.nll,
        "tokens": result.tokens,
        "by_position": [[b.first, b.last, b.nll, b.tokens] for b in result.by_position],
    }
