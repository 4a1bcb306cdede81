"""Named tensors: those that a checkpoint holds, and whether two sets are the same."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def weights_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint's safetensors files by name."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_close(
    actual: dict[str, Tensor], wanted: dict[str, Tensor], *, atol: float | None = None, rtol: float | None = None
) -> None:
    """The same names, at least one, and values within the tolerances, by default those of PyTorch for the dtype."""
    assert actual.keys() == wanted.keys() and actual
    for name, tensor in wanted.items():
        torch.testing.assert_close(actual[name], tensor, atol=atol, rtol=rtol, msg=name)
