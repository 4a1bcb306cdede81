"""A Transformers model with a relative position bias: attaching it, loading it, keeping it.

The class of a retrofitted ``LlamaForCausalLM`` is ``RpbLlamaForCausalLM``, made on demand for any class of
Transformers: ``modeling.RpbLlamaForCausalLM`` is what a checkpoint's ``auto_map`` refers to.
"""

from __future__ import annotations

# isort: off
from .releases import OLDEST, check_release  # first, or what an older release lacks would be the error

# isort: on
import copy
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .bias import RelativePositionBias
from .buckets import Bucketing
from .errors import (
    ADAPTER,
    AttentionImplementationError,
    CheckpointError,
    ConfigError,
    MissingTablesError,
    NotRetrofittedError,
    PartialMatchError,
    beside_adapter,
)
from .factor import ContentFactor, RotaryPairs
from .families import FACTOR, TABLE, UNSCALED, Family, family_of, is_own, is_table
from .interface import (
    ATTENTION,
    BIAS_HOOKS,
    CAUSAL,
    RUN,
    SILENCERS,
    biased_attention,
    is_causal_module,
    plain_attention,
    would_drop,
)
from .loading import check_loaded, check_numbers, check_shared, stored_names
from .mechanisms import modules_named, neutralise, remove_hooks, restore
from .positions import (
    keep_positions,
    of_generation,
    of_step,
    read_positions,
    refuse_positions,
    tag_position_ids,
    takes_positions,
)
from .settings import check_against, check_settings

if TYPE_CHECKING:  # Transformers before 5.10 copies those files of a folder only that this one names by an import.
    from .attention import attention  # noqa: F401
    from .blockwise import forward  # noqa: F401
    from .blockwise_gradients import backward  # noqa: F401
    from .dense import attend_dense  # noqa: F401
    from .fused import obstacle  # noqa: F401
    from .gradients import inner_products  # noqa: F401
    from .kernels_backward import key_gradient_kernel  # noqa: F401
    from .kernels_forward import forward_kernel  # noqa: F401
    from .kernels_shared import load  # noqa: F401
    from .line import Bias  # noqa: F401
    from .operators import attend_fused  # noqa: F401
    from .row import attend_row  # noqa: F401
    from .tilings import Tiling  # noqa: F401
    from .tracing import traced  # noqa: F401
    from .version import __version__  # noqa: F401
    from .visibility import runs_of  # noqa: F401

LOCK = (
    "none: this is an rpb_retrofit checkpoint, which plain classes cannot run. Load it with rpb_retrofit.load(path), "
    "or with AutoModel...from_pretrained(path, trust_remote_code=True)"
)
"""Stands in config.json as the attention and the experts implementation. From Transformers 5.4 on every model checks
both when it is built and refuses unknown ones with an error that prints them, so no plain class loads a retrofit by
mistake."""

WEIGHTS = "transformers_weights"

FILE_LOCKS = (WEIGHTS, "_attn_implementation_internal")
"""Where `LOCK` stands in the file only, for older releases and for both arguments given by hand: a config drops them
when it is written. To every ``from_pretrained`` since 4.52 the first is the name of the file with the weights, and it
prints what cannot be one. Before 5.3 a model checks the second when it is built. scripts/check_lock.py tries them."""

UNSAVED = "none: a retrofit in memory. Save it, load it with rpb_retrofit.load(path), and put the adapter onto that"
"""Where a model comes from that was retrofitted in place. PEFT notes it as an adapter's base, and whoever looks for it
reads it in the error; the source's name would put the adapter onto the source."""

SCALING = "rpb_scaling"
"""Attribute of an attention module: the scale that it had."""

RUNTIME_FILES = (
    "version.py",
    "errors.py",
    "releases.py",
    "buckets.py",
    "bias.py",
    "factor.py",
    "visibility.py",
    "line.py",
    "gradients.py",
    "blockwise.py",
    "blockwise_gradients.py",
    "tilings.py",
    "kernels_shared.py",
    "kernels_forward.py",
    "kernels_backward.py",
    "fused.py",
    "operators.py",
    "row.py",
    "dense.py",
    "attention.py",
    "families.py",
    "tracing.py",
    "positions.py",
    "settings.py",
    "loading.py",
    "mechanisms.py",
    "interface.py",
    "modeling.py",
)
"""The files that a checkpoint carries, so that it loads where rpb_retrofit is not installed."""


