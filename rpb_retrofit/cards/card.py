"""The model card of a retrofit: what its files say of it, and nothing that they do not say."""

from __future__ import annotations

import json
import re
import reprlib
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined
from pydantic import Field

from rpb_retrofit.config import RetrofitConfig, command_of
from rpb_retrofit.errors import CheckpointError, DataError
from rpb_retrofit.files.checked import Written, check
from rpb_retrofit.files.printable import one_line
from rpb_retrofit.files.small_file import read_small
from rpb_retrofit.pages.markdown import FILTERS
from rpb_retrofit.pages.words import number
from rpb_retrofit.runtime.families import family_of
from rpb_retrofit.runtime.loading import architectures
from rpb_retrofit.runtime.releases import OLDEST
from rpb_retrofit.runtime.settings import check_settings
from rpb_retrofit.training.run import RECIPE
from rpb_retrofit.training.summary import PICTURE, SUMMARY, read_summary
from rpb_retrofit.training.yaml_text import read_yaml

TEMPLATE = Path(__file__).parent / "template.md"
CARD, SOURCE_CARD = "README.md", "README.source.md"

SETTINGS = ("version", "mechanism", *RetrofitConfig().__dict__)
"""What the card shows of a config's settings; other versions may lack some."""


def make_card(folder: Path, evaluations: Sequence[Path] = ()) -> ModelCard:
    """The card of the retrofit in ``folder``: its config, its training (if `rpb finetune` made it) and the figures of
    ``evaluations``, files that ``rpb evaluate --json`` wrote.

    Raises CheckpointError where there is no retrofit, DataError for a file that is no evaluation.
    """
    config = _json(folder / "config.json", f"'{folder}'")
    if not isinstance(settings := config.get("rpb_retrofit"), dict) or "source" not in settings:
        raise CheckpointError(f"'{folder}' is not a retrofit: its config.json has no 'rpb_retrofit'")
    check_settings(settings, str(folder))
    kept = settings.get("kept_frequencies", {})
    training = asdict(read_summary(folder)) if (folder / SUMMARY).exists() else None
    results = [_evaluation(file) for file in evaluations]
    source, name = str(settings["source"]), folder.resolve().name
    environment = Environment(undefined=StrictUndefined)
    environment.filters.update(FILTERS, value=number)
    card = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        card_data=_metadata(folder, source, config, results).to_yaml(),
        name=name,
        source=source,
        settings={**dict.fromkeys(SETTINGS, "not known"), **settings},
        kept=kept,
        retrofit_command=one_line(command_of(settings, source)) if training is None else None,
        training=training and _training(training),
        recipe=_text(folder / RECIPE, f"'{folder}'").strip() if (folder / RECIPE).exists() else None,
        picture=PICTURE if (folder / PICTURE).exists() else None,
        results=results,
        commands="\n".join(one_line(result["command"]) for result in results),
        loading=_loading(name, _auto_class(config)),
        locked_since="4.50" if "transformers_weights" in config else "5.4",
        needed=_release(config) if (folder / "releases.py").exists() else None,
    )
    return ModelCard(card)


def _loading(name: str, auto: str) -> str:
    path = json.dumps(one_line(name), ensure_ascii=False)
    return (
        f"import rpb_retrofit as rpb\n\nmodel = rpb.load({path})\n# or, where rpb_retrofit is not installed:\n"
        f"# {one_line(auto)}.from_pretrained({path}, trust_remote_code=True)"
    )


def _auto_class(config: dict[str, Any]) -> str:
    """The Auto class that serves the class which was saved."""
    auto_map, saved = config.get("auto_map"), _architectures(config)[:1]
    if not isinstance(auto_map, dict) or not saved:
        return "AutoModel"
    serving = (name for name, reference in auto_map.items() if str(reference).endswith(f".{saved[0]}"))
    return next(serving, "AutoModel")


def _architectures(config: dict[str, Any]) -> list[str]:
    return architectures(SimpleNamespace(architectures=config.get("architectures")))


def _release(config: dict[str, Any]) -> str:
    """The release of Transformers that the code beside the config needs."""
    return ".".join(map(str, family_of(SimpleNamespace(**config)).since or OLDEST))


def _training(summary: dict[str, Any]) -> dict[str, Any]:
    """What the card says of a training.json."""
    identity, stages = summary["identity"], summary["stages"]
    first = stages[0]["evaluations"][0]["by_length"] if stages[0]["evaluations"] else []
    last = stages[-1]["evaluations"][-1]["by_length"] if stages[-1]["evaluations"] else []
    words = ["rpb", "finetune", identity["model"], "OUT", "--recipe", RECIPE]
    return {
        "command": one_line(shlex.join(words)),
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
    nll: Annotated[float, Field(allow_inf_nan=False)] | None  # null: it was not finite
    tokens: int


class _Evaluation(Written):
    model: str
    data: str
    command: str
    lengths: list[_Length]


def _metadata(folder: Path, source: str, config: dict[str, Any], results: Sequence[dict[str, Any]]) -> ModelCardData:
    given: dict[str, Any] = {"library_name": "transformers", "tags": ["rpb_retrofit", "t5-relative-position-bias"]}
    if not _exists(source) and re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        given["base_model"] = source
    if (card := folder / SOURCE_CARD).exists():
        given |= _of_source_card(card)
    if any(name.endswith("ForCausalLM") for name in _architectures(config)):
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
        if _exists(result["model"]) and Path(result["model"]).expanduser().resolve() == folder.resolve()
        for length in result["lengths"]
        if length["nll"] is not None
    ]
    if figures:
        given |= {"eval_results": figures, "model_name": folder.resolve().name, "metrics": ["nll"]}
    return ModelCardData(**given)


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # no path at all: too long a name, an unknown user's home
        return False


def _of_source_card(card: Path) -> dict[str, Any]:
    """What a source's card says of its licence and kind. DataError where its metadata are not YAML, or no text."""
    what = f"'{card}'"
    metadata = re.match(
        r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", _text(card, what).lstrip("\ufeff"), re.DOTALL
    )
    known = read_yaml(metadata[1], f"the metadata of {what}") if metadata else {}
    if not isinstance(known, dict):
        raise DataError(
            f"the metadata of {what} are a {type(known).__name__}, not keys with values: repair or remove it"
        )
    given: dict[str, Any] = {}
    for name in ("license", "license_name", "license_link", "language", "pipeline_tag"):
        value = known.get(name)
        texts = value if isinstance(value, list) else [value]
        if value is None:
            continue
        if not all(isinstance(text, str) for text in texts):
            raise DataError(f"the metadata of {what}: {name}={reprlib.repr(value)} is no text: repair or remove it")
        cleaned = [one_line(text) for text in texts]
        given[name] = cleaned if isinstance(value, list) else cleaned[0]
    return given


def _text(file: Path, what: str) -> str:
    try:
        return read_small(file)
    except ValueError as error:
        raise CheckpointError(f"{what}: {file.name} cannot be read: {error}") from error


def _json(file: Path, what: str) -> dict[str, Any]:
    try:
        content = json.loads(_text(file, what))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what}: {file.name} is not JSON") from error
    if not isinstance(content, dict):
        raise DataError(f"{what}: {file.name} is not a JSON object")
    return content
