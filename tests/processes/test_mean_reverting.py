"""Mean-reverting diffusion: our solvers on the residual are the MR Sampler's own updates on x."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import ebbflow as ef
from ebbflow.processes import cosine_betas, mean_reverting
from ebbflow.solvers import Solver

SCALE = 0.3
PROCESS = ef.schedules.Betas(cosine_betas(100, 0.005))
TIMES = [1.0, 0.83, 0.61, 0.44, 0.3, 0.12, 0.05]
N = len(TIMES) - 1


def degraded(samples: int = 5) -> Tensor:
    return torch.linspace(-1, 1, 3 * samples, dtype=torch.float64).reshape(samples, 3).sin()


def predict_x0(x: Tensor, mean: Tensor, alpha: Tensor) -> Tensor:
    """Any smooth function of what a network sees: a solver cannot tell it from a trained one."""
    return torch.tanh(x - 0.4 * mean) + 0.3 * mean + 0.2 * alpha * x.roll(1, -1)


def network(prediction: str) -> Callable[..., Tensor]:
    """The same posterior mean in each of the paper's parametrisations, by its own formulas."""

    def net(x: Tensor, t: Tensor, mean: Tensor) -> Tensor:
        a = PROCESS.alpha(t)[:, None]
        s = torch.sqrt(1 - a**2)
        x0 = predict_x0(x, mean, a)
        if prediction == "x0":
            return x0
        if prediction == "v":  # x0 = a x - s v + (1 - a) mean
            return (a * x + (1 - a) * mean - x0) / s
        eps = (x - mean - a * (x0 - mean)) / (SCALE * s)
        return {"noise": eps, "score": -eps / (SCALE * s)}[prediction]

    return net


def run(solver: Solver, prediction: str = "x0") -> Tensor:
    """x at the last node, with the library's solver on the residual."""
    mean = degraded()
    denoiser = mean_reverting(network(prediction), PROCESS, SCALE, prediction)
    y = torch.ones_like(mean).cumsum(0).cos()
    end = ef.sample(denoiser, mean.shape, solver=solver, times=TIMES, x_init=y, seed=5, mean=mean)
    return mean + SCALE * end


Step = Callable[..., Tensor]


def paper(step: Step) -> Tensor:
    """The MR Sampler's loop on x itself: `step` gets (a, a', s, s', h, x, mean, now, slope, z).

    now is (x0, eps); slope the multistep differences of both, zero in the first step.
    """
    mean = degraded()
    t = torch.tensor(TIMES, dtype=torch.float64)
    alpha = PROCESS.alpha(t)
    spread = SCALE * torch.sqrt(1 - alpha**2)
    lambda_ = torch.log(alpha / spread)
    x = mean + SCALE * torch.ones_like(mean).cumsum(0).cos()
    before = None
    for k in range(N):
        a, a_next, s, s_next = alpha[k], alpha[k + 1], spread[k], spread[k + 1]
        h = lambda_[k + 1] - lambda_[k]
        x0 = predict_x0(x, mean, a)
        now = torch.stack([x0, (x - mean - a * (x0 - mean)) / s])
        slope = torch.zeros_like(now)
        if before is not None:
            r = (lambda_[k] - lambda_[k - 1]) / h
            slope = (now - before) / r
        z = ef.noise.normal(5, range(len(x)), k + 1, x.shape[1:], torch.float64)
        x = step(a, a_next, s, s_next, h, x, mean, now, slope, z)
        before = now
    return x


def ode_noise_1(a, a_next, s, s_next, h, x, mean, now, slope, z) -> Tensor:
    return a_next / a * x + (1 - a_next / a) * mean - s_next * torch.expm1(h) * now[1]


def ode_data_1(a, a_next, s, s_next, h, x, mean, now, slope, z) -> Tensor:
    shift = 1 - s_next / s + s_next / s * a - a_next
    return s_next / s * x + mean * shift + a_next * (1 - torch.exp(-h)) * now[0]


