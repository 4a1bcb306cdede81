"""Text to calibrate and to evaluate on, as documents of tokens."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

import datasets
import torch
from datasets import load_dataset
from torch import Tensor

from rpb_retrofit.errors import DataError
from rpb_retrofit.files.digest import digest, digest_of
from rpb_retrofit.files.printable import first_line
from rpb_retrofit.tables.calibrate import SHORTEST

_FORMATS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_COLUMN = "text"


@dataclass(frozen=True)
class Text:
    """Documents, and what to call them in a report."""

    name: str
    documents: list[str]

    @property
    def checksum(self) -> str:
        """What tells it from another text."""
        return digest_of(document.encode("utf-8", "surrogatepass") for document in self.documents)


def read_text(file: str | None, option: str = "--data") -> Text:
    """Documents of a file: plain text is one; each row of JSONL or Parquet is one, in its column ``text``.

    Without a file, the help topics that come with every Python (``pydoc_data.topics``), as one document: 465 KB of
    English technical prose. Raises DataError for a file that is missing, empty, not UTF-8 or without that column; it
    names the command line's ``option``.
    """
    if file is None:
        prose = "\n\n".join(topics.topics[name].strip() for name in sorted(topics.topics))
        return Text(f"pydoc_data.topics (Python's help texts; give {option} FILE for text like yours)", [prose])
    path, rows = Path(file).expanduser(), read_rows(file, option)
    documents = [document for document in decoded(rows, f"{option} '{file}'") if document]
    if odd := next((document for document in documents if not isinstance(document, str)), None):
        raise DataError(f"{option} '{file}': its column '{_COLUMN}' holds {type(odd).__name__}, not text")
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise DataError(f"{option} '{file}' holds no text")
    return Text(path.name, documents)


def decoded(rows: Iterable[Any], what: str) -> Iterator[Any]:
    """The rows; DataError where one is not UTF-8, which some formats notice only when it is read."""
    try:
        yield from rows
    except UnicodeDecodeError as error:
        raise DataError(f"{what} is not UTF-8: {error.reason} at byte {error.start} of a row") from error


def read_rows(file: str, option: str, column: str = _COLUMN, streaming: bool = False) -> Any:
    """A column of a file, as a sequence that stays on disk; with ``streaming``, the rows of the dataset as they come.

    Raises DataError for a file that is missing, empty, not UTF-8 or without that column; it names the ``option``.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise DataError(f"{option} '{file}': no such file")
    if (kind := _FORMATS.get(path.suffix.lower())) is None:
        raise DataError(f"{option} '{file}': its ending '{path.suffix}' is none of {', '.join(_FORMATS)}")
    options: dict[str, Any] = {"sample_by": "document"} if kind == "text" else {}
    try:
        if not streaming:  # what comes from the file directly is cached nowhere
            options["cache_dir"] = _cache(path)
        rows = load_dataset(kind, data_files=glob.escape(str(path)), split="train", streaming=streaming, **options)
        names = rows.column_names or list(next(iter(rows)))
    except StopIteration as error:
        raise DataError(f"{option} '{file}' holds no text") from error
    except Exception as error:  # it opens archives by their first bytes, each with errors of its own
        cause = error.__cause__ or error
        if isinstance(cause, UnicodeDecodeError):
            raise DataError(f"{option} '{file}' is not UTF-8: {cause.reason} at byte {cause.start}") from error
        raise DataError(f"{option} '{file}' cannot be read as {kind}: {first_line(cause)}") from error
    if column not in names:
        raise DataError(f"{option} '{file}' has no column '{column}', only {', '.join(names) or 'none'}")
    return rows if streaming else rows[column]


def _cache(file: Path) -> str:
    """Where `datasets` keeps what it makes of a file: its own cache goes by path and time of change, and would give the
    old text of a file that was replaced by one of the same time; here it goes by content."""
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "rpb_retrofit" / digest(file))


