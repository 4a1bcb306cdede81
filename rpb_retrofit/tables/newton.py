"""Newton's method with a step length per head, and numbers that may not rise above zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rpb_retrofit.tables.loss import Loss


class Pace(NamedTuple):
    """How far Newton's steps go: at most ``steps``, until each promises less than ``tolerance`` nats to every head, or
    less than the share ``rough`` of the loss that it has.

    The Hessian is taken from one row in ``thin``, and anew in each step or, with ``stale``, in steps 1, 2, 4, 8, ...:
    both make the steps a little worse, and neither moves what they lead to.
    """

    steps: int
    tolerance: float
    thin: int = 1
    stale: bool = False
    rough: float = 0.0


def newton(
    evaluate: Callable[[Tensor, int | None], Loss], numbers: Tensor, pace: Pace, falling: slice
) -> tuple[Tensor, Loss, Loss, int]:
    """The numbers of least loss, the loss at the start and there (without its Hessian), and the steps taken.

    ``evaluate`` takes numbers, and one row in how many its Hessian is taken from (None: there is none). The numbers
    ``falling`` stay at or below zero (Bertsekas 1982, "Projected Newton methods": those that are at the bound and would
    leave it take no part in a step).
    """

    def along(direction: Tensor, length: Tensor | float) -> Tensor:
        there = numbers + length * direction
        there[:, falling] = there[:, falling].clamp(max=0)
        return there

    first = now = evaluate(numbers, pace.thin)
    hessian, steps = now.hessian, 0
    length = numbers.new_ones(len(numbers), 1)
    while steps < pace.steps:
        assert hessian is not None, "the first evaluation has one"
        direction = _free_direction(hessian, now.gradient, numbers, falling)
        expected_decrease = -(direction * now.gradient).sum(1) / 2
        if not (expected_decrease > pace.tolerance + pace.rough * now.value).any():
            # What is left is next to nothing in the loss but not in the numbers: the loss is flat here.
            flat = (expected_decrease >= 0) & (expected_decrease <= pace.tolerance)
            numbers = torch.where(flat[:, None], along(direction, 1.0), numbers)
            break
        steps += 1
        there = along(direction, length)
        new = evaluate(there, None if pace.stale and steps & (steps - 1) else pace.thin)
        # Sufficient decrease, or a decrease that is lost in rounding; a head that gets worse tries a shorter step.
        better = new.value <= now.value - 1e-4 * length[:, 0] * expected_decrease + 1e-6
        numbers = torch.where(better[:, None], there, numbers)
        if new.hessian is not None:
            hessian = torch.where(better[:, None, None], new.hessian, hessian)
        now = Loss(
            torch.where(better, new.kl, now.kl),
            torch.where(better, new.value, now.value),
            torch.where(better[:, None], new.gradient, now.gradient),
            None,
            None if new.beside is None or now.beside is None else torch.where(better, new.beside, now.beside),
        )
        length = torch.where(better[:, None], (length * 4).clamp(max=1), length / 4)
    return numbers, first, now, steps


def _free_direction(hessian: Tensor, gradient: Tensor, numbers: Tensor, falling: slice) -> Tensor:
    """Newton's direction (heads, size) in the numbers that may move."""
    held = torch.zeros_like(gradient, dtype=torch.bool)
    held[:, falling] = (numbers[:, falling] >= 0) & (gradient[:, falling] < 0)
    free = (~held).to(hessian.dtype)
    among = hessian * free[:, :, None] * free[:, None, :] + torch.diag_embed(held.to(hessian.dtype))
    return -torch.linalg.solve(among, gradient * free)
