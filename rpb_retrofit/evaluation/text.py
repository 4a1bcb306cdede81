"""Text to evaluate on, as documents of tokens."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

from datasets import load_dataset
from datasets.exceptions import DatasetGenerationError

from rpb_retrofit.errors import DataError

_FORMATS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_COLUMN = "text"


@dataclass(frozen=True)
class Text:
    """Documents, and what to call them in a report."""

    name: str
    documents: list[str]


def read_text(file: str | None) -> Text:
    """Documents of a file: plain text is one; each row of JSONL or Parquet is one, in its column ``text``.

    Without a file, the help topics that come with every Python (``pydoc_data.topics``), as one document: 465 KB of
    English technical prose. Raises DataError for a file that is missing, empty, not UTF-8 or without that column.
    """
    if file is None:
        prose = "\n\n".join(topics.topics[name].strip() for name in sorted(topics.topics))
        return Text("pydoc_data.topics (Python's help texts; give --data FILE for text like yours)", [prose])
    path = Path(file).expanduser()
    if not path.is_file():
        raise DataError(f"--data '{file}': no such file")
    if (kind := _FORMATS.get(path.suffix.lower())) is None:
        raise DataError(f"--data '{file}': its ending '{path.suffix}' is none of {', '.join(_FORMATS)}")
    options: dict[str, Any] = {"sample_by": "document"} if kind == "text" else {}
    try:
        rows = load_dataset(kind, data_files=glob.escape(str(path)), split="train", **options)
    except StopIteration as error:
        raise DataError(f"--data '{file}' holds no text") from error
    except (DatasetGenerationError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, UnicodeDecodeError):
            raise DataError(f"--data '{file}' is not UTF-8: {cause.reason} at byte {cause.start}") from error
        raise DataError(f"--data '{file}' cannot be read as {kind}: {str(cause).splitlines()[0]}") from error
    if _COLUMN not in rows.column_names:
        raise DataError(f"--data '{file}' has no column '{_COLUMN}', only {', '.join(rows.column_names) or 'none'}")
    documents = [document for document in rows[_COLUMN] if document]
    if odd := next((document for document in documents if not isinstance(document, str)), None):
        raise DataError(f"--data '{file}': its column '{_COLUMN}' holds {type(odd).__name__}, not text")
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise DataError(f"--data '{file}' holds no text")
    return Text(path.name, documents)
