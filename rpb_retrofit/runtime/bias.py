"""The relative position bias: a learned function of the offset, one row of numbers per head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .buckets import Bucketing, bucket_of, descending_buckets, first_distances, log_beyond


class RelativePositionBias(nn.Module):
    """T5's bucketed bias: one learned scalar per (head, bucket), looked up by offset.

    A module of its own, so that PEFT's ``modules_to_save``, FSDP and tensor-parallel plans can name it. Always read
    it by calling it: a wrapper (PEFT's, FSDP's) may stand in its place.

    With ``tail`` the last bucket is not constant: from the maximum distance on a slope of each head, ``tail`` (heads,
    directions), times the logarithm of the distance is added. At slope zero that is T5 exactly.

    Source: ``relative_attention_bias`` of ``T5Attention``, which stores the transpose, (buckets, heads); the logarithm
    is KERPLE's, Chi et al. 2022, arXiv:2205.09921.
    """

    def __init__(self, num_heads: int, bucketing: Bucketing, tail: bool = False) -> None:
        super().__init__()
        self.bucketing = bucketing.validate()
        self._kept: tuple[tuple[int, ...], Tensor] | None = None
        self.weight = nn.Parameter(torch.zeros(num_heads, bucketing.num_buckets, dtype=torch.float32))
        self.tail = nn.Parameter(torch.zeros(num_heads, bucketing.directions, dtype=torch.float32)) if tail else None

    takes_range = True

    def forward(self, offset: Tensor | range) -> Tensor:
        """Offsets ``i - j``, int64 of shape (n,), to their bias per head, float32 of shape (heads, n).

        Consecutive descending offsets may come as a range, which costs no more than the gather from the table; those
        of one query behind all its keys, ``range(n - 1, -1, -1)``, without gradients, not even that.
        """
        if not isinstance(offset, range):
            return self._with_tail(self.weight.index_select(1, bucket_of(offset, self.bucketing)), offset)
        if offset.stop == -1 and not torch.is_grad_enabled():
            weight = self.weight
            if not weight.is_inference():
                return self._row(offset.start + 1, weight)
        self._kept = None
        return self._gather(offset)

    def _gather(self, offsets: range) -> Tensor:
        device = self.weight.device
        line = self.weight.index_select(1, descending_buckets(offsets, self.bucketing, device))
        if self.tail is None:
            return line
        return self._with_tail(line, torch.arange(offsets.start, offsets.stop, offsets.step, device=device))

    def _with_tail(self, line: Tensor, offset: Tensor) -> Tensor:
        if self.tail is None:
            return line
        # Not a matrix product, which autocast would round.
        return line + (self.tail[:, :, None] * log_beyond(offset, self.bucketing)).sum(1)

    def _row(self, keys: int, weight: Tensor) -> Tensor:
        """The bias of the offsets ``keys - 1 .. 0``: a view of a vector that decoding keeps from token to token.

        It is dropped when the table changes or more than one token comes in, so it is never older than the keys and
        values that are cached beside it, even where a table was written behind autograd's back.
        """
        stamp: tuple[int, ...] = (weight.data_ptr(), weight._version)
        if (tail := self.tail) is not None:
            stamp += (tail.data_ptr(), tail._version)
        kept = self._kept
        if kept is None or kept[0] != stamp or kept[1].shape[1] < keys:
            kept = self._kept = stamp, self._gather(range((1 << keys.bit_length()) - 1, -1, -1))
        line = kept[1]
        return line.narrow(1, line.shape[1] - keys, keys)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    @property
    def constant_beyond(self) -> tuple[int | None, int | None]:
        """The bias is one constant per head at offsets up to the first number, and one from the second number on.

        None: no such end. Attention needs only the sum of the gradients there, which is cheap.
        """
        if self.tail is not None:
            return None, None
        last = first_distances(self.bucketing)[-1]
        return (-last if self.bucketing.bidirectional else None, last)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # ``model.to(torch.bfloat16)`` must not round the tables: they follow to the device and keep their dtype.
        return super()._apply(lambda tensor: keep_dtype(fn, tensor), recurse)

    def extra_repr(self) -> str:
        kind = "bidirectional" if self.bucketing.bidirectional else "causal"
        heads, buckets = self.weight.shape
        tail = "" if self.tail is None else ", logarithmic tail"
        return f"heads={heads}, buckets={buckets}, max_distance={self.bucketing.max_distance}, {kind}{tail}"


def keep_dtype(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """What ``fn`` (a cast, a move) makes of a tensor, in the dtype that it had."""
    moved = fn(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
