"""Faults of the settings that were chosen, and of what training did."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import rpb_retrofit as rpb
from rpb_retrofit.diagnosis.arms import Arms
from tests.diagnosis.faults.planting import fault
from tests.diagnosis.small_model import language, plain_language, retrofitted, train


@fault("the tables were never fitted", "not_fitted", zeros="zeros", normal="normal", alibi="alibi")
def never_fitted(arms: Arms, init: str) -> Arms:
    model = deepcopy(arms.source)
    rpb.retrofit(model, rpb.RetrofitConfig(init=init))
    return replace(arms, retrofit=model)


@fault("the last bucket begins at 8", "far_order_lost")
def short_reach(arms: Arms) -> Arms:
    return replace(arms, retrofit=retrofitted(arms.source, buckets=10, max_distance=8))


@fault("two buckets for all that is near", "local_order_lost")
def wide_buckets(arms: Arms) -> Arms:
    return replace(arms, retrofit=retrofitted(arms.source, buckets=4, max_distance=256))


@fault("texts longer than frequencies that were kept", "outside_trained_length", {"lengths": (64, 256, 1024)})
def kept_frequencies(arms: Arms) -> Arms:
    return Arms(retrofitted(arms.source, keep=6))  # its source breaks there as well


@fault("training on far positions only", "short_context_forgotten")
def forgets_short(arms: Arms) -> Arms:
    train(arms.retrofit, language(60_000, 5), steps=60, worse_before=40)
    return arms


@fault("another language was trained", "domain_drift")
def another_language(arms: Arms) -> Arms:
    control = deepcopy(arms.source)
    other = language(60_000, 5, words=1234) % 24
    for model in (arms.retrofit, control):
        train(model, other, steps=60)
    return replace(arms, control=control)


@fault("induction was unlearned", "heads_lost")
def induction_unlearned(arms: Arms) -> Arms:
    train(arms.retrofit, plain_language(60_000, 5), steps=120)
    return arms


@fault("nothing ever came again in training", "retrieval_lost", {"text": plain_language})
def no_repetitions(arms: Arms) -> Arms:
    train(arms.retrofit, plain_language(60_000, 5), steps=120)
    return arms
