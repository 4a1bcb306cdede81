"""How the bias enters a running model: through Transformers' attention interface, or an argument of the attention.

The attention modules of a retrofit have a child ``relative_attention_bias``. Models that use Transformers' attention
interface run the implementation registered here as ``rpb_retrofit``, which reads the child; the others get the bias
through the argument that their family's row names. Importing this module registers that name and does nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    _ignore_bidirectional_mask_sdpa,
    _ignore_causal_mask_sdpa,
    prepare_padding_mask,
    sdpa_mask,
)
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import _active_collector

from .anatomy import is_causal_module
from .attention import ROW, attention
from .cached_positions import self_attention
from .errors import AttentionImplementationError
from .families import FACTOR, TABLE
from .line import bias_at, bias_matrix
from .positions import Positions, tagged
from .row import decode
from .visibility import dense, is_runs, runs_of

ATTENTION = "rpb_retrofit"
"""Name of the attention implementation that adds the bias."""

CAUSAL = "rpb_causal"
"""Attribute of the attention modules with a table: whether it is a causal one."""

RUN = "rpb_run"
"""Attribute of the attention modules of a retrofit: the function that `dispatch` calls for them."""


BACKEND = "rpb_backend"
"""Attribute of the attention modules with a table: how their last attention ran, as of `attention.backend`."""


def dispatch(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """What is registered as the attention implementation ``rpb_retrofit``: run what the module's model came with.

    The installed package and the code of each checkpoint register the same name, and the last one wins; this line
    keeps every model on its own code.
    """
    run = getattr(module, RUN, None)
    if run is None:
        raise AttentionImplementationError(
            f"{type(module).__name__} has a retrofit's config but no table: load a retrofit with "
            "rpb_retrofit.load(path), and give every other model a config of its own"
        )
    return run(module, *args, **kwargs)


def mask_of_runs(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """Transformers' `sdpa_mask` in linear memory: None, or each query's run of keys, (batch, 1, Q, 2) int32.

    The boolean (batch, 1, Q, K) where a query's keys are not one run, for one query, and while a graph is traced.
    """
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if allow_is_causal_skip and _ignore_causal_mask_sdpa(padding, q_length, kv_length, q_offset, kv_offset, local_size):
        return None
    if allow_is_bidirectional_skip and _ignore_bidirectional_mask_sdpa(padding, kv_length, local_size):
        return None

    def visible(start: int, end: int) -> Tensor:
        mask = sdpa_mask(
            batch_size, end - start, kv_length, q_offset + start, kv_offset,
            attention_mask=attention_mask, allow_is_causal_skip=False, **kwargs,
        )  # fmt: skip
        assert mask is not None, "nothing is skipped"
        return mask

    runs = None if q_length == 1 or is_tracing() else runs_of(visible, q_length, kv_length)
    return visible(0, q_length) if runs is None else runs


AttentionInterface.register(ATTENTION, dispatch)
AttentionMaskInterface.register(ATTENTION, mask_of_runs)


def biased_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    first_offset: int | Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    output_attentions: bool = False,
    is_causal: bool | None = None,
    rpb_positions: Positions | None = None,
    first_key: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a module with a table; the signature is that of Transformers' attention interface, and POSITIONS.

    Returns (batch, Q, heads, d_v) and the weights (batch, heads, Q, K) if asked for.
    """
    if (factor := module._modules.get(FACTOR)) is not None:
        query = factor(query)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    weighted = output_attentions or _records_attentions()
    positions = _irregular(rpb_positions, attention_mask, key, first_key, query)
    bare = attention_mask is None and first_offset is None and softcap is None and s_aux is None and positions is None
    if bare and not dropout and not weighted and query.shape[2] == 1:
        decoded = decode(query, key, value, module._modules[TABLE], scale)
        if decoded is not None:
            module.__dict__[BACKEND] = ROW
            return decoded, None
    attended = attention(
        query,
        key,
        value,
        getattr(module, TABLE),
        scale=scale,
        causal=_direction(module, query, is_causal),
        mask=attention_mask,
        first_offset=first_offset,
        positions=positions,
        softcap=softcap,
        sinks=s_aux,
        dropout=dropout,
        need_weights=weighted,
    )
    if not torch.compiler.is_compiling():
        module.__dict__[BACKEND] = attended.backend  # nn.Module's own __setattr__ would cost microseconds
    return attended.output.transpose(1, 2).contiguous(), attended.weights


def _irregular(
    positions: Positions | None, mask: Tensor | None, key: Tensor, first_key: int | None, query: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The positions of queries and keys, where the bias must be looked up for each pair; None where indices will do."""
    if positions is None or positions.are_indices(mask, key.shape[2], first_key):
        return None
    return positions.pairs(key.shape[2], first_key, query.device)


def _direction(module: Any, query: Tensor, is_causal: bool | None) -> bool:
    """Whether the module's table is causal; an error where the call is not. One query sees all keys either way."""
    causal: bool = getattr(module, CAUSAL)
    if query.shape[2] > 1 and causal != (is_causal_module(module) if is_causal is None else is_causal):
        raise AttentionImplementationError(
            f"is_causal={not causal}: the tables of this retrofit are {'causal' if causal else 'bidirectional'}"
        )
    return causal


def plain_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention of a module without a table (cross-attention: its two sides have no offset): Transformers' own sdpa."""
    if attention_mask is not None and is_runs(attention_mask):
        attention_mask = dense(attention_mask, key.shape[2])
    return sdpa_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)


