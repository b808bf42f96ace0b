"""What the laws run on: every solver of the package, four schedules and two laws of data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

import ebbflow as ef
from ebbflow.plan import Plan
from ebbflow.schedules import Schedule
from ebbflow.solvers import Solver
from ebbflow.solvers.stepping import Stepping
from tests.laws import reference
from tests.laws.reference import Mixture

# Anisotropic, off-centre, of different shapes in every direction: nothing cancels by symmetry.
LAWS = {
    "gaussian": Mixture(
        np.array([[0.7, -0.4]]), np.array([[[1.3, 0.5], [0.5, 0.4]]]), np.array([1.0])
    ),
    "mixture": Mixture(
        np.array([[1.0, -0.5], [-1.2, 0.8]]),
        np.array([[[0.3, 0.2], [0.2, 0.4]], [[0.5, -0.3], [-0.3, 0.4]]]),
        np.array([0.6, 0.4]),
    ),
}

SCHEDULES: dict[str, Schedule] = {
    "VP": ef.schedules.VP(),
    "Linear": ef.schedules.Linear(),
    "Cosine": ef.schedules.Cosine(),
    "VE": ef.schedules.VE(),
}

# Methods in time t, which integrate alpha D + sigma eps exactly only where it is straight in t.
IN_TIME = frozenset({"euler", "heun"})
# Discretisations of the reverse SDE keep no constant prediction exact: `test_reverse_sde` has their
# law.
INEXACT = frozenset({"euler-maruyama", "reverse-diffusion", "sde-dpm-solver-1"})

# Exact for a Gaussian instead of for a constant prediction.
GAUSSIAN = frozenset({"gaussian-residual", "unit-residual"})

# Methods that look at t beside the network: they depend on what a schedule calls t.
SEES_TIME = IN_TIME | {"deis-tab1", "deis-tab2", "deis-tab3", "f-pndm"}
SEES_TIME |= {"euler-maruyama", "reverse-diffusion"}

# Enrolment: every name the package lists, so a solver cannot be added without passing.
EVERY = MappingProxyType({name: ef.solvers.get(name) for name in ef.solvers.list()})
# Those that write plans have tables to look at; the others are held to test_walks.py and
# test_adaptive.py.
SOLVERS = MappingProxyType({n: s for n, s in EVERY.items() if not isinstance(s, Stepping)})
WALKS = MappingProxyType(
    {n: s for n, s in EVERY.items() if isinstance(s, Stepping) and not s.adaptive}
)
ADAPTIVE = MappingProxyType({n: s for n, s in EVERY.items() if s.adaptive})
DETERMINISTIC = tuple(n for n, s in SOLVERS.items() if not s.stochastic and not s.adaptive)
STOCHASTIC = tuple(n for n, s in SOLVERS.items() if s.stochastic and not s.adaptive)

# Those that can do without statistics; the others write plans in a basis, whose rows hold along its
# axes: test_basis_plans.py and test_gaussian_residual.py look at them.
PLAIN = tuple(n for n, s in SOLVERS.items() if "statistics" not in s.needs)

Maker = Callable[[Schedule, Sequence[float]], Plan]
"""`make(schedule, nodes) -> plan`: a solver, or a wrong one."""


def statistics(law: str = "gaussian") -> ef.Statistics:
    """Of a law, in its own directions but with another mean and other variances, so that no solver
    is exact by knowing the law; solvers that do not need them ignore them."""
    known = exact_statistics(law)
    shift = torch.tensor([0.3, -0.2], dtype=torch.float64)
    factors = torch.tensor([1.6, 0.7], dtype=torch.float64)
    return ef.Statistics(known.mean + shift, known.variance * factors, known.basis)


def exact_statistics(law: str = "gaussian") -> ef.Statistics:
    known = oracle(law)
    return ef.Statistics.exact(known.mean, known.covariance)


def some_statistics(size: int) -> ef.Statistics:
    """Of no law in particular, along the axes of (size,)."""
    mean = torch.linspace(-0.3, 0.4, size, dtype=torch.float64)
    return ef.Statistics(mean, mean + 0.8, torch.eye(size, dtype=torch.float64))


def maker(solver: Solver) -> Maker:
    known = statistics()
    return lambda schedule, nodes: solver.plan(schedule, times=nodes, statistics=known)


def oracle(law: str) -> ef.oracles.GaussianMixture:
    known = LAWS[law]
    parts = (known.means, known.covariances, known.weights)
    return ef.oracles.GaussianMixture(*(torch.tensor(part) for part in parts))


def posterior_means(schedule: str) -> Callable[[np.ndarray, float], np.ndarray]:
    """`f(x, t)` of every law at once, each on its share of the batch (…, B, d) in turn: by the
    reference's own formulas, which owe the package nothing."""
    levels = functools.cache(reference.LEVELS[schedule])

    def f(x: np.ndarray, t: float) -> np.ndarray:
        now, shares = levels(t), np.split(x, len(LAWS), axis=-2)
        means = [
            law.posterior_mean(share.reshape(-1, 2), now.alpha, now.sigma).reshape(share.shape)
            for law, share in zip(LAWS.values(), shares, strict=True)
        ]
        return np.concatenate(means, axis=-2)

    return f


def denoisers(schedule: str) -> ef.Denoiser:
    """`posterior_means` as a denoiser."""
    f = posterior_means(schedule)
    return ef.Denoiser(
        lambda x, t: torch.from_numpy(f(x.numpy(), t[0].item())), SCHEDULES[schedule]
    )


def denoiser(law: str, schedule: str) -> ef.Denoiser:
    """The posterior mean of one law, by the reference's formulas."""
    known, levels = LAWS[law], reference.LEVELS[schedule]

    def posterior_mean(x: Tensor, t: Tensor) -> Tensor:
        now = levels(t[0].item())
        return torch.from_numpy(known.posterior_mean(x.numpy(), now.alpha, now.sigma))

    return ef.Denoiser(posterior_mean, SCHEDULES[schedule])


@functools.cache
def starts(schedule: str) -> np.ndarray:
    """`start` of every law, one after the other."""
    return np.concatenate([start(law, schedule) for law in LAWS])


@functools.cache
def exact_ends(schedule: str) -> np.ndarray:
    """Where the probability-flow ODEs carry `starts` at t = 0.05."""
    return np.concatenate([exact_end(law, schedule) for law in LAWS])


def interior(steps: int) -> list[float]:
    """Uniform nodes from 0.95 to 0.05."""
    return np.linspace(0.95, 0.05, steps + 1).tolist()


def uneven(steps: int, seed: int = 0) -> list[float]:
    """Decreasing nodes with no regularity, from 0.95 to 0.05."""
    gaps = np.random.default_rng(seed).uniform(0.5, 1.5, steps)
    return [0.95, *(0.95 - 0.9 * np.cumsum(gaps) / gaps.sum())[:-1].tolist(), 0.05]


@functools.cache
def start(law: str, schedule: str, samples: int = 4) -> np.ndarray:
    """States (samples, d) of the process at t = 0.95."""
    levels = reference.LEVELS[schedule](0.95)
    x0 = LAWS[law].draw(samples, seed=3)
    noise = np.random.default_rng(4).standard_normal(x0.shape)
    return levels.alpha * x0 + levels.sigma * noise


@functools.cache
def exact_end(law: str, schedule: str) -> np.ndarray:
    """Where the probability-flow ODE carries `start` at t = 0.05."""
    return reference.flow(LAWS[law], schedule, start(law, schedule), 0.95, 0.05)


def tensor(values: np.ndarray) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
