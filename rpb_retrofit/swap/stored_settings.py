"""What the config of a retrofit says: its settings, as config.json keeps them, and the classes that load it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor
from transformers.models.auto import modeling_auto

from rpb_retrofit.config import RetrofitConfig
from rpb_retrofit.frequencies import KeepFrequencies
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.runtime.families import FACTOR
from rpb_retrofit.swap.kept_frequencies import keep
from rpb_retrofit.tables import CONTENT
from rpb_retrofit.version import __version__


def describe(
    anatomy: Anatomy, config: RetrofitConfig, windows: Sequence[Tensor] = (), whole: Sequence[int] = ()
) -> dict[str, Any]:
    """What the model's config says about its retrofit: the key ``rpb_retrofit`` of config.json.

    ``windows`` are those of calibration: their lengths say which of an absolute source's positions occur. ``whole``:
    layers, by number, that were chosen to keep all frequencies.
    """
    model, family = anatomy.model, anatomy.family
    absolute = family.mechanism in ("learned", "sinusoidal") and windows
    kept = keep(anatomy, KeepFrequencies.of(config.keep_frequencies).chosen(whole))
    return {
        "version": __version__,
        "source": str(model.name_or_path or type(model).__name__),
        "mechanism": family.mechanism,
        **asdict(config),
        **({"kept_frequencies": kept.by_buffer} if kept.by_buffer else {}),
        **({"kept_in_layers": kept.in_layers} if kept.in_layers else {}),
        **({"text_lengths": text_lengths(windows)} if absolute else {}),
        **({FACTOR: anatomy.rotary_pairs._asdict()} if config.calibrate == CONTENT else {}),
    }


def text_lengths(windows: Sequence[Tensor]) -> list[tuple[int, float]]:
    """The lengths of texts, ascending, and the share of all tokens that lie in texts of each."""
    tokens = Counter[int]()
    for window in windows:
        tokens[len(window)] += len(window)
    return [(length, tokens[length] / tokens.total()) for length in sorted(tokens)]


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
