"""A model that many tests of the runtime need."""

from __future__ import annotations

import pytest
from transformers import PreTrainedModel

from tests.families.cases import BY_NAME
from tests.support.tiny_models import retrofitted


@pytest.fixture
def llama() -> PreTrainedModel:
    """A tiny retrofit, of the test's own."""
    return retrofitted(BY_NAME["llama"])
