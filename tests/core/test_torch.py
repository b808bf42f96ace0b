"""What torch can do with a run: other precisions, gradients, transforms, compilation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import ebbflow as ef
from ebbflow.networks import MLP
from tests.laws.cases import SOLVERS, some_statistics
from tests.laws.test_same_sample import randomised

VP = ef.schedules.VP()
NODES = [0.9, 0.6, 0.4, 0.2]


def curved(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(1.3 * x) * (1 + t[:, None])


def start(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)


# The network's dtype, the start's, the state's.
TYPES = [
    (torch.float32, torch.float32, torch.float32),
    (torch.float32, torch.float64, torch.float64),
    (torch.float64, torch.float32, torch.float32),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float16, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float32, torch.float16, torch.float32),
    (torch.bfloat16, torch.float64, torch.float64),
]


class Recorder(nn.Module):
    """A network that notes what it is given."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4).to(dtype)
        self.seen: set[tuple[torch.dtype, torch.dtype, torch.Size]] = set()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.add((x.dtype, t.dtype, t.shape))
        return torch.tanh(self.linear(x))


@pytest.mark.parametrize(("own", "given", "state"), TYPES, ids=str)
def test_everyone_keeps_a_precision_of_their_own(
    own: torch.dtype, given: torch.dtype, state: torch.dtype
) -> None:
    net = Recorder(own)
    denoiser = ef.Denoiser(net, VP, "v")
    for name in ("dpm-solver++2m", "ddpm", "edm"):
        points = list(
            ef.trajectory(denoiser, (3, 4), solver=name, times=NODES, x_init=start(given))
        )
        assert {point.state.dtype for point in points} == {state}
        assert {point.prediction.dtype for point in points} == {state}
    clock = torch.promote_types(own, torch.float32)
    assert net.seen == {(own, clock, torch.Size([3]))}


def test_the_default_dtype_is_the_states() -> None:
    denoiser = ef.Denoiser(curved, VP)
    assert ef.sample(denoiser, (3, 4), steps=2).dtype == torch.float32
    try:
        for default, state in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
            torch.set_default_dtype(default)
            assert ef.sample(denoiser, (3, 4), steps=2).dtype == state
    finally:
        torch.set_default_dtype(torch.float32)


def test_single_precision_is_double_rounded() -> None:
    for name in SOLVERS:
        plan = ef.solvers.get(name).plan(VP, times=NODES, statistics=some_statistics(4))
        denoiser = ef.Denoiser(curved, VP)
        single = plan.run(denoiser, start().float())
        double = plan.run(denoiser, start().float().double())
        torch.testing.assert_close(single.double(), double, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", SOLVERS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    plan = ef.solvers.get(name).plan(VP, times=NODES, statistics=some_statistics(4))
    weight = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

    def end(x: Tensor, weight: Tensor) -> Tensor:
        return plan.run(ef.Denoiser(lambda x, t: torch.tanh(weight * x), VP, "noise"), x, seed=1)

    torch.autograd.gradcheck(end, (start().requires_grad_(True), weight))


@pytest.mark.parametrize("name", ["ddim", "dpm-solver++3m", "edm", "ddpm", "edm-churn"])
def test_transforms_of_torch_func_agree(name: str) -> None:
    plan = ef.solvers.get(name).plan(VP, times=NODES, statistics=some_statistics(4))
    denoiser = ef.Denoiser(curved, VP, "v")
    x, direction = start(), torch.ones(3, 4, dtype=torch.float64)

    def end(x: Tensor) -> Tensor:
        return plan.run(denoiser, x, seed=1)

    jacobian = torch.autograd.functional.jacobian(end, x)
    expected = torch.einsum("abij,ij->ab", jacobian, direction)  # pyright: ignore
    value, tangent = torch.func.jvp(end, (x,), (direction,))
    torch.testing.assert_close(value, end(x))
    torch.testing.assert_close(tangent, expected)
    torch.testing.assert_close(torch.func.jacrev(end)(x), jacobian)
    torch.testing.assert_close(torch.func.jacfwd(end)(x), jacobian)
    gradient = torch.func.grad(lambda x: end(x).square().sum())(x)
    by_hand = torch.einsum("abij,ab->ij", jacobian, 2 * end(x))  # pyright: ignore
    torch.testing.assert_close(gradient, by_hand)
    with forward_ad.dual_level():
        dual = end(forward_ad.make_dual(x, direction))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)
    many = torch.stack([x, x + 0.1, 2 * x])
    mapped = torch.func.vmap(end)(many)
    torch.testing.assert_close(mapped, torch.stack([end(one) for one in many]))


def test_the_denoiser_passes_transforms_in_time_too() -> None:
    """d/dt of the velocity, as consistency and flow-map losses need it."""
    for schedule in (VP, ef.schedules.Cosine(), ef.schedules.Betas([0.02] * 50)):
        denoiser = ef.Denoiser(curved, schedule, "v", time="log_snr")
        x, t = start(), torch.full((3,), 0.43, dtype=torch.float64)

        def ask(t: Tensor, d: ef.Denoiser = denoiser, x: Tensor = x) -> Tensor:
            return d.noise(x, t)

        slope = torch.func.jvp(ask, (t,), (torch.ones_like(t),))[1]
        h = 1e-6
        torch.testing.assert_close(slope, (ask(t + h) - ask(t - h)) / (2 * h), rtol=1e-6, atol=1e-6)
        leaf = t.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(ask(leaf).sum(), leaf)
        torch.testing.assert_close(gradient, slope.sum(1))
        each = torch.func.vmap(lambda x, t, d=denoiser: d(x[None], t)[0])(x, t)
        torch.testing.assert_close(each, denoiser(x, t))
        rate = torch.func.grad(lambda t, d=denoiser, x=x: d(x[:1], t).sum())
        alone = torch.stack([rate(one) for one in t])
        torch.testing.assert_close(torch.func.vmap(rate)(t), alone)
        round_trip = torch.func.vmap(lambda t, s=schedule: s.time(s.log_snr(t)))(t)
        torch.testing.assert_close(round_trip, t)


