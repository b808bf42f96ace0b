"""Gradients through sampling: four ways that agree, three of them without recording the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ebbflow as ef
from benchmarks.memory import peak_bytes
from ebbflow.plan import Plan
from tests.laws.cases import LAWS
from tests.laws.test_machine import COSINE, bdia, edict

VP = ef.schedules.VP()
UNRECORDED = ("checkpoint", "reversible")
# From noise to data by one step, several steps, several registers, with noise, in a basis.
SAMPLERS = ("ddim", "dpm-solver++3m", "unipc-b2-3", "edm", "ddpm", "gaussian-residual")
NODES = [0.9, 0.8, 0.65, 0.5, 0.3, 0.15, 0.05]


class Net(nn.Module):
    """Coupled, non-linear and non-autonomous, with a condition."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.w = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        return torch.tanh(x @ self.w + t[:, None] * shift) + 0.1 * x


def pulled(gradient: str, schedule: Any = VP, **arguments: Any) -> list[Tensor]:
    """The samples and the gradients of a function of them to x_init, condition and parameters."""
    net = Net()
    torch.manual_seed(0)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    shift = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    denoiser = ef.Denoiser(net, schedule, "v", statistics=statistics())
    samples = ef.sample(
        denoiser, (2, 3), x_init=x, shift=2 * shift, gradient=gradient, seed=5, **arguments
    )
    loss = (samples * torch.arange(1.0, 7.0).reshape(2, 3)).sin().sum()
    return [samples.detach(), *torch.autograd.grad(loss, [x, shift, net.w])]


def statistics() -> ef.Statistics:
    torch.manual_seed(1)
    return ef.Statistics.from_data(torch.randn(50, 3) * torch.tensor([1.0, 0.5, 0.2]))


def close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gradient", UNRECORDED)
@pytest.mark.parametrize("solver", SAMPLERS)
def test_any_plan_has_the_gradient_of_recording_it(solver: str, gradient: str) -> None:
    arguments: Any = {"solver": solver, "steps": 12}
    close(pulled(gradient, **arguments), pulled("direct", **arguments), 1e-11)


@pytest.mark.parametrize("gradient", UNRECORDED)
@pytest.mark.parametrize("scheme", [bdia, edict])
def test_plans_with_an_inverse_are_undone(
    scheme: Callable[[list[float]], Plan], gradient: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ebbflow.differentiation import gradients

    if gradient == "reversible":  # nothing may be recomputed from snapshots
        monkeypatch.setattr(gradients, "checkpointing", None)
    arguments: Any = {"schedule": COSINE, "plan": scheme(NODES)}
    close(pulled(gradient, **arguments), pulled("direct", **arguments), 1e-10)


def test_an_undoing_that_lost_the_start_raises() -> None:
    """The network answers otherwise on the way back."""
    calls: list[int] = []

    def fickle(x: Tensor, t: Tensor) -> Tensor:
        calls.append(1)
        return torch.tanh(x) * (1 if len(calls) <= 12 else 1.3)

    x = torch.randn(2, 3, requires_grad=True)
    denoiser = ef.Denoiser(fickle, COSINE)
    end = ef.sample(denoiser, (2, 3), plan=edict(NODES), x_init=x, gradient="reversible")
    with pytest.raises(RuntimeError, match="came back"):
        end.sum().backward()


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "reversible", "adjoint"])
def test_gradients_are_those_of_finite_differences_on_an_oracle(gradient: str) -> None:
    law = LAWS["mixture"]
    oracle = ef.oracles.GaussianMixture(
        torch.tensor(law.means), torch.tensor(law.covariances), torch.tensor(law.weights)
    )
    denoiser = oracle.denoiser(VP)
    start = torch.tensor([[0.4, -1.2], [1.1, 0.3]], dtype=torch.float64)
    steps = 400 if gradient == "adjoint" else 20

    def end(x: Tensor, mode: str | None) -> Tensor:
        return ef.sample(
            denoiser, (2, 2), solver="dpm-solver++2m", steps=steps, x_init=x, gradient=mode
        )

    x = start.clone().requires_grad_()
    (found,) = torch.autograd.grad(end(x, gradient).sum(), x)
    h = 1e-5
    for i in range(2):
        shift = torch.zeros(2, 2, dtype=torch.float64)
        shift[:, i] = h
        slope = ((end(start + shift, None) - end(start - shift, None)) / (2 * h)).sum(1)
        tolerance = 2e-3 if gradient == "adjoint" else 1e-6
        torch.testing.assert_close(found[:, i], slope, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("schedule", [VP, COSINE, ef.schedules.Linear()])
def test_the_adjoint_converges_to_the_recorded_gradient(schedule: Any) -> None:
    """At the second order, for a second-order plan between nodes away from sigma = 0."""
    errors = []
    for n in (20, 40, 80):
        times = torch.linspace(0.95, 0.2, n + 1, dtype=torch.float64)
        arguments: Any = {"schedule": schedule, "solver": "dpm-solver++2m", "times": times}
        pairs = zip(pulled("adjoint", **arguments), pulled("direct", **arguments), strict=True)
        errors.append(max(float((a - b).abs().max()) for a, b in pairs))
    assert errors[-1] < 2e-3
    assert errors[0] / errors[-1] > 10


def test_chunks_and_nodes_on_the_way() -> None:
    whole = pulled("checkpoint", solver="ddim", steps=6)
    nodes: list[Any] = []
    parts = pulled("checkpoint", solver="ddim", steps=6, batch=1, on_step=nodes.append)
    close(parts, whole, 1e-12)
    assert len(nodes) == 12
    assert [point.state.requires_grad for point in nodes] == [False] * 5 + [True] + [False] * 5 + [
        True
    ]


def test_memory_does_not_grow_with_the_steps() -> None:
    torch.manual_seed(0)
    weight = (0.1 * torch.randn(40, 40)).requires_grad_()
    denoiser = ef.Denoiser(lambda x, t: torch.tanh(torch.tanh(x @ weight) @ weight), VP)
    x = torch.randn(100, 40, requires_grad=True)

    def peak(gradient: str, n: int) -> float:
        def run() -> None:
            end = ef.sample(
                denoiser, (100, 40), solver="ddim", steps=n, x_init=x, gradient=gradient
            )
            end.square().sum().backward()
            x.grad = weight.grad = None

        run()  # tables that are computed once
        return peak_bytes(run) / (100 * 40 * 4)

    assert peak("adjoint", 200) < peak("adjoint", 20) + 1
    assert peak("reversible", 200) < peak("reversible", 20) + 1
    assert peak("checkpoint", 200) < peak("checkpoint", 20) + 16  # √200 - √20, and noise
    assert peak("direct", 200) > 5 * peak("direct", 20)


def test_what_a_mode_cannot_do_is_refused() -> None:
    denoiser = ef.Denoiser(lambda x, t: x, VP)
    for match, arguments in (
        ("direct", {"gradient": "checkpoint", "solver": "genie"}),
        ("noise", {"gradient": "adjoint", "solver": "ddpm"}),
        ("got 'sum'", {"gradient": "sum"}),
    ):
        call: Any = arguments
        with pytest.raises(ValueError, match=match):
            ef.sample(denoiser, (2, 3), steps=3, **call)
