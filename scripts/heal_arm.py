"""One arm of scripts/heal.py: made, trained and measured, each part once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from heal_measures import MeasuredModel, release, say, watched
from heal_plan import ABOUT, SOURCE, HealingPlan

import rpb_retrofit as rpb
from rpb_retrofit.checkpoint.load import open_causal_lm
from rpb_retrofit.files.folder import whole_folder
from rpb_retrofit.files.journal import Journal
from rpb_retrofit.files.whole_file import write_whole
from rpb_retrofit.text.calibration_text import CalibrationText
from rpb_retrofit.text.reading import Text, read_text
from rpb_retrofit.training.identity import checksum, fingerprint
from rpb_retrofit.training.run import finetune


@dataclass
class ArmRun:
    """The making, training and measuring of one arm in a ``folder``.

    The folder's journal holds each part, so that a stopped run goes on; ``result.json`` holds them for readers.
    """

    name: str
    folder: Path
    plan: HealingPlan
    parts: dict[str, Any] = field(default_factory=dict)
    journal: Journal = field(default_factory=Journal)

    @property
    def retrofitted(self) -> Path:
        """Where its retrofit is, calibrated only."""
        return self.folder / "retrofit"

    @property
    def healed(self) -> Path:
        """Where it is after training."""
        return self.folder / "healed"

    def run(self) -> None:
        """Everything. ConfigError where the folder holds parts of another plan."""
        say(self.name, ABOUT[self.name])
        self.folder.mkdir(parents=True, exist_ok=True)
        place, told = self.folder / "parts", partial(say, self.name)
        with Journal.open(place, self.identity, "scripts/heal.py", (), told) as self.journal:
            if self.name != SOURCE:
                self.part("made", self.make)
                self.measure("before", self.retrofitted, ["inside"])
                self.part("trained", self.train)
            after = self.plan.source if self.name == SOURCE else self.healed
            self.measure("after", after, ["inside", "beyond", "questions", "spans"])
            self.write()
        say(self.name, "done")

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the parts depend on."""
        texts = [name for name in (*self.plan.data, *self.plan.held_out) if Path(name).is_file()]
        read = {"weights": fingerprint(self.plan.source), "texts": {name: checksum(Path(name)) for name in texts}}
        return {**asdict(self.plan), **read}

    def part(self, name: str, find_out: Callable[[], dict[str, Any]]) -> None:
        """The part ``name``: found out now, unless it was before; with what the ``whole`` of it took."""
        fresh = False

        def take() -> dict[str, Any]:
            nonlocal fresh
            fresh = True
            with watched() as seen:
                figures = find_out()
            peak = f", {seen['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in seen else ""
            say(self.name, f"{name}: took {seen['seconds']:.1f} s{peak}")
            return json.loads(json.dumps({**figures, "whole": seen}))

        self.parts[name] = self.journal(name.replace(": ", "-"), take)
        if fresh:
            self.write()

    def write(self) -> None:
        """Write result.json, with the parts that are known."""
        document = {"arm": self.name, "plan": self.identity, "parts": self.parts}
        write_whole(self.folder / "result.json", json.dumps(document, indent=1) + "\n")

    def make(self) -> dict[str, Any]:
        """Retrofit the source in memory, on the accelerator, and save it."""
        model, tokenizer = open_causal_lm(self.plan.source)
        say(self.name, f"source loaded, on {model.device}")
        documents = [document for file in self.plan.data for document in read_text(file).documents]
        text = CalibrationText(Text("training text", documents), self.plan.calibration, self.plan.length)
        windows = text.windows(tokenizer, self.plan.length)
        say(self.name, f"{len(windows)} windows to calibrate on")
        report = rpb.retrofit(model, self.plan.config(self.name), calibration=windows)
        say(self.name, str(report))
        if not self.retrofitted.exists():
            with whole_folder(self.retrofitted) as folder:
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
        return {"report": str(report)}

    def train(self) -> dict[str, Any]:
        """`rpb finetune`, in this process."""
        told = partial(say, self.name)
        summary = finetune(str(self.retrofitted), self.healed, self.plan.recipe, reuse=True, say=told)
        told(str(summary))
        (stage,) = summary.stages
        kept = ("steps", "scored_tokens", "seconds", "losses", "evaluations", "untrained_buckets")
        figures = {name: getattr(stage, name) for name in kept}
        return {**figures, "tokens_per_s": stage.scored_tokens / stage.seconds}

    def measure(self, when: str, place: str | Path, parts: Sequence[str]) -> None:
        """These measurements of one model, which is opened when the first is missing."""
        opened: list[MeasuredModel] = []

        def take(part: str) -> dict[str, Any]:
            if not opened:
                opened.append(MeasuredModel.open(self.name, self.plan, place))
            return getattr(opened[0], part)()

        for part in parts:
            self.part(f"{when}: {part}", partial(take, part))
        opened.clear()
        release()
