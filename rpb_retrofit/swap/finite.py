"""Whether weights are numbers at all: what is fitted to NaN is NaN, and says so nowhere."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rpb_retrofit.errors import CheckpointError


def check_finite(parameters: Mapping[str, Tensor], name: str) -> None:
    """CheckpointError names the parameters of ``name`` that hold NaN or infinity; those without content are skipped.

    Asks for the smallest and the largest number only, which takes no memory beside the weights.
    """
    wrong = [
        key
        for key, value in parameters.items()
        if not value.is_meta
        and value.numel()
        and value.is_floating_point()
        and not all(bool(end.isfinite()) for end in value.detach().aminmax())
    ]
    if wrong:
        raise CheckpointError(
            f"'{name}': {len(wrong)} of its weights hold NaN or infinity ({wrong[0]}{', ...' * (len(wrong) > 1)}): a "
            "damaged checkpoint, fetch it again"
        )
