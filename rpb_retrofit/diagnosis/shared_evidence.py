"""What several hypotheses ask of the same measurements."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial

from rpb_retrofit.diagnosis.consistency import Way
from rpb_retrofit.diagnosis.effect import Effect
from rpb_retrofit.diagnosis.fidelity import NOTABLE, Fidelity
from rpb_retrofit.diagnosis.finding import QUARTER, Finding, confirmed, excluded, unknown, with_effect
from rpb_retrofit.diagnosis.intervention import bias_of, with_biases, with_reach, with_tables, with_weights
from rpb_retrofit.diagnosis.layer_names import name_layers
from rpb_retrofit.diagnosis.meanings import MADE_FOR, meanings_of
from rpb_retrofit.diagnosis.measurements import Measurements
from rpb_retrofit.files.digest import digest_of
from rpb_retrofit.runtime.attach import SCALING
from rpb_retrofit.runtime.buckets import Bucketing
from rpb_retrofit.tables import CALIBRATED, FROM, INITIALISATIONS

WON_BACK = 0.4
"""Share of the distance from the best tables that undoing a mistake must win back to be suspected."""

LEFT = 0.25
"""Share of what the best tables bring over none that may still be missing then: less of a wrong table also helps."""

HANDED_ON = 0.1
"""Share of what a layer's heads miss of the source's outputs that undoing a mistake must bring back to be suspected."""


def unfitted(measurements: Measurements) -> str | None:
    """What the settings ask for, where they ask for tables that are not fitted to this source; None where they are."""
    init: str = measurements.arms.settings.get("init", CALIBRATED)
    if init in INITIALISATIONS:
        return f"init='{init}' asks for tables that are fitted to no source"
    return f"init='{init}' asks for tables that were fitted to another model" if init.startswith(FROM) else None


def of_kind(measurements: Measurements, kind: str) -> list[str]:
    """The attentions whose acting bias is related to the table in this way."""
    return [name for name, comparison in measurements.bias_checks.items() if comparison.kind == kind]


def altered(measurements: Measurements, what: str) -> list[str]:
    """The attentions of whose tables it is known that this became of them since they were written."""
    return [name for name, became in (measurements.alterations or {}).items() if became == what]


def explains(measurements: Measurements, effect: Effect, layers: Sequence[str], buckets: float = 1.0) -> bool:
    """Whether a mistake in the tables of these attentions, in a share of their ``buckets``, whose undoing had this
    effect, is a cause: it brings back a quarter of what was lost, for sure."""
    written = measurements.alterations is not None and not any(name in measurements.alterations for name in layers)
    part = 1.0 if written else buckets * len(layers) / len(measurements.arms.attentions)
    return effect.sure and effect.at_least(QUARTER * part)


def meant_otherwise(measurements: Measurements, meaning: str, remedy: str) -> Finding | None:
    """The finding that tables were meant to be something else; None where that is not borne out.

    It is suspected where the checksum of what was written says so, or the source: its attention is nearer under the
    meaning by a good part of what the best tables of the same buckets would bring, and the heads hand on what is nearer
    to the source's. It is a cause where undoing it in the running model, on other text, brings back what was lost.
    """
    if known := altered(measurements, meaning):
        evidence = f"the tables of {name_layers(known)} are {meaning}, by the checksums of what was written"
        return confirmed(evidence, remedy, effect=_effect(measurements, known, meaning), undoing="")
    if measurements.alterations is not None:  # what was written was meant, and what became of the rest is known
        return None
    won = _suspected(measurements, meaning)
    if not won or measurements.fidelity is None:
        return None
    effect = _effect(measurements, list(won), meaning)
    if effect is not None and not explains(measurements, effect, list(won)):
        return None
    kl = {name: measurements.fidelity.meant[name][meaning] for name in won}
    before = measurements.fidelity.mean({name: measurements.fidelity.own[name] for name in won})
    evidence = (
        f"the tables of {name_layers(won)} are {meaning}: by the source's attention undone, the mean KL falls from "
        f"{before:.3f} to {measurements.fidelity.mean(kl):.3f}"
    )
    return confirmed(evidence, remedy, effect=effect, undoing="")


def _suspected(measurements: Measurements, meaning: str) -> dict[str, float]:
    """The attentions whose tables the source's attention says were meant so, and by how much nearer it is then."""
    fidelity, won = measurements.fidelity, dict[str, float]()
    if fidelity is None or measurements.arms.settings.get("shared"):  # a table for all layers is no single layer's best
        return {}
    for name, own in fidelity.own.items():
        other = fidelity.meant.get(name, {}).get(meaning)
        if other is None:
            continue
        excess, gain = (own - fidelity.refit[name]).mean().item(), (own - other).mean().item()
        missed = (other - fidelity.refit[name]).mean().item()
        brought = (fidelity.zeros[name] - fidelity.refit[name]).mean().item()
        if gain > NOTABLE and gain > WON_BACK * excess and missed < LEFT * brought:
            best = min(fidelity.meant[name], key=lambda what: fidelity.meant[name][what].mean().item())
            if best == meaning and _hands_on_more(fidelity, name, meaning):
                won[name] = gain
    few = len(won) < 0.25 * len(fidelity.own)
    return {} if few and max(won.values(), default=0) < 2 * NOTABLE else won


