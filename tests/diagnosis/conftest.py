"""One trained model, and one saved one, for all tests of a diagnosis, on one thread: two would wait for each other on a
small model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tests.diagnosis.small_model import retrofitted, trained
from tests.support.training_cases import PROSE, write_retrofit, write_source


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


@pytest.fixture(scope="package")
def checkpoints(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source, its retrofit, a text, and retrofits that are broken: ``dropped`` and ``nan``."""
    folder = tmp_path_factory.mktemp("diagnose")
    source = write_source(folder / "source")
    (folder / "text.txt").write_text(PROSE[:8000])
    retrofit = write_retrofit(source, folder / "retrofit", relative_attention_num_buckets=16)
    for name, factor in (("dropped", 0.0), ("nan", float("nan"))):
        (folder / name).mkdir()
        for file in retrofit.iterdir():
            if file.is_file():
                (folder / name / file.name).write_bytes(file.read_bytes())
        for shard in (folder / name).glob("*.safetensors"):
            tensors = load_file(shard)
            for key in tensors:
                if "relative_attention_bias" in key:
                    tensors[key] = tensors[key] * factor
            save_file(tensors, shard, metadata={"format": "pt"})
    return folder
