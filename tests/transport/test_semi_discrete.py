"""Semi-discrete transport against closed forms and against linear assignment."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog
from torch import Tensor

from ebbflow.transport import (
    NotConverged,
    SemiDiscrete,
    monotone,
    semi_discrete,
    standard_normal,
)

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def uniform(d: int):
    return lambda n, generator: torch.rand(n, d, dtype=torch.float64, generator=generator)


def points(n: int, d: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, dtype=torch.float64, generator=generator) * 2 + 3


def draws(n: int, d: int, seed: int = 7) -> Tensor:
    return standard_normal(d)(n, torch.Generator().manual_seed(seed))


# One dimension, in closed form.


def check_quantiles(found: SemiDiscrete) -> None:
    """Cells are the quantile intervals, and u_h is continuous where they meet."""
    order = found.targets[:, 0].argsort()
    borders = torch.special.ndtri(found.weights[order].cumsum(0)[:-1])
    for i, b in enumerate(borders):
        low, high = order[i], order[i + 1]
        assert found.index((b - 1e-9).reshape(1, 1)).item() == low
        assert found.index((b + 1e-9).reshape(1, 1)).item() == high
        planes = found.targets[:, 0] * b + found.heights
        torch.testing.assert_close(planes[low], planes[high], **TIGHT)
        torch.testing.assert_close(planes[low], planes.max(), **TIGHT)


WEIGHTS = torch.tensor([0.3, 0.05, 0.2, 0.1, 0.15, 0.2], dtype=torch.float64)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "weighted"])
def test_one_dimension_is_the_monotone_map(weights: Tensor | None) -> None:
    check_quantiles(monotone(points(6, 1)[:, 0], torch.special.ndtri, weights))


@pytest.mark.parametrize("shift", [1e-3, -1e-3])
def test_a_height_off_by_a_thousandth_is_seen(shift: float) -> None:
    right = monotone(points(6, 1)[:, 0], torch.special.ndtri)
    for i in range(6):
        wrong = right.heights.clone()
        wrong[i] += shift
        with pytest.raises(AssertionError):
            check_quantiles(replace(right, heights=wrong))


def test_uniform_source_in_one_dimension_by_the_paper_s_formula() -> None:
    """U(0, 1), equal masses: `h_{i+1} - h_i = -(y_{i+1} - y_i) i/n` for sorted targets."""
    y = points(9, 1)[:, 0].sort().values
    found = monotone(y, lambda p: p)
    expected = -y.diff() * torch.arange(1, 10)[:-1] / 9
    torch.testing.assert_close(found.heights.diff(), expected, **TIGHT)


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "weighted"])
def test_the_solver_finds_the_monotone_map(weights: Tensor | None) -> None:
    """The masses' errors bound where a border lies: |dF| at most sqrt(sum nu) tolerance."""
    tolerance = 0.02
    y = points(6, 1)
    found = semi_discrete(y, weights=weights, tolerance=tolerance)
    exact = monotone(y[:, 0], torch.special.ndtri, weights)
    assert found.converged and found.error <= tolerance
    order = y[:, 0].argsort()
    h, z = found.heights[order], y[order, 0]
    borders = -h.diff() / z.diff()
    reached = torch.special.ndtr(borders)
    wanted = exact.weights[order].cumsum(0)[:-1]
    assert (reached - wanted).abs().max() < tolerance / 2
    assert (found.heights - exact.heights).abs().max() < 0.1


# Two dimensions.


def product() -> tuple[SemiDiscrete, Tensor, Tensor]:
    """Targets on a 4 x 3 grid: a product source splits into two maps of one dimension."""
    a, b = points(4, 1, 1)[:, 0], points(3, 1, 2)[:, 0]
    p = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    one, two = (monotone(z, torch.special.ndtri, w) for z, w in ((a, p), (b, q)))
    targets = torch.cartesian_prod(a, b)
    heights = (one.heights[:, None] + two.heights).flatten()
    weights = (p[:, None] * q).flatten()
    return SemiDiscrete(targets, weights, heights - heights.mean(), 0.0), p, q


def test_a_grid_of_targets_in_closed_form() -> None:
    exact, _, _ = product()
    masses, errors = exact.cells(standard_normal(2), 100_000)
    assert ((masses - exact.weights).abs() < 4 * errors).all()
    found = semi_discrete(exact.targets, weights=exact.weights, tolerance=0.02)
    assert found.converged
    assert (found.heights - exact.heights).abs().max() < 0.1
    x = draws(20_000, 2)
    assert (found.index(x) != exact.index(x)).double().mean() < 0.02
    # The dual value is least at the exact heights: E(h) >= E(h*).
    dual = [(m.potential(x).mean() - (m.weights * m.heights).sum()).item() for m in (found, exact)]
    assert abs(dual[0] - dual[1]) < 1e-3


