"""NaN and infinity in a prediction stop a run with the step, the time and the share."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ebbflow as ef
from ebbflow import NonFinite
from ebbflow.plan import Plan
from tests.laws.cases import SOLVERS, some_statistics

VP = ef.schedules.VP()


class Breaks:
    """Halves its input, but at call `when` some elements of the answer are `value`."""

    def __init__(self, when: int, value: float, elements: int = 3) -> None:
        self.when, self.value, self.elements, self.calls = when, value, elements, 0
        self.at: list[float] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        out = 0.5 * x
        self.at.append(t[0].item())
        # The run is replayed once to find where it broke: calls count from each start.
        if (len(self.at) - 1) % self.nfe == self.when:
            out.view(-1)[: self.elements] = self.value
        return out

    nfe = 1


def run(plan: Plan, net: Breaks, prediction: str = "x0", **more: Any) -> Tensor:
    net.nfe = plan.nfe
    return plan.run(ef.Denoiser(net, VP, prediction), torch.randn(4, 5), **more)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", SOLVERS)
def test_every_call_of_every_solver_is_watched(name: str, value: float) -> None:
    plan = ef.solvers.get(name).plan(VP, 5, statistics=some_statistics(5))
    for k in range(plan.nfe):
        with pytest.raises(NonFinite) as caught:
            run(plan, Breaks(k, value))
        message = str(caught.value)
        where = f"the prediction at step {k + 1} of {plan.nfe}, t = {plan.stages[k].time:g},"
        assert message.startswith(where)
        assert "15.0%" in message and "float32" in message and "bfloat16" in message


@given(k=st.integers(0, 9), elements=st.integers(1, 20), seed=st.integers(0, 99))
def test_the_share_is_counted(k: int, elements: int, seed: int) -> None:
    plan = ef.solvers.get("sde-dpm-solver++2m").plan(VP, 10)
    with pytest.raises(NonFinite, match=rf"step {k + 1} of 10.* {100 * elements / 20:.1f}% of"):
        run(plan, Breaks(k, math.nan, elements), seed=seed)


def test_infinities_that_cancel_are_seen() -> None:
    def net(x: Tensor, t: Tensor) -> Tensor:
        out = x.clone()
        out[0, 0], out[0, 1] = math.inf, -math.inf
        return out

    with pytest.raises(NonFinite, match=re.escape("10.0%")):
        ef.sample(ef.Denoiser(net, VP), (4, 5), steps=3)


def test_a_start_that_is_not_finite_is_named() -> None:
    x = torch.randn(4, 5)
    x[0, 0] = math.nan
    with pytest.raises(NonFinite, match=r"x_init, the state at t = 1, is not finite in 5\.0%"):
        ef.sample(ef.Denoiser(lambda x, t: 0.5 * x, VP), (4, 5), steps=3, x_init=x)


def test_overflow_of_half_precision_says_so() -> None:
    class Half(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(60000.0, dtype=torch.float16))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x * self.scale * 10

    with pytest.raises(NonFinite, match=r"float16 networks overflow, try bfloat16 or float32"):
        ef.sample(ef.Denoiser(Half(), VP), (4, 5), steps=3)


def test_large_but_finite_numbers_pass() -> None:
    """A sum may overflow where no element does: that is no fault."""
    x = torch.full((4, 5), 3e38)
    plan = ef.solvers.get("ddim").plan(VP, times=[0.5, 0.4999])
    out = plan.run(ef.Denoiser(lambda x, t: 0.5 * x, VP), x)
    assert bool(torch.isfinite(out).all())


@pytest.mark.parametrize("batch", [None, 3])
def test_sampling_in_chunks_is_watched_too(batch: int | None) -> None:
    def net(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(t[:, None] < 0.3, math.nan * x, 0.5 * x)

    for prediction in ("x0", "noise", "v"):
        with pytest.raises(NonFinite, match=r"t = 0\.[0-2]"):
            ef.sample(ef.Denoiser(net, VP, prediction), (7, 5), steps=9, batch=batch)
        with pytest.raises(NonFinite, match=r"t = 0\.[0-2]"):
            list(ef.trajectory(ef.Denoiser(net, VP, prediction), (7, 5), steps=9, batch=batch))


def test_the_call_that_removes_the_last_noise_is_watched() -> None:
    """`denoise=True` calls once more, at the last node."""

    def net(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(t[:, None] == 0, math.nan * x, 0.5 * x)

    denoiser = ef.Denoiser(net, ef.schedules.VE())
    assert bool(torch.isfinite(ef.sample(denoiser, (2, 3), steps=3)).all())
    with pytest.raises(NonFinite, match="t = 0"):
        ef.sample(denoiser, (2, 3), steps=3, denoise=True)


def test_a_long_run_is_looked_at_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every few seconds, so that a night's work does not end in NaN."""
    clock = iter(range(0, 10**6, 2))
    monkeypatch.setattr("ebbflow.plan.time.monotonic", lambda: float(next(clock)))
    plan, calls = ef.solvers.get("ddim").plan(VP, 100), []

    def net(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t[0].item())
        return math.nan * x if calls[-1] < plan.stages[2].time + 1e-6 else 0.5 * x

    with pytest.raises(NonFinite, match="step 3 of 100"):
        plan.run(ef.Denoiser(net, VP), torch.randn(4, 5))
    assert len(calls) < 20
