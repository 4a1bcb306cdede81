"""One trained model for all tests of a diagnosis, on one thread: two would wait for each other on a small model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel

from tests.diagnosis.small_model import retrofitted, trained


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def source(one_thread: None) -> PreTrainedModel:
    """The small model, which is not to be changed: copy it."""
    return trained("llama")


@pytest.fixture(scope="package")
def healthy(source: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with its calibrated retrofit."""
    folder = str(tmp_path_factory.mktemp("healthy"))
    retrofitted(source).save_pretrained(folder)
    return folder
