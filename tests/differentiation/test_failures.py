"""A solve that stops early, diverges or is singular says so, in every entry point.

`root`, `fixed_point`, `minimize` and the linear solvers are in test_implicit.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ebbflow.differentiation import (
    NotSolved,
    bilevel,
    inverse_sqrtm,
    projections,
    proximal,
    quadratic_program,
    sylvester_symmetric,
)

F64 = torch.float64
HALVES = torch.full((2,), 0.5, dtype=F64)
ZEROS = torch.zeros(2, 2, dtype=F64)
UNEQUAL = torch.tensor([[0.5, 0.5], [0.5, 0.6]], dtype=F64)
INDEFINITE = torch.diag(torch.tensor([1.0, -1.0], dtype=F64))


def outer(x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (y - 1).square().sum()


def inner(x: Tensor, y: Tensor) -> Tensor:
    return y.square().sum() - x @ y


POINT = torch.ones(2, dtype=F64), 3 * torch.ones(2, dtype=F64)
FAILURES: dict[str, Callable[[], object]] = {
    "infeasible": lambda: quadratic_program(
        torch.eye(2, dtype=F64), HALVES, m=torch.stack([HALVES, -HALVES]), h=-HALVES
    ),
    "dependent equalities": lambda: quadratic_program(
        torch.eye(2, dtype=F64), HALVES, torch.stack([HALVES, HALVES]), torch.zeros(2, dtype=F64)
    ),
    "a row without mass": lambda: projections.transport(
        ZEROS, torch.tensor([0.0, 1.0], dtype=F64), HALVES, 0.5
    ),
    "unequal totals of a transport under vmap": lambda: torch.vmap(
        lambda rows: projections.transport(ZEROS, rows, HALVES, 0.5)
    )(UNEQUAL),
    "unequal totals of a polytope under vmap": lambda: torch.vmap(
        lambda rows: projections.transport_polytope(ZEROS, rows, HALVES)
    )(UNEQUAL),
    "not a number": lambda: proximal.logistic(torch.tensor([torch.nan], dtype=F64)),
    "unrolled": lambda: bilevel.unrolled(outer, inner, *POINT, step=1.5, steps=20),
    "truncated": lambda: bilevel.truncated(outer, inner, *POINT, step=1.5, steps=20, last=2),
    "neumann": lambda: bilevel.neumann(outer, inner, *POINT, step=1.5, terms=20),
    "inverse root": lambda: inverse_sqrtm(INDEFINITE),
    "lyapunov": lambda: sylvester_symmetric(INDEFINITE, INDEFINITE),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_solve_raises(name: str) -> None:
    with pytest.raises(NotSolved, match="not solved"):
        FAILURES[name]()


def test_hypergradients_report_what_they_left() -> None:
    for found in (
        bilevel.unrolled(outer, inner, *POINT, step=0.25, steps=6),
        bilevel.truncated(outer, inner, *POINT, step=0.25, steps=6, last=2),
    ):
        # The inner gradient halves with every step, from 5.
        left = torch.linalg.vector_norm(torch.full((2,), 5 / 2**6, dtype=F64))
        assert torch.allclose(found.residual, left / (1 + torch.linalg.vector_norm(found.y)))
    found = bilevel.neumann(outer, inner, *POINT, step=0.25, terms=6)
    assert found.residual.item() == pytest.approx(2**-6)


def test_a_simplex_of_negative_total_is_not_a_number() -> None:
    assert projections.simplex(HALVES, -1.0).isnan().all()
    assert torch.equal(projections.simplex(HALVES, 0.0), torch.zeros(2, dtype=F64))