def test_cells_of_a_regular_polygon_are_equal_sectors() -> None:
    angle = 2 * math.pi * torch.arange(7, dtype=torch.float64) / 7
    y = torch.stack([angle.cos(), angle.sin()], 1)
    found = semi_discrete(y, tolerance=0.02)
    assert found.heights.abs().max() < 0.02
    flat = replace(found, heights=torch.zeros(7, dtype=torch.float64))
    x = draws(1000, 2)
    turns = torch.atan2(x[:, 1], x[:, 0]) * 7 / (2 * math.pi)
    assert torch.equal(flat.index(x), turns.round().long() % 7)


def assignment(x: Tensor, y: Tensor) -> float:
    """Greatest mean <x, y> over maps of the rows of x onto those of y, as many to each."""
    gain = (x @ y.repeat_interleave(len(x) // len(y), 0).T).numpy()
    return gain[linear_sum_assignment(gain, maximize=True)].mean().item()


def test_the_dual_value_is_that_of_linear_assignment() -> None:
    """On a finite source the dual bounds every assignment; at the solution the two meet, up to what
    the finite source differs from its law."""
    y = points(12, 2, 3)
    found = semi_discrete(y, tolerance=0.02)
    x = draws(1200, 2)
    best = assignment(x, y)
    dual = (found.potential(x).mean() - found.heights.mean()).item()
    spread = (x - x.mean(0)).norm(dim=1).mean().item() * y.std().item()
    assert -1e-9 < dual - best < 0.002 * spread
    # Heights that are wrong by a fifth of what they are leave a gap.
    wrong = replace(found, heights=0.8 * found.heights)
    gap = (wrong.potential(x).mean() - wrong.heights.mean()).item() - best
    assert gap > 10 * (dual - best)
    # The nearest target alone, without heights, costs more still.
    nearest = torch.cdist(x, y).argmin(1)
    assert torch.bincount(nearest, minlength=12).max() > 3 * 100


def test_heights_are_the_prices_of_the_linear_programme() -> None:
    """The dual variables of the transport polytope between 600 draws and 6 targets."""
    y, x = points(6, 2, 4), draws(600, 2)
    n, k = len(x), len(y)
    rows = np.kron(np.eye(n), np.ones(k))
    columns = np.kron(np.ones(n), np.eye(k))
    solved = linprog(
        -(x @ y.T).numpy().ravel(),
        A_eq=np.vstack([rows, columns]),
        b_eq=np.concatenate([np.full(n, 1 / n), np.full(k, 1 / k)]),
        method="highs",
    )
    prices = torch.from_numpy(solved.eqlin.marginals[n:].copy())
    prices = prices - prices.mean()
    # Solved on the same 600 draws, drawn again and again.
    found = semi_discrete(
        y,
        lambda m, generator: x[torch.randint(n, (m,), generator=generator)],
        tolerance=0.05,
    )
    assert (found.heights - prices).abs().max() < 0.1
    assert (found.heights + prices).abs().max() > 1


def test_masses_are_right_within_monte_carlo_error() -> None:
    y = points(40, 2, 5)
    found = semi_discrete(y, tolerance=0.05)
    masses, errors = found.cells(standard_normal(2), 40_000, seed=99)
    assert masses.sum() == pytest.approx(1)
    torch.testing.assert_close(errors, (masses * (1 - masses) / 40_000).sqrt())
    relative = (masses * 40 - 1).square().mean().sqrt()
    assert relative < 0.05 + (40 / 40_000) ** 0.5
    # A source that is not the one of the solution has other masses: the law must match.
    other = found.cells(uniform(2), 40_000).masses
    assert (other * 40 - 1).square().mean().sqrt() > 1


def test_the_error_that_is_stated_bounds_the_error() -> None:
    """Of maps whose masses are known: heights moved in one dimension."""
    from ebbflow.transport.semi_discrete import _error

    exact = monotone(points(10, 1, 6)[:, 0], torch.special.ndtri)
    order = exact.targets[:, 0].argsort()
    generator = torch.Generator().manual_seed(0)
    covered, over = 0, []
    for trial in range(120):
        noise = 0.03 * torch.randn(10, dtype=torch.float64, generator=generator)
        moved = replace(exact, heights=exact.heights + noise)
        borders = -moved.heights[order].diff() / moved.targets[order, 0].diff()
        if not all(a < b for a, b in pairwise(borders.tolist())):
            continue
        edges = torch.cat([torch.zeros(1), torch.special.ndtr(borders), torch.ones(1)])
        true = ((edges.diff() - 0.1).square() / 0.1).sum().sqrt().item()
        bound, _ = _error(moved, standard_normal(1), 4000, torch.Generator().manual_seed(trial))
        covered += bound >= true
        over.append(bound - true)
    assert covered >= 0.9 * len(over) and len(over) > 30
    assert np.median(over) < (10 / 4000) ** 0.5


# The map and its geometry.


def test_the_map_is_the_argmax_and_the_gradient_of_a_convex_function() -> None:
    found = semi_discrete(points(9, 3), tolerance=0.1)
    x = draws(50, 3)
    planes = x @ found.targets.T + found.heights
    assert torch.equal(found.index(x), planes.argmax(1))
    assert torch.equal(found(x), found.targets[planes.argmax(1)])
    assert found(x.float()).dtype == torch.float32
    point = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(found.potential(point).sum(), point)
    assert torch.equal(slope, found(x))
    # Cyclically monotone: no exchange of two targets brings them nearer.
    i, j = x[:25], x[25:]
    assert (((i - j) * (found(i) - found(j))).sum(1) >= 0).all()


def test_rows_in_parts_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    found, x = semi_discrete(points(9, 3), tolerance=0.1), draws(50, 3)
    whole = found.highest(x, 3)
    monkeypatch.setattr(sys.modules["ebbflow.transport.semi_discrete"], "ELEMENTS", 20)
    for a, b in zip(found.highest(x, 3), whole, strict=True):
        torch.testing.assert_close(a, b)
    assert (whole[0].diff(dim=1) <= 0).all()


def test_angles_by_hand() -> None:
    """Two planes of slopes a and b in one dimension bend by |atan a - atan b|."""
    y = torch.tensor([[0.2], [1.5], [-4.0]], dtype=torch.float64)
    found = monotone(y[:, 0], torch.special.ndtri)
    x = torch.tensor([[-3.0], [-0.3], [0.2], [3.0]], dtype=torch.float64)
    first, second = (y[i, 0] for i in found.highest(x, 2)[1].T)
    torch.testing.assert_close(found.angles(x), (first.atan() - second.atan()).abs(), **TIGHT)
    assert len(set(found.angles(x).tolist())) == 2
    assert monotone(y[:1, 0], torch.special.ndtri).angles(x).tolist() == [0.0] * 4


# What is refused, and what is reported.


def test_what_has_not_converged_is_not_accepted(caplog: pytest.LogCaptureFixture) -> None:
    y = points(30, 2)
    with pytest.raises(
        NotConverged, match=r"not converged: the cells' masses are .* off"
    ) as caught:
        semi_discrete(y, tolerance=0.02, max_samples=5000)
    assert not caught.value.result.converged and caught.value.result.error > 0.02
    with caplog.at_level("WARNING", "ebbflow"):
        found = semi_discrete(y, tolerance=0.02, max_samples=5000, strict=False)
    assert not found.converged and "not converged" in caplog.text
    assert found.samples >= 5000


def test_the_same_seed_is_the_same_map() -> None:
    y = points(10, 2)
    first, again = (semi_discrete(y, tolerance=0.1, seed=3) for _ in range(2))
    assert torch.equal(first.heights, again.heights)
    assert not torch.equal(first.heights, semi_discrete(y, tolerance=0.1, seed=4).heights)


def test_a_shift_of_the_targets_shifts_the_map() -> None:
    """<x, c> is common to all planes: the cells stay."""
    y, c = points(10, 2), torch.tensor([100.0, -40.0], dtype=torch.float64)
    first, moved = (semi_discrete(z, tolerance=0.1) for z in (y, y + c))
    x = draws(500, 2)
    torch.testing.assert_close(moved(x), first(x) + c)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(3)}, "give floats"),
        ({"targets": torch.zeros(3, 2)}, "are equal"),
        ({"targets": torch.tensor([[math.nan], [0.0]])}, "NaN"),
        ({"weights": torch.ones(4)}, "sum"),
        ({"weights": torch.tensor([0.5, 0.5, 0.5, -0.5])}, "positive"),
        ({"tolerance": 0.0}, "tolerance 0"),
        ({"source": standard_normal(3)}, "the source draws shape"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str) -> None:
    given = {"targets": points(4, 2), **change}
    with pytest.raises(ValueError, match=message):
        semi_discrete(given.pop("targets"), **given)


def test_one_target_takes_all() -> None:
    found = semi_discrete(points(1, 2))
    assert found.converged and torch.equal(found(draws(3, 2)), points(1, 2).expand(3, 2))
