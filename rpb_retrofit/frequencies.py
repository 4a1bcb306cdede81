"""How ``keep_frequencies`` is written: how many of RoPE's highest frequencies go on rotating, everywhere and by layer.

``20``, ``auto`` or ``all`` for every layer; after it, rules for some: ``20,17-18:28,sliding_attention:all``. A rule
names layers by their number from 0 on, by a range, or by the type that the model's config gives them; of two rules for
one layer the later holds. A first entry that is itself a rule leaves nothing rotating elsewhere. ``auto+4`` keeps all
in four layers more, those that text shows to need it most.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rpb_retrofit.errors import ConfigError

AUTO, ALL = "auto", "all"

Amount = int | str
"""A number of frequencies, `AUTO` or `ALL`."""

LONGEST = 400
"""Characters of a setting that are read: more than any that means something, and few enough for an error's line."""

_MORE = re.compile(r"(.*)\+(\d{1,6})")

_LAYERS = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")


@dataclass(frozen=True)
class Rule:
    """What the layers keep that ``layers`` names: a number, a range of numbers, or a layer type."""

    layers: str
    amount: Amount

    @property
    def numbers(self) -> range | None:
        """The layers by number; None where the rule names a type."""
        match = _LAYERS.fullmatch(self.layers)
        return None if match is None else range(int(match[1]), int(match[2] or match[1]) + 1)

    def names(self, number: int, layer_type: str | None) -> bool:
        """Whether the rule is for the layer of this number and type."""
        return self.layers == layer_type if self.numbers is None else number in self.numbers


@dataclass(frozen=True)
class KeepFrequencies:
    """What ``keep_frequencies`` says: an amount for ``every`` layer, ``rules`` for some; and how many ``more`` layers,
    yet to be chosen, keep all."""

    every: Amount
    rules: tuple[Rule, ...] = ()
    more: int = 0

    @classmethod
    def of(cls, value: int | str) -> KeepFrequencies:
        """Read a setting. ConfigError names the entry that has no meaning."""
        value = str(value) if len(str(value)) <= LONGEST else f"{str(value)[:LONGEST]}..."
        first, *rest = value.split(",")
        if ":" in first:
            return cls(0, tuple(_rule(entry, value) for entry in (first, *rest)))
        match = _MORE.fullmatch(first.strip())
        every, more = (first, 0) if match is None else (match[1], int(match[2]))
        return cls(_amount(every, value), tuple(_rule(entry, value) for entry in rest), more)

    @property
    def nothing(self) -> bool:
        """Whether no layer keeps any."""
        return self.every == 0 and not self.more and all(rule.amount == 0 for rule in self.rules)

    def chosen(self, layers: Iterable[int]) -> KeepFrequencies:
        """The same where these layers, by number, were chosen as those that keep all."""
        return KeepFrequencies(self.every, self.rules + tuple(Rule(str(number), ALL) for number in layers))

    def of_layer(self, number: int, layer_type: str | None) -> Amount:
        """What the layer of this number and type keeps."""
        amounts = [rule.amount for rule in self.rules if rule.names(number, layer_type)]
        return amounts[-1] if amounts else self.every

    def unused(self, layer_types: Sequence[str | None]) -> Rule | None:
        """The first rule that is for no layer of a model with layers of these types, or reaches beyond its last."""
        for rule in self.rules:
            named = {rule.layers} if rule.numbers is None else set(rule.numbers)
            if not named <= {*layer_types, *range(len(layer_types))}:
                return rule
        return None


def _rule(entry: str, value: int | str) -> Rule:
    layers, colon, amount = entry.strip().rpartition(":")
    if not colon or not layers:
        raise ConfigError(f"keep_frequencies={value}: '{entry}' is no rule: write LAYERS:K, such as 17-18:28")
    rule = Rule(layers, _amount(amount, value))
    if rule.numbers is None and not layers.isidentifier():
        raise ConfigError(f"keep_frequencies={value}: '{layers}' names no layers: write 7, 17-18, or a layer type")
    if rule.numbers is not None and not rule.numbers:
        raise ConfigError(f"keep_frequencies={value}: '{layers}' is no range: write the lower layer first")
    return rule


def _amount(text: str, value: int | str) -> Amount:
    text = text.strip()
    if text in (AUTO, ALL):
        return text
    if not re.fullmatch(r"\d{1,6}", text):
        raise ConfigError(f"keep_frequencies={value}: '{text}' is neither a number from 0 on, 'auto' nor 'all'")
    return int(text)
