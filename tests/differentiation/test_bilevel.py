"""Hypergradients against closed forms; LV-HBA and BSVRB against known optima."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ebbflow.differentiation import NotSolved, bilevel
from ebbflow.differentiation.solvers import LBFGS

torch.manual_seed(0)
F64 = torch.float64
H = torch.randn(3, 3, dtype=F64)
H = H @ H.mT / 3 + torch.eye(3, dtype=F64)
B = torch.randn(2, 3, dtype=F64)
C = torch.randn(3, dtype=F64)
X = torch.randn(2, dtype=F64)
STEP = 1 / torch.linalg.matrix_norm(H, ord=2).item()
RATE = 1 - STEP * torch.linalg.eigvalsh(H)[0].item()


def outer(x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (y - C).square().sum() + 0.1 * x.square().sum()


def inner(x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * y @ (H @ y) - x @ (B @ y)


def exact(x: Tensor) -> Tensor:
    return torch.func.grad(lambda x: outer(x, torch.linalg.inv(H) @ (B.mT @ x)))(x)


def test_implicit_hypergradient() -> None:
    found = bilevel.implicit(outer, inner, X, torch.zeros(3, dtype=F64))
    assert torch.allclose(found.gradient, exact(X), atol=1e-9)
    short = LBFGS(max_iterations=1)
    with pytest.raises(NotSolved):
        bilevel.implicit(outer, inner, X, torch.zeros(3, dtype=F64), solver=short)


def test_unrolled_truncated_and_neumann_converge_at_the_contraction_s_rate() -> None:
    y = torch.zeros(3, dtype=F64)
    answer = torch.linalg.inv(H) @ (B.mT @ X)
    for method in ("unrolled", "truncated", "neumann"):
        errors = []
        for k in (20, 40):
            if method == "unrolled":
                found = bilevel.unrolled(outer, inner, X, y, step=STEP, steps=k)
            elif method == "truncated":
                found = bilevel.truncated(outer, inner, X, y, step=STEP, steps=400, last=k)
            else:
                found = bilevel.neumann(outer, inner, X, answer, step=STEP, terms=k)
            errors.append((found.gradient - exact(X)).norm().item())
        # Twenty more terms: the rate to that power, for unrolling times a polynomial.
        assert errors[1] < 3 * RATE**20 * errors[0], method
        assert errors[1] > 0.2 * RATE**20 * errors[0], method
    with pytest.raises(ValueError, match="last 3"):
        bilevel.truncated(outer, inner, X, y, step=STEP, steps=2, last=3)


N = 10


def toy_outer(x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (x - y[N:]).square().sum() + 0.5 * (y[:N] - 1).square().sum()


def toy_inner(x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * y[:N].square().sum() - x @ y[:N] + y[N:].sum()


def toy_constraint(x: Tensor, y: Tensor) -> Tensor:
    return (x.sum() + y.sum()).reshape(1)


def toy_project(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    excess = (x.sum() + y.sum()) / (3 * N)
    return x - excess, y - excess


def test_lv_hba_goes_to_the_toy_problem_s_optimum() -> None:
    """x = -0.3, y = (0.7, -0.4): the penalty's weight falls slowly, and the answer with it."""
    settings = bilevel.LVHBA(
        alpha=0.02, beta=0.001, eta=0.1, gamma1=1.0, gamma2=1.0, penalty=1.0, equality=True
    )
    seen: dict[int, tuple[float, float]] = {}

    def watch(k: int, state: object) -> None:
        if k in (100, 599):
            mean = [state.x.mean(), state.y[:N].mean(), state.y[N:].mean()]  # pyright: ignore
            target = torch.tensor([-0.3, 0.7, -0.4], dtype=F64)
            distance = (torch.stack(mean) - target).norm().item()
            seen[k] = distance, abs(state.gap)  # pyright: ignore

    x, y = torch.zeros(N, dtype=F64), torch.zeros(2 * N, dtype=F64)
    arguments = (toy_outer, toy_inner, toy_constraint, x, y)
    bilevel.lv_hba(*arguments, steps=600, project=toy_project, settings=settings, on_step=watch)
    assert seen[599][0] < 0.2 and seen[599][0] < seen[100][0], seen
    assert seen[599][1] < 0.8 * seen[100][1], seen


