"""The classes of retrofitted models: Transformers' own, with a relative position bias; loading and saving them.

The class of a retrofitted ``LlamaForCausalLM`` is ``RpbLlamaForCausalLM``, made on demand for any class of
Transformers: ``modeling.RpbLlamaForCausalLM`` is what a checkpoint's ``auto_map`` refers to.
"""

from __future__ import annotations

# isort: off
from .releases import OLDEST  # noqa: F401 - first, or what an older release lacks would be the error

# isort: on
import os
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import transformers
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .anatomy import Anatomy, submodels
from .attach import attach_bias, detach_bias, table_names
from .cached_positions import of_generation, of_step
from .errors import (
    ADAPTER,
    AttentionImplementationError,
    CheckpointError,
    ConfigError,
    MissingTablesError,
    NotRetrofittedError,
    beside_adapter,
)
from .families import FACTOR, TABLE, family_of, is_own, is_table
from .interface import ATTENTION, would_drop
from .loading import check_loaded, check_numbers, check_shared, stored_names
from .locks import LOCK, lock, unlock, without_file_locks, writing_file_locks
from .settings import check_settings

if TYPE_CHECKING:  # Transformers before 5.10 copies those files of a folder only that this one names by an import.
    from .attention import attention  # noqa: F401
    from .bias import OffsetBias  # noqa: F401
    from .blockwise import forward  # noqa: F401
    from .blockwise_gradients import backward  # noqa: F401
    from .buckets import Bucketing  # noqa: F401
    from .dense import attend_dense  # noqa: F401
    from .factor import ContentFactor  # noqa: F401
    from .fused import obstacle  # noqa: F401
    from .gradients import inner_products  # noqa: F401
    from .kernels_backward import key_gradient_kernel  # noqa: F401
    from .kernels_forward import forward_kernel  # noqa: F401
    from .kernels_shared import load  # noqa: F401
    from .line import Bias  # noqa: F401
    from .mechanisms import neutralise  # noqa: F401
    from .operators import attend_fused  # noqa: F401
    from .positions import Positions  # noqa: F401
    from .rotation import position_zero  # noqa: F401
    from .row import attend_row  # noqa: F401
    from .tilings import Tiling  # noqa: F401
    from .tracing import traced  # noqa: F401
    from .version import __version__  # noqa: F401
    from .visibility import runs_of  # noqa: F401

UNSAVED = "none: a retrofit in memory. Save it, load it with rpb_retrofit.load(path), and put the adapter onto that"
"""Where a model comes from that was retrofitted in place. PEFT notes it as an adapter's base, and whoever looks for it
reads it in the error; the source's name would put the adapter onto the source."""

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
    "anatomy.py",
    "cached_positions.py",
    "positions.py",
    "settings.py",
    "loading.py",
    "rotation.py",
    "mechanisms.py",
    "interface.py",
    "attach.py",
    "locks.py",
    "modeling.py",
)
"""The files that a checkpoint carries, so that it loads where rpb_retrofit is not installed."""


def attach(anatomy: Anatomy) -> None:
    """Make a plain model a retrofit with zero tables, as its ``config.rpb_retrofit`` says.

    Its class and those of the models inside it become the retrofitted ones. Raises UnsupportedModelError, ReleaseError,
    PartialMatchError or ConfigError before anything is changed.
    """
    attach_bias(anatomy)
    for submodel in anatomy.submodels:
        submodel.__class__ = retrofit_class(type(submodel))
        lock(submodel)
        submodel.all_tied_weights_keys = submodel.get_expanded_tied_weights_keys(all_submodels=True)


def detach(anatomy: Anatomy) -> None:
    """Undo `attach`, however far it came. T5's own tables are the caller's to put back."""
    detach_bias(anatomy)
    for submodel in anatomy.submodels:
        if isinstance(submodel, RetrofitModel):
            submodel.__class__ = cast(Any, type(submodel)).source_class
        submodel.all_tied_weights_keys = submodel.get_expanded_tied_weights_keys(all_submodels=True)


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
        unlock(config, family)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        attach(Anatomy(cast(PreTrainedModel, self), family))

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
        config = without_file_locks(cls, path, kwargs)
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
        for key, stored, expected in sorted(info["mismatched_keys"]):
            if is_own(key) or not ignore_mismatched_sizes:
                meaning = " (heads, buckets)" if is_table(key) else ""
                raise ConfigError(
                    f"'{name}': {key} has shape {tuple(stored)}{meaning}, the config asks for {tuple(expected)}"
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
        with writing_file_locks(self.config):  # type: ignore[attr-defined]
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
