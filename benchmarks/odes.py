"""odeint beside torchdiffeq and diffrax: evaluations, errors and seconds at equal tolerance.

    python -m benchmarks.odes [--batch 256] [--repeats 5] [--rtol 1e-3 1e-6 1e-9]

Two batches of mixed stiff and easy problems, each sample with a step size of its own in our solver
and in diffrax (under vmap), one for all in torchdiffeq:

- relaxation, y' = -rate (y - cos t) - sin t with rates 0.5 to 200, y = cos t + e^(-rate t) / 2;
- oscillators of van der Pol, y'' = mu (1 - y²) y' - y with mu 0.1 to 30, over ten units of time;

and one smooth problem, a harmonic oscillator over twenty. Solvers take turns within each repeat.
Printed: the median of the seconds, and its ratio to torchdiffeq's; evaluations a sample (those that
were performed for it: with diffrax a batch goes on until its last sample has ended, and what the
samples needed stands in brackets); the median and the greatest error over the samples. A peer that
is not installed is left out; float64, one thread, jax compiled beforehand.
"""

from __future__ import annotations

import argparse
import importlib
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ebbflow.differentiation import odeint

Field = Callable[..., Any]


@dataclass(frozen=True)
class Problem:
    """Solve from `y0` (B, d) at 0 to `end`.

    `field(xp, t, y, p)` is f of y (..., d) with the samples' parameters p (..., 1), in torch and in
    jax.numpy; `truth` (B, d) is the solution.
    """

    name: str
    field: Field
    parameters: Tensor
    y0: Tensor
    end: float
    truth: Tensor


class Counted:
    """A field in torch, with counts of its calls and of the rows that they evaluated."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.calls, self.rows = problem, 0, 0

    def __call__(self, t: Tensor, y: Tensor, rows: Tensor | None = None) -> Tensor:
        self.calls += 1
        self.rows += y.shape[0]
        p = self.problem.parameters
        return self.problem.field(torch, t, y, p if rows is None else p[rows])


@dataclass(frozen=True)
class Solver:
    """`solve()` -> states at the end (B, d); `count()` of the last solve, in words and a number."""

    name: str
    solve: Callable[[], Tensor]
    count: Callable[[], str]


def relaxation(xp: Any, t: Any, y: Any, rate: Any) -> Any:
    return -rate * (y - xp.cos(t)) - xp.sin(t)


def van_der_pol(xp: Any, t: Any, y: Any, mu: Any) -> Any:
    place, speed = y[..., :1], y[..., 1:]
    return xp.concatenate([speed, mu * (1 - place * place) * speed - place], -1)


def harmonic(xp: Any, t: Any, y: Any, _: Any) -> Any:
    return xp.concatenate([y[..., 1:], -y[..., :1]], -1)


def problems(batch: int) -> list[Problem]:
    """The two batches and the smooth problem."""
    rates = torch.logspace(-0.3, 2.3, batch, dtype=torch.float64)[:, None]
    mus = torch.logspace(-1, 1.5, batch, dtype=torch.float64)[:, None]
    pair = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    start, one = torch.full_like(rates, 1.5), torch.ones(1, 1, dtype=torch.float64)
    van = Problem("van der Pol", van_der_pol, mus, pair.repeat(batch, 1), 10.0, pair)
    exact = odeint(
        lambda t, y, rows: van_der_pol(torch, t, y, mus[rows]),
        van.y0,
        [0.0, van.end],
        method="tsit5",
        rtol=1e-12,
        atol=1e-13,
        batch_dims=1,
        compact=True,
        max_steps=200_000,
    )[-1]
    return [
        Problem(
            *("relaxation", relaxation, rates, start, 5.0),
            torch.cos(torch.tensor(5.0, dtype=torch.float64)) + 0.5 * torch.exp(-5 * rates),
        ),
        Problem(van.name, van.field, mus, van.y0, van.end, exact),
        Problem(
            *("one smooth problem", harmonic, one, pair / 2, 20.0),
            torch.tensor([[math.cos(20.0), -math.sin(20.0)]], dtype=torch.float64),
        ),
    ]


def ours(problem: Problem, method: str, rtol: float, atol: float) -> Solver:
    """Steps of each sample's own for a batch, one step size for one problem."""
    f, many = Counted(problem), len(problem.y0) > 1

    def solve() -> Tensor:
        f.calls = f.rows = 0
        times = [0.0, problem.end]
        each: Any = {"batch_dims": 1, "compact": True} if many else {}
        return odeint(
            f, problem.y0, times, method=method, rtol=rtol, atol=atol, max_steps=100_000, **each
        )[-1]

    return Solver(f"ours {method}", solve, lambda: f"{f.rows / len(problem.y0):8.1f}")


