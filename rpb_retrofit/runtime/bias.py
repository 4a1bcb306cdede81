"""The relative position bias: a function of the offset, one row of numbers per head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .buckets import Bucketing, bucket_of, descending_buckets, first_distances, log_beyond
from .tracing import traced


class OffsetBias(nn.Module):
    """A bias of the offset: ``weight`` (heads, ...) and ``_gather`` say which.

    Called with offsets ``i - j``, int64 of shape (n,), it gives their bias per head, float32 of shape (heads, n).
    Consecutive descending offsets may come as a range; those of one query behind all its keys, ``range(n - 1, -1,
    -1)``, without gradients, cost next to nothing, as decoding asks for them at every token.
    """

    weight: Tensor
    takes_range = True

    def __init__(self) -> None:
        super().__init__()
        self._kept: tuple[tuple[int, ...], Tensor] | None = None

    def forward(self, offset: Tensor | range) -> Tensor:
        """The bias of the offsets; see above."""
        if not isinstance(offset, range) or traced(self.weight):  # what is kept must be numbers
            return self._gather(as_tensor(offset, self.weight.device))
        if offset.stop == -1 and not torch.is_grad_enabled() and not self.weight.is_inference():
            return self._row(offset.start + 1, self.weight)
        self._kept = None
        return self._gather(offset)

    def _gather(self, offset: Tensor | range) -> Tensor:
        raise NotImplementedError

    def _stamp(self, weight: Tensor) -> tuple[int, ...]:
        """What changes when a number does that the bias depends on."""
        return weight.data_ptr(), weight._version

    def _row(self, keys: int, weight: Tensor) -> Tensor:
        """The bias of the offsets ``keys - 1 .. 0``: a view of a vector that decoding keeps from token to token.

        It is dropped when the numbers change or more than one token comes in, so it is never older than the keys and
        values that are cached beside it, even where a table was written behind autograd's back.
        """
        stamp, kept = self._stamp(weight), self._kept
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
        return None, None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # ``model.to(torch.bfloat16)`` must not round the numbers: they follow to the device and keep their dtype.
        return super()._apply(lambda tensor: keep_dtype(fn, tensor), recurse)


class AlibiBias(OffsetBias):
    """ALiBi, exactly: minus a fixed slope of each head, ``weight`` (heads,), times the distance.

    Source: Press et al. 2022, arXiv:2108.12409.
    """

    def __init__(self, slopes: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor(slopes, dtype=torch.float32), persistent=False)

    def _gather(self, offset: Tensor | range) -> Tensor:
        return -self.weight[:, None] * as_tensor(offset, self.weight.device).abs()


class RelativePositionBias(OffsetBias):
    """T5's bucketed bias: one learned scalar per (head, bucket), looked up by offset.

    A module of its own, so that PEFT's ``modules_to_save``, FSDP and tensor-parallel plans can name it. Always read
    it by calling it: a wrapper (PEFT's, FSDP's) may stand in its place.

    With ``tail`` the last bucket is not constant: from the maximum distance on a slope of each head, ``tail`` (heads,
    directions), times the logarithm of the distance is added. At slope zero that is T5 exactly. A slope above zero
    counts as zero: what rose with the distance would give all attention to the farthest keys of a text that is longer
    than any that was trained on.

    Source: ``relative_attention_bias`` of ``T5Attention``, which stores the transpose, (buckets, heads); the logarithm
    is KERPLE's, Chi et al. 2022, arXiv:2205.09921.
    """

    def __init__(self, num_heads: int, bucketing: Bucketing, tail: bool = False) -> None:
        super().__init__()
        self.bucketing = bucketing.validate()
        self.weight = nn.Parameter(torch.zeros(num_heads, bucketing.num_buckets, dtype=torch.float32))
        self.tail = nn.Parameter(torch.zeros(num_heads, bucketing.directions, dtype=torch.float32)) if tail else None

    def _gather(self, offset: Tensor | range) -> Tensor:
        device = self.weight.device
        if isinstance(offset, range):
            bucket = descending_buckets(offset, self.bucketing, device)
        else:
            bucket = bucket_of(offset, self.bucketing)
        line = self.weight.index_select(1, bucket)
        if self.tail is None:
            return line
        # Not a matrix product, which autocast would round.
        beyond = log_beyond(as_tensor(offset, device), self.bucketing)
        return line + (_AtMostZero.apply(self.tail)[:, :, None] * beyond).sum(1)

    def _stamp(self, weight: Tensor) -> tuple[int, ...]:
        stamp = super()._stamp(weight)
        return stamp if (tail := self.tail) is None else (*stamp, tail.data_ptr(), tail._version)

    @property
    def constant_beyond(self) -> tuple[int | None, int | None]:
        """As of `OffsetBias`: the last bucket's, unless there is a tail."""
        if self.tail is not None:
            return None, None
        last = first_distances(self.bucketing)[-1]
        return (-last if self.bucketing.bidirectional else None, last)

    def extra_repr(self) -> str:
        kind = "bidirectional" if self.bucketing.bidirectional else "causal"
        heads, buckets = self.weight.shape
        tail = "" if self.tail is None else ", logarithmic tail"
        return f"heads={heads}, buckets={buckets}, max_distance={self.bucketing.max_distance}, {kind}{tail}"


class _AtMostZero(torch.autograd.Function):
    """``min(x, 0)``, whose gradient reaches an ``x`` above zero where descent would lower it: none is lost."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clamp(max=0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where((x <= 0) | (grad > 0), grad, 0)


def keep_dtype(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """What ``fn`` (a cast, a move) makes of a tensor, in the dtype that it had."""
    moved = fn(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)


def as_tensor(offset: Tensor | range, device: torch.device) -> Tensor:
    """Offsets as a tensor."""
    if isinstance(offset, range):
        return torch.arange(offset.start, offset.stop, offset.step, device=device)
    return offset
