"""What the config of a retrofit says: its settings, as config.json keeps them, and the classes that load it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from rpb_retrofit.config import RetrofitConfig
from rpb_retrofit.errors import ConfigError
from rpb_retrofit.runtime.families import FACTOR, Family
from rpb_retrofit.runtime.mechanisms import inverse_frequencies, rotary_pairs, trained_context
from rpb_retrofit.tables import CONTENT
from rpb_retrofit.version import __version__


def describe(
    model: PreTrainedModel, config: RetrofitConfig, family: Family, windows: Sequence[Tensor] = ()
) -> dict[str, Any]:
    """What the model's config says about its retrofit: the key ``rpb_retrofit`` of config.json.

    ``windows`` are those of calibration: their lengths say which of an absolute source's positions occur.
    """
    absolute = family.mechanism in ("learned", "sinusoidal") and windows
    kept = kept_frequencies(model, config.keep_frequencies, family)
    return {
        "version": __version__,
        "source": str(model.name_or_path or type(model).__name__),
        "mechanism": family.mechanism,
        **asdict(config),
        **({"kept_frequencies": kept} if kept else {}),
        **({"text_lengths": text_lengths(windows)} if absolute else {}),
        **({FACTOR: rotary_pairs(model, family)._asdict()} if config.calibrate == CONTENT else {}),
    }


def text_lengths(windows: Sequence[Tensor]) -> list[tuple[int, float]]:
    """The lengths of texts, ascending, and the share of all tokens that lie in texts of each."""
    tokens = Counter[int]()
    for window in windows:
        tokens[len(window)] += len(window)
    return [(length, tokens[length] / tokens.total()) for length in sorted(tokens)]


def kept_frequencies(model: PreTrainedModel, keep: int | str, family: Family) -> dict[str, int]:
    """How many of the highest frequencies of each rotary buffer stay; empty where none do."""
    if keep == 0:
        return {}
    source = model.name_or_path or type(model).__name__
    if family.mechanism != "rope":
        raise ConfigError(
            f"keep_frequencies={keep!r}: '{source}' has {family.mechanism} positions and no frequencies: leave it out"
        )
    found = inverse_frequencies(model, family)
    if keep == "auto":
        context = trained_context(model, family) or 0
        kept = {name: int((2 * math.pi / frequencies <= context).sum()) for name, frequencies in found.items()}
        return kept if any(kept.values()) else {}
    for name, frequencies in found.items():
        if int(keep) > len(frequencies):
            raise ConfigError(f"keep_frequencies={keep}: '{source}' has {len(frequencies)} in {name}; keep fewer")
    return dict.fromkeys(found, int(keep))


def auto_map(config: Any) -> dict[str, str]:
    """For every Auto class that serves this config, the retrofitted class in the checkpoint's own code."""
    classes = {}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None and type(config) in mapping:
            served = mapping[type(config)]
            model = served[0] if isinstance(served, tuple | list) else served
            classes[name] = f"modeling.Rpb{model.__name__}"
    return classes
