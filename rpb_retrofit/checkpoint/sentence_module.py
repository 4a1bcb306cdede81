"""Sentence Transformers' module of a retrofit: it reads texts as long as its user sets.

Sentence Transformers cuts texts at the config's ``max_position_embeddings``, which in a retrofit is only the size of a
table whose rows no longer stand for positions, unless its settings say otherwise, and does not save what they said.
"""

from __future__ import annotations

from typing import Any, ClassVar

try:
    from sentence_transformers.sentence_transformer.modules import Transformer as Source
except ImportError:  # before release 6
    from sentence_transformers.models import Transformer as Source


class Transformer(Source):
    """Sentence Transformers' own, whose settings keep ``max_seq_length``."""

    config_keys: ClassVar[list[str]] = list(dict.fromkeys([*Source.config_keys, "max_seq_length"]))

    def get_config_dict(self) -> dict[str, Any]:
        """What is saved."""
        return {**super().get_config_dict(), "max_seq_length": self.max_seq_length}
