"""YAML that a user wrote, read strictly: a key twice is a mistake, and a few lines cannot stand for millions."""

from __future__ import annotations

from typing import Any

import yaml

from rpb_retrofit.errors import ConfigError
from rpb_retrofit.files.printable import message_of

LARGEST = 256 * 1024
"""Bytes of a document: a recipe has some hundred, and the parser takes seconds for a megabyte."""

MOST_NODES = 100_000
"""Values of a document, an alias counting as all that it stands for."""


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML in which a key stands once, a number fits 64 bits, and aliases stay few."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key that is no plain value", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key.value}' twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        try:
            value = super().construct_yaml_int(node)
        except ValueError as error:
            raise yaml.constructor.ConstructorError(None, None, "a number that is none", node.start_mark) from error
        if not -(2**63) <= value < 2**63:
            raise yaml.constructor.ConstructorError(None, None, "a number beyond 64 bits", node.start_mark)
        return value

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _size(node, {}) > MOST_NODES:
            raise yaml.constructor.ConstructorError(None, None, "aliases that stand for too much", node.start_mark)
        return node


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values there would be without aliases; one that stands for itself has no end."""
    if id(node) not in known:
        known[id(node)] = MOST_NODES + 1  # as long as it is being counted
        inner: list[Any] = []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        known[id(node)] = 1 + sum(_size(part, known) for part in inner)
    return known[id(node)]


def read_yaml(text: str, what: str) -> Any:
    """What ``text`` says. ConfigError, in one line that begins with ``what``, where it is not YAML, or not strictly."""
    if len(text) > LARGEST:
        raise ConfigError(f"{what} is not read: it has more than {LARGEST:,} characters")
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{what} is not YAML: {message_of(error)}") from error
    except RecursionError as error:
        raise ConfigError(f"{what} is not read: it is nested too deep") from error
    except (ValueError, OverflowError, AttributeError, TypeError) as error:  # a date without a day, say
        raise ConfigError(f"{what} is not YAML: {error}") from error
