"""Loads retrofits with the Transformers of this environment, which need not be one that rpb_retrofit itself supports.

Run by scripts/check_lock.py as ``python lock_probe.py FOLDER FOUND``: FOLDER/cases.json lists the retrofits; what each
load did is written to FOUND, as JSON.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

transformers.utils.logging.set_verbosity_error()
warnings.simplefilter("ignore")

EAGER = {"attn_implementation": "eager"}
BY_HAND = {"nothing": {}, "attention": EAGER}
if int(transformers.__version__.split(".")[0]) >= 5:  # before, there is no such argument
    BY_HAND |= {
        "experts": {"experts_implementation": "eager"},
        "both": {**EAGER, "experts_implementation": "eager"},
    }


def attempt(load: Callable[..., object], *args: object, **kwargs: object) -> str | None:
    """The error of a load in one line; None where it succeeded."""
    try:
        load(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def probe(case: dict, folder: Path) -> dict:
    """``plain``: by what was given by hand, each class and its error. ``remote``: with the checkpoint's own code."""
    path = folder / case["name"]
    classes = [getattr(transformers, name, None) for name in (case["auto"], case["concrete"], "AutoModel")]
    known = case["model_type"] in transformers.CONFIG_MAPPING
    plain = {
        given: {cls.__name__: attempt(cls.from_pretrained, path, **kwargs) for cls in classes if cls is not None}
        for given, kwargs in BY_HAND.items()
    }
    differences: list[float] = []

    def remote() -> None:
        model = getattr(transformers, case["auto"]).from_pretrained(path, trust_remote_code=True).eval()
        tensors = load_file(path / "expected.tensors")
        want = tensors.pop("logits")
        with torch.no_grad():
            differences.append(((model(**tensors).logits - want).abs().max() / want.abs().max()).item())

    error = attempt(remote)
    return {
        "known": known,
        "plain": plain,
        "remote": {"error": error, "difference": differences[0] if differences else None},
    }


if __name__ == "__main__":
    root = Path(sys.argv[1])
    cases = json.loads((root / "cases.json").read_text())
    Path(sys.argv[2]).write_text(json.dumps({case["name"]: probe(case, root) for case in cases}))
