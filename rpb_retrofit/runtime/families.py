"""What the toolkit knows about model families: one row each. A new family is a row here, not a function.

Module names are ends of dotted names (``self_attn`` matches ``model.layers.3.self_attn``, not ``encoder_attn``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import UnsupportedModelError

TABLE = "relative_attention_bias"
"""Name of the bias module within its attention module; its table is the parameter ``weight``. T5's own has it too."""


FACTOR = "relative_content_factor"
"""Name of the module with the factors on the content term, beside the bias module, where there is one."""


UNSCALED = "unscaled"
"""The setting ``scale`` of a retrofit whose queries come scaled: its attention multiplies by nothing."""


def is_table(key: str) -> bool:
    """Whether a state dict key names a table."""
    return key.endswith(f"{TABLE}.weight")


def is_own(key: str) -> bool:
    """Whether a state dict key names a parameter that a retrofit has and its source has not (T5's tables aside)."""
    return key.endswith((f"{TABLE}.weight", f"{TABLE}.tail", f"{FACTOR}.weight"))


@dataclass(frozen=True)
class Family:
    """How positions enter a family of models, and where the bias goes.

    ``mechanism``: ``rope``, ``learned``, ``sinusoidal``, ``alibi`` or ``t5``.
    ``attention``: name of the self-attention modules.
    ``positions``: name of the modules that hold the mechanism: rotary modules, or position embeddings.
    ``bias_argument``: forward argument of the attention that takes the bias: ``attention_mask`` (the bias is added to
    it) or ``position_bias`` (the bias replaces it). Empty where the model uses Transformers' attention interface.
    ``silenced``: forward argument of the attention that carries the source's mechanism, replaced by zeros.
    ``pairing``: which dimensions of a query rotate together, ``half`` or ``interleaved``: see `factor.RotaryPairs`.
    ``rotary_after``: config attribute with the number of a query's dimensions before those that rotate.
    ``since``: the first release of Transformers it runs right on, where that is not `releases.OLDEST`.
    ``when``: a config attribute and the value for which this row holds.
    """

    mechanism: str
    attention: str
    positions: str = ""
    bias_argument: str = ""
    silenced: str = ""
    pairing: str = "half"
    rotary_after: str = ""
    since: tuple[int, int] | None = None
    when: tuple[str, object] | None = None

    @property
    def uses_interface(self) -> bool:
        """Whether the model calls Transformers' attention interface."""
        return not self.bias_argument


_ROTARY = Family("rope", "self_attn", "rotary_emb")
_BERT = Family("learned", "attention.self", "position_embeddings")

FAMILIES: dict[str, tuple[Family, ...]] = {
    # decoders with rotary positions
    "llama": (_ROTARY,),
    "mistral": (_ROTARY,),
    "qwen2": (_ROTARY,),
    "qwen3": (_ROTARY,),
    "gemma2": (_ROTARY,),
    "gemma3_text": (_ROTARY,),
    "phi": (_ROTARY,),
    "olmo2": (_ROTARY,),
    "mixtral": (_ROTARY,),
    "deepseek_v3": (Family("rope", "self_attn", "rotary_emb", rotary_after="qk_nope_head_dim"),),
    "llama4_text": (Family("rope", "self_attn", "rotary_emb", pairing="interleaved"),),
    "gpt_oss": (_ROTARY,),
    "gpt_neox": (Family("rope", "attention", "rotary_emb"),),
    # decoders with learned positions
    "gpt2": (Family("learned", "attn", "wpe"),),
    "opt": (Family("learned", "self_attn", "embed_positions"),),
    # decoders with ALiBi, none of which uses the attention interface
    "bloom": (Family("alibi", "self_attention", bias_argument="attention_mask", silenced="alibi"),),
    "mpt": (Family("alibi", "attn", bias_argument="position_bias"),),
    "falcon": (
        Family("alibi", "self_attention", bias_argument="attention_mask", silenced="alibi", when=("alibi", True)),
        Family("rope", "self_attention", "rotary_emb", bias_argument="attention_mask"),
    ),
    # encoders
    "bert": (_BERT,),
    "roberta": (_BERT,),
    "distilbert": (Family("learned", "attention", "position_embeddings"),),
    "modernbert": (Family("rope", "attn", "rotary_emb"),),
    # encoder-decoders
    "bart": (Family("learned", "self_attn", "embed_positions"),),
    "pegasus": (Family("sinusoidal", "self_attn", "embed_positions"),),
    "t5": (Family("t5", "SelfAttention"),),
    "umt5": (Family("t5", "SelfAttention", since=(5, 18)),),  # before, its decoder was not told from its encoder
}


def family_of(config: Any) -> Family:
    """The row of a model's config; UnsupportedModelError where there is none."""
    for family in FAMILIES.get(config.model_type, ()):
        if family.when is None or getattr(config, family.when[0], None) == family.when[1]:
            return family
    raise UnsupportedModelError(
        f"model type '{config.model_type}' has no positional mechanism that this toolkit replaces; "
        f"supported: {', '.join(sorted(FAMILIES))}"
    )
