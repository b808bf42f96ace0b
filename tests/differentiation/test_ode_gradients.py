from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.memory import peak_bytes
from ebbflow.differentiation import gradients, odeint

MODES = ["direct", "checkpoint", "reversible", "adjoint"]
WEIGHTS = torch.arange(1.0, 7.0, dtype=torch.float64).reshape(3, 2)


class Net(nn.Module):
    """Non-autonomous and coupled."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(2, 2, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(2, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ self.w.T + self.b * t) * torch.cos(3 * t) + 0.3 * t * y.flip(-1)


def y0() -> Tensor:
    return torch.tensor([0.7, -0.4], dtype=torch.float64, requires_grad=True)


def times() -> Tensor:
    return torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64, requires_grad=True)


def pulled(net: Net, **arguments: Any) -> list[Tensor]:
    """The loss and its gradients to the start, the times and the parameters."""
    y, t = y0(), times()
    loss = (odeint(net, y, t, **arguments) * WEIGHTS).sum()
    return [loss.detach(), *torch.autograd.grad(loss, [y, t, net.w, net.b])]


def close(a: list[Tensor], b: list[Tensor], tolerance: float) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gradient", MODES)
@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3"])
def test_adaptive_gradients_agree_with_a_fine_fixed_step_solution(method: str, gradient: str):
    net = Net()
    fine = pulled(net, method="rk4", steps=150)
    close(pulled(net, method=method, gradient=gradient, rtol=4e-7, atol=4e-9), fine, 3e-6)


def test_fine_gradients_agree_with_finite_differences():
    net = Net()
    found = pulled(net, method="rk4", steps=60)[1:]
    h = 1e-5
    for i, read in enumerate((lambda y, t: y, lambda y, t: t, lambda y, t: net.w)):
        flat = found[i].reshape(-1)
        for j in range(len(flat)):
            values = []
            for side in (h, -h):
                y, t = y0().detach(), times().detach()
                with torch.no_grad():
                    read(y, t).view(-1)[j] += side
                    values.append((odeint(net, y, t, method="rk4", steps=60) * WEIGHTS).sum())
                    if i == 2:
                        net.w.view(-1)[j] -= side
            slope = float(values[0] - values[1]) / (2 * h)
            assert float(flat[j]) == pytest.approx(slope, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("gradient", ["checkpoint", "reversible"])
@pytest.mark.parametrize("method", ["reversible-heun", "alf", "rk4", "esdirk4", "dopri5"])
def test_modes_that_replay_or_undo_are_exact_to_rounding(method: str, gradient: str):
    """With the same discrete solution they give the gradient of recording it."""
    if gradient == "reversible" and method == "esdirk4":
        return
    from ebbflow.differentiation.methods import METHODS, Coupled

    net, arguments = Net(), {"steps": 12}
    direct: Any = METHODS[method]
    if gradient == "reversible" and not direct.reversible:
        direct = Coupled.around(direct)
    tolerance = 1e-9 if method == "esdirk4" else 1e-12
    close(
        pulled(net, method=method, gradient=gradient, **arguments),
        pulled(net, method=direct, **arguments),
        tolerance,
    )


@pytest.mark.parametrize(("method", "n"), [("reversible-heun", 1000), ("alf", 1000), ("rk4", 200)])
def test_undoing_many_steps_stays_exact(method: str, n: int):
    from ebbflow.differentiation.methods import METHODS, Coupled

    net = Net()
    chosen: Any = METHODS[method] if METHODS[method].reversible else Coupled.around(METHODS[method])
    results = []
    for gradient in ("direct", "reversible"):
        y = y0()
        end = odeint(net, y, [0.0, 3.0], method=chosen, gradient=gradient, steps=n)[-1]
        results.append(torch.autograd.grad(end.sum(), [y, net.w]))
    close(list(results[0]), list(results[1]), 1e-10)


@pytest.mark.parametrize("gradient", MODES)
@pytest.mark.parametrize("compact", [False, True])
def test_per_sample_gradients_are_each_samples_own(gradient: str, compact: bool):
    net = Net()
    start = torch.tensor([[0.7, -0.4], [-0.2, 0.9], [1.5, 0.1]], dtype=torch.float64)
    ends = torch.tensor([0.5, 1.0, 1.6], dtype=torch.float64)
    t = torch.stack([0 * ends, ends / 3, ends])

    def f(t: Tensor, y: Tensor, rows: Tensor | None = None) -> Tensor:
        return net(t, y)

    def gradient_of(mode: str, **more: Any) -> list[Tensor]:
        y, s = start.clone().requires_grad_(), t.clone().requires_grad_()
        if more.pop("loop", False):
            ys = torch.stack([odeint(net, y[i], s[:, i], **more) for i in range(3)], 1)
        else:
            ys = odeint(f, y, s, gradient=mode, batch_dims=1, compact=compact, **more)
        loss = (ys * WEIGHTS[:, None]).sum()
        return [loss.detach(), *torch.autograd.grad(loss, [y, s, net.w, net.b])]

    fine = gradient_of("direct", loop=True, method="rk4", steps=80)
    close(gradient_of(gradient, rtol=4e-7, atol=4e-9), fine, 1e-5)
    if gradient in ("checkpoint",):
        same = gradient_of("direct", rtol=1e-4)
        close(gradient_of(gradient, rtol=1e-4), same, 1e-12)


@pytest.mark.parametrize("gradient", MODES)
@pytest.mark.parametrize("batch_dims", [0, 1])
def test_nested_states_have_the_gradients_of_their_parts(batch_dims: int, gradient: str):
    net = Net()

    def f(t: Tensor, state: Any) -> Any:
        both = torch.cat([state["a"].double(), state["b"][0]], -1)
        slope = net(t, both)
        return {"a": slope[..., :1].float(), "b": [slope[..., 1:]]}

    def gradient_of(f: Any, nested: bool, **more: Any) -> list[Tensor]:
        shape = (2, 1) if batch_dims else (1,)
        a = torch.tensor([0.75, -0.5], dtype=torch.float64)[: shape[0]].reshape(shape)
        a, b = a.requires_grad_(), (a.detach() - 1).requires_grad_()
        t = times()
        if nested:
            ys = odeint(f, {"a": a.float(), "b": [b]}, t, batch_dims=batch_dims, **more)
            ys = torch.cat([ys["a"].double(), ys["b"][0]], -1)
        else:
            ys = odeint(f, torch.cat([a, b], -1), t, **more)
        loss = (ys * ys.new_tensor([2.0, 1.0])).sum()
        return [loss.detach(), *torch.autograd.grad(loss, [a, b, t, net.w, net.b])]

    fine = gradient_of(net, False, method="rk4", steps=80)
    # A part of the state is in single precision.
    close(gradient_of(f, True, gradient=gradient, rtol=1e-6, atol=1e-8), fine, 2e-5)


@pytest.mark.parametrize(
    ("method", "gradient"),
    [
        *(("reversible-heun", mode) for mode in MODES),
        *(("alf", mode) for mode in MODES),
        *((name, mode) for name in ("kvaerno3", "esdirk4") for mode in ("direct", "checkpoint")),
        *((name, mode) for name in ("midpoint", "heun") for mode in ("reversible", "adjoint")),
    ],
)
def test_the_other_adaptive_methods_have_the_same_gradients(method: str, gradient: str):
    net = Net()
    fine = pulled(net, method="rk4", steps=150)
    close(pulled(net, method=method, gradient=gradient, rtol=1e-5, atol=1e-7), fine, 1e-3)


def test_a_rejected_sample_that_overflows_leaves_the_others_gradients_finite():
    rate = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([[1.0], [40.0]], dtype=torch.float64)

    def f(t: Tensor, y: Tensor) -> Tensor:
        return -rate * torch.exp(scale * y)

    y = torch.full((2, 1), 1.0, dtype=torch.float64)
    end = odeint(f, y, [0.0, 1.0], batch_dims=1, first_step=0.5)[-1]
    # y = -log(e^-sy0 + s r t) / s, so dy/dr = -t / (e^-sy0 + s r t).
    truth = -(1 / (torch.exp(-scale) + scale)).sum()
    (found,) = torch.autograd.grad(end.sum(), rate)
    assert float(found) == pytest.approx(float(truth), rel=1e-4)


@pytest.mark.parametrize("method", ["dopri5", "reversible-heun"])
def test_memory_is_flat_in_the_steps_unless_every_operation_is_recorded(method: str):
    w = (torch.eye(50) * 0.9).requires_grad_()

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ w) * torch.cos(t)

    def peak(gradient: Any, n: int) -> float:
        def run() -> None:
            start = torch.ones(50, 50, requires_grad=True)
            end = odeint(f, start, [0.0, 1.0], method=method, steps=n, gradient=gradient)[-1]
            end.sum().backward()
            w.grad = None

        return peak_bytes(run) / (50 * 50 * 4)

    many = 1000 if method == "reversible-heun" else 100
    for gradient in ("adjoint", "reversible"):
        assert peak(gradient, many) == pytest.approx(peak(gradient, 10), abs=2.5)
    few, many = peak("checkpoint", 9), peak("checkpoint", 81)
    # √n states of at most three tensors more.
    assert many - few <= 3 * (9 - 3) + 1
    assert peak("direct", 60) > 4 * peak("direct", 10)


def test_no_more_checkpoints_are_held_than_asked_for_and_recomputation_is_binomial():
    calls: list[int] = []
    rate = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def f(t: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        return -rate * y

    n, slots = 20, 3
    y = torch.ones(1, dtype=torch.float64)
    arguments: Any = {"gradient": "checkpoint", "method": "euler", "steps": n}
    end = odeint(f, y, [0.0, 1.0], checkpoints=slots, **arguments)[-1]
    calls.clear()
    end.sum().backward()
    # C(3 + 3, 3) = 20 steps: no step is recomputed more than 3 times before its own reversal.
    assert n <= len(calls) <= 4 * n
    # Griewank's and Walther's count of advances, r n - C(c + r, r - 1), and n reversals.
    assert len(calls) == 3 * n - math.comb(3 + 3, 2) + n
    assert float(rate.grad) == pytest.approx(-((1 - 0.5 / n) ** (n - 1)), rel=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [2, 3, 7, 20, 35, 100])
def test_splits_stay_inside(n: int):
    for slots in (1, 2, 5):
        assert 1 <= gradients.split(n, slots) < n


def found_by(f: Callable[..., Any], leaf: Tensor, **arguments: Any) -> Tensor:
    y = torch.ones(1, dtype=torch.float64)
    end = odeint(f, y, [0.0, 1.0], method="rk4", steps=5, **arguments)[-1]
    return torch.autograd.grad(end.sum(), leaf, retain_graph=True)[0]


GLOBAL = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("gradient", MODES[1:])
def test_tensors_that_f_reads_are_found_wherever_they_are(gradient: str):
    import functools

    leaf = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    made = leaf * 2
    module = nn.Linear(1, 1, bias=False).double()

    class Callable_:
        def __init__(self) -> None:
            self.rate = leaf

        def __call__(self, t: Tensor, y: Tensor) -> Tensor:
            return -self.rate * y

        def method(self, t: Tensor, y: Tensor) -> Tensor:
            return -self.rate * y

    def with_default(t: Tensor, y: Tensor, rate: Tensor = leaf) -> Tensor:
        return -rate * y

    inner = lambda y: -made * y  # noqa: E731
    for f, where in (
        (lambda t, y: -leaf * y, leaf),
        (lambda t, y: inner(y), leaf),
        (lambda t, y: -GLOBAL * y, GLOBAL),
        (Callable_(), leaf),
        (Callable_().method, leaf),
        (with_default, leaf),
        (functools.partial(lambda rate, t, y: -rate * y, leaf), leaf),
        (lambda t, y: module(y), module.weight),
    ):
        found = found_by(f, where, gradient=gradient)
        direct = found_by(f, where)
        torch.testing.assert_close(found, direct, rtol=3e-3, atol=1e-6)


def test_a_tensor_that_is_not_found_raises_rather_than_give_zero():
    leaf = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    hidden = iter([leaf])

    class Opaque:
        __slots__ = ("rate",)

    opaque = Opaque()
    opaque.rate = next(hidden)  # type: ignore[attr-defined]

    def f(t: Tensor, y: Tensor) -> Tensor:
        return -opaque.rate * y  # type: ignore[attr-defined]

    with pytest.raises(ValueError, match="parameters="):
        found_by(f, leaf, gradient="checkpoint")
    named = found_by(f, leaf, gradient="checkpoint", parameters=[leaf])
    torch.testing.assert_close(named, found_by(f, leaf))


def test_a_tensor_and_its_function_are_not_counted_twice():
    leaf = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    made = leaf * 2

    def unused(t: Tensor, y: Tensor) -> Tensor:
        return -made * y + 0 * len(str(leaf.shape))

    torch.testing.assert_close(
        found_by(unused, leaf, gradient="reversible"), found_by(unused, leaf), rtol=1e-3, atol=0
    )
    with pytest.raises(ValueError, match="both directly and through"):
        found_by(lambda t, y: -made * leaf * y, leaf, gradient="reversible")


def test_the_adjoint_says_where_it_cannot_go_back():
    rate = torch.tensor(300.0, dtype=torch.float64, requires_grad=True)
    y = torch.linspace(0.5, 2.0, 8, dtype=torch.float64)

    def f(t: Tensor, y: Tensor) -> Tensor:
        return -rate * y**3

    # Backwards, an error of 1e-3 in y(400) = 1 / sqrt(1 / y0² + 600 t) makes some of them blow up.
    end = odeint(f, y, [0.0, 400.0], gradient="adjoint", rtol=1e-3, full=True)
    assert end.status == "done"
    with pytest.raises(RuntimeError, match="checkpoint"):
        end.ys[-1].sum().backward()


@pytest.mark.parametrize("gradient", MODES)
def test_outputs_beyond_the_cap_on_steps_carry_the_last_states_gradient(gradient: str):
    rate = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    y = torch.ones(1, dtype=torch.float64, requires_grad=True)
    t = [0.0, 1.0, 50.0]
    cap = 9 if gradient == "reversible" else 6
    run = odeint(lambda t, y: -rate * y, y, t, max_steps=cap, gradient=gradient, full=True)
    assert run.status == "max_steps" and 1 < run.t < 50
    (to_y, to_rate) = torch.autograd.grad(run.ys[-1].sum(), [y, rate])
    assert float(to_y) == pytest.approx(math.exp(-0.5 * run.t), rel=1e-4)
    assert float(to_rate) == pytest.approx(-run.t * math.exp(-0.5 * run.t), rel=1e-4)


def test_recorded_solutions_can_be_differentiated_twice():
    y = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    end = odeint(lambda t, y: y * y, y, [0.0, 1.0], rtol=1e-9)[-1]
    (first,) = torch.autograd.grad(end.sum(), y, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), y)
    # y(1) = y0 / (1 - y0).
    assert float(second) == pytest.approx(2 / 0.5**3, rel=1e-5)


def contracting(rate: Tensor) -> Callable[..., Tensor]:
    """y = cos t attracts every solution; two rates, coupled by a rotation."""

    def f(t: Tensor, y: Tensor, rows: Tensor | None = None) -> Tensor:
        apart = y - torch.cos(t)
        return -rate * apart + 3 * apart.flip(-1) * apart.new_tensor([1.0, -1.0]) - torch.sin(t)

    return f


@pytest.mark.parametrize("batch_dims", [0, 1])
@pytest.mark.parametrize("fixed", [False, True])
def test_undoing_stands_contraction(fixed: bool, batch_dims: int):
    """Without closing the gap between the coupling's copies it grows to e^40 times an error."""
    from ebbflow.differentiation.methods import METHODS, Coupled

    coupled = Coupled.around(METHODS["dopri5"])
    control: Any = {"steps": 200} if fixed else {"rtol": 1e-7, "atol": 1e-9}
    start = torch.tensor([[1.5, 0.3], [-0.2, 1.0]], dtype=torch.float64)
    times = torch.tensor([[0.0, 0.0], [0.05, 0.1], [1.5, 2.0]], dtype=torch.float64)
    start, times = (start, times) if batch_dims else (start[0], times[:, 0])

    def pulled(**arguments: Any) -> list[Tensor]:
        rate = torch.tensor([20.0, 4.0], dtype=torch.float64, requires_grad=True)
        y = start.clone().requires_grad_()
        run = odeint(
            contracting(rate), y, times, batch_dims=batch_dims, full=True, **control, **arguments
        )
        assert run.status in ("done", ["done", "done"])
        loss = (run.ys * run.ys.new_tensor([1.0, 2.0])).sum()
        return [loss.detach(), *torch.autograd.grad(loss, [y, rate])]

    found, direct = pulled(gradient="reversible"), pulled(gradient="direct")
    close(found, direct, 1e-4 if fixed else 1e-5)
    close(found, pulled(method=coupled), 1e-9)
    if not (fixed and batch_dims):
        # Set back to nothing but the outputs, the adjoint would magnify errors to e^38 times.
        close(pulled(gradient="adjoint"), direct, 1e-3)


def test_gaps_are_closed_as_often_as_the_equation_contracts_not_at_every_step():
    from ebbflow.differentiation.fields import Field, Structure
    from ebbflow.differentiation.march import Control, march
    from ebbflow.differentiation.methods import METHODS, Coupled

    y = torch.tensor([1.5, 0.3], dtype=torch.float64)
    f = Field(contracting(torch.tensor([20.0, 4.0], dtype=torch.float64)), Structure(y, 0))
    kept, steps = [], []
    for rtol in (1e-5, 1e-7, 1e-9):
        run = march(Coupled.around(METHODS["dopri5"]), f, [0.0, 2.0], y, Control(rtol, rtol))
        kept.append(sum(p.before is not None for p in run.passages))
        steps.append(int(run.steps))
    # The gap grows to e^40 times an error if it is left alone.
    assert steps[2] > 4 * steps[0] and kept[2] < steps[2] / 5
    assert 0 < max(kept) < 40
