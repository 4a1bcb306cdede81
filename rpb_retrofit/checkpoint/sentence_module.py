"""Sentence Transformers' module of a retrofit: it reads texts as long as its user sets.

Sentence Transformers cuts texts at the config's ``max_position_embeddings``, which in a retrofit is only the size of a
table whose rows no longer stand for positions, unless its settings say otherwise, and does not save what they said.
"""

from __future__ import annotations

from typing import Any

try:
    from sentence_transformers.sentence_transformer import modules as library
except ImportError:  # before release 6
    from sentence_transformers import models as library  # type: ignore[no-redef, attr-defined]

Source: Any = library.Transformer


class Transformer(Source):
    """Sentence Transformers' own, whose settings keep ``max_seq_length``."""

    config_keys = list(dict.fromkeys([*Source.config_keys, "max_seq_length"]))  # noqa: RUF012 (as in the class above)

    def get_config_dict(self) -> dict[str, Any]:
        """What is saved."""
        return {**super().get_config_dict(), "max_seq_length": self.max_seq_length}