# --- attaching ---------------------------------------------------------------------------------------------------


def attach(model: PreTrainedModel) -> dict[str, Any]:
    """Neutralise the mechanism of a plain model and attach zero tables, as its ``config.rpb_retrofit`` says.

    Returns the patched attention modules by name. The model's class and those of the models inside it become the
    retrofitted ones. Raises UnsupportedModelError, ReleaseError or PartialMatchError before anything is changed.
    """
    settings, family = model.config.rpb_retrofit, family_of(model.config)
    check_release(transformers.__version__, family.since or OLDEST)
    modules = attention_modules(model, family)
    check_against(settings, family, rotary_frequencies(model, family), str(model.config.name_or_path))
    biases: dict[tuple[int, Bucketing], RelativePositionBias] = {}
    tables = {}
    for name, module in modules.items():
        bucketing = Bucketing(
            settings["relative_attention_num_buckets"],
            settings["relative_attention_max_distance"],
            bidirectional=not is_causal_module(module),
        )
        heads = num_heads(module, model.config)
        bias = biases.get((heads, bucketing)) if settings["shared"] else None
        tables[name] = biases[heads, bucketing] = bias or RelativePositionBias(
            heads, bucketing, tail=settings.get("tail") == "log"
        )
    _check_directions(settings, {table.bucketing.bidirectional for table in tables.values()})
    neutralise(model, family, settings.get("kept_frequencies", {}), settings.get("text_lengths", []))
    for module in model.modules():
        if "Attention" in type(module).__name__:
            setattr(module, RUN, plain_attention)
    for name, module in modules.items():
        device = next(module.parameters()).device
        setattr(module, TABLE, on(device, tables[name]))
        if pairs := settings.get(FACTOR):
            setattr(module, FACTOR, on(device, ContentFactor(num_heads(module, model.config), RotaryPairs(**pairs))))
        setattr(module, RUN, biased_attention)
        setattr(module, CAUSAL, not tables[name].bucketing.bidirectional)
        if settings.get("scale") == UNSCALED:
            drop_scale(module)
        if hasattr(module, "has_relative_attention_bias"):  # T5: no table of its own any more
            module.has_relative_attention_bias = False
        if family.silenced:
            module.register_forward_pre_hook(SILENCERS[family.silenced], with_kwargs=True)
        module.register_forward_pre_hook(BIAS_HOOKS[family.bias_argument], with_kwargs=True)
    follow_positions(model, family)
    for submodel in submodels(model):
        submodel.__class__ = retrofit_class(type(submodel))
        _lock(submodel, family)
        submodel.all_tied_weights_keys = submodel.get_expanded_tied_weights_keys(all_submodels=True)
    return modules


def follow_positions(model: PreTrainedModel, family: Family) -> None:
    """Let the bias follow the ``position_ids`` that a model is given, or refuse them where it takes none."""
    takers = positioned(model)
    for taker in takers:
        taker.register_forward_pre_hook(read_positions, with_kwargs=True)
        taker.register_forward_hook(keep_positions, with_kwargs=True)
        if not family.uses_interface:
            taker.register_forward_pre_hook(tag_position_ids, with_kwargs=True)
    within = {part for taker in takers for part in submodels(taker)}
    for submodel in submodels(model):
        if submodel not in within and not takes_positions(submodel):
            submodel.register_forward_pre_hook(refuse_positions, with_kwargs=True)


def on(device: torch.device, module: nn.Module) -> nn.Module:
    """A module of our own on a device; where it is already, it stays untouched, as fake tensors must."""
    return module if next(module.parameters()).device == device else module.to(device)


def detach(model: PreTrainedModel) -> None:
    """Undo `attach`: the plain model with its own mechanism. T5's own tables are the caller's to put back."""
    family = family_of(model.config)
    restore(model)
    for module in model.modules():
        vars(module).pop(RUN, None)
        vars(module).pop(CAUSAL, None)
    for module in attention_modules(model, family).values():
        remove_hooks(module, *BIAS_HOOKS.values(), *SILENCERS.values())
        delattr(module, TABLE)
        module._modules.pop(FACTOR, None)
        if SCALING in vars(module):
            module.scaling = vars(module).pop(SCALING)
    for submodel in submodels(model):
        remove_hooks(submodel, read_positions, keep_positions, tag_position_ids, refuse_positions)
    for submodel in submodels(model):
        submodel.__class__ = cast(Any, type(submodel)).source_class
        submodel.all_tied_weights_keys = submodel.get_expanded_tied_weights_keys(all_submodels=True)


