"""How an inner solve ended: reported or raised, never silent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Status:
    """The end of one solve of a batch of problems.

    Attributes:
        solver: which one, in words.
        residual: what is left of the equation, relative, of shape (*batch,).
        tolerance: what `residual` was to get below.
        iterations: of the slowest problem.
        converged: (*batch,).
        reason: why it ended, in words.
    """

    solver: str
    residual: Tensor
    tolerance: float
    iterations: int
    converged: Tensor
    reason: str

    @property
    def ok(self) -> bool:
        return bool(self.converged.all())

    def __str__(self) -> str:
        failed = int((~self.converged).sum())
        return (
            f"{self.solver}: {failed} of {self.converged.numel()} problems not solved after "
            f"{self.iterations} iterations ({self.reason}), greatest relative residual "
            f"{self.residual.max().item():.2e}, tolerance {self.tolerance:.2e}"
        )


Report = Callable[[Status], None]


class NotSolved(ArithmeticError):
    """An inner solve failed, and a derivative of its answer would be wrong."""

    def __init__(self, status: Status) -> None:
        super().__init__(
            f"{status}; allow more iterations, loosen `tol` or the solver's `tolerance`, choose "
            "another solver, or pass report=… to receive statuses instead of this error"
        )
        self.status = status


def settle(status: Status, report: Report | None) -> None:
    """Hand the status to `report`, or raise NotSolved where the solve failed and none is given."""
    if report is not None:
        report(status)
    elif not status.ok:
        raise NotSolved(status)


def norm(x: Tensor) -> Tensor:
    """Euclidean norm of each problem's vector, (*batch, n) -> (*batch,)."""
    return torch.linalg.vector_norm(x, dim=-1)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner product of each problem's vectors, (*batch, n), (*batch, n) -> (*batch, 1)."""
    return torch.linalg.vecdot(x, y).unsqueeze(-1)


def some(condition: Tensor) -> bool:
    """Whether it holds for any problem."""
    return bool(condition if condition.numel() == 1 else condition.any())


def keep(active: Tensor, new: Tensor, old: Tensor | float) -> Tensor:
    """`new` where a problem is active (*batch, 1), else `old`, while some problem is.

    One on its own then is: what is said of it once an iteration need not be said of every vector.
    """
    return new if active.dim() == 1 else torch.where(active, new, old)
