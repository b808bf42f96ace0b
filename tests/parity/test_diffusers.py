"""Endpoints against diffusers at the same noise and the same grid, in float64.

diffusers computes its tables in float32 and rounds states to it. So that formulas are compared and
not roundings, its tables are replaced by exact ones, and its `torch.float32` by `torch.float64`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import ebbflow as ef
from tests.parity import peers
from tests.parity.problem import agree, denoiser, levels, noise, ours, start
from tests.parity.test_formulas import BETAS, CHAIN, INDICES, NODES, TIMES, velocity

try:
    diffusers: Any = peers.diffusers()
except ImportError as error:
    pytest.skip(
        f"compares with diffusers itself ({error}: pip install 'ebbflow[peers]'); "
        "test_formulas.py compares with its formulas",
        allow_module_level=True,
    )


class Wide:
    """torch, with float64 under the name of float32."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def widen(monkeypatch: pytest.MonkeyPatch, scheduler: Any) -> Any:
    """The scheduler with its module computing in float64."""
    monkeypatch.setattr(f"{type(scheduler).__module__}.torch", Wide())
    return scheduler


def chain(monkeypatch: pytest.MonkeyPatch, name: str, **options: Any) -> Any:
    """A scheduler of the discrete chain, on the indices of `NODES`."""
    scheduler = widen(monkeypatch, getattr(diffusers, name)(clip_sample=False, **options))
    scheduler.alphas_cumprod = torch.cumprod(1 - BETAS, 0)
    scheduler.one = torch.ones((), dtype=torch.float64)
    scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    scheduler.set_timesteps(len(INDICES))
    assert tuple(scheduler.timesteps.tolist()) == INDICES
    return scheduler


def eps(x: Tensor, k: int) -> Tensor:
    """The noise prediction at node k of the chain."""
    alpha, sigma = levels(CHAIN, NODES)
    return (x - alpha[k] * denoiser(CHAIN)(x, NODES[k])) / sigma[k]


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim(monkeypatch: pytest.MonkeyPatch, eta: float) -> None:
    scheduler = chain(monkeypatch, "DDIMScheduler", timestep_spacing="trailing")
    x = start(CHAIN, NODES[0])
    for k, t in enumerate(scheduler.timesteps):
        extra = {"variance_noise": noise(k)} if eta else {}
        x = scheduler.step(eps(x, k), t, x, eta=eta, **extra).prev_sample
    agree(ours(ef.solvers.get("ddim", eta=eta), CHAIN, NODES), x)


def test_ddpm_and_its_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = chain(
        monkeypatch, "DDPMScheduler", timestep_spacing="trailing", variance_type="fixed_small"
    )
    draws: Iterator[Tensor] = (noise(k) for k in range(len(INDICES)))
    module = type(scheduler).__module__
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *shape, **rest: next(draws))
    x = start(CHAIN, NODES[0])
    alpha, _ = levels(CHAIN, NODES)
    for k, t in enumerate(scheduler.timesteps):
        variance = scheduler._get_variance(t).item()
        step = ef.solvers.get("ddpm").plan(CHAIN, times=NODES).transition(k)
        # diffusers keeps its variance above 1e-20.
        assert variance == pytest.approx(max(step.deviation**2, 1e-20), rel=1e-9)
        x = scheduler.step(eps(x, k), t, x).prev_sample
    assert alpha[-1] == 1
    agree(ours(ef.solvers.get("ddpm"), CHAIN, NODES), x)


def endpoint(monkeypatch: pytest.MonkeyPatch, name: str, order: int, **options: Any) -> Tensor:
    """The endpoint of a scheduler that keeps sigma/alpha in a table, on VP through `TIMES`."""
    schedule = ef.schedules.VP()
    options = {"prediction_type": "sample", "lower_order_final": False, **options}
    scheduler = widen(monkeypatch, getattr(diffusers, name)(solver_order=order, **options))
    scheduler.set_timesteps(len(TIMES) - 1)
    alpha, sigma = levels(schedule, TIMES)
    scheduler.sigmas = sigma / alpha
    f, x = denoiser(schedule), start(schedule, TIMES[0])
    # The final step of diffusers is of first order where its grid ends at sigma = 0; this one
    # does not.
    scheduler.config.final_sigmas_type = "sigma_min"
    for k, t in enumerate(scheduler.timesteps):
        stochastic = options.get("algorithm_type", "").startswith("sde")
        extra = {"variance_noise": noise(k)} if stochastic else {}
        x = scheduler.step(f(x, TIMES[k]), t, x, **extra).prev_sample
    return x


