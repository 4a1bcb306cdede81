"""The divergence of what a student makes likely from what its teacher does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

AT_ONCE = 2**26
"""Numbers that are computed at a time."""


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """The sum over rows of ``KL(softmax(teacher) || softmax(student))``, a scalar in its dtype; both (..., n).

    Where both are minus infinity nothing counts. Only the student gets a gradient: the plain difference of the two
    distributions, so exactly zero where a student equals its teacher. Adam would blow any rounding up to steps of its
    full rate, and a control would drift away from its source.
    """
    return _Divergence.apply(student, teacher)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        total, change = student.new_zeros(()), torch.empty_like(student, memory_format=torch.contiguous_format)
        rows = max(1, AT_ONCE // student.shape[-1])
        parts = (x.reshape(-1, x.shape[-1]).split(rows) for x in (student, teacher, change))
        for of_student, of_teacher, out in zip(*parts, strict=True):
            log_p, log_q = of_teacher.to(of_student.dtype).log_softmax(-1), of_student.log_softmax(-1)
            p = log_p.exp()
            torch.sub(log_q.exp(), p, out=out)
            total += torch.where(p > 0, p * (log_p - log_q), 0).sum()
        ctx.save_for_backward(change)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None