def _records_attentions() -> bool:
    """Whether the model's caller asked for the weights, which some families (GPT-2, OPT) do not pass on."""
    if torch.compiler.is_compiling() and not _active_collector.compiling:
        # A layer compiled by itself, where a context variable cannot be read: families that do not pass the wish on
        # give no weights there.
        return False
    return any(name.endswith("attentions") for name in _active_collector.get() or ())


def pass_offset(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Forward pre-hook of an attention module that uses the interface: how far the queries are ahead of the keys.

    Only a static cache has unused slots behind the last query, and it knows only before it is updated.
    """
    if torch.compiler.is_compiling():
        implementation = module.config._attn_implementation
    else:  # the config's own look-up takes longer than all that follows, and this runs in every layer at every token
        implementation = object.__getattribute__(module.config, "_attn_implementation_internal")
    if implementation != ATTENTION:
        raise AttentionImplementationError(would_drop(implementation))
    cache = _self_attention_cache(args, kwargs)
    static = (
        cache is not None and module.layer_idx < len(cache.layers) and cache.layers[module.layer_idx].is_compileable
    )
    if not static and "position_bias" not in kwargs:
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    if "position_bias" in kwargs:  # T5's, which it would fill with zeros (heads, Q, K) that nobody reads
        kwargs = {**kwargs, "position_bias": hidden.new_zeros(())}
    if cache is not None and static:
        first_key = _first_key(cache, hidden.shape[1], module.layer_idx)
        first_offset = cache.get_query_offset(module.layer_idx) - first_key
        kwargs = {**kwargs, "first_key": first_key, "first_offset": first_offset}
    return args, kwargs


def add_to_mask(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook of an attention module with an additive ``attention_mask``: the bias is added to it."""
    bias, mask = _bias_argument(module, args, kwargs), kwargs["attention_mask"]
    if mask.dtype == torch.bool:  # a caller's own, with its four dimensions
        mask = torch.zeros_like(mask, dtype=args[0].dtype).masked_fill(~mask, torch.finfo(args[0].dtype).min)
    wide = torch.promote_types(mask.dtype, torch.float32)
    biased = (mask.to(wide) + bias).clamp(min=torch.finfo(mask.dtype).min)
    return args, {**kwargs, "attention_mask": biased.to(mask.dtype)}


def replace_position_bias(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook of an attention module with a ``position_bias`` (heads, Q, K): ours takes its place."""
    bias = _bias_argument(module, args, kwargs)
    return args, {**kwargs, "position_bias": bias.to(args[0].dtype)}


def silence_alibi(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook of an attention module with an ``alibi`` argument: the slopes arrive as zeros.

    So do the allowed entries of the mask, where Falcon's model has put them already.
    """
    kwargs = {**kwargs, "alibi": torch.zeros_like(kwargs["alibi"])}
    if (mask := kwargs["attention_mask"]) is not None:
        lowest = torch.finfo(mask.dtype).min
        kwargs["attention_mask"] = torch.where(mask > lowest / 2, torch.zeros_like(mask), lowest)
    return args, kwargs


BIAS_HOOKS = {"": pass_offset, "attention_mask": add_to_mask, "position_bias": replace_position_bias}
SILENCERS = {"alibi": silence_alibi}


def _bias_argument(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    if kwargs["attention_mask"] is None:
        raise AttentionImplementationError(
            f"{type(module).__name__} got no attention mask, to which its relative position bias is added: this family "
            "runs attn_implementation='eager' only; leave the setting alone"
        )
    queries, keys = args[0].shape[1], kwargs["attention_mask"].shape[-1]
    cache, layer = _self_attention_cache(args, kwargs), module.layer_idx
    first_key = 0 if cache is None else _first_key(cache, queries, layer)
    past = 0 if cache is None else cache.get_query_offset(layer)
    positions = tagged(kwargs.get("position_ids"), cache, past, len(args[0]))
    if positions is not None:
        return bias_at(getattr(module, TABLE), *positions.pairs(keys, first_key, args[0].device))
    return bias_matrix(getattr(module, TABLE), queries, keys, past - first_key, args[0].device)


def _self_attention_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    for value in (*args, *kwargs.values()):  # families disagree on its name and place
        if isinstance(value, Cache):
            return self_attention(value)
    return None


def _first_key(cache: Cache, queries: int, layer: int) -> int:
    """The index of the first key that the cache will hand out for so many more queries."""
    return cache.get_mask_sizes(queries, layer)[1]


def would_drop(implementation: Any) -> str:
    """Why an attention implementation is refused."""
    return (
        f"attn_implementation='{implementation}' would drop the relative position bias; a retrofit runs only its own, "
        f"'{ATTENTION}': leave the argument out"
    )