def test_gradients_are_asked_for_by_name() -> None:
    net = MLP(4, width=8, blocks=1)
    denoiser = ef.Denoiser(randomised(net), VP)
    assert not ef.sample(denoiser, (3, 4), steps=2).requires_grad
    sample = ef.sample(denoiser, (3, 4), steps=2, gradient="direct")
    sample.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in net.parameters())


@pytest.mark.parametrize("call", [ef.sample, ef.trajectory])
def test_inputs_that_want_gradients_are_not_detached_silently(call: Any) -> None:
    denoiser = ef.Denoiser(lambda x, t, weight: weight * x, VP)
    wanting = torch.ones(3, 1, requires_grad=True)
    plain = torch.ones(3, 1)
    x = torch.zeros(3, 4, requires_grad=True)
    for arguments, name in (
        ({"weight": wanting}, "weight"),
        ({"weight": plain, "x_init": x}, "x_init"),
    ):
        with pytest.raises(ValueError, match=f"{name} requires a gradient.*gradient='direct'"):
            call(denoiser, (3, 4), steps=2, **arguments)
    out = ef.sample(denoiser, (3, 4), steps=2, batch=2, x_init=x, weight=wanting, gradient="direct")
    out.sum().backward()
    assert x.grad is not None and wanting.grad is not None


def test_a_trajectory_leaves_the_callers_gradient_mode_alone() -> None:
    inside: list[bool] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        inside.append(torch.is_grad_enabled())
        return 0.5 * x

    for _ in ef.trajectory(ef.Denoiser(net, VP), (3, 4), steps=3):
        assert torch.is_grad_enabled()
    assert inside == [False] * 3
    points = ef.trajectory(ef.Denoiser(net, VP), (3, 4), steps=3)
    next(points)
    points.close()  # pyright: ignore
    assert torch.is_grad_enabled()
    with torch.no_grad():
        for _ in ef.trajectory(ef.Denoiser(net, VP), (3, 4), steps=3):
            assert not torch.is_grad_enabled()
    with pytest.raises(RuntimeError, match="stop"):
        ef.sample(ef.Denoiser(_stop, VP), (3, 4))
    assert torch.is_grad_enabled()


def _stop(x: Tensor, t: Tensor) -> Tensor:
    raise RuntimeError("stop")


def test_inference_mode_and_plain_calls_mix() -> None:
    """What one mode caches, the other can use."""
    denoiser = ef.Denoiser(curved, VP, "edm", sigma_data=0.5)
    plan = ef.solvers.get("ddpm").plan(VP, times=[0.91, 0.62, 0.43])
    with torch.inference_mode():
        first = plan.run(denoiser, start())
    x = start().requires_grad_(True)
    second = plan.run(denoiser, x)
    second.sum().backward()
    assert torch.equal(first, second.detach()) and x.grad is not None


def test_a_compiled_network_is_compiled_once() -> None:
    """Times and steps are tensors to it: no number that changes reaches its graph."""
    compiled = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal compiled
        compiled += 1
        return graph.forward

    torch._dynamo.reset()
    net = randomised(MLP(4, width=8, blocks=1))
    fast = torch.compile(copy.deepcopy(net), backend=backend, fullgraph=True)
    for name, steps in (("ddim", 7), ("dpm-solver++3m", 5), ("edm-churn", 4), ("ddpm", 9)):
        one, two = (
            ef.sample(
                ef.Denoiser(n, VP, "edm", time="quarter_log_sigma", sigma_data=0.5),
                (3, 4),
                solver=name,
                steps=steps,
            )
            for n in (fast, net)
        )
        torch.testing.assert_close(one, two)
    assert compiled == 1
    torch._dynamo.reset()


def test_runs_leave_what_they_are_given_alone() -> None:
    """The executor adds in place only to tensors of its own: not to the start, the conditions or
    what the network keeps."""
    kept: list[Tensor] = []

    def net(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        kept.append(torch.tanh(x + shift))
        return kept[-1]

    shift = torch.full((3, 1), 0.1, dtype=torch.float64)
    for name in SOLVERS:
        kept.clear()
        plan = ef.solvers.get(name).plan(VP, times=NODES, statistics=some_statistics(4))
        x, copies, states = start(), [], []
        for step in plan.execute(ef.Denoiser(net, VP), x, shift=shift):
            copies.append(kept[-1].clone())
            states.append((step.registers, [r if r is None else r.clone() for r in step.registers]))
        assert torch.equal(x, start()) and bool((shift == 0.1).all())
        assert all(torch.equal(one, two) for one, two in zip(kept, copies, strict=True))
        for registers, then in states:
            for one, two in zip(registers, then, strict=True):
                assert one is two is None or torch.equal(one, two)