def tokenise(tokenizer: Any, documents: Sequence[str]) -> list[Tensor]:
    """Documents as token ids, without special tokens."""
    if not documents:
        return []
    encoded = tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
    return [torch.tensor(ids) for ids in encoded]


def bos_policy(tokenizer: Any, policy: str) -> int | None:
    """The id that begins every window: ``always``, ``never``, or ``auto``: where the tokenizer itself adds it."""
    bos = tokenizer.bos_token_id
    if policy == "never" or (policy == "auto" and tokenizer("a")["input_ids"][:1] != [bos]):
        return None
    if bos is None:
        raise DataError("--bos always: this tokenizer has no beginning-of-sequence token")
    return bos


def spread_windows(tokenizer: Any, text: Text, length: int, tokens: int) -> list[Tensor]:
    """Windows (length,) of token ids, ``tokens`` together, spread evenly over the text and never across documents.

    Each stands between the special tokens that the tokenizer adds. Raises DataError where the text has too few tokens
    for one window.
    """
    before, after = special_tokens(tokenizer)
    room = length - len(before) - len(after)
    documents = tokenise(tokenizer, text.documents)
    longest = max(map(len, documents))
    if longest < room:
        raise DataError(
            f"{text.name}: its longest document has {longest} tokens, too few for a window of {length}: give longer "
            "text or shorter windows"
        )
    starts = [(i, start) for i, ids in enumerate(documents) for start in range(0, len(ids) - room + 1, room)]
    count = max(1, min(len(starts), tokens // length))
    chosen = [starts[i * len(starts) // count] for i in range(count)]
    return [torch.cat([before, documents[i][start : start + room], after]) for i, start in chosen]


def special_tokens(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """What the tokenizer puts before and after a text: BOS, CLS, SEP, ..."""
    plain, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    extra = len(whole) - len(plain)
    start = next((i for i in range(extra + 1) if whole[i : i + len(plain)] == plain), 0)
    return torch.tensor(whole[:start], dtype=torch.long), torch.tensor(whole[start + len(plain) :], dtype=torch.long)


LONGEST = 2048
"""Tokens of the longer windows of calibration, unless a length is asked for: the time grows with its square."""

SHARE = 4
"""The shorter windows have one token in so many of the longer ones', if that is no fewer than `SHORTEST`."""

POLISH = 512
"""Tokens of a step of polish."""


@dataclass(frozen=True)
class CalibrationText:
    """What tables are calibrated on: ``tokens`` of a text, half in windows of ``length``, half in shorter ones."""

    text: Text
    tokens: int = 8192
    length: int | None = None

    @classmethod
    def of(cls, file: str | None, **cut: Any) -> CalibrationText:
        """A file's text, or by default Python's help texts, as `read_text` reads them."""
        return cls(read_text(file, "--calibration"), **cut)

    def windows(self, tokenizer: Any, context: int | None) -> list[Tensor]:
        """The windows for a model that was trained on ``context`` tokens at once (None: not known).

        By default the longer ones are as long as that, but not longer than `LONGEST`. Short ones are there because a
        head attends otherwise at the beginning of a text than far inside it, and prompts come in all lengths.
        DataError where they would be longer than the context: the source has nothing to teach there.
        """
        if self.length is not None and context is not None and self.length > context:
            raise DataError(f"--calibration-length {self.length}: the source was made for {context} tokens at most")
        length = self.length or min(context or LONGEST, LONGEST)
        if length // SHARE < SHORTEST:
            return spread_windows(tokenizer, self.text, length, self.tokens)
        return [
            *spread_windows(tokenizer, self.text, length, self.tokens // 2),
            *spread_windows(tokenizer, self.text, length // SHARE, self.tokens // 2),
        ]

    def polishing(self, tokenizer: Any, context: int | None, steps: int) -> list[Tensor]:
        """The windows for so many steps of polish, and some to be held out; fewer where the text is short."""
        length = min(context or POLISH, POLISH)
        return spread_windows(tokenizer, self.text, length, length * (steps + max(1, steps // 10)))