def _hands_on_more(fidelity: Fidelity, name: str, meaning: str) -> bool:
    """Whether the heads of an attention hand on notably more of the source's under a meaning; True where the model
    hands out no values, or the meaning is of other buckets."""
    if name not in fidelity.missed or meaning not in fidelity.missed_if_meant[name]:
        return True
    own, meant = (x.mean().item() for x in (fidelity.missed[name], fidelity.missed_if_meant[name][meaning]))
    return own - meant > HANDED_ON * own


def _effect(measurements: Measurements, names: Sequence[str], meaning: str) -> Effect | None:
    """What it brings when the tables of these attentions are what they may have been meant to be; None of a model that
    predicts no next token."""
    biases = {name: measurements.arms.biases[name] for name in names}

    def undo() -> AbstractContextManager[None]:
        if meaning.startswith(MADE_FOR):
            return with_reach(measurements.arms, names, int(meaning.rpartition(" ")[2]))
        return with_tables(
            biases, lambda name, bias: meanings_of(bias, bias.weight.detach().float(), measurements.arms.width)[meaning]
        )

    return measurements.undoing.attempt(of_all(meaning, names), undo)


def of_all(what: str, names: Sequence[str]) -> str:
    """A name, which a file can have, for undoing something in these attentions or weights."""
    return f"{re.sub('[^a-z0-9]+', '-', what)}-{digest_of([name.encode() for name in names])[:12]}"


def with_best(measurements: Measurements, names: Sequence[str]) -> Effect | None:
    """What it brings when these attentions get the tables that are best for the source's attention; None where they are
    not known, or of a model that predicts no next token."""

    def measure() -> Effect | None:
        fidelity = measurements.fidelity
        if fidelity is None or not all(name in fidelity.tables for name in names):
            return None
        biases = {name: measurements.arms.biases[name] for name in names}
        undo = partial(with_tables, biases, lambda name, bias: fidelity.tables[name])
        return measurements.undoing.effect(of_all("fitted-anew", names), undo)

    return measurements.attempt("what fitted tables would bring", measure, None) if measurements.arms.causal else None


def weights_back(measurements: Measurements, names: Sequence[str]) -> Effect | None:
    """What it brings when these weights are the source's again; None without a source, or of a model that predicts no
    next token."""
    source = measurements.arms.source
    if source is None:
        return None
    return measurements.undoing.attempt(
        of_all("weights-back", names), partial(with_weights, measurements.arms.retrofit, source, names)
    )


