"""Documents of a file, or those that come with every Python."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

import datasets
from datasets import load_dataset

from rpb_retrofit.errors import DataError
from rpb_retrofit.files.digest import digest, digest_of
from rpb_retrofit.files.printable import first_line

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

    @property
    def characters(self) -> int:
        """Of all documents."""
        return sum(map(len, self.documents))

    def parted(self, characters: int) -> tuple[Text, Text]:
        """About so many characters from the beginning, and the rest; a document is cut between two words."""
        first, rest = list[str](), list[str]()
        for document in self.documents:
            cut = characters
            if 0 < cut < len(document):
                cut = document.rfind(" ", 0, cut) + 1 or cut
            first.append(document[:cut])
            rest.append(document[cut:])
            characters = max(0, characters - len(document))
        return Text(self.name, [x for x in first if x.strip()]), Text(self.name, [x for x in rest if x.strip()])


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
