"""Value and gradient of five implicit functions, beside jaxopt where it is installed.

    python -m benchmarks.implicit [--repeats 5]

float64, one thread; the time is the least of the repeats after one warm-up (jaxopt is compiled in
it, ours is not compiled). Answers are compared: the greatest difference of the gradients, relative.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ebbflow.differentiation import (
    conditions,
    fixed_point,
    minimize,
    projections,
    proximal,
    quadratic_program,
)

F64 = torch.float64
Run = Callable[[np.ndarray], np.ndarray]


def problems(rng: np.random.Generator) -> dict[str, dict[str, Any]]:
    """Data of each problem, and the point at which it is differentiated."""
    a, y = rng.normal(size=(200, 60)), rng.normal(size=200)
    labels = np.eye(3)[rng.integers(3, size=40)]
    q = rng.normal(size=(40, 40))
    w = rng.normal(size=(100, 100))
    return {
        "ridge": {"a": a, "y": y, "at": np.full(60, 3.0)},
        "lasso": {"a": a, "y": y, "at": np.array(20.0)},
        "svm": {"a": rng.normal(size=(40, 10)), "y": labels, "at": np.array(4.0)},
        "program": {
            "q": q @ q.T / 40 + np.eye(40),
            "e": rng.normal(size=(5, 40)),
            "at": rng.normal(size=40),
        },
        "network": {"w": 0.8 * w / np.linalg.norm(w, 2), "at": rng.normal(size=100)},
    }


def ours(name: str, p: dict[str, Any]) -> Run:
    """The gradient of the sum of squares of the solution."""
    t = {k: torch.as_tensor(v, dtype=F64) for k, v in p.items()}

    def lasso_step() -> float:
        return 1 / float(torch.linalg.matrix_norm(t["a"], ord=2)) ** 2

    def solve(at: Tensor) -> Tensor:
        if name == "ridge":
            a, y = t["a"], t["y"]

            def loss(x: Tensor, at: Tensor) -> Tensor:
                return 0.5 * (a @ x - y).square().sum() + 0.5 * (at * x * x).sum()

            return minimize(loss, torch.zeros(60, dtype=F64), at, tol=1e-9)
        if name == "lasso":
            a, y, step = t["a"], t["y"], lasso_step()
            condition = conditions.proximal_gradient(
                lambda x: 0.5 * (a @ x - y).square().sum(),
                lambda z, w: proximal.lasso(z, step * w),
                step,
            )
            return fixed_point(condition, torch.zeros(60, dtype=F64), (), at, tol=1e-9)
        if name == "svm":
            a, y, step = t["a"], t["y"], lasso_step() * 4.0

            def dual(x: Tensor, at: Tensor) -> Tensor:
                return 0.5 * (a.mT @ (y - x)).square().sum() / at + (x * y).sum()

            condition = conditions.projected_gradient(dual, projections.simplex, step)
            return fixed_point(condition, torch.full((40, 3), 1 / 3, dtype=F64), at, tol=1e-9)
        if name == "program":
            q, e = t["q"], t["e"]
            return quadratic_program(q, at, e, torch.ones(5, dtype=F64)).x
        w = t["w"]
        network = fixed_point(lambda z, x: torch.tanh(w @ z + x), tol=1e-9)
        return network(torch.zeros(100, dtype=F64), at)

    def run(at: np.ndarray) -> np.ndarray:
        point = torch.tensor(at, dtype=F64, requires_grad=True)
        (gradient,) = torch.autograd.grad(solve(point).square().sum(), point)
        return gradient.numpy()

    return run


def jaxopts(name: str, p: dict[str, Any]) -> Run:
    """The same by jaxopt, compiled."""
    import jax

    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp
    import jaxopt

    t = {k: jnp.asarray(v) for k, v in p.items()}

    def solve(at: Any) -> Any:
        if name == "ridge":

            def loss(x: Any, at: Any) -> Any:
                return 0.5 * ((t["a"] @ x - t["y"]) ** 2).sum() + 0.5 * (at * x * x).sum()

            return jaxopt.LBFGS(loss, tol=1e-8, maxiter=2000).run(jnp.zeros(60), at).params
        if name == "lasso":

            def squares(x: Any) -> Any:
                return 0.5 * ((t["a"] @ x - t["y"]) ** 2).sum()

            method = jaxopt.ProximalGradient(
                squares, jaxopt.prox.prox_lasso, tol=1e-10, maxiter=5000
            )
            return method.run(jnp.zeros(60), hyperparams_prox=at).params
        if name == "svm":

            def dual(x: Any, at: Any) -> Any:
                residual = t["a"].T @ (t["y"] - x)
                return 0.5 * (residual**2).sum() / at + (x * t["y"]).sum()

            def project(x: Any, _: Any) -> Any:
                return jax.vmap(jaxopt.projection.projection_simplex)(x)

            method = jaxopt.ProjectedGradient(dual, project, tol=1e-10, maxiter=5000)
            return method.run(jnp.full((40, 3), 1 / 3), None, at).params
        if name == "program":
            method = jaxopt.EqualityConstrainedQP(tol=1e-12)
            params = method.run(params_obj=(t["q"], at), params_eq=(t["e"], jnp.ones(5))).params
            return params.primal
        method = jaxopt.AndersonAcceleration(
            lambda z, x: jnp.tanh(t["w"] @ z + x), tol=1e-9, maxiter=1000
        )
        return method.run(jnp.zeros(100), at).params

    gradient = jax.jit(jax.grad(lambda at: (solve(at) ** 2).sum()))
    return lambda at: np.asarray(gradient(jnp.asarray(at)).block_until_ready())


def timed(run: Run, at: np.ndarray, repeats: int) -> tuple[np.ndarray, float]:
    found, seconds = run(at), []
    for _ in range(repeats):
        start = time.perf_counter()
        run(at)
        seconds.append(time.perf_counter() - start)
    return found, min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    print(f"{'problem':10s} {'ours, ms':>9s} {'jaxopt, ms':>11s} {'ratio':>6s} {'difference':>11s}")
    for name, p in problems(np.random.default_rng(0)).items():
        found, seconds = timed(ours(name, p), p["at"], repeats)
        try:
            other, theirs = timed(jaxopts(name, p), p["at"], repeats)
        except ImportError:
            print(f"{name:10s} {1e3 * seconds:9.2f} {'absent':>11s}")
            continue
        difference = np.abs(found - other).max() / np.abs(other).max()
        ratio = seconds / theirs
        print(
            f"{name:10s} {1e3 * seconds:9.2f} {1e3 * theirs:11.2f} {ratio:6.2f} {difference:11.1e}"
        )


if __name__ == "__main__":
    main()
