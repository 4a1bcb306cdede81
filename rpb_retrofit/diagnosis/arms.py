"""The models that are compared: the retrofit that is examined, and whatever it can be held against."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from rpb_retrofit.checkpoint.load import CAUSAL_HEADS
from rpb_retrofit.errors import DataError, NotRetrofittedError
from rpb_retrofit.runtime.anatomy import Anatomy
from rpb_retrofit.runtime.bias import RelativePositionBias
from rpb_retrofit.runtime.families import TABLE, UNSCALED, Family, is_own
from rpb_retrofit.runtime.modeling import RetrofitModel
from rpb_retrofit.tables import CONTENT

SOURCE, UNTRAINED, RETROFIT, CONTROL = "source", "untrained", "retrofit", "control"


def baseline(roles: Collection[str]) -> str:
    """Of these roles, what a retrofit's loss is held against: the control, which had the same training, or else the
    source."""
    return CONTROL if CONTROL in roles else SOURCE


@dataclass(frozen=True)
class Arms:
    """``retrofit`` is examined. ``source``: the model before; ``untrained``: the retrofit before it was trained;
    ``control``: the source after the same training. All in evaluation mode.

    Raises NotRetrofittedError, or DataError where two do not read the same tokens.
    """

    retrofit: PreTrainedModel
    source: PreTrainedModel | None = None
    untrained: PreTrainedModel | None = None
    control: PreTrainedModel | None = None

    def __post_init__(self) -> None:
        for role, model in self:
            settings = getattr(model.config, "rpb_retrofit", None)
            if (settings is None) == (role in (RETROFIT, UNTRAINED)):
                raise NotRetrofittedError(
                    f"the {role} '{model.name_or_path}' is {'no' if settings is None else 'a'} retrofit: "
                    f"{'make one with `rpb retrofit`' if settings is None else 'give the plain model'}"
                )
            if (model.get_output_embeddings() is None) != (self.retrofit.get_output_embeddings() is None):
                raise DataError(
                    f"the {role} is a {type(model).__name__}, the retrofit a {type(self.retrofit).__name__}: one has a "
                    "head and the other has none"
                )
            if model.config.get_text_config().vocab_size != self.vocabulary:
                raise DataError(
                    f"the {role} '{model.name_or_path}' has {model.config.get_text_config().vocab_size} tokens, the "
                    f"retrofit {self.vocabulary}: they read different texts; give models of one tokenizer"
                )

    def __iter__(self) -> Iterator[tuple[str, PreTrainedModel]]:
        """The models that are there, by role, the source first."""
        for role in (SOURCE, CONTROL, UNTRAINED, RETROFIT):
            if (model := getattr(self, role)) is not None:
                yield role, model

    def model(self, role: str) -> PreTrainedModel | None:
        """The model of a role; None where it was not given."""
        return getattr(self, role)

    @property
    def vocabulary(self) -> int:
        """Token ids that the models know."""
        return self.retrofit.config.get_text_config().vocab_size

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the retrofit's config says about it."""
        return self.retrofit.config.rpb_retrofit

    @property
    def folded(self) -> bool:
        """Whether the retrofit changed the weights that make queries, by folding factors or the scale into them."""
        return self.settings.get("calibrate") == CONTENT or self.settings.get("scale") == UNSCALED

    @cached_property
    def anatomy(self) -> Anatomy:
        """What the retrofit is made of."""
        return Anatomy.of(self.retrofit)

    @property
    def causal(self) -> bool:
        """Whether the retrofit predicts next tokens."""
        return type(self.retrofit).__name__.endswith(CAUSAL_HEADS)

    @property
    def width(self) -> int:
        """Dimensions of a head."""
        config = self.retrofit.config.get_text_config()
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @property
    def trained_context(self) -> int | None:
        """Tokens of context that the source was made for, None where nothing says."""
        return Anatomy.of(self.plain).context

    @cached_property
    def position_limit(self) -> int | None:
        """Tokens beyond which an absolute source has no positions; None where there is no such end."""
        if self.source_anatomy is None or self.family.mechanism not in ("learned", "sinusoidal"):
            return None
        return self.source_anatomy.context

    @cached_property
    def source_anatomy(self) -> Anatomy | None:
        """What the source is made of, where there is one."""
        return None if self.source is None else Anatomy.of(self.source)

    @property
    def family(self) -> Family:
        """How positions enter these models."""
        return self.anatomy.family

    @property
    def attentions(self) -> dict[str, Any]:
        """The retrofit's self-attention modules by name."""
        return self.anatomy.attentions

    @property
    def biases(self) -> dict[str, RelativePositionBias]:
        """The retrofit's bias modules by their attention's name; attentions without one are left out."""
        modules = {name: module._modules.get(TABLE) for name, module in self.attentions.items()}
        return {name: bias for name, bias in modules.items() if isinstance(bias, RelativePositionBias)}

    @property
    def reference(self) -> PreTrainedModel:
        """What the family itself does: the source, or without one the retrofit's weights in its source's class."""
        return self.plain if self.source is None else self.source

    @cached_property
    def plain(self) -> PreTrainedModel:
        """The retrofit's weights in its source's class: what the family itself does. They share their memory."""
        model = self.retrofit
        cls: Any = model.source_class if isinstance(model, RetrofitModel) else type(model)
        settings = {k: v for k, v in model.config.to_dict().items() if k not in WRITTEN}
        config = type(model.config).from_dict(settings)
        with no_init_weights():
            plain = cls._from_config(config, attn_implementation=None if self.family.uses_interface else "eager")
        state = {name: tensor for name, tensor in model.state_dict().items() if not is_own(name)}
        plain.load_state_dict(state, strict=False, assign=True)
        plain.tie_weights()
        plain.name_or_path = model.name_or_path
        return plain.to(model.device).eval()


WRITTEN = (
    *("rpb_retrofit", "auto_map", "attn_implementation", "experts_implementation", "architectures"),
    *("_attn_implementation", "_experts_implementation"),
)
"""What a retrofit writes into a config, and saving it into config.json."""
