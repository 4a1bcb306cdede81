"""The training loop of one stage: steps, checkpoints, evaluation, and going on after a stop."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from tqdm import tqdm

from rpb_retrofit.errors import ConfigError, InterruptedRunError, TrainingError
from rpb_retrofit.evaluation.nll import LengthResult
from rpb_retrofit.instruments.modes import evaluating
from rpb_retrofit.training.batches import bucketing_of, pairs_by_bucket
from rpb_retrofit.training.checkpoints import Checkpoints, failure_of
from rpb_retrofit.training.processes import Interruption, gathered, on_main
from rpb_retrofit.training.setup import TrainingSetup
from rpb_retrofit.training.state import load_state, save_state
from rpb_retrofit.training.step import Progress, Stepper


class StageRun:
    """Stage ``number`` of a run: trains ``model``, and keeps checkpoints of the run ``run`` in ``folder``."""

    def __init__(
        self, setup: TrainingSetup, number: int, model: Any, folder: Path, say: Callable[[str], None], run: str = ""
    ) -> None:
        self.setup, self.number, self.say = setup, number, say
        self.accelerator, self.recipe = setup.accelerator, setup.recipe
        self.stepper = Stepper(setup, number, model)
        self.checkpoints = Checkpoints(folder, setup.recipe.keep, run)

    @property
    def model(self) -> Any:
        """The model as Accelerate wrapped it."""
        return self.stepper.model

    @property
    def progress(self) -> Progress:
        """What is done so far."""
        return self.stepper.progress

    @property
    def steps(self) -> int:
        """Steps of the stage."""
        return self.stepper.steps

    @property
    def trains(self) -> bool:
        """Whether anything has gradients."""
        return self.stepper.trains

    def resume(self) -> bool:
        """Go on from the last whole checkpoint, if there is one. Newer ones that are damaged are named."""
        noted: list[str] = []
        saved, damaged = on_main(self.accelerator, lambda: (self.checkpoints.last(noted), noted))
        for damage in damaged:
            self.say(f"stage {self.number + 1}: {damage}: this checkpoint is left out")
        if saved is None:
            return False
        if (mode := self._mode) != saved.meta["mode"]:
            raise ConfigError(
                f"'{saved.folder}' holds {saved.meta['mode']} weights, and this run has {mode} ones: go on as it was "
                "begun, or --restart"
            )
        if self.trains:
            random_states = load_state(self.accelerator, self.model, self.stepper.optimizer, saved.folder)
            if new := [str(rank) for rank, has in enumerate(gathered(self.accelerator, random_states)) if not has]:
                self.say(
                    f"'{saved.folder}' was written by fewer processes: {', '.join(new)} begin with new random states"
                )
        self.stepper.progress = Progress.from_json(saved.meta["progress"])
        self.setup.rows.restore(saved.meta["rows"])
        self.stepper.monitor.recent.extend(saved.meta["recent"])
        return True

    def run(self) -> None:
        """All steps that are left. Raises TrainingError for a bad step, InterruptedRunError after SIGTERM; both leave
        the last checkpoint in place."""
        bar = tqdm(
            total=self.steps,
            initial=self.progress.step,
            desc=f"{self.setup.label}, stage {self.number + 1} ({self.stepper.stage.train})",
            unit="step",
            disable=None if self.accelerator.is_main_process else True,
        )
        with bar, Interruption() as interruption:
            if self.progress.step == 0 and self.number == 0:
                self._evaluate()
            while self.progress.step < self.steps:
                loss = self._take_step(bar, interruption)
                step = self.progress.step
                if step % self.recipe.evaluate_every == 0 or step == self.steps:
                    self._evaluate_and_log(loss, in_words=bar.disable)  # a log file, say, where no bar is drawn
                # The last step has one more chance: a signal may come while the stage is evaluated.
                if stopped := self.stepper.signal if step < self.steps else self._signal(interruption):
                    self.save()
                    raise InterruptedRunError(
                        f"stopped by {signal.Signals(stopped).name} after step {step} of {self.steps} of stage "
                        f"{self.number + 1}; the same command goes on from there"
                    )
                if step % self.recipe.save_every == 0 and step < self.steps:
                    self.save()

    def _take_step(self, bar: tqdm[Any], interruption: Interruption) -> float:
        """One step, with what bar and trackers show of it: its loss."""
        start = time.perf_counter()
        tokens, loss = self.stepper.take(interruption)
        seconds = time.perf_counter() - start
        self.progress.seconds += seconds
        bar.update(1)
        bar.set_postfix({"loss": f"{loss:.3f}", "tokens/s": f"{tokens / seconds:.0f}"})
        groups = self.stepper.optimizer.param_groups if self.stepper.optimizer is not None else []
        rates = {f"rate/{group['name']}": group["lr"] for group in groups}
        self._log({"loss": loss, "tokens_per_second": tokens / seconds, **rates})
        return loss

    def _evaluate_and_log(self, loss: float, in_words: bool) -> None:
        """Measure the held-out loss, if the recipe asks for it, and show it beside the ``loss`` of the last step."""
        if (result := self._evaluate()) is None:
            return
        trained = sum(count > 0 for count in result["pairs_by_bucket"])
        self._log({"held_out": result["loss"], "buckets_trained": trained})
        if in_words:
            held_out = f"held-out {result['loss']:.4f}"
            self.say(f"step {self.progress.step} of {self.steps}: loss {loss:.4f}, {held_out}")

    def _log(self, values: dict[str, Any]) -> None:
        """Give the trackers what belongs to the last step, which they count over all stages."""
        before = sum(math.ceil(stage.tokens / self.recipe.batch_tokens) for stage in self.recipe.stages[: self.number])
        self.accelerator.log(values, step=before + self.progress.step)

    def _signal(self, interruption: Interruption) -> int:
        """The signal that any process got, 0 for none."""
        own = torch.tensor([interruption.signal or 0], device=self.accelerator.device)
        return int(self.accelerator.gather(own).max())

    def _evaluate(self) -> dict[str, Any] | None:
        if self.setup.held_out is None:
            return None
        with evaluating(self.model):
            loss, by_length = self.setup.held_out.measure(self.model, self.accelerator)
        bucketing = bucketing_of(self.model)
        result = {
            "step": self.progress.step,
            "loss": loss,
            "by_length": [_as_json(one) for one in by_length],
            "pairs_by_bucket": [] if bucketing is None else pairs_by_bucket(self.progress.parts, bucketing),
        }
        self.progress.evaluations.append(result)
        return result

    @property
    def _mode(self) -> str:
        """How a checkpoint holds the weights; one process and DDP are alike."""
        kinds = {DistributedType.FSDP: "FSDP2's", DistributedType.DEEPSPEED: "DeepSpeed's"}
        return kinds.get(self.accelerator.distributed_type, "whole")

    def save(self) -> None:
        """Write a checkpoint; TrainingError where the disk is full, with the last one intact."""
        step, accelerator = self.progress.step, self.accelerator
        part = self.checkpoints.partial(step)
        if accelerator.is_main_process:
            self.checkpoints.discard(step)
            part.mkdir(parents=True, exist_ok=True)
        accelerator.wait_for_everyone()
        failure = self._first_failure(
            lambda: save_state(accelerator, self.model, self.stepper.optimizer, part) if self.trains else None
        )
        if failure is None:
            meta = {
                "mode": self._mode,
                "progress": self.progress.to_json(),
                "rows": self.setup.rows.state(),
                "recent": list(self.stepper.monitor.recent),
            }
            failure = self._first_failure(
                lambda: self.checkpoints.publish(step, meta) if accelerator.is_main_process else None
            )
        if failure is not None:
            if accelerator.is_main_process:
                self.checkpoints.discard(step)
            last = self.checkpoints.last()
            kept = f"the last one, {last.folder}, is whole" if last else "there is none yet"
            raise TrainingError(
                f"the checkpoint of step {step} could not be written ({failure}); {kept}: make space, then give the "
                "same command"
            )

    def _first_failure(self, write: Callable[[], None]) -> str | None:
        """Have every process write; why the first of those that could not failed, or None."""
        return next(filter(None, gathered(self.accelerator, failure_of(write))), None)


def _as_json(result: LengthResult) -> dict[str, Any]:
    return {
        "length": result.length,
        "nll": result.nll,
        "tokens": result.tokens,
        "by_position": [[b.first, b.last, b.nll, b.tokens] for b in result.by_position],
    }
