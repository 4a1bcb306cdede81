"""A whole run: the stages of a recipe one after the other, from one checkpoint to another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedModel

from rpb_retrofit.checkpoint.limits import copy_sentence_files
from rpb_retrofit.checkpoint.load import open_model
from rpb_retrofit.errors import ConfigError, NotRetrofittedError
from rpb_retrofit.files.claim import remove_entry
from rpb_retrofit.files.folder import check_absent, whole_folder
from rpb_retrofit.files.record import DamagedError
from rpb_retrofit.files.source import find
from rpb_retrofit.tables.checksums import record
from rpb_retrofit.training.checkpoints import STATE, RunFolder, read_manifest, run_checksum, write_manifest
from rpb_retrofit.training.identity import identity_of
from rpb_retrofit.training.objective import comparing_attention
from rpb_retrofit.training.parameters import merged, prepare
from rpb_retrofit.training.processes import on_main, open_accelerator
from rpb_retrofit.training.recipe import Recipe
from rpb_retrofit.training.setup import TrainingSetup, open_setup
from rpb_retrofit.training.stage import StageRun
from rpb_retrofit.training.step import Progress
from rpb_retrofit.training.summary import SUMMARY, Summary, read_summary, stage_summary, write_summary
from rpb_retrofit.training.teacher import open_teacher, share_weights

RECIPE = "recipe.yaml"


def finetune(
    model: str,
    out: Path,
    recipe: Recipe,
    *,
    control: bool = False,
    source: str | None = None,
    restart: bool = False,
    reuse: bool = False,
    say: Callable[[str], None] = print,
) -> Summary:
    """Fine-tune the retrofit ``model`` (a folder or hub id) into a new folder ``out``.

    Until it is done, ``out`` does not exist and ``OUT.run`` beside it holds the run; the same call goes on with it,
    exactly as if it had never stopped, unless ``restart``. With ``control`` the retrofit's source is trained by the
    same recipe, on the same tokens in the same order: the difference is what the positions cost. ``source`` names the
    source where the retrofit's config no longer does. With ``reuse`` an ``out`` that the same run made already is its
    answer. ``say`` is called on the first process, with what goes on.

    Raises ConfigError, DataError and CheckpointError for wrong input, TrainingError for a run that had to stop,
    InterruptedRunError after SIGTERM or Ctrl-C. Under a launcher each process calls this.
    """
    out = Path(out).expanduser()
    folder = RunFolder(out)
    accelerator = open_accelerator(recipe, str(folder.path / "logs"))
    set_seed(recipe.seed)
    config = None if model.endswith(".gguf") else find(model).config()
    if (settings := getattr(config, "rpb_retrofit", None)) is None:
        raise NotRetrofittedError(f"'{model}' is not a retrofit: make one with `rpb retrofit {model} OUT`")
    teacher_name = source or settings["source"]
    start = teacher_name if control else model
    identity = on_main(accelerator, partial(identity_of, model, start, teacher_name, recipe, control))
    if reuse and (summary := on_main(accelerator, partial(_finished_before, out, identity))) is not None:
        return summary

    def open_folder() -> bool:
        check_absent(out)
        return folder.open(identity, restart, say)

    with _in_folder(accelerator, folder, open_folder) as goes_on:
        summary = _all_stages(accelerator, out, folder, recipe, identity, goes_on, say)
    accelerator.wait_for_everyone()
    return summary


@contextmanager
def _in_folder(accelerator: Accelerator, folder: RunFolder, open_folder: Callable[[], bool]) -> Iterator[bool]:
    """Hold the folder of a run: yields whether there is a run to go on with.

    The folder goes at the end, and where an error comes before anything was trained.
    """
    try:
        goes_on = on_main(accelerator, open_folder)
        try:
            yield goes_on
        except BaseException:
            if accelerator.is_main_process and folder.idle:
                folder.remove()
            raise
        if accelerator.is_main_process:
            folder.remove()
    finally:
        folder.release()


def _all_stages(
    accelerator: Accelerator,
    out: Path,
    folder: RunFolder,
    recipe: Recipe,
    identity: dict[str, Any],
    goes_on: bool,
    say: Callable[[str], None],
) -> Summary:
    """The run in an opened folder."""
    say_once = say if accelerator.is_main_process else _silent
    say_once(f"{'going on with' if goes_on else 'starting'} the run in {folder.path}")
    accelerator.init_trackers("rpb_retrofit")
    teacher = None
    if recipe.objective == "distillation":
        retrofit, _ = open_model(identity["model"])
        teacher = open_teacher(retrofit, identity["source"]).to(accelerator.device)
        del retrofit  # only compared with its source: in memory it would be one copy too many
    start, label = (identity["source"], "control") if identity["control"] else (identity["model"], "retrofit")
    checksum = run_checksum(identity)
    stages = _Stages(accelerator, recipe, folder.path, start, teacher, label, checksum, say_once)
    summary = stages.run(out, identity)
    for tracker in accelerator.trackers:
        tracker.finish()
    return summary


@dataclass
class _Stages:
    """The stages of one arm, called ``label``. Each ends in a checkpoint folder, from which the next begins.

    ``start`` is what the first begins with; ``checksum`` that of the run's identity.
    """

    accelerator: Accelerator
    recipe: Recipe
    folder: Path
    start: str
    teacher: PreTrainedModel | None
    label: str
    checksum: str
    say: Callable[[str], None]
    setup: TrainingSetup | None = None

    def run(self, out: Path, identity: dict[str, Any]) -> Summary:
        """All stages that are left; the last one's model becomes ``out``."""
        current, done = self.start, []
        for number, stage in enumerate(self.recipe.stages):
            place = self.folder / f"stage-{number + 1}"
            model, tokenizer = open_model(current)
            self.setup = self.setup or open_setup(
                self.accelerator, self.recipe, model, tokenizer, self.teacher, self.label, self.say
            )
            state = on_main(self.accelerator, partial(self._left_of, number))
            if finished := state is not None:
                self.setup.rows.restore(state["rows"])
                progress, weights = Progress.from_json(state["progress"]), None
            else:
                progress, weights = self._train(number, model)
            done.append(stage_summary(stage, progress, model))
            del model
            if number < len(self.recipe.stages) - 1:
                if not finished:
                    rows = self.setup.rows.state()
                    state = {"progress": progress.to_json(), "rows": rows, "run": self.checksum}
                    on_main(self.accelerator, partial(self._write, place, current, weights, number, state))
                    self._forget_checkpoints(number)
                current = str(place)
        accelerator = self.accelerator
        mode = accelerator.distributed_type.value if accelerator.num_processes > 1 else "one process"
        summary = Summary(identity, accelerator.num_processes, accelerator.device.type, mode, done)
        on_main(self.accelerator, partial(self._write, out, current, weights, number, summary))
        return summary

    def _train(self, number: int, model: PreTrainedModel) -> tuple[Progress, dict[str, Any] | None]:
        """Train a stage to its end: what it did, and (on the first process) its weights; None where none are."""
        assert self.setup is not None
        stage, accelerator = self.recipe.stages[number], self.accelerator
        set_seed(self.recipe.seed + number)  # whatever ran before it, in this process or another
        student = prepare(model.float(), stage, self.recipe, self.setup.objective.kind).to(accelerator.device)
        spared = share_weights(self.teacher, student) if self.teacher is not None else 0
        if spared:
            self.say(
                f"stage {number + 1}: the source shares {spared / 1e6:.0f} MB of weights with the model in training"
            )
        with comparing_attention(self.setup.objective, model, stage) as objective:
            setup = replace(self.setup, objective=objective)
            run = StageRun(setup, number, student, self._checkpoints(number), self.say, self.checksum)
            if run.resume():
                self.say(f"stage {number + 1}: going on after step {run.progress.step} of {run.steps}")
            run.run()
        weights = accelerator.get_state_dict(run.model) if run.trains else None
        accelerator.free_memory()
        return run.progress, weights

    def _left_of(self, number: int) -> dict[str, Any] | None:
        """What a stage that is done left; None where it is not done, or what it left is damaged."""
        place = self.folder / f"stage-{number + 1}"
        if not place.is_dir():
            return None
        try:
            return read_manifest(place, STATE)
        except DamagedError as error:
            self.say(f"stage {number + 1} is trained again, and what came after it: {error}")
        for later in reversed(range(number, len(self.recipe.stages))):
            for folder in (self.folder / f"stage-{later + 1}", self._checkpoints(later)):
                if folder.exists():
                    remove_entry(folder)
        return None

    def _checkpoints(self, number: int) -> Path:
        return self.folder / f"stage-{number + 1}.checkpoints"

    def _forget_checkpoints(self, number: int) -> None:
        if self.accelerator.is_main_process:
            shutil.rmtree(self._checkpoints(number), ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _write(
        self, target: Path, current: str, weights: dict[str, Any] | None, number: int, end: Summary | dict[str, Any]
    ) -> None:
        """Write what a stage made of ``current``; at the end of the run with its summary, recipe and logs."""
        stage, (model, tokenizer) = self.recipe.stages[number], open_model(current)
        if weights is not None:
            dtype = model.dtype
            wrapped = prepare(model.float(), stage, self.recipe, "")
            wrapped.load_state_dict(weights)
            model = merged(wrapped).to(dtype)
        record(model)
        with whole_folder(target) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if not current.endswith(".gguf"):
                copy_sentence_files(find(current).folder, folder)
            if isinstance(end, dict):
                write_manifest(folder, STATE, end)
                return
            if (card := self._source_card()) is not None:
                shutil.copyfile(card, folder / "README.source.md")
            (folder / RECIPE).write_text(self.recipe.to_yaml())
            write_summary(end, folder)
            if (self.folder / "logs").is_dir():
                shutil.copytree(self.folder / "logs", folder / "logs")

    def _source_card(self) -> Path | None:
        """The card of what the run began with, whose licence must travel: a retrofit keeps its source's."""
        if self.start.endswith(".gguf"):
            return None
        folder = find(self.start).folder
        card = folder / ("README.md" if self.label == "control" else "README.source.md")
        return card if card.exists() else None


def _finished_before(out: Path, identity: dict[str, Any]) -> Summary | None:
    """What an equal run that is done wrote, or None."""
    if not (out / SUMMARY).exists():
        return None
    summary = read_summary(out)  # damaged, it is an error: training again would find OUT in the way
    return summary if summary.identity == json.loads(json.dumps(identity)) else None


def _silent(text: str) -> None:
    """Say nothing: what the processes after the first do."""


def finetune_arms(model: str, out: Path, recipe: Recipe, arms: list[str], **options: Any) -> dict[str, Summary]:
    """`finetune` for ``retrofit`` (into ``out``), ``control`` (into ``OUT-control``), or both, one after the other."""
    if unknown := [arm for arm in arms if arm not in ("retrofit", "control")] or ([] if arms else [""]):
        raise ConfigError(f"arm '{unknown[0]}': choose retrofit, control, or retrofit,control")
    if len(set(arms)) == 1:
        return {arms[0]: finetune(model, out, recipe, control=arms[0] == "control", **options)}
    places = {"retrofit": out, "control": out.with_name(f"{out.name}-control")}
    for place in places.values():
        if not (place / SUMMARY).exists():  # an arm that is done is not done again; any other folder is in the way
            check_absent(place)
    return {
        arm: finetune(model, places[arm], recipe, control=arm == "control", reuse=True, **options)
        for arm in dict.fromkeys(arms)
    }
