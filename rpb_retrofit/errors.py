"""The exceptions that users meet. They live in `runtime.errors`, because checkpoints raise them too."""

from rpb_retrofit.runtime.errors import (
    AlreadyRetrofittedError,
    AttentionImplementationError,
    CheckpointError,
    ConfigError,
    DataError,
    InterruptedRunError,
    MissingTablesError,
    NotRetrofittedError,
    PartialMatchError,
    ReleaseError,
    RetrofitError,
    RevertError,
    TrainingError,
    UnsupportedModelError,
)

__all__ = [
    "AlreadyRetrofittedError",
    "AttentionImplementationError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "InterruptedRunError",
    "MissingTablesError",
    "NotRetrofittedError",
    "PartialMatchError",
    "ReleaseError",
    "RetrofitError",
    "RevertError",
    "TrainingError",
    "UnsupportedModelError",
]