def drop_scale(attention: Any) -> None:
    """Let an attention module take its queries as they are: the scale is in the weights that make them."""
    setattr(attention, SCALING, attention.scaling)
    attention.scaling = 1.0


def detach_factors(model: PreTrainedModel) -> None:
    """Take the factors on the content term off, and out of the configs: they are part of the weights now."""
    for module in model.modules():
        module._modules.pop(FACTOR, None)
    for submodel in submodels(model):
        submodel.config.rpb_retrofit = {k: v for k, v in submodel.config.rpb_retrofit.items() if k != FACTOR}


def attention_modules(model: nn.Module, family: Family) -> dict[str, Any]:
    """The self-attention modules by name, one in every block; PartialMatchError lists the blocks without."""
    named = modules_named(model, family.attention)
    modules = {name: module for name, module in named.items() if "Attention" in type(module).__name__}
    blocks = block_names(model)
    without = [block for block in blocks if not any(name.startswith(f"{block}.") for name in modules)]
    if without or not modules:
        raise PartialMatchError(
            f"{type(model).__name__}: {len(modules)} of {len(blocks)} layers have a self-attention named "
            f"'{family.attention}'; without: {', '.join(without) or 'no layers found'}"
        )
    return modules


def rotary_frequencies(model: nn.Module, family: Family) -> dict[str, int]:
    """How many frequencies each rotary buffer of a model holds, by the buffer's name."""
    return {
        name: len(buffer)
        for holder in (modules_named(model, family.positions) if family.positions else {}).values()
        for name, buffer in holder.named_buffers()
        if name.endswith("inv_freq") and "original" not in name
    }


def table_names(model: nn.Module) -> list[str]:
    """Names of the tables' parameters in the model's state dict, a shared table once."""
    return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, RelativePositionBias)]


def own_names(model: nn.Module) -> list[str]:
    """Names of all parameters that the retrofit added: tables, tails and factors; shared ones once."""
    return [name for name, _ in model.named_parameters() if is_own(name)]


def block_names(model: nn.Module) -> list[str]:
    """Names of the model's layers, each of which has a self-attention."""
    return [name for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)]


def submodels(model: nn.Module) -> Iterator[PreTrainedModel]:
    """The model and all models inside it."""
    return (module for module in model.modules() if isinstance(module, PreTrainedModel))


def positioned(model: nn.Module) -> list[PreTrainedModel]:
    """The innermost models whose forward takes ``position_ids``: those that hold the layers."""
    takers = [submodel for submodel in submodels(model) if takes_positions(submodel)]
    return [taker for taker in takers if sum(part in takers for part in submodels(taker)) == 1]


def _check_directions(settings: dict[str, Any], needed: set[bool]) -> None:
    """A checkpoint's tables serve the directions that they were made for: a table's shape would not tell."""
    made_for = settings.setdefault("bidirectional", sorted(needed))
    if not needed <= set(made_for):
        kinds = {True: "bidirectional", False: "causal"}
        raise ConfigError(
            f"the tables of '{settings['source']}''s retrofit are {' and '.join(kinds[b] for b in made_for)}, and this "
            f"model's attention is {kinds[(needed - set(made_for)).pop()]}: leave is_decoder and is_causal as they were"
        )


def num_heads(module: nn.Module, config: Any) -> int:
    """Query heads of an attention module, and so rows of its table."""
    for owner, name in ((module, "num_heads"), (module, "n_heads"), (config, "num_attention_heads")):
        if isinstance(heads := getattr(owner, name, None), int):
            return heads
    raise PartialMatchError(f"{type(module).__name__}: its number of heads is not known")


def _unlock(config: Any, family: Family) -> None:
    config._attn_implementation = ATTENTION if family.uses_interface else "eager"
    if config._experts_implementation == LOCK:
        config._experts_implementation = None


def _lock(model: PreTrainedModel, family: Family) -> None:
    config = model.config
    _unlock(config, family)
    # The public attributes only exist to be written to config.json.
    config.attn_implementation = config.experts_implementation = LOCK
    if not cast(Any, type(model)).source_class._can_set_experts_implementation():
        config._experts_implementation_internal = LOCK  # nothing reads it, but a plain class would check it


# --- the retrofitted classes -------------------------------------------------------------------------------------


