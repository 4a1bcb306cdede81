"""What is asked of a long context, after the synthetic tasks of RULER; a new kind is a file and a row here."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from rpb_retrofit.evaluation.tasks.common_words import common_words
from rpb_retrofit.evaluation.tasks.key_value import key_value
from rpb_retrofit.evaluation.tasks.multi_key import multi_key
from rpb_retrofit.evaluation.tasks.multi_query import multi_query
from rpb_retrofit.evaluation.tasks.multi_value import multi_value
from rpb_retrofit.evaluation.tasks.passkey import passkey
from rpb_retrofit.evaluation.tasks.task import Task
from rpb_retrofit.evaluation.tasks.variable_tracking import variable_tracking

PLACED: dict[str, Callable[[Random, float], Task]] = {
    "passkey": passkey,
    "multi-key": multi_key,
    "key-value": key_value,
}
"""Kinds whose answer stands in one place, from the depth of that place."""

SPREAD: dict[str, Callable[[Random, int], Task]] = {
    "multi-value": lambda random, length: multi_value(random),
    "multi-query": lambda random, length: multi_query(random),
    "variable-tracking": lambda random, length: variable_tracking(random),
    "common-words": common_words,
}
"""Kinds whose answer is gathered from all over the context, from the item's length in tokens."""

KINDS = (*PLACED, *SPREAD)
"""The names of all kinds."""