def fed_otherwise(measurements: Measurements, ways: Sequence[str], remedy: str) -> Finding:
    """Whether the logits depend on these ways to feed a text, where those of the family itself do not."""
    allowed = measurements.ways.allowed
    fed = {way: measurements.ways.by_name[way] for way in ways if way in measurements.ways.by_name}
    wrong, unable = {}, []
    if fed and all(way.error for way in fed.values()):
        return unknown(f"the model does not run: {next(iter(fed.values())).error}")
    for name, way in fed.items():
        if way.difference <= allowed and not way.error and not way.broken:
            continue
        family = measurements.source_ways.by_name.get(name)
        if family is not None and (
            family.difference > max(allowed, measurements.source_ways.allowed) or family.error or family.broken
        ):
            unable.append(name)
        else:
            wrong[name] = way
    figures = {name: way.difference for name, way in fed.items()}
    if wrong:
        evidence = ", ".join(f"{name}: {_difference_of(way)}" for name, way in wrong.items())
        return confirmed(
            f"{evidence}; the family itself shows no such difference",
            remedy,
            gain=max(way.far for way in wrong.values()),
            figures=figures,
        )
    good = [name for name in fed if name not in unable]
    rest = f"; {', '.join(unable)}: the family itself cannot do that" if unable else ""
    if not good:
        return unknown(f"nothing to compare{rest}", figures=figures)
    largest = max(fed[name].difference for name in good)
    return excluded(
        f"{', '.join(good)}: the same logits, within {largest:.0e} of the largest one{rest}",
        figures={**figures, "noise": measurements.ways.noise, "allowed": allowed},
    )


FINER, SHARE = 0.05, 0.28
"""Mean KL in nats, and share of what the best tables of these buckets win over none, that others must win on top."""


def coarse(measurements: Measurements, other: str, described: str, remedy: str) -> Finding:
    """Whether other buckets would bring the tables notably nearer to the source's attention."""
    fidelity = measurements.fidelity
    if fidelity is None:
        return unknown("only the source's attention tells what the buckets hide; give --source")
    richer = {name: kl[other] for name, kl in fidelity.richer.items() if other in kl}
    if not richer:
        return excluded("the buckets are as fine and reach as far as the text that was measured")
    refit, best = fidelity.mean({name: fidelity.refit[name] for name in richer}), fidelity.mean(richer)
    evidence = (
        f"mean KL from the source's attention: {refit:.3f} with the best tables of these buckets, {best:.3f} with "
        f"those of {other}{described}"
    )
    brought = fidelity.mean({name: fidelity.zeros[name] for name in richer}) - refit
    if refit - best <= FINER or refit - best <= SHARE * brought:
        return excluded(evidence)
    effect, undoing = _with_richer(measurements, other, list(richer)), "fitted so, against the best of these buckets: "
    if effect is None or effect.sure:
        return confirmed(evidence, remedy, effect=effect, undoing=undoing)
    return excluded(with_effect(evidence, effect, undoing))


def _with_richer(measurements: Measurements, other: str, names: Sequence[str]) -> Effect | None:
    """What the best tables of other buckets bring over the best of the same ones."""
    fidelity, arms = measurements.fidelity, measurements.arms
    if not measurements.arms.causal or fidelity is None:
        return None
    reach, biases = fidelity.richer_reach[other], {}
    for name in names:
        table = fidelity.richer_tables[name][other]
        buckets = Bucketing(table.shape[1], reach, arms.biases[name].bucketing.bidirectional)
        biases[name] = bias_of(buckets, table.to(arms.biases[name].weight.device))
    own = {name: arms.biases[name] for name in names}
    same = partial(with_tables, own, lambda n, b: fidelity.tables[n])
    richer = partial(with_biases, arms, biases)
    return measurements.attempt(
        f"what {other} bring",
        lambda: measurements.undoing.between((of_all("fitted-anew", names), same), (of_all(other, names), richer)),
        None,
    )


def content_ratios(measurements: Measurements) -> dict[str, float]:
    """What multiplies query and key, over the same of the source, by attention.

    Where a retrofit is unscaled on purpose, what its weights hold counts as a part of it.
    """
    source_probes, ratios = measurements.source_position_probe.probes, {}
    for name, probe in measurements.position_probe.probes.items():
        other = source_probes.get(name)
        if probe.scale is not None and other is not None and other.scale is not None:
            ratio = probe.scale / other.scale * scale_in_weights(measurements, name)
            worst = float(ratio[(ratio - 1).abs().argmax()])
            if math.isfinite(worst) and worst > 0:
                ratios[name] = worst
    return ratios


def scale_in_weights(measurements: Measurements, attention: str) -> float:
    """The scale that was folded into what makes an attention's queries; 1 where none was."""
    return float(getattr(measurements.arms.attentions[attention], SCALING, 1.0))


def _difference_of(way: Way) -> str:
    if way.error:
        return way.error
    if way.broken:
        return f"{way.broken} logits are no numbers"
    return f"logits differ by {way.difference:.1%} of the largest one, predictions by {way.far:.3f} nats a token"
