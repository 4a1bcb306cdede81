"""Every error that a user of the toolkit or of a retrofitted checkpoint can meet."""

from __future__ import annotations


class RetrofitError(Exception):
    """Base of all errors of rpb_retrofit: the message names the offender, its value and the remedy."""


class ConfigError(RetrofitError, ValueError):
    """A setting that has no meaning, or that contradicts another one."""


class UnsupportedModelError(RetrofitError):
    """A model whose positional mechanism, format or quantisation the toolkit does not handle."""


class ReleaseError(RetrofitError, ImportError):
    """A Transformers older than the code of a checkpoint runs on; the message names the release that it needs."""


class PartialMatchError(RetrofitError):
    """Some layers could not be patched; the message lists them."""


class AlreadyRetrofittedError(RetrofitError):
    """A retrofit of a retrofit."""


class NotRetrofittedError(RetrofitError):
    """An operation that only a retrofit has, asked of a model or checkpoint that is not one."""


class RevertError(RetrofitError):
    """The source's weights are no longer in this process; the message names the source checkpoint."""


class AttentionImplementationError(RetrofitError, ValueError):
    """An attention implementation that would silently drop the bias."""


class MissingTablesError(RetrofitError):
    """A checkpoint without (all) its tables; the message lists them."""


class CheckpointError(RetrofitError):
    """A folder or file that cannot be read, or must not be overwritten."""


class DataError(RetrofitError, ValueError):
    """Text that cannot be evaluated as asked."""


class TrainingError(RetrofitError):
    """A run that had to stop: a step that would ruin the model, a disk that is full; its last checkpoint is whole."""


class InterruptedRunError(TrainingError):
    """A run that was asked to stop (SIGTERM, Ctrl-C), saved what it had, and can go on."""


ADAPTER = "adapter_config.json"
"""The file that makes Transformers apply an adapter, whose loading report then replaces the model's."""


def beside_adapter(name: str) -> str:
    """The message for a checkpoint with an adapter in its folder."""
    return (
        f"'{name}' holds an adapter ({ADAPTER}), which would be applied unasked: give it a folder of its own, load the "
        "model without it, then PeftModel.from_pretrained(model, folder)"
    )
