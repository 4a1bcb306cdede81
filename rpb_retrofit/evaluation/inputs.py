"""What a user gives to be measured: a model, by its name or loaded, and text, in a file or in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from rpb_retrofit.checkpoint.load import CAUSAL_HEADS, open_causal_lm
from rpb_retrofit.errors import ConfigError, DataError
from rpb_retrofit.instruments.modes import evaluating
from rpb_retrofit.text.reading import Text, read_text

GivenModel = str | os.PathLike[str] | PreTrainedModel
"""A folder, a hub id, a GGUF file, or a model in memory."""

GivenText = str | os.PathLike[str] | Sequence[str] | None
"""A file, a list of documents, or None: Python's help texts."""


@dataclass(frozen=True)
class OpenModel:
    """A model with its tokenizer. ``name`` is what reports call it; ``loaded``: the user's own, not read from disk."""

    name: str
    network: PreTrainedModel
    tokenizer: Any
    loaded: bool

    @contextmanager
    def evaluating(self) -> Iterator[PreTrainedModel]:
        """The network without dropout; a user's own goes back to the mode that it was in."""
        with evaluating(self.network):
            yield self.network


def name_of(model: GivenModel) -> str:
    """What a report calls a model. ConfigError for what is none."""
    if isinstance(model, PreTrainedModel):
        return model.name_or_path or type(model).__name__
    if not isinstance(model, str | os.PathLike):
        raise ConfigError(f"model: a {type(model).__name__} is neither a name nor a model of Transformers")
    return os.fspath(model)


def open_given(model: GivenModel, tokenizer: Any = None) -> OpenModel:
    """A causal model and its tokenizer. One that is loaded stays on its device; others go to the accelerator, if any.

    Raises ConfigError for a loaded model without its tokenizer, and for a tokenizer beside a name; DataError for a
    model that does not predict next tokens; CheckpointError for what cannot be found.
    """
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise ConfigError(f"'{name_of(model)}' is a loaded model: give its tokenizer too, as tokenizer=...")
        if not type(model).__name__.endswith(CAUSAL_HEADS):
            raise DataError(
                f"'{name_of(model)}' is a {type(model).__name__}: only models that predict the next token can be scored"
            )
        return OpenModel(name_of(model), model, tokenizer, loaded=True)
    name = name_of(model)
    if tokenizer is not None:
        raise ConfigError(f"tokenizer: '{name}' is read with its own; give one beside a loaded model only")
    return OpenModel(name, *open_causal_lm(name), loaded=False)


def given_text(data: GivenText, option: str = "--data") -> Text:
    """Documents, without those that hold no text. DataError for none, and what `read_text` raises; it names the
    command line's ``option``."""
    if data is None or isinstance(data, str | os.PathLike):
        return read_text(None if data is None else os.fspath(data), option)
    if odd := [document for document in data if not isinstance(document, str)]:
        raise DataError(f"{option}: the list of documents holds {type(odd[0]).__name__}, not text")
    documents = [document for document in data if document.strip()]
    if not documents:
        raise DataError(f"{option}: the list of documents holds no text")
    return Text(f"documents in memory ({len(documents):,})", documents)


def check_bos(bos: str) -> None:
    """ConfigError for what is no policy of `rpb_retrofit.text.tokens.bos_policy`."""
    if bos not in ("auto", "always", "never"):
        raise ConfigError(f"--bos {bos}: choose auto, always or never")


def check_least(**least: tuple[int | None, int]) -> None:
    """ConfigError for a number below its bound; each is given as ``name=(number, bound)``, None where it was not."""
    for name, (number, bound) in least.items():
        if number is not None and number < bound:
            raise ConfigError(f"--{name.replace('_', '-')} {number}: at least {bound}")


def check_lengths(lengths: Sequence[int], option: str = "--lengths") -> list[int]:
    """Lengths in tokens, ascending, each once. ConfigError for none, or for one below 2."""
    if not lengths or min(lengths) < 2:
        raise ConfigError(f"{option} {','.join(map(str, lengths))}: give lengths of at least 2 tokens")
    return sorted(set(lengths))
