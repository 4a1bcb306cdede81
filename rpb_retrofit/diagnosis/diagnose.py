"""`rpb_retrofit.diagnose`: what regressed after a retrofit, where, and why."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from rpb_retrofit.diagnosis.arms import CONTROL, RETROFIT, SOURCE, UNTRAINED
from rpb_retrofit.diagnosis.hypotheses import hypotheses_named
from rpb_retrofit.diagnosis.measurements import MEASURED, Measurements
from rpb_retrofit.diagnosis.open_models import check_tokenizer, identity, known_source, open_arms, trained_pairs
from rpb_retrofit.diagnosis.plan import DiagnosisPlan
from rpb_retrofit.diagnosis.report import write_folder
from rpb_retrofit.diagnosis.result import Diagnosis
from rpb_retrofit.diagnosis.run import run_diagnosis
from rpb_retrofit.errors import ConfigError
from rpb_retrofit.evaluation.inputs import (
    GivenModel,
    GivenText,
    check_bos,
    check_least,
    check_lengths,
    given_text,
    name_of,
)
from rpb_retrofit.evaluation.nll import check_ids
from rpb_retrofit.files.folder import check_absent
from rpb_retrofit.files.journal import Journal
from rpb_retrofit.text.reading import Text
from rpb_retrofit.text.tokens import bos_policy, tokenise


def diagnose(
    retrofit: GivenModel,
    source: GivenModel | None = None,
    *,
    untrained: GivenModel | None = None,
    control: GivenModel | None = None,
    tokenizer: Any = None,
    data: GivenText = None,
    lengths: Sequence[int] = (128, 512, 2048),
    tokens: int = 4096,
    probed: int = 1024,
    items: int = 2,
    rounds: int = 1,
    bos: str = "auto",
    only: Sequence[str] = (),
    out: str | os.PathLike[str] | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
    command: str | None = None,
) -> Diagnosis:
    """Test every hypothesis on a retrofit, undo what is suspected in the running model, and measure what it lost.

    A model is a folder, a hub id or a GGUF file, which is opened on the accelerator where there is one; or one in
    memory, which is measured as it is: on its device, in its mode (call ``eval()`` after training), with its hooks.

    Args:
        retrofit: what is diagnosed; one in memory with its ``tokenizer``. source: the model before the retrofit; by
            default what the retrofit's config names, where that is still there.
        untrained, control: the retrofit before it was trained; the source after the same training.
        data: a file (text, JSONL or Parquet with a column ``text``), a list of documents, or None: Python's help texts.
        lengths: tokens of the windows; ``tokens`` of text are scored at each, the same ones, and ``probed`` of them
            where a suspected cause is undone. bos: whether the BOS token begins every window: ``auto`` (where the
            tokenizer adds it), ``always``, ``never``.
        items: questions of each kind, at each length and depth; rounds: of timing; 0 for none of either.
        only: names of hypotheses (files of `diagnosis.hypotheses`): no others are tested, and no figures measured.
        out: a new folder for report.html and report.json; beside it, in ``OUT.run``, an interrupted diagnosis of saved
            models goes on. None writes nothing. command: how to repeat it. say: takes lines on the progress.

    Raises ConfigError, DataError, CheckpointError or NotRetrofittedError in one line.
    """
    plan = _plan(lengths, tokens, probed, items, rounds, seed, bos)
    hypotheses, folder = hypotheses_named(only), _new_folder(out, only)
    models = _models({RETROFIT: retrofit, SOURCE: source, UNTRAINED: untrained, CONTROL: control}, tokenizer)
    text = given_text(data)
    with _measurements(models, tokenizer, text, plan, bos, folder, say) as measurements:
        diagnosis = run_diagnosis(measurements, text.name, say, hypotheses, figures=not only)
        if folder is not None:
            write_folder(diagnosis, folder, command or _call(models, data))
            measurements.journal.remove()
    return diagnosis


def _plan(
    lengths: Sequence[int], tokens: int, probed: int, items: int, rounds: int, seed: int, bos: str
) -> DiagnosisPlan:
    """How much is measured. ConfigError for what means nothing."""
    check_least(tokens=(tokens, 2), probed=(probed, 2), items=(items, 0), rounds=(rounds, 0))
    check_bos(bos)
    return DiagnosisPlan(tuple(check_lengths(lengths)), tokens, probed, items, rounds, seed)


def _new_folder(out: str | os.PathLike[str] | None, only: Sequence[str]) -> Path | None:
    """Where the report goes. ConfigError where none is drawn, CheckpointError where it exists already."""
    if out is None:
        return None
    if only:
        raise ConfigError(f"--out '{out}' would go unused: --only draws no report; leave one of the two out")
    check_absent(Path(out))
    return Path(out)


def _models(given: Mapping[str, GivenModel | None], tokenizer: Any) -> dict[str, str | PreTrainedModel]:
    """The models that there are, by role, with the source that the retrofit's config names. ConfigError where the
    tokenizer is missing, or one too many."""
    models = {
        role: model if isinstance(model, PreTrainedModel) else os.fspath(model)
        for role, model in given.items()
        if model is not None
    }
    check_tokenizer(models[RETROFIT], tokenizer)
    if SOURCE not in models and (named := known_source(models[RETROFIT])) is not None:
        models[SOURCE] = named
    return models


@contextmanager
def _measurements(
    models: Mapping[str, str | PreTrainedModel],
    tokenizer: Any,
    text: Text,
    plan: DiagnosisPlan,
    bos: str,
    folder: Path | None,
    say: Callable[[str], None],
) -> Iterator[Measurements]:
    """The opened models on the text as tokens. Inside, measurements are kept beside ``folder``; in memory without one,
    and for models in memory, since nothing on disk would tell one that runs from another."""
    arms, tokenizer = open_arms(models, text.documents[0], tokenizer)
    documents = tokenise(tokenizer, text.documents)
    for _, model in arms:
        check_ids(model, documents)
    names = {role: model for role, model in models.items() if isinstance(model, str)}
    pairs = trained_pairs(names[RETROFIT]) if RETROFIT in names else None
    journal = Journal()
    if folder is not None and len(names) == len(models):
        depends_on = identity(names, text.checksum, {**asdict(plan), "bos": bos})
        journal = Journal.open(folder.with_name(f"{folder.name}.run"), depends_on, "rpb diagnose", MEASURED, say)
    with journal:
        yield Measurements(arms, documents, bos_policy(tokenizer, bos), plan, tokenizer, pairs, journal)


def _call(models: Mapping[str, str | PreTrainedModel], data: GivenText) -> str:
    """The call, as a user types it, without the settings."""
    named = ", ".join(f"{role}={name_of(model)!r}" for role, model in models.items())
    text = "[...]" if data is not None and not isinstance(data, str | os.PathLike) else repr(data and os.fspath(data))
    return f"rpb_retrofit.diagnose({named}, data={text})"
