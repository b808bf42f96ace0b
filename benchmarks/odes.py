"""odeint beside torchdiffeq: evaluations, error and seconds at equal tolerance, in one run.

    python -m benchmarks.odes [--batch 256] [--repeats 3]

The batch holds mixed stiff and easy problems, y' = -rate (y - cos t) - sin t with rates from 0.5 to
200 (y = cos t whatever the rate, from a start beside it); one smooth problem follows. torchdiffeq
has one step size for the batch; without it installed, only ours is measured.
"""

from __future__ import annotations

import argparse
import importlib
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ebbflow.differentiation import odeint


class Counted:
    """Calls of f, and the rows that they evaluated."""

    def __init__(self, f: Callable[..., Tensor]) -> None:
        self.f, self.calls, self.rows = f, 0, 0

    def __call__(self, t: Tensor, y: Tensor, *rest: Tensor) -> Tensor:
        self.calls += 1
        self.rows += y.shape[0]
        return self.f(t, y, *rest)


def measured(name: str, solve: Callable[[Counted], Tensor], f: Counted, exact: Tensor, n: int):
    """One line: the best of n times, the calls and rows of one solve, its error."""
    seconds = []
    for _ in range(n):
        f.calls = f.rows = 0
        start = time.perf_counter()
        end = solve(f)
        seconds.append(time.perf_counter() - start)
    error = float((end - exact).abs().max())
    print(
        f"{name:34} {min(seconds):9.4f} s {f.calls:7d} calls "
        f"{f.rows / end.shape[0]:9.1f} evaluations a sample   error {error:.1e}"
    )


def main() -> None:
    """Both problems, every solver."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    batch, repeats = options.batch, options.repeats
    try:
        peer = importlib.import_module("torchdiffeq").odeint
    except ImportError:
        peer = None

    rates = torch.logspace(-0.3, 2.3, batch, dtype=torch.float64)[:, None]
    y0 = torch.full((batch, 1), 1.5, dtype=torch.float64)
    times = torch.tensor([0.0, 5.0], dtype=torch.float64)
    exact = torch.cos(times[-1]) + 0.5 * torch.exp(-rates * 5.0)
    tolerance: Any = {"rtol": 1e-6, "atol": 1e-9}

    def mixed(t: Tensor, y: Tensor, rows: Tensor | None = None) -> Tensor:
        rate = rates if rows is None else rates[rows]
        return -rate * (y - torch.cos(t)) - torch.sin(t)

    print(f"{batch} mixed stiff and easy samples, float64, {tolerance}")
    for method in ("dopri5", "tsit5"):
        measured(
            f"ours {method}, per sample",
            lambda f, m=method: odeint(
                f, y0, times, method=m, batch_dims=1, compact=True, **tolerance
            )[-1],
            Counted(mixed),
            exact,
            repeats,
        )
    measured(
        "ours dopri5, one step size",
        lambda f: odeint(f, y0, times, **tolerance)[-1],
        Counted(mixed),
        exact,
        repeats,
    )
    if peer is not None:
        measured(
            "torchdiffeq dopri5",
            lambda f: peer(f, y0, times, method="dopri5", **tolerance)[-1],
            Counted(mixed),
            exact,
            repeats,
        )

    start = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    truth = torch.tensor([[math.cos(20.0), -math.sin(20.0)]], dtype=torch.float64)
    times = torch.tensor([0.0, 20.0], dtype=torch.float64)

    def smooth(t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([y[:, 1:], -y[:, :1]], 1)

    print("one smooth problem, a harmonic oscillator over 20 units of time")
    for method in ("dopri5", "tsit5"):
        measured(
            f"ours {method}",
            lambda f, m=method: odeint(f, start, times, method=m, **tolerance)[-1],
            Counted(smooth),
            truth,
            repeats,
        )
    if peer is not None:
        measured(
            "torchdiffeq dopri5",
            lambda f: peer(f, start, times, method="dopri5", **tolerance)[-1],
            Counted(smooth),
            truth,
            repeats,
        )


if __name__ == "__main__":
    main()
