"""Tune the ridge of a multiclass support vector machine by its validation loss.

The dual of the machine lives on simplices, one a sample; its solution is a fixed point of a
projected gradient step, and the hypergradient of the validation loss follows from that alone.
The figure shows the loss along the way, and how fast implicit and unrolled Jacobians approach
the true one: the error of the implicit one is that of the solution, the unrolled one lags.
Efficient and Modular Implicit Differentiation, section 4.1.

    python -m examples.svm_regularisation --output svm.png
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import jvp

from ebbflow.differentiation import conditions, fixed_point, projections
from examples._shared import arguments, plots, save


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    from sklearn.datasets import load_wine
    from sklearn.preprocessing import scale

    outer_steps, path = arguments("svm_regularisation", __doc__, 15, argv)
    raw = load_wine()
    data, target = torch.tensor(scale(raw.data)), torch.tensor(raw.target)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    train, valid = order[:50], order[50:110]
    x_train, y_train = data[train], torch.eye(3, dtype=data.dtype)[target[train]]
    x_valid, y_valid = data[valid], torch.eye(3, dtype=data.dtype)[target[valid]]

    def weights(dual: Tensor, theta: Tensor) -> Tensor:
        return x_train.mT @ (y_train - dual) / theta.exp()

    def objective(dual: Tensor, theta: Tensor) -> Tensor:
        w = weights(dual, theta)
        return 0.5 * theta.exp() * w.square().sum() + (dual * y_train).sum()

    lipschitz = torch.linalg.matrix_norm(x_train, ord=2).item() ** 2

    def step_for(theta: Tensor) -> float:
        return 1 / (lipschitz / theta.exp().item())

    def loss(dual: Tensor, theta: Tensor) -> Tensor:
        return 0.5 * (x_valid @ weights(dual, theta) - y_valid).square().sum()

    one = torch.ones((), dtype=data.dtype)
    begin = torch.full((len(train), 3), 1 / 3, dtype=data.dtype)
    theta, start = 2.0 * one, begin
    trace: list[tuple[float, float]] = []
    for _ in range(outer_steps):
        at = theta.clone().requires_grad_()
        condition = conditions.projected_gradient(objective, projections.simplex, step_for(theta))
        dual = fixed_point(condition, start, at, tol=1e-8)
        value = loss(dual, at)
        (gradient,) = torch.autograd.grad(value, at)
        trace.append((theta.item(), value.item()))
        theta, start = (
            theta - 0.3 * gradient.sign() * min(1.0, gradient.abs().item()),
            dual.detach(),
        )
        print(f"log ridge {trace[-1][0]:.3f}  validation loss {value.item():.4f}")

    theta = 4.0 * one
    condition = conditions.projected_gradient(objective, projections.simplex, step_for(theta))

    def exact(t: Tensor) -> Tensor:
        return fixed_point(condition, begin, t, tol=1e-12)

    solution, truth = jvp(exact, (theta,), (one,))
    marks, rows = (25, 50, 100, 200, 400, 800), []
    x, dx = begin, torch.zeros_like(begin)
    for k in range(1, marks[-1] + 1):
        # Forward through one step: the unrolled Jacobian, without storing the steps.
        x, dx = jvp(lambda x, t: condition(x, t), (x, theta), (dx, one))
        if k in marks:
            found = x

            def solved(begin: Tensor, t: Tensor, found: Tensor = found) -> Tensor:
                return found

            implicit = fixed_point(condition, solver=solved, tol=1.0)
            tangent = jvp(lambda t, f=implicit: f(begin, t), (theta,), (one,))[1]
            errors = [(x - solution).norm(), (tangent - truth).norm(), (dx - truth).norm()]
            rows.append([k, *(e.item() for e in errors)])
            print(
                "steps {:4d}  solution {:.1e}  implicit {:.1e}  unrolled {:.1e}".format(*rows[-1])
            )

    figure, (left, right) = plots().subplots(1, 2, figsize=(10, 4))
    left.plot(*zip(*trace, strict=True), "o-")
    left.set(xlabel="log ridge", ylabel="validation loss", title="hypergradient descent")
    steps, *errors = zip(*rows, strict=True)
    for name, error in zip(
        ("solution", "implicit Jacobian", "unrolled Jacobian"), errors, strict=True
    ):
        right.loglog(steps, error, "o-", label=name)
    right.set(xlabel="inner steps", ylabel="error", title="at equal iterations")
    right.set_xticks(steps, [str(k) for k in steps])
    right.set_xticks([], minor=True)
    right.legend()
    save(figure, path)
    return dict(zip(("steps", "solution", "implicit", "unrolled"), rows[-1], strict=True))


if __name__ == "__main__":
    main()
