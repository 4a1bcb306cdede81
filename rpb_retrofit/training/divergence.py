"""The divergence of what a student makes likely from what its teacher does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """The sum over rows of ``KL(softmax(teacher) || softmax(student))``, a scalar; both (..., n), float32.

    Where both are minus infinity nothing counts. Only the student gets a gradient: the plain difference of the two
    distributions, so exactly zero where a student equals its teacher. Adam would blow any rounding up to steps of its
    full rate, and a control would drift away from its source.
    """
    return _Divergence.apply(student, teacher)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
        p = log_p.exp()
        ctx.save_for_backward(log_q.exp().sub_(p))
        return torch.where(p > 0, p * (log_p - log_q), 0).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None
