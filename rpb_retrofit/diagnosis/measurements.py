"""One examination: the models, the text, and every measurement that a hypothesis may ask for, each taken once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rpb_retrofit.diagnosis.arms import RETROFIT, SOURCE, Arms
from rpb_retrofit.diagnosis.attention_patterns import AttentionPatterns, attention_patterns
from rpb_retrofit.diagnosis.bias_check import BiasCheck, compare
from rpb_retrofit.diagnosis.consistency import Way, Ways, consistency
from rpb_retrofit.diagnosis.effect import Effect, Predictions, Scores, predictions, scores
from rpb_retrofit.diagnosis.exactly import computes_in, in_float32
from rpb_retrofit.diagnosis.fidelity import Fidelity, fidelity
from rpb_retrofit.diagnosis.intervention import Change, changed
from rpb_retrofit.diagnosis.position_probe import AttentionProbe, PositionProbe, position_probe
from rpb_retrofit.diagnosis.provenance import UNKNOWN, alterations
from rpb_retrofit.diagnosis.rebuilt import Rebuilt, rebuilt
from rpb_retrofit.diagnosis.weights import drift, trained
from rpb_retrofit.errors import DataError
from rpb_retrofit.evaluation.context_use import make_inductions, make_local_orders
from rpb_retrofit.evaluation.losses import Losses, cut_text, difference, key_tokens, on_tokens, token_by_token
from rpb_retrofit.evaluation.nll import check_length
from rpb_retrofit.evaluation.retrieval import KINDS, make_items, measure
from rpb_retrofit.evaluation.speed import Seconds, Skipped, SpeedResult, is_out_of_memory, speed
from rpb_retrofit.evaluation.statistics import Difference
from rpb_retrofit.files.journal import Journal
from rpb_retrofit.files.printable import message_of
from rpb_retrofit.runtime.anatomy import Anatomy

Within = Callable[[], AbstractContextManager[Any]]
"""Within what it gives, a model is changed."""

AS_IT_IS = "as-it-is"
"""What a change that changes nothing is called."""

DEPTHS = (0.1, 0.9)
"""Where in the context the answers lie, from its beginning to its end."""


MEASURED = (
    *(PositionProbe, AttentionProbe, Rebuilt, Way, Ways, Fidelity, AttentionPatterns),
    *(Losses, Scores, Predictions, SpeedResult, Seconds, Skipped),
)
"""The data classes of measurements, which a journal may hold."""


@dataclass(frozen=True)
class DiagnosisPlan:
    """How much is measured. ``lengths``: context lengths, ascending. ``tokens``: of text, the same at every length.
    ``probed``: tokens that an intervention is scored on. ``items``: of each kind of question, at each length and
    depth. ``rounds``: of timing. ``seed``: of the questions."""

    lengths: tuple[int, ...] = (128, 512, 2048)
    tokens: int = 4096
    probed: int = 2048
    items: int = 4
    rounds: int = 3
    seed: int = 0


@dataclass
class Measurements:
    """The measurements of ``arms`` on ``documents`` of token ids.

    ``bos``: the token that begins every window. ``tokenizer``: for questions in words; without one only what token ids
    can show is measured. ``pairs``: of queries and keys that trained each bucket, where a training.json says so.
    ``skipped``: what was not measured, and why; ``failed``: what ended in an error, and in which.
    """

    arms: Arms
    documents: Sequence[Tensor]
    bos: int | None = None
    plan: DiagnosisPlan = field(default_factory=DiagnosisPlan)
    tokenizer: Any = None
    pairs: Sequence[int] | None = None
    journal: Journal = field(default_factory=Journal)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    # --- the text -------------------------------------------------------------------------------------------------

    def window(self, length: int, number: int = 0) -> Tensor:
        """A window (length,) of the text."""
        return self.windows(length, number + 1)[number]

    def windows(self, length: int, count: int) -> list[Tensor]:
        """``count`` windows of the text, or as many as there are."""
        return cut_text(self.documents, length, count * length, self.bos)

    @cached_property
    def common(self) -> Tensor:
        """The tokens that occur in the text."""
        return torch.cat(list(self.documents)).unique()

    @cached_property
    def lengths(self) -> list[int]:
        """The plan's lengths that the text fills; what it does not is in ``skipped``."""
        longest = max(map(len, self.documents))
        found = []
        for length in self.plan.lengths:
            if length > min(longest, self.plan.tokens):
                self.skipped[f"length {length}"] = (
                    f"the text's longest document has {longest} tokens, and {self.plan.tokens} (--tokens) are read"
                )
            else:
                found.append(length)
        if not found:
            raise DataError(
                f"the shortest length is {min(self.plan.lengths)}; the text's longest document has {longest} tokens, "
                f"and {self.plan.tokens} tokens are read: give longer text, shorter lengths or more tokens"
            )
        return found

    @cached_property
    def limit(self) -> int | None:
        """Tokens beyond which an absolute source has no positions; None where there is no such end."""
        source = self.arms.source_anatomy
        if source is None or self.arms.family.mechanism not in ("learned", "sinusoidal"):
            return None
        return source.context

    def within(self, length: int) -> int:
        """A length, or what of it the text fills and all arms can take."""
        return min(length, max(self.lengths), self.limit or length)

    @property
    def trained(self) -> int | None:
        """Tokens of context that the source was made for, None where nothing says."""
        return Anatomy.of(self.arms.plain).context

    # --- the running model ----------------------------------------------------------------------------------------

    @cached_property
    def probe_length(self) -> int:
        """Tokens that are enough to see what an attention does."""
        return self.within(256)

    @cached_property
    def position_probe(self) -> PositionProbe:
        """What positions do in the retrofit."""
        return self._position_probe(RETROFIT, self.arms.retrofit)

    @cached_property
    def source_position_probe(self) -> PositionProbe:
        """What they do in its source; without one, in the source's class with the retrofit's weights."""
        source = self.arms.source
        return self._position_probe(SOURCE, self.arms.plain if source is None else source)

    def _position_probe(self, role: str, model: PreTrainedModel) -> PositionProbe:
        reach = max((bias.bucketing.max_distance for bias in self.arms.biases.values()), default=0)
        far = min(2 * reach, 4096) if role == RETROFIT else 0
        if role == SOURCE and not self.arms.family.uses_interface:
            return PositionProbe({}, 0.0)

        def measure() -> PositionProbe:
            with in_float32(model):
                return position_probe(Anatomy.of(model), self.probe_length, far)

        return self.journal(f"positions-{role}", measure)

    @property
    def running(self) -> bool:
        """Whether every attention of the retrofit has a table and runs the retrofit's attention."""
        return len(self.arms.biases) == len(self.arms.attentions) == len(self.position_probe.probes)

    @cached_property
    def bias_checks(self) -> dict[str, BiasCheck]:
        """Whether the bias that acts in each attention is its table's."""
        biases, dtype = self.arms.biases, self.precision
        return {
            name: compare(name, probe, biases, self.width, dtype)
            for name, probe in self.position_probe.probes.items()
            if name in biases
        }

    @property
    def causal(self) -> bool:
        """Whether the retrofit predicts next tokens."""
        return type(self.arms.retrofit).__name__.endswith(("ForCausalLM", "LMHeadModel"))

    @cached_property
    def trained_since(self) -> bool:
        """Whether the retrofit's weights or tables were trained after the retrofit, as far as the other arms tell."""
        if self.arms.untrained is not None:
            before = dict(self.arms.untrained.named_parameters())
            own = self.arms.retrofit.named_parameters()
            return any(not torch.equal(p, before[n].to(p.dtype)) for n, p in own if n in before)
        return self.weights_trained

    @cached_property
    def weights_trained(self) -> bool:
        """Whether weights moved as training moves them, other than those into which a retrofit folds something."""
        within = tuple(f"{attention}." for attention in self.arms.attentions) if self.arms.folded else ()
        return any(not (within and name.startswith(within)) for name in trained(self.moved))

    @cached_property
    def precision(self) -> torch.dtype:
        """In which the retrofit computes where its equal ways are compared."""
        return computes_in(self.arms.retrofit)

    @property
    def width(self) -> int:
        """Dimensions of a head."""
        config = self.arms.retrofit.config.get_text_config()
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @cached_property
    def moved(self) -> dict[str, float | None]:
        """By how much of its size each of the source's weights moved; empty without a source."""
        return {} if self.arms.source is None else drift(self.arms.retrofit, self.arms.source)

    @cached_property
    def rebuilt(self) -> Rebuilt:
        """The retrofit beside one built anew from its config and weights; in float32 where memory allows."""

        model = self.arms.retrofit
        rounded = next((b.dtype for b in model.buffers() if b.is_floating_point() and b.element_size() == 2), None)

        def measure() -> Rebuilt:  # buffers that a cast rounded are none that a new model has
            with in_float32(model) as dtype:
                return rebuilt(model, self.window(self.within(1024)), rounded or dtype)

        return self.journal("rebuilt", measure)

    @cached_property
    def ways(self) -> Ways:
        """How the retrofit's logits depend on the way it is fed; in float32 where memory allows."""
        return self._ways(RETROFIT, self.arms.retrofit)

    @cached_property
    def source_ways(self) -> Ways:
        """The same of its source's class."""
        return self._ways(SOURCE, self.arms.plain if self.arms.source is None else self.arms.source)

    def _ways(self, role: str, model: PreTrainedModel) -> Ways:
        def measure() -> Ways:
            with in_float32(model) as dtype:
                return consistency(model, self.window(self.within(96)), self.window(self.within(1024)), dtype)

        return self.journal(f"ways-{role}", measure)

    @cached_property
    def half_precision_ways(self) -> Ways | None:
        """The retrofit's in float16, where `ways` took float32: what overflows does so here alone. None of any other
        dtype: bfloat16 reaches as far as float32."""
        model, ids = self.arms.retrofit, self.window(self.within(96))
        if model.dtype != torch.float16 or self.precision == model.dtype:
            return None
        return self.journal("ways-half-precision", lambda: consistency(model, ids, ids, model.dtype))

    def attempt(self, what: str, measure: Callable[[], Any], otherwise: Any) -> Any:
        """What ``measure`` gives; ``otherwise`` where it ends in an error, which is noted and costs nothing else."""
        try:
            return measure()
        except Exception as error:  # whatever a model raises that is at fault
            self.failed[what] = f"{type(error).__name__}: {message_of(error)}"
            return otherwise

    # --- beside the source ----------------------------------------------------------------------------------------

    @cached_property
    def fidelity(self) -> Fidelity | None:
        """Whether the tables suit the source; None without one, or where the tables cannot be read."""
        source, arms = self.arms.source_anatomy, self.arms
        if source is None or arms.family.mechanism == "t5" or not self.running:
            return None
        windows = self.suggesting
        changed = self.alterations
        suspected = list(arms.attentions) if changed is None else [n for n, what in changed.items() if what == UNKNOWN]
        return self.journal("fidelity", lambda: fidelity(arms, source, windows, self.width, suspected))

    @property
    def suggesting(self) -> list[Tensor]:
        """Two windows that suggest what may be wrong: behind the text on which what is undone is scored, where there is
        enough of it."""
        length = self.within(512)
        found = cut_text(self.documents, length, self.plan.tokens + 2 * length, self.bos)
        if (len(found) - 2) * length < max(self.plan.probed, self.middle):
            self.skipped["text of its own to confirm a cause on"] = (
                f"the text has {sum(map(len, self.documents))} tokens: what suggests a cause and what confirms it "
                "overlap; give more"
            )
        return found[-2:]

    @cached_property
    def alterations(self) -> dict[str, str] | None:
        """What became of the tables since they were written. None where that is not known: without checksums, or where
        a training that wrote none changed some in no simple way."""
        found = alterations(self.arms, self.width)
        strange = [name for name, became in (found or {}).items() if became == UNKNOWN]
        return None if strange and (len(strange) > len(self.arms.biases) / 2 or self.weights_trained) else found

    @property
    def as_written(self) -> bool:
        """Whether every table is, number for number, what a retrofit or a training wrote."""
        return self.alterations == {}

    def attention_patterns(self, role: str) -> AttentionPatterns | None:
        """Where the heads of an arm look; None without that arm, or where its attention does not run."""
        model = dict(self.arms).get(role)
        if model is None or not self.running:
            return None
        text = self.window(self.within(512))
        return self.journal(
            f"attention_patterns-{role}",
            lambda: attention_patterns(Anatomy.of(model), text, self.common, min(48, len(text) // 2)),
        )

    # --- losses ---------------------------------------------------------------------------------------------------

    def losses(self, role: str, length: int) -> Losses | None:
        """An arm's loss of every token, in windows of one length; None where it cannot take it, which is noted."""
        model = dict(self.arms).get(role)
        if model is None:
            return None
        name = f"loss-{role}-{length}"
        if name in self.skipped:
            return None
        try:
            check_length(model, length)
            return self.journal(
                name, lambda: token_by_token(model, self.documents, length, self.plan.tokens, self.bos, f"{role}, ")
            )
        except (DataError, MemoryError, RuntimeError) as error:
            if not isinstance(error, DataError) and not is_out_of_memory(error):
                raise
            self.skipped[name] = str(error).splitlines()[0]
            return None

    def cost(self, length: int, role: str = RETROFIT, above: str = SOURCE) -> Difference | None:
        """How much more one arm loses than another at a length."""
        a, b = self.losses(above, length), self.losses(role, length)
        return None if a is None or b is None else difference(a, b)

    @property
    def middle(self) -> int:
        """The length that is nearest to 512 tokens, of those that all arms can take."""
        return min(
            (n for n in self.lengths if self.within(n) == n), key=lambda n: abs(n - 512), default=self.lengths[0]
        )

    def inductions(self, role: str) -> list[dict[str, Any]] | None:
        """An arm's gain from a repeated span of random tokens, by distance, item by item; None without that arm."""
        model = dict(self.arms).get(role)
        if model is None:
            return None
        span = min(16, len(self.common))
        if span < 4:
            return []
        longest = self.within(max(self.lengths)) - span - 1
        distances = [d for d in (2 * span, 128, 512, 1024) if d <= longest]
        count = max(6, 2 * self.plan.items)
        items = make_inductions(self.documents, distances, count, self.plan.seed, span, self.bos)
        return self.journal(f"induction-{role}", lambda: measure(model, items))

    def local_orders(self, role: str) -> list[dict[str, Any]] | None:
        """An arm's gain from the order of neighbours in its context, item by item; None without that arm."""
        model = dict(self.arms).get(role)
        length = min(256, self.within(self.middle))
        if model is None:
            return None
        items = make_local_orders(self.documents, [length], max(6, 2 * self.plan.items), self.plan.seed, self.bos)
        return self.journal(f"order-{role}", lambda: measure(model, items))

    def questions(self, role: str) -> list[dict[str, Any]] | None:
        """An arm's answers to questions about a long context; None without that arm or a tokenizer. What does not
        fit is noted."""
        model = dict(self.arms).get(role)
        if model is None or self.tokenizer is None or not self.plan.items:
            return None
        items = []
        for kind in KINDS:
            for length in self.asked:
                try:
                    items += make_items(
                        kind, self.tokenizer, self.documents, [length], DEPTHS, self.plan.items, self.plan.seed
                    )
                except DataError as error:
                    self.skipped[f"{kind} at {length}"] = str(error)
        try:
            return self.journal(f"questions-{role}", lambda: measure(model, items))
        except DataError as error:
            self.skipped[f"questions to the {role}"] = str(error)
            return None

    @cached_property
    def asked(self) -> list[int]:
        """The lengths at which questions are asked: a short and a middle one, as far as they are among the lengths."""
        return sorted({n for n in self.lengths if 256 <= self.within(n) == n <= 1024}) or [self.within(self.middle)]

    @cached_property
    def speed(self) -> dict[str, list[SpeedResult | Skipped]]:
        """How fast source and retrofit are at the middle length, side by side; empty where that is not wanted."""
        if not self.plan.rounds:
            return {}
        models = {role: model for role, model in self.arms if role in (SOURCE, RETROFIT)}
        return self.journal("speed", lambda: speed(models, [self.middle], new_tokens=16, rounds=self.plan.rounds))

    @cached_property
    def key(self) -> Tensor | None:
        """The tokens that the source predicts well only with far context."""
        short, long = self.losses(SOURCE, self.lengths[0]), self.losses(SOURCE, self.lengths[-1])
        return None if short is None or long is None or len(self.lengths) < 2 else key_tokens(short, long)

    def key_cost(self, role: str = RETROFIT, above: str = SOURCE) -> Difference | None:
        """How much more one arm loses than another on those, at the longest length."""
        a, b = self.losses(above, self.lengths[-1]), self.losses(role, self.lengths[-1])
        if a is None or b is None or self.key is None or len(self.key) < 8:
            return None
        return difference(on_tokens(a, self.key), on_tokens(b, self.key))

    def undone(self, name: str, undo: Within, length: int | None = None) -> Effect:
        """What the retrofit gets back when something is undone."""
        length = length or self.middle
        return Effect.of(
            self._probed(RETROFIT, AS_IT_IS, nullcontext, length), self._probed(RETROFIT, name, undo, length)
        )

    def brings(self, name: str, undo: Within, length: int | None = None) -> Effect | None:
        """What undoing brings; None where that ends in an error, which is noted, and of what predicts no next token."""
        return (
            self.attempt(f"what undoing {name} brings", lambda: self.undone(name, undo, length), None)
            if self.causal
            else None
        )

    def between(self, first: tuple[str, Within], second: tuple[str, Within]) -> Effect:
        """What a second change of the retrofit, by its name, brings over a first one."""
        (before, one), (after, other) = first, second
        length = self.middle
        return Effect.of(self._probed(RETROFIT, before, one, length), self._probed(RETROFIT, after, other, length))

    def replaced(self, name: str, model: PreTrainedModel) -> Effect:
        """What the retrofit gets back when ``model`` runs in its place."""
        length = self.middle
        return Effect.of(self._probed(RETROFIT, AS_IT_IS, nullcontext, length), self._scores(name, model, length))

    def with_change(self, role: str, name: str, change: Change, length: int) -> Losses:
        """An arm's losses with a change of its attention, on the text that interventions are scored on."""
        if role == SOURCE and change == Change():
            return self._predictions(length)[0]
        within = partial(changed, Anatomy.of(dict(self.arms)[role]), change)
        return self._probed(role, name, within, length).losses

    def _probed(self, role: str, name: str, within: Within, length: int) -> Scores:
        def score() -> Scores:
            with within():
                return self._scores(f"{role}, {name}, ", dict(self.arms)[role], length)

        return self.journal(f"changed-{role}-{name}-{length}", score)

    def _scores(self, label: str, model: PreTrainedModel, length: int) -> Scores:
        theirs = None if self.arms.source is None else self._predictions(length)[1]
        return scores(model, self.documents, length, max(self.plan.probed, length), self.bos, theirs, label)

    def _predictions(self, length: int) -> tuple[Losses, Predictions]:
        source, tokens = self.arms.source, max(self.plan.probed, length)
        assert source is not None
        return self.journal(
            f"predictions-source-{length}", lambda: predictions(source, self.documents, length, tokens, self.bos)
        )