def multistep(monkeypatch: pytest.MonkeyPatch, algorithm: str, order: int = 2) -> Tensor:
    options = {"solver_type": "midpoint", "final_sigmas_type": "sigma_min"}
    name = "DPMSolverMultistepScheduler"
    return endpoint(monkeypatch, name, order, algorithm_type=algorithm, **options)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_dpm_solver_2m(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = multistep(monkeypatch, "dpmsolver")
    agree(ours(ef.solvers.get("dpm-solver-2m"), ef.schedules.VP(), TIMES), theirs)


@pytest.mark.parametrize(("order", "name"), [(2, "deis-logrhoab1"), (3, "dpm-solver-3m")])
def test_deis_in_log_rho(monkeypatch: pytest.MonkeyPatch, order: int, name: str) -> None:
    theirs = endpoint(monkeypatch, "DEISMultistepScheduler", order)
    agree(ours(ef.solvers.get(name), ef.schedules.VP(), TIMES), theirs)


@pytest.mark.parametrize("form", ["b1", "b2"])
@pytest.mark.parametrize("order", [2, 3])
def test_unipc(monkeypatch: pytest.MonkeyPatch, order: int, form: str) -> None:
    options = {"solver_type": form.replace("b", "bh"), "predict_x0": True}
    theirs = endpoint(monkeypatch, "UniPCMultistepScheduler", order, **options)
    agree(ours(ef.solvers.get(f"unipc-{form}-{order}"), ef.schedules.VP(), TIMES), theirs)


def test_f_pndm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to its last step, which extrapolates to sigma = 0 where ours returns the prediction."""
    scheduler = widen(monkeypatch, diffusers.PNDMScheduler(timestep_spacing="trailing"))
    scheduler.alphas_cumprod = torch.cumprod(1 - BETAS, 0)
    scheduler.set_timesteps(len(INDICES))
    f, x = denoiser(CHAIN), start(CHAIN, NODES[0])
    for index in scheduler.timesteps[:-1].tolist():
        t = (index + 1) / 1000
        (alpha,), (sigma,) = levels(CHAIN, [t])
        x = scheduler.step((x - alpha * f(x, t)) / sigma, index, x).prev_sample
    agree(ours(ef.solvers.get("f-pndm"), CHAIN, NODES[:-1]), x)


def test_dpm_solver_plus_plus_2m(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = multistep(monkeypatch, "dpmsolver++")
    agree(ours(ef.solvers.get("dpm-solver++2m"), ef.schedules.VP(), TIMES), theirs)


def test_sde_dpm_solver_plus_plus_2m(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = multistep(monkeypatch, "sde-dpmsolver++")
    agree(ours(ef.solvers.get("sde-dpm-solver++2m"), ef.schedules.VP(), TIMES), theirs)


def test_flow_match_euler(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule, times = ef.schedules.Linear(), (1.0, *TIMES, 0.0)
    scheduler = widen(monkeypatch, diffusers.FlowMatchEulerDiscreteScheduler())
    scheduler.set_timesteps(len(times) - 1)
    scheduler.sigmas = torch.tensor(times, dtype=torch.float64)
    f, x = denoiser(schedule), start(schedule, 1.0)
    for t, index in zip(times, scheduler.timesteps, strict=False):
        x = scheduler.step(velocity(f, x, t), index, x).prev_sample
    agree(ours(ef.solvers.get("euler"), schedule, times), x)


def test_flow_match_heun(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule, times = ef.schedules.Linear(), (1.0, *TIMES, 0.0)
    scheduler = widen(monkeypatch, diffusers.FlowMatchHeunDiscreteScheduler())
    scheduler.set_timesteps(len(times) - 1)
    nodes = torch.tensor(times, dtype=torch.float64)
    inner = nodes[1:-1].repeat_interleave(2)
    scheduler.sigmas = torch.cat([nodes[:1], inner, nodes[-1:]])
    f, x = denoiser(schedule), start(schedule, 1.0)
    for t, index in zip([times[0], *inner.tolist()], scheduler.timesteps, strict=True):
        x = scheduler.step(velocity(f, x, t), index, x).prev_sample
    agree(ours(ef.solvers.get("heun"), schedule, times), x)