def ode_data_2(a, a_next, s, s_next, h, x, mean, now, slope, z) -> Tensor:
    first = ode_data_1(a, a_next, s, s_next, h, x, mean, now, slope, z)
    return first + a_next * (torch.expm1(-h) / h + 1) * slope[0]


def sde_noise_1(a, a_next, s, s_next, h, x, mean, now, slope, z) -> Tensor:
    kept = a_next / a * x + (1 - a_next / a) * mean
    return kept - 2 * s_next * torch.expm1(h) * now[1] + s_next * torch.sqrt(torch.expm1(2 * h)) * z


def sde_data_1(a, a_next, s, s_next, h, x, mean, now, slope, z) -> Tensor:
    gone = 1 - torch.exp(-2 * h)
    shift = 1 - a_next / a * torch.exp(-2 * h) - a_next * gone
    kept = s_next / s * torch.exp(-h) * x + mean * shift
    return kept + a_next * gone * now[0] + s_next * torch.sqrt(gone) * z


def sde_data_2(a, a_next, s, s_next, h, x, mean, now, slope, z) -> Tensor:
    first = sde_data_1(a, a_next, s, s_next, h, x, mean, now, slope, z)
    return first + a_next * (1 - (1 - torch.exp(-2 * h)) / (2 * h)) * slope[0]


SECOND = {"history": 2, "corrected_start": False}
SAME = {
    "ODE-1, noise": (ode_noise_1, ef.solvers.get("ddim")),
    "ODE-1, data": (ode_data_1, ef.solvers.get("ddim")),
    "ODE-2, data": (ode_data_2, ef.solvers.get("dpm-solver++3m", **SECOND)),
    "SDE-1, noise": (sde_noise_1, ef.solvers.get("sde-dpm-solver-1")),
    "SDE-1, data": (sde_data_1, ef.solvers.get("ddpm")),
    "SDE-2, data": (sde_data_2, ef.solvers.get("dpm-solver++3m", tau=1.0, **SECOND)),
}


@pytest.mark.parametrize("prediction", ["x0", "noise", "v", "score"])
@pytest.mark.parametrize("name", SAME)
def test_the_paper_s_update_is_a_solver_of_ours(name: str, prediction: str) -> None:
    update, solver = SAME[name]
    np.testing.assert_allclose(run(solver, prediction), paper(update), rtol=0, atol=1e-10)


def test_another_solver_is_another_update() -> None:
    for one, (update, _) in SAME.items():
        for two, (other, solver) in SAME.items():
            if one != two and solver != SAME[one][1]:
                assert np.abs((run(solver) - paper(update)).numpy()).max() > 1e-6, (one, two, other)


def test_a_wrong_mean_or_scale_is_seen() -> None:
    """The residual of another mean, or at another scale, ends elsewhere."""
    expected = paper(ode_data_1)
    mean = degraded()
    y = torch.ones_like(mean).cumsum(0).cos()
    for moved, scale in ((1e-3, SCALE), (0.0, 1.001 * SCALE)):
        denoiser = mean_reverting(network("x0"), PROCESS, scale, "x0")
        wrong = mean + moved
        end = ef.sample(denoiser, mean.shape, solver="ddim", times=TIMES, x_init=y, mean=wrong)
        assert np.abs((wrong + scale * end - expected).numpy()).max() > 1e-5


def test_a_chunk_takes_its_own_means() -> None:
    mean = degraded()
    denoiser = mean_reverting(network("noise"), PROCESS, SCALE, "noise")
    whole = ef.sample(denoiser, mean.shape, times=[0.9, 0.5, 0.1], x_init=mean, mean=mean)
    parts = ef.sample(denoiser, mean.shape, times=[0.9, 0.5, 0.1], x_init=mean, mean=mean, batch=2)
    torch.testing.assert_close(whole, parts)