def torchdiffeq(problem: Problem, rtol: float, atol: float) -> Solver:
    """dopri5, one step size for the batch."""
    peer, f = importlib.import_module("torchdiffeq").odeint, Counted(problem)
    times = torch.tensor([0.0, problem.end], dtype=torch.float64)

    def solve() -> Tensor:
        f.calls = f.rows = 0
        return peer(f, problem.y0, times, method="dopri5", rtol=rtol, atol=atol)[-1]

    return Solver("torchdiffeq dopri5", solve, lambda: f"{f.rows / len(problem.y0):8.1f}")


def diffrax(problem: Problem, method: str, rtol: float, atol: float) -> Solver:
    """Its defaults with these tolerances, one step size for each sample by vmap, compiled."""
    peer, jax = importlib.import_module("diffrax"), importlib.import_module("jax")
    jax.config.update("jax_enable_x64", True)
    xp = importlib.import_module("jax.numpy")
    chosen = {"dopri5": peer.Dopri5, "tsit5": peer.Tsit5}[method]()
    term = peer.ODETerm(lambda t, y, p: problem.field(xp, t, y, p))

    def one(y0: Any, p: Any) -> Any:
        controller = peer.PIDController(rtol=rtol, atol=atol)
        out = peer.diffeqsolve(
            *(term, chosen, 0.0, problem.end, None, y0, p),
            stepsize_controller=controller,
            max_steps=100_000,
            # Its default keeps checkpoints for gradients, which cost time.
            adjoint=peer.ForwardMode(),
        )
        return out.ys[-1], out.stats["num_steps"]

    y0, p = xp.asarray(problem.y0.numpy()), xp.asarray(problem.parameters.numpy())
    compiled = jax.jit(jax.vmap(one)).lower(y0, p).compile()
    steps: Any = None

    def solve() -> Tensor:
        nonlocal steps
        end, steps = compiled(y0, p)
        return torch.tensor(end.tolist(), dtype=torch.float64)

    def count() -> str:
        # Six a step, as the last stage is the next step's first, and two or three at the start.
        return f"{6 * float(steps.max()) + 3:8.1f} ({6 * float(steps.mean()) + 3:.1f})"

    return Solver(f"diffrax {method}", solve, count)


def installed(name: str) -> bool:
    """Whether a peer can be imported."""
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def compared(problem: Problem, rtol: float, repeats: int) -> None:
    """One line a solver."""
    atol = 1e-3 * rtol
    solvers = [ours(problem, method, rtol, atol) for method in ("dopri5", "tsit5")]
    if installed("torchdiffeq"):
        solvers.append(torchdiffeq(problem, rtol, atol))
    if installed("diffrax"):
        solvers += [diffrax(problem, method, rtol, atol) for method in ("dopri5", "tsit5")]
    seconds: dict[str, list[float]] = {solver.name: [] for solver in solvers}
    ends: dict[str, Tensor] = {}
    for _ in range(repeats):
        for solver in solvers:
            start = time.perf_counter()
            ends[solver.name] = solver.solve()
            seconds[solver.name].append(time.perf_counter() - start)
    peer = seconds.get("torchdiffeq dopri5")
    print(f"{problem.name}, {len(problem.y0)} at once, rtol {rtol:g}, atol {atol:g}")
    for solver in solvers:
        median = statistics.median(seconds[solver.name])
        ratio = "" if peer is None else f"{median / statistics.median(peer):6.2f} of torchdiffeq's"
        error = (ends[solver.name] - problem.truth).abs().amax(1)
        print(
            f"  {solver.name:20} {median:8.4f} s {ratio}   evaluations a sample {solver.count()}"
            f"   error {float(error.median()):.1e}, greatest {float(error.max()):.1e}",
            flush=True,
        )


def main() -> None:
    """Every problem at every tolerance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rtol", type=float, nargs="+", default=[1e-3, 1e-6, 1e-9])
    options = parser.parse_args()
    torch.set_num_threads(1)
    for problem in problems(options.batch):
        for rtol in options.rtol:
            compared(problem, rtol, options.repeats)


if __name__ == "__main__":
    main()