def test_lv_hba_says_that_its_steps_are_too_long() -> None:
    x, y = torch.zeros(N, dtype=F64), torch.zeros(2 * N, dtype=F64)
    arguments = (toy_outer, toy_inner, toy_constraint, x, y)
    settings = bilevel.LVHBA(alpha=100.0, bound=1e300)
    with pytest.raises(FloatingPointError, match="alpha 100"):
        bilevel.lv_hba(
            *arguments,
            steps=400,
            project=toy_project,
            settings=settings,
        )


M = 6
BLOCK_H = torch.randn(M, 2, 2, dtype=F64)
BLOCK_H = BLOCK_H @ BLOCK_H.mT / 2 + torch.eye(2, dtype=F64)
BLOCK_B = torch.randn(M, 2, 2, dtype=F64)
BLOCK_C = torch.randn(M, 2, dtype=F64)


@dataclass(frozen=True)
class Quadratics:
    """M quadratic blocks with noise in the inner gradients."""

    noise: float = 0.0
    count: int = M

    def sample(self, blocks: Tensor, generator: torch.Generator) -> Tensor:
        return self.noise * torch.randn(len(blocks), 2, generator=generator, dtype=F64)

    def outer(self, blocks: Tensor, x: Tensor, y: Tensor, sample: Tensor) -> Tensor:
        return 0.5 * (y - BLOCK_C[blocks]).square().sum(-1) + 0.1 * x.square().sum()

    def inner(self, blocks: Tensor, x: Tensor, y: Tensor, sample: Tensor) -> Tensor:
        square = torch.einsum("bi,bij,bj->b", y, BLOCK_H[blocks], y)
        return (
            0.5 * square - torch.einsum("p,bpd,bd->b", x, BLOCK_B[blocks], y) + (sample * y).sum(-1)
        )

    def value(self, x: Tensor) -> Tensor:
        every = torch.arange(M)
        y = (
            torch.linalg.inv(BLOCK_H) @ torch.einsum("p,bpd->bd", x, BLOCK_B).unsqueeze(-1)
        ).squeeze(-1)
        return self.outer(every, x, y, y).mean()


@functools.cache
def optimum() -> Tensor:
    zero = torch.zeros(2, dtype=F64)
    value = Quadratics().value
    return -torch.linalg.inv(torch.func.hessian(value)(zero)) @ torch.func.grad(value)(zero)


@pytest.mark.parametrize("version", [1, 2])
def test_bsvrb_with_all_blocks_and_no_noise_is_exact(version: int) -> None:
    settings = bilevel.BSVRB(blocks=M, version=version, eta=0.05, tau=0.15, tau_v=0.15, beta=0.3)
    x, y = torch.zeros(2, dtype=F64), torch.zeros(M, 2, dtype=F64)
    end = bilevel.bsvrb(Quadratics(), x, y, steps=300, settings=settings)
    assert (end.x - optimum()).norm() < 1e-2 * optimum().norm()
    assert end.z.norm() < 1e-2


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("blocks", [1, 2])
def test_bsvrb_with_few_blocks_and_noise_comes_near(version: int, blocks: int) -> None:
    """The same settings for both versions and any number of blocks: sixty passes over all."""
    x, y = torch.zeros(2, dtype=F64), torch.zeros(M, 2, dtype=F64)
    # x slower than what it waits for, or it circles.
    settings = bilevel.BSVRB(
        blocks=blocks,
        version=version,
        eta=0.1,
        tau=0.2,
        tau_v=0.2,
        alpha=0.3,
        beta=0.3,
        decay=0.1,
    )
    distances: list[float] = []

    def watch(k: int, state: object) -> None:
        distances.append((state.x - optimum()).norm().item())  # pyright: ignore

    steps = 60 * M // blocks
    problem = Quadratics(noise=0.1)
    bilevel.bsvrb(problem, x, y, steps=steps, settings=settings, on_step=watch)
    late = distances[-steps // 6 :]
    assert sum(late) / len(late) < 0.15 * optimum().norm().item()


def test_bsvrb_says_that_its_steps_are_too_long() -> None:
    x, y = torch.zeros(2, dtype=F64), torch.zeros(M, 2, dtype=F64)
    settings = bilevel.BSVRB(blocks=M, eta=1e6, tau=1e6)
    with pytest.raises(FloatingPointError, match="shorten eta"):
        bilevel.bsvrb(Quadratics(), x, y, steps=200, settings=settings)
