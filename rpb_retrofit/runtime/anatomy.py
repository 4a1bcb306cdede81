"""What a model is made of, found once: where its attention is, what holds its positions, how long it was trained.

Whoever works on a model asks its `Anatomy`, and passes that on. Nothing is found before it is asked for. All of it
holds before and after a retrofit, which keeps every module in its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .errors import PartialMatchError, UnsupportedModelError
from .factor import RotaryPairs
from .families import Family, family_of
from .positions import takes_positions


@dataclass(frozen=True)
class AttentionFacts:
    """What a self-attention module says of itself; None where it does not say.

    ``heads`` of the queries, and so rows of its table; ``key_heads``; ``width`` of a head; ``scale`` of the content
    term; ``causal``; ``window``: keys that a query sees, itself included, in layers with a sliding window; ``sinks``:
    whether each head has a score that no key has.
    """

    heads: int
    key_heads: int | None
    width: int | None
    scale: float | None
    causal: bool
    window: int | None
    sinks: bool

    @classmethod
    def of(cls, module: Any, config: Any) -> AttentionFacts:
        """What ``module`` says, in a model of this text config. PartialMatchError where its heads are not known."""
        heads = _first_number((module, "num_heads"), (module, "n_heads"), (config, "num_attention_heads"))
        if heads is None:
            raise PartialMatchError(f"{type(module).__name__}: its number of heads is not known")
        scale = getattr(module, "scaling", None)
        return cls(
            heads=heads,
            key_heads=_first_number((module, "num_key_value_heads"), (config, "num_key_value_heads")) or heads,
            width=_first_number(*((module, name) for name in _WIDTHS)),
            scale=scale if isinstance(scale, float) else None,
            causal=is_causal_module(module),
            window=_window(module, config),
            sinks=isinstance(getattr(module, "sinks", None), Tensor),
        )


_WIDTHS = ("qk_head_dim", "head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
"""What families call the width of a head that queries and keys have."""


def _window(module: Any, config: Any) -> int | None:
    """A layer's own window; else the config's, where it has one for all layers."""
    if hasattr(module, "sliding_window"):
        return module.sliding_window
    return None if getattr(config, "layer_types", None) else getattr(config, "sliding_window", None)


def _first_number(*places: tuple[Any, str]) -> int | None:
    numbers = (getattr(owner, name, None) for owner, name in places)
    return next((number for number in numbers if isinstance(number, int)), None)


def is_causal_module(module: Any) -> bool:
    """Whether an attention module hides the keys after the query: by its class, unless its config says otherwise."""
    config = getattr(module, "config", None)
    return bool(getattr(module, "is_causal", True) and getattr(config, "is_causal", True))


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts of ``model``, whose positions enter as its ``family`` says."""

    model: PreTrainedModel
    family: Family

    @classmethod
    def of(cls, model: PreTrainedModel) -> Anatomy:
        """The anatomy of a plain or a retrofitted model. UnsupportedModelError where its family is not known."""
        return cls(model, family_of(model.config))

    @cached_property
    def attentions(self) -> dict[str, Any]:
        """The self-attention modules by name, one in every block; PartialMatchError lists the blocks without."""
        named = modules_named(self.model, self.family.attention)
        modules = {name: module for name, module in named.items() if _is_attention(module)}
        without = [block for block in self.blocks if not any(name.startswith(f"{block}.") for name in modules)]
        if without or not modules:
            raise PartialMatchError(
                f"{type(self.model).__name__}: {len(modules)} of {len(self.blocks)} layers have a self-attention named "
                f"'{self.family.attention}'; without: {', '.join(without) or 'no layers numbers'}"
            )
        return modules

    @property
    def every_attention(self) -> Iterator[Any]:
        """All attention modules: cross-attention and those of submodels without a bias too."""
        return (module for module in self.model.modules() if _is_attention(module))

    def facts(self, attention: str) -> AttentionFacts:
        """What the self-attention of that name says of itself."""
        return AttentionFacts.of(self.attentions[attention], self.model.config)

    @cached_property
    def blocks(self) -> list[str]:
        """Names of the layers, each of which has a self-attention."""
        return [name for name, module in self.model.named_modules() if isinstance(module, GradientCheckpointingLayer)]

    def block_of(self, attention: str) -> str:
        """The name of the layer that an attention lies in."""
        return next(block for block in self.blocks if attention.startswith(f"{block}."))

    @property
    def position_modules(self) -> dict[str, Any]:
        """The modules that hold the mechanism, by name: rotary modules, or tables of positions; empty for ALiBi and T5,
        whose mechanism lives in the attention."""
        return modules_named(self.model, self.family.positions) if self.family.positions else {}

    @property
    def rotary_counts(self) -> dict[str, int]:
        """How many frequencies each rotary buffer holds, by the buffer's name."""
        return {
            name: len(buffer)
            for holder in self.position_modules.values()
            for name, buffer in holder.named_buffers()
            if _is_rotary(name)
        }

    @property
    def layer_types(self) -> dict[str, str | None]:
        """The type that the config gives each layer, by the name of its attention; None where it gives none."""
        types = getattr(self.model.config.get_text_config(), "layer_types", None) or [None] * len(self.attentions)
        return dict(zip(self.attentions, types, strict=False))

    @property
    def rotary_buffers(self) -> dict[str, str]:
        """The rotary buffer that each attention's rotation comes from, by the attention's name; of a model with rotary
        positions."""
        counts = self.rotary_counts
        typed = {name: f"{layer_type}_inv_freq" for name, layer_type in self.layer_types.items()}
        return {name: buffer if buffer in counts else "inv_freq" for name, buffer in typed.items()}

    @property
    def inverse_frequencies(self) -> dict[str, Tensor]:
        """The rotary frequencies, in radians a token and descending, by the name of the buffer that holds them.

        They are computed from the config again, so a model without weights (on the meta device) has them too.
        PartialMatchError where they do not descend.
        """
        by_name: dict[str, Tensor] = {}
        for holder in self.position_modules.values():
            with torch.device("cpu"):
                fresh: Any = type(holder)(config=holder.config)
            by_name |= {name: buffer for name, buffer in fresh.named_buffers() if _is_rotary(name)}
        for name, frequencies in by_name.items():
            if not bool((frequencies.diff() <= 0).all()):
                kind = type(self.model).__name__
                raise PartialMatchError(f"{kind}: the frequencies in {name} do not descend: keep none")
        return by_name

    @property
    def rotary_pairs(self) -> RotaryPairs:
        """Which dimensions of a query rotate together; UnsupportedModelError where none do, or nothing says which."""
        name, family = type(self.model).__name__, self.family
        if family.mechanism != "rope" or not family.uses_interface:
            reason = "has no rotary frequencies" if family.mechanism != "rope" else "keeps its queries to itself"
            raise UnsupportedModelError(f"{name} {reason}: its content term gets no factors, only tables can be fitted")
        counts = {len(frequencies) for frequencies in self.inverse_frequencies.values()}
        if len(counts) != 1:
            raise UnsupportedModelError(
                f"{name} has layers with {sorted(counts)} frequencies: only tables can be fitted"
            )
        config = self.model.config.get_text_config()
        start = getattr(config, family.rotary_after) if family.rotary_after else 0
        return RotaryPairs(family.pairing, start, counts.pop())

    @property
    def context(self) -> int | None:
        """The most tokens that the plain model was made for, None where nothing says: of a table of positions, its
        rows."""
        if self.family.mechanism in ("learned", "sinusoidal"):
            tables = self.position_modules.values()
            return min((table.num_embeddings - unused_rows(table) for table in tables), default=None)
        config = self.model.config.get_text_config()
        lengths = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
        return next((length for length in lengths if length), None)

    @property
    def submodels(self) -> list[PreTrainedModel]:
        """The model and all models inside it."""
        return list(submodels(self.model))

    @property
    def configs(self) -> list[Any]:
        """The configs of all submodels, each once."""
        return distinct(submodel.config for submodel in self.submodels)

    @property
    def positioned(self) -> list[PreTrainedModel]:
        """The innermost models whose forward takes ``position_ids``: those that hold the layers."""
        takers = [submodel for submodel in self.submodels if takes_positions(submodel)]
        return [taker for taker in takers if sum(part in takers for part in submodels(taker)) == 1]


def submodels(model: nn.Module) -> Iterator[PreTrainedModel]:
    """The model and all models inside it, of whatever family."""
    return (module for module in model.modules() if isinstance(module, PreTrainedModel))


def distinct(configs: Iterable[Any]) -> list[Any]:
    """Each object once, though it be equal to another: models that share a config share one object."""
    return list({id(config): config for config in configs}.values())


def modules_named(model: nn.Module, ending: str) -> dict[str, Any]:
    """Modules whose dotted name ends with these components, by name."""
    return {name: module for name, module in model.named_modules() if f".{name}".endswith(f".{ending}")}


def unused_rows(table: nn.Module) -> int:
    """Rows that no position uses, at a position table's head: OPT's and BART's offset, RoBERTa's padding row."""
    padding = getattr(table, "padding_idx", None)
    return cast(int, getattr(table, "offset", 0) if padding is None else padding + 1)


def _is_attention(module: nn.Module) -> bool:
    return "Attention" in type(module).__name__


def _is_rotary(buffer: str) -> bool:
    return buffer.endswith("inv_freq") and "original" not in buffer