def gaussian_network(x: Tensor, t: Tensor, mean: Tensor) -> Tensor:
    """The exact noise prediction of `x_0 given mean ~ N(mean/2 + 1, 0.2²)`, from the SDE's law."""
    a = PROCESS.alpha(t)[:, None]
    s = SCALE * torch.sqrt(1 - a**2)
    centre = mean + a * (0.5 * mean + 1 - mean)
    return s * (x - centre) / (a**2 * 0.2**2 + s**2)


@pytest.mark.parametrize(("solver", "calls"), [("dpm-solver++3m", 20), ("sa-solver", 40)])
def test_restoring_ends_at_the_posterior(solver: str, calls: int) -> None:
    """x_0 given the degraded image, from `mean + scale eps`, in mean and deviation."""
    mean = torch.linspace(-1, 1, 20_000, dtype=torch.float64)[:, None]
    denoiser = mean_reverting(gaussian_network, PROCESS, SCALE)
    x = mean + SCALE * ef.sample(
        denoiser, mean.shape, solver=solver, steps=calls, mean=mean, seed=1
    )
    residual = x - (0.5 * mean + 1)
    # The start forgets alpha(1) = 0.005 of the residual.
    assert residual.mean().abs() < 0.01
    assert (residual.std() / 0.2 - 1).abs() < 0.03


@pytest.mark.parametrize("corrected", [True, False])
def test_the_third_order_lacks_a_factor_two_as_published(corrected: bool) -> None:
    """Order of the data form as published, whose second difference stands for the second derivative
    without its factor 2, and with it; on a smooth prediction along the path."""

    def published(half: float, steps: int) -> float:
        """The third-order update on dx/dlambda with D = sin(lambda) and sigma = 1."""
        nodes = np.linspace(0.0, 1.5, steps + 1)
        h = nodes[1] - nodes[0]

        def D(u: float) -> float:
            return math.sin(u)

        x = 0.0
        p1 = math.expm1(-h)
        p2 = p1 / h + 1
        p3 = p2 / h - 0.5
        for u, v in pairwise(nodes):
            m0, m1, m2 = D(u), D(u - h), D(u - 2 * h)
            d10, d11 = m0 - m1, m1 - m2
            first, second = d10 + 0.5 * (d10 - d11), half * (d10 - d11)
            a = math.exp(v)  # alpha' with sigma = 1
            x += -a * p1 * m0 + a * p2 * first - a * p3 * second
        exact = (math.exp(1.5) * (math.sin(1.5) - math.cos(1.5)) + 1) / 2
        return abs(x - exact)

    half = 1.0 if corrected else 0.5
    slope = math.log2(published(half, 64) / published(half, 256)) / 2
    assert slope == pytest.approx(3 if corrected else 2, abs=0.15)


def test_cosine_betas_end_where_they_should() -> None:
    assert PROCESS.alpha(1.0).item() == pytest.approx(0.005, rel=1e-9)
    rates = -0.5 * np.log1p(-np.array(cosine_betas(100)))
    assert (np.diff(rates) > 0).all() and len(rates) == 100
    # theta_i over theta_j is that of the cosine.
    c = np.cos(np.pi / 2 * (np.arange(103) / 102 + 0.008) / 1.008) ** 2
    expected = 1 - (c / c[0])[2:-1]
    np.testing.assert_allclose(rates / rates[-1], expected / expected[-1], rtol=1e-9)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"scale": 0.0}, "scale must be positive"), ({"prediction": "edm"}, "has .*noise")],
)
def test_wrong_arguments_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mean_reverting(network("x0"), PROCESS, **{"scale": SCALE, **wrong})


def test_a_mean_of_another_shape_is_refused() -> None:
    denoiser = mean_reverting(network("noise"), PROCESS, SCALE)
    with pytest.raises(ValueError, match="one mean a sample"):
        denoiser(torch.zeros(2, 3), 0.5, mean=torch.zeros(3))
