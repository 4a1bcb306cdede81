"""The arms of `bench_attention`: attention with a bias of the offset, and without, each as a function of q, k and v."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Case:
    """One measurement's setting."""

    arm: str
    length: int
    backward: bool
    device: str
    dtype: str
    heads: int
    kv_heads: int
    width: int
    buckets: int
    max_distance: int

    def operations(self) -> float:
        """Floating-point operations of the pairs that are seen: two products forward, five backward."""
        return 4 * self.heads * self.length**2 / 2 * self.width * (3.5 if self.backward else 1)

    def bytes_of_a_bias(self) -> int:
        """Of one tensor (heads, N, N) in the dtype."""
        return self.heads * self.length**2 * getattr(torch, self.dtype).itemsize


class LogTail(nn.Module):
    """T5's table, and past its reach a fall with log(offset), one slope a head: no constant end."""

    def __init__(self, table: nn.Module, heads: int, start: int) -> None:
        super().__init__()
        self.table, self.start = table, start
        self.slope = nn.Parameter(torch.rand(heads))

    def forward(self, offset: Tensor) -> Tensor:
        """Offsets (n,) to (heads, n)."""
        tail = (offset.clamp(min=self.start) / self.start).log()
        return self.table(offset) - self.slope[:, None] * tail


Arm = Callable[[Tensor, Tensor, Tensor], Tensor]


def no_bias(case: Case) -> tuple[Arm, list[Tensor]]:
    """PyTorch's causal attention."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])

    return run, []


def no_bias_by_cudnn(case: Case) -> tuple[Arm, list[Tensor]]:
    """The same by cuDNN: on Hopper the fastest that PyTorch offers."""
    run, parameters = no_bias(case)

    def run_by_cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return run(q, k, v)

    return run_by_cudnn, parameters


def biased(case: Case, log_tail: bool = False) -> tuple[Arm, list[Tensor]]:
    """This project's."""
    from rpb_retrofit.runtime.attention import attention
    from rpb_retrofit.runtime.bias import RelativePositionBias
    from rpb_retrofit.runtime.buckets import Bucketing

    table = RelativePositionBias(case.heads, Bucketing(case.buckets, case.max_distance, False))
    nn.init.normal_(table.weight)
    bias = (LogTail(table, case.heads, case.max_distance) if log_tail else table).to(case.device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, bias, scale=case.width**-0.5, causal=True).output

    return run, list(bias.parameters())


def position_bias(case: Case, flex: bool = False) -> tuple[Arm, list[Tensor]]:
    """Transformers' own: a T5 attention makes the bias (heads, N, N), sdpa or flex_attention takes it."""
    from transformers import T5Config
    from transformers.integrations.flex_attention import flex_attention_forward
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import causal_mask_function, flex_attention_mask
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config(
        num_heads=case.heads,
        d_kv=case.width,
        d_model=case.heads * case.width,
        relative_attention_num_buckets=case.buckets,
        relative_attention_max_distance=case.max_distance,
        is_decoder=True,
    )
    t5 = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).to(case.device)
    module = SimpleNamespace(num_key_value_groups=case.heads // case.kv_heads, is_causal=True, training=True)
    forward: Any = flex_attention_forward if flex else sdpa_attention_forward
    n = case.length
    mask = flex_attention_mask(1, n, n, mask_function=causal_mask_function, device=case.device) if flex else None

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = t5.compute_bias(n, n).to(q.dtype)
        return forward(module, q, k, v, mask, scaling=case.width**-0.5, position_bias=bias)[0].transpose(1, 2)

    return run, [t5.relative_attention_bias.weight]


CUDNN = "no bias, cuDNN"

ARMS: dict[str, Callable[[Case], tuple[Arm, list[Tensor]]]] = {
    "no bias": no_bias,
    CUDNN: no_bias_by_cudnn,
    "ours": biased,
    "ours, log tail": lambda case: biased(case, log_tail=True),
    "position_bias, sdpa": position_bias,
    "position_bias, flex": lambda case: position_bias(case, flex=True),
}


def prepare(case: Case) -> Callable[[], None]:
    """A function that runs the case once."""
    torch.manual_seed(0)
    arm, parameters = ARMS[case.arm](case)
    shape = (1, case.length, case.heads + 2 * case.kv_heads, case.width)  # laid out as models do
    options: Any = {"device": case.device, "dtype": getattr(torch, case.dtype)}
    q, k, v = (
        x.detach().requires_grad_(case.backward)
        for x in torch.randn(shape, **options).transpose(1, 2).split([case.heads, case.kv_heads, case.kv_heads], 1)
    )
    upstream = torch.randn(1, case.length, case.heads, case.width, **options).transpose(1, 2)

    def run() -> None:
        if case.backward:
            torch.autograd.grad(arm(q, k, v), [q, k, v, *parameters], upstream)
        else:
            with torch.no_grad():
                arm(q, k, v)
        if case.device == "cuda":
            torch.cuda.synchronize()

    return run