class RetrofitModel:
    """Mixed into a Transformers class: ``RpbLlamaForCausalLM`` is ``(RetrofitModel, LlamaForCausalLM)``."""

    source_class: type[PreTrainedModel]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        if getattr(config, "rpb_retrofit", None) is None:
            raise NotRetrofittedError(
                f"{type(self).__name__} needs a retrofit's config; this one, of '{config.name_or_path}', has no "
                f"'rpb_retrofit': make a retrofit with `rpb retrofit` first"
            )
        check_settings(config.rpb_retrofit, config.name_or_path)
        family = family_of(config)
        if config._attn_implementation not in (None, LOCK, ATTENTION, "eager" if not family.uses_interface else None):
            raise AttentionImplementationError(would_drop(config._attn_implementation))
        _unlock(config, family)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        attach(self)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *args: Any,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        examined: bool = False,
        **kwargs: Any,
    ) -> Any:
        """`PreTrainedModel.from_pretrained`, which leaves missing tables as uninitialised memory: here an error.

        So is whatever else the checkpoint lost, and an adapter beside it, whose report would hide what is missing.
        Tables that hold NaN or infinity are let through to be ``examined`` only.
        """
        config = _without_file_locks(cls, path, kwargs)
        name = str(config.name_or_path if path is None else path)
        if path is not None and (Path(path) / kwargs.get("subfolder", "") / ADAPTER).exists():
            raise CheckpointError(beside_adapter(name))
        model, info = super().from_pretrained(  # type: ignore[misc]
            path, *args, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        if getattr(model, "_hf_peft_config_loaded", False):
            raise CheckpointError(beside_adapter(name))
        if missing := sorted(filter(is_own, info["missing_keys"])):
            raise MissingTablesError(f"'{name}' lacks {len(missing)} tables of its retrofit: {', '.join(missing)}")
        for key, found, expected in sorted(info["mismatched_keys"]):
            if is_own(key) or not ignore_mismatched_sizes:
                meaning = " (heads, buckets)" if is_table(key) else ""
                raise ConfigError(
                    f"'{name}': {key} has shape {tuple(found)}{meaning}, the config asks for {tuple(expected)}"
                )
        check_loaded(model, info, name, retrofit_class)
        if not examined:
            check_numbers(model, name)
        if model.config.rpb_retrofit["shared"]:
            check_shared(
                model._shared_tables(), kwargs["state_dict"] if path is None else stored_names(path, kwargs), name
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """`PreTrainedModel.save_pretrained`, with the code that the checkpoint needs to run."""
        folder = Path(save_directory)
        if kwargs.get("is_main_process", True):
            write_runtime(folder)
            for shard in folder.glob("*.safetensors"):
                if shard.stat().st_nlink > 1:  # a hard link to the source's shard: never write through it
                    shard.unlink()
        shared = self._shared_tables()
        settings = self.config.rpb_retrofit  # type: ignore[attr-defined]
        if settings["shared"] and not shared and len(table_names(self)) > len(settings["bidirectional"]):  # type: ignore[arg-type]
            self.config.rpb_retrofit = {**settings, "shared": False}  # type: ignore[attr-defined]  # PEFT trained copies
        if shared:  # a file holds each tensor once
            state = kwargs.get("state_dict") or self.state_dict()  # type: ignore[attr-defined]
            kwargs["state_dict"] = {name: tensor for name, tensor in state.items() if name not in shared}
        with _writing_file_locks(self.config):  # type: ignore[attr-defined]
            super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", True):
            for shard in folder.glob("*.safetensors"):  # which safetensors lets nobody but the owner read
                shutil.copymode(folder / "config.json", shard)
            # One file wins over shards when both are there, whichever is older: only what was just saved may stay.
            whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
            if whole.exists() and index.exists():
                min(whole, index, key=lambda file: file.stat().st_mtime_ns).unlink()
        if not getattr(self, "_hf_peft_config_loaded", False):  # else an adapter was saved, and the model was not
            self._name_after(folder)

    def _name_after(self, folder: Path) -> None:
        """Once a retrofit in memory is saved, that is what it was loaded from, as far as anybody else can tell."""
        for model in submodels(self):  # type: ignore[arg-type]
            if model.name_or_path == UNSAVED:
                model.name_or_path = model.config.name_or_path = str(folder.absolute())

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: names and initialisation of the weights are the source class's, and so are their conversions."""
        return False

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Refuse whatever would drop the bias."""
        if attn_implementation != self.config._attn_implementation:  # type: ignore[attr-defined]
            raise AttentionImplementationError(would_drop(attn_implementation))

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Transformers' map of tied weights, plus the tables that all layers share, whatever the embeddings do."""
        return super().get_expanded_tied_weights_keys(all_submodels) | self._shared_tables()  # type: ignore[misc]

    def _shared_tables(self) -> dict[str, str]:
        """Each further name of a table, and its first."""
        owners: dict[int, str] = {}
        names = [n for n, _ in self.named_parameters(remove_duplicate=False) if is_own(n)]  # type: ignore[attr-defined]
        tied = {name: owners.setdefault(id(self.get_parameter(name)), name) for name in names}  # type: ignore[attr-defined]
        return {name: owner for name, owner in tied.items() if name != owner}

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_retrofit, (type(self).source_class,), self.__dict__


def retrofit_class(source: Any) -> Any:
    """``Rpb`` + the name of a Transformers class: that class with a relative position bias."""
    return source if issubclass(source, RetrofitModel) else _retrofit_class(source)


@cache
def _retrofit_class(source: Any) -> Any:
    keep = {*(source._keep_in_fp32_modules_strict or ()), TABLE, FACTOR}
    name = f"Rpb{source.__name__}"
    if (conversion := get_checkpoint_conversion_mapping(source.__name__)) is not None:
        # Some classes (GPTNeoXForCausalLM) have weight names of their own in checkpoints.
        register_checkpoint_conversion_mapping(name, conversion, overwrite=True)
    members = {"source_class": source, "_keep_in_fp32_modules_strict": keep, "__module__": __name__}
    if hasattr(source, "prepare_inputs_for_generation"):  # by which Transformers tells a class that generates
        members["prepare_inputs_for_generation"] = of_step(source.prepare_inputs_for_generation)
        members["generate"] = of_generation(source.generate)
    cls: Any = type(name, (RetrofitModel, source), members)
    # output_attentions and output_hidden_states look up here what to record; only __init__ would enter the class.
    _CAN_RECORD_REGISTRY[cls.__new__(cls)] = cls._can_record_outputs
    return cls


_HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies", "subfolder")
_MODEL_ARGUMENTS = ("dtype", "torch_dtype", "attn_implementation", "experts_implementation", "quantization_config")


def _without_file_locks(cls: Any, path: str | os.PathLike[str], kwargs: dict[str, Any]) -> Any:
    """The config for ``cls.from_pretrained(path, **kwargs)``, out of which is taken what goes into it."""
    config = kwargs.pop("config", None)
    if not isinstance(config, PreTrainedConfig):
        where = {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}
        config = cls.config_class.from_pretrained(path if config is None else config, **where)
        for name in [name for name in kwargs if name not in _MODEL_ARGUMENTS and hasattr(config, name)]:
            setattr(config, name, kwargs.pop(name))  # num_labels=3 and the like
    config = copy.copy(config)
    vars(config).pop(WEIGHTS, None)
    return config


def save_config(config: Any, folder: str | os.PathLike[str], **kwargs: Any) -> None:
    """``config.save_pretrained``, and the locks that only the file has."""
    type(config).save_pretrained(config, folder, **kwargs)
    file = Path(folder) / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) | dict.fromkeys(FILE_LOCKS, LOCK)
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def _writing_file_locks(config: Any) -> Iterator[None]:
    """Within, the next ``config.save_pretrained`` is `save_config`: a model saves its config, then may upload it."""

    def save(folder: str | os.PathLike[str], **kwargs: Any) -> None:
        vars(config).pop("save_pretrained")
        save_config(config, folder, **kwargs)

    vars(config)["save_pretrained"] = save
    try:
        yield
    finally:
        vars(config).pop("save_pretrained", None)


def __getattr__(name: str) -> Any:
    source = getattr(transformers, name.removeprefix("Rpb"), None) if name.startswith("Rpb") else None
    if source is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return retrofit_class(source)


def _new_retrofit(source: Any) -> Any:
    cls = retrofit_class(source)
    return cls.__new__(cls)


def write_runtime(folder: Path) -> None:
    """Copy this package's files into a checkpoint, so that ``trust_remote_code=True`` finds them."""
    here = Path(sys.modules[__name__].__file__ or "").parent
    folder.mkdir(parents=True, exist_ok=True)
    for name in RUNTIME_FILES:
        if (target := folder / name).resolve() != (here / name).resolve():
            shutil.copyfile(here / name, target)
