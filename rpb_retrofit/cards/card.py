"""The model card of a retrofit: what its files say of it, and nothing that they do not say."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from pydantic import Field

from rpb_retrofit.config import RetrofitConfig
from rpb_retrofit.errors import CheckpointError, DataError
from rpb_retrofit.files.checked import Written, check
from rpb_retrofit.runtime.families import family_of
from rpb_retrofit.runtime.releases import OLDEST
from rpb_retrofit.runtime.settings import check_settings
from rpb_retrofit.training.run import RECIPE
from rpb_retrofit.training.summary import PICTURE, SUMMARY, read_summary

TEMPLATE = Path(__file__).parent / "template.md"
CARD, SOURCE_CARD = "README.md", "README.source.md"

OPTIONS = {"relative_attention_num_buckets": "buckets", "relative_attention_max_distance": "max-distance"}
"""The command line's names of settings where they are not the settings' own."""

FLAGS = ("shared",)


def make_card(folder: Path, evaluations: Sequence[Path] = ()) -> ModelCard:
    """The card of the retrofit in ``folder``: its config, its training (if `rpb finetune` made it) and the figures of
    ``evaluations``, files that ``rpb evaluate --json`` wrote.

    Raises CheckpointError where there is no retrofit, DataError for a file that is no evaluation.
    """
    config = _json(folder / "config.json", f"'{folder}'")
    if not isinstance(settings := config.get("rpb_retrofit"), dict) or "source" not in settings:
        raise CheckpointError(f"'{folder}' is not a retrofit: its config.json has no 'rpb_retrofit'")
    check_settings(settings, str(folder))
    training = asdict(read_summary(folder)) if (folder / SUMMARY).exists() else None
    results = [_evaluation(file) for file in evaluations]
    source = str(settings["source"])
    return ModelCard.from_template(
        _metadata(folder, source, config, results),
        template_path=str(TEMPLATE),
        name=folder.resolve().name,
        source=source,
        settings=settings,
        kept=settings.get("kept_frequencies"),
        retrofit_command=_command(settings) if training is None else None,
        training=training and _training(training),
        recipe=(folder / RECIPE).read_text().strip() if (folder / RECIPE).exists() else None,
        picture=PICTURE if (folder / PICTURE).exists() else None,
        results=results,
        auto=_auto_class(config),
        locked_since="4.50" if "transformers_weights" in config else "5.4",
        needed=_release(config) if (folder / "releases.py").exists() else None,
    )


def _auto_class(config: dict[str, Any]) -> str:
    """The Auto class that serves the class which was saved."""
    (architecture, *_) = config.get("architectures") or [""]
    served = (name for name, reference in config.get("auto_map", {}).items() if reference.endswith(f".{architecture}"))
    return next(served, "AutoModel")


def _release(config: dict[str, Any]) -> str:
    """The release of Transformers that the code beside the config needs."""
    return ".".join(map(str, family_of(SimpleNamespace(**config)).since or OLDEST))


def _command(settings: dict[str, Any]) -> str:
    """The `rpb retrofit` that a config's settings come from; the text it was calibrated on is not among them."""
    words = ["rpb", "retrofit", str(settings["source"]), "OUT"]
    for name, default in RetrofitConfig().__dict__.items():
        value, option = settings.get(name, default), OPTIONS.get(name, name.replace("_", "-"))
        if value != default:
            words += [f"--{option}"] if name in FLAGS else [f"--{option}", str(value)]
    return shlex.join(words)


def _training(summary: dict[str, Any]) -> dict[str, Any]:
    """What the card says of a training.json."""
    identity, stages = summary["identity"], summary["stages"]
    first = stages[0]["evaluations"][0]["by_length"] if stages[0]["evaluations"] else []
    last = stages[-1]["evaluations"][-1]["by_length"] if stages[-1]["evaluations"] else []
    words = ["rpb", "finetune", identity["model"], "OUT", "--recipe", RECIPE]
    return {
        "command": shlex.join(words),
        "model": identity["model"],
        "objective": identity["recipe"]["objective"],
        "texts": [data["name"] for data in identity["recipe"]["data"]],
        "stages": stages,
        "where": f"{summary['processes']} x {summary['device']} ({summary['mode']})",
        "seconds": sum(stage["seconds"] for stage in stages),
        "tokens": sum(stage["scored_tokens"] for stage in stages),
        "held_out": [(b["length"], b["nll"], a["nll"]) for b, a in zip(first, last, strict=False)],
        "untrained": sorted(set.intersection(*(set(stage["untrained_buckets"]) for stage in stages))),
        "skipped": sum(len(stage["skipped"]) for stage in stages),
    }


def _evaluation(file: Path) -> dict[str, Any]:
    try:
        return check(_json(file, f"--evaluation '{file}'"), file, _Evaluation, "rpb evaluate --json")
    except CheckpointError as error:
        raise DataError(f"{error}") from error


class _Length(Written):
    length: int
    nll: Annotated[float, Field(allow_inf_nan=False)]
    tokens: int


class _Evaluation(Written):
    model: str
    data: str
    command: str
    lengths: list[_Length]


def _metadata(folder: Path, source: str, config: dict[str, Any], results: Sequence[dict[str, Any]]) -> ModelCardData:
    given: dict[str, Any] = {"library_name": "transformers", "tags": ["rpb_retrofit", "t5-relative-position-bias"]}
    if not Path(source).expanduser().exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        given["base_model"] = source
    if (card := folder / SOURCE_CARD).exists():
        known = ModelCard.load(card, ignore_metadata_errors=True).data
        for name in ("license", "license_name", "license_link", "language", "pipeline_tag"):
            if (value := getattr(known, name, None)) is not None:
                given[name] = value
    if any(name.endswith("ForCausalLM") for name in config.get("architectures") or []):
        given.setdefault("pipeline_tag", "text-generation")
    figures = [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=result["data"],
            metric_type="nll",
            metric_name=f"nats a token, windows of {length['length']} tokens",
            metric_value=round(length["nll"], 4),
        )
        for result in results
        if Path(result["model"]).expanduser().resolve() == folder.resolve()
        for length in result["lengths"]
    ]
    if figures:
        given |= {"eval_results": figures, "model_name": folder.resolve().name, "metrics": ["nll"]}
    return ModelCardData(**given)


def _json(file: Path, what: str) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except OSError as error:
        raise CheckpointError(f"{what}: {file.name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{what}: {file.name} is not JSON") from error
    if not isinstance(found, dict):
        raise DataError(f"{what}: {file.name} is not a JSON object")
    return found
