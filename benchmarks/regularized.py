"""Fewer evaluations at the same accuracy: neural ODEs regularised by their solver's estimates.

    python -m benchmarks.regularized [--tasks digits doses] [--seeds 0 1 2] [--kinds none global]
    python -m benchmarks.regularized --validate --seeds 100 --weights 0.1 0.3 1

Each is trained without regularisation, with the global estimate (`regularized_odeint`: the errors
of all steps), and with the local one (`locally_regularized_odeint`: one step's) at a uniform time
and at times where steps begin.

- digits: scikit-learn's 8x8 digits, `linear -> ODE over [0, 1] -> linear`; accuracy.
- doses: a latent ODE of concentrations after a dose, `x = D a / (a - e) (exp(-e t) - exp(-a t))`
  with random rates of absorption and elimination: a quarter of 40 noisy values is seen, an encoder
  makes the state at time 0, an equation in 8 dimensions and a linear read-out give the rest; error
  (root mean square) of what was not seen, against the curve without noise.

Printed: the test's score and evaluations of one solve of the whole test part. Weights were chosen
with --validate: other seeds, other splits, and a part that neither trains nor tests.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor, nn

from ebbflow.differentiation import (
    Heuristics,
    locally_regularized_odeint,
    odeint,
    regularized_odeint,
)

TOLERANCE = 1e-5
KINDS = ("none", "global", "local", "local at steps")
# The last weight of a run, which begins at ten times it: on validation, the largest without loss.
WEIGHTS = {
    "digits": {"global": 1.0, "local": 1.0, "local at steps": 1.0},
    "doses": {"global": 0.03, "local": 0.08, "local at steps": 0.3},
}
ITERATIONS = {"digits": 400, "doses": 1000}
RATE = 0.01


@dataclass
class Task:
    """Inputs, targets and masks by part, the times, and the networks around the equation."""

    parts: dict[str, tuple[Tensor, ...]]
    times: list[float]
    into: nn.Module
    out: nn.Linear
    width: int
    # Of the network's last layer at first: lively, as long training makes it, and more accurate.
    gain: float

    def loss(self, ys: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
        """Of a solve's outputs, in nats."""
        raise NotImplementedError

    def score(self, ys: Tensor, rows: tuple[Tensor, ...]) -> float:
        """What is reported."""
        raise NotImplementedError


class Digits(Task):
    """`parts` are pictures and labels."""

    def __init__(self, generator: torch.Generator) -> None:
        from sklearn.datasets import load_digits

        found = load_digits()
        x, labels = torch.from_numpy(found.data) / 8 - 1, torch.from_numpy(found.target)
        test, valid, train = torch.randperm(len(x), generator=generator).split([449, 300, 1048])
        parts = {"test": test, "valid": valid, "train": train}
        super().__init__(
            {name: (x[rows], labels[rows]) for name, rows in parts.items()},
            [0.0, 1.0],
            nn.Linear(64, 24),
            nn.Linear(24, 10),
            24,
            4.0,
        )

    def loss(self, ys: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
        return nn.functional.cross_entropy(self.out(ys[-1]), rows[1])

    def score(self, ys: Tensor, rows: tuple[Tensor, ...]) -> float:
        return (self.out(ys[-1]).argmax(1) == rows[1]).double().mean().item()


class Doses(Task):
    """`parts` are what is seen (with its mask), noisy values, true values and the mask."""

    noise, count, seen = 0.1, 40, 0.25

    def __init__(self, generator: torch.Generator) -> None:
        n = 2400

        def uniform(low: float, high: float, width: int = 1) -> Tensor:
            return low + (high - low) * torch.rand(n, width, generator=generator)

        t = torch.linspace(0, 1, self.count)
        a, e, dose = uniform(1, 4), uniform(0.3, 2), uniform(1, 3)
        e = torch.minimum(e, 0.8 * a)
        x = dose * a / (a - e) * (torch.exp(-e * t) - torch.exp(-a * t))
        noisy = x + self.noise * torch.randn(n, self.count, generator=generator)
        mask = (uniform(0, 1, self.count) < self.seen).to(x)
        rows = (torch.cat([noisy * mask, mask], 1), noisy, x, mask)
        split = [v.split([400, 400, 1600]) for v in rows]
        names = ("test", "valid", "train")
        super().__init__(
            {name: tuple(v[k] for v in split) for k, name in enumerate(names)},
            t.tolist(),
            nn.Sequential(nn.Linear(2 * self.count, 64), nn.Tanh(), nn.Linear(64, 8)),
            nn.Linear(8, 1),
            8,
            1.0,
        )

    def loss(self, ys: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
        return (self.out(ys)[..., 0].T - rows[1]).square().mean() / (2 * self.noise**2)

    def score(self, ys: Tensor, rows: tuple[Tensor, ...]) -> float:
        square, unseen = (self.out(ys)[..., 0].T - rows[2]).square(), 1 - rows[3]
        return ((square * unseen).sum() / unseen.sum()).sqrt().item()


class Network(nn.Module):
    """dy/dt: one hidden layer that also sees the time."""

    def __init__(self, width: int, gain: float, hidden: int = 48) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.rate = nn.Parameter(0.3 * torch.randn(hidden))
        with torch.no_grad():
            self.last.weight.mul_(gain)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """The slope (B, width)."""
        return self.last(torch.tanh(self.first(y) + t * self.rate))


def trained(
    name: str, kind: str, weight: float, seed: int, iterations: int, part: str
) -> tuple[float, int]:
    """The part's score and the evaluations of its solve, after training."""
    torch.manual_seed(seed)
    task = {"digits": Digits, "doses": Doses}[name](torch.Generator().manual_seed(1000 + seed))
    field = Network(task.width, task.gain)
    owned = [p for module in (task.into, task.out, field) for p in module.parameters()]
    optimizer = torch.optim.Adam(owned, RATE)
    begun = [0.0]

    def solve(start: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs, and the regularisation of this kind."""
        nonlocal begun
        control = {"rtol": TOLERANCE, "atol": TOLERANCE}
        if kind == "none":
            ys = odeint(field, start, task.times, method="tsit5", **control)
            return ys, torch.zeros(())
        if kind == "global":
            found: Heuristics = regularized_odeint(field, start, task.times, **control)
        else:
            at = 0.01 + 0.98 * torch.rand(()).item()
            if kind == "local at steps":
                # Where the steps of the last solve began; the start itself, a moment later.
                at = max(begun[int(at * len(begun))], 1e-3)
            found = locally_regularized_odeint(field, start, task.times, at=at, **control)
            begun = found.times
        return found.ys, found.error

    train = task.parts["train"]
    for step in range(iterations):
        progress = step / iterations
        chosen = torch.randint(len(train[0]), (64,))
        rows = tuple(v[chosen] for v in train)
        ys, penalty = solve(task.into(rows[0]))
        optimizer.zero_grad()
        # From ten times the last weight, exponentially, as in the papers.
        (task.loss(ys, rows) + weight * 10 ** (1 - progress) * penalty).backward()
        nn.utils.clip_grad_norm_(owned, 10.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))
        optimizer.step()
    with torch.no_grad():
        rows = task.parts[part]
        run = odeint(
            field,
            task.into(rows[0]),
            task.times,
            method="tsit5",
            rtol=TOLERANCE,
            atol=TOLERANCE,
            full=True,
        )
        return task.score(run.ys, rows), int(run.evaluations)


def main() -> None:
    """One line a training, then one a kind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=["digits", "doses"], choices=WEIGHTS)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, help="instead of those of the task")
    parser.add_argument("--weights", nargs="+", type=float, help="instead of those chosen")
    parser.add_argument("--validate", action="store_true", help="score the part for choices")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    part = "valid" if options.validate else "test"
    for name in options.tasks:
        base = math.nan
        for kind in options.kinds:
            weights = [0.0] if kind == "none" else options.weights or [WEIGHTS[name][kind]]
            for weight in weights:
                found = []
                for seed in options.seeds:
                    begun = time.process_time()
                    iterations = options.iterations or ITERATIONS[name]
                    found.append(trained(name, kind, weight, seed, iterations, part))
                    score, evaluations = found[-1]
                    print(
                        f"{name:6} {kind:14} weight {weight:<5g} seed {seed:<3} {part} "
                        f"{score:.4f}, {evaluations} evaluations, "
                        f"{time.process_time() - begun:.0f} s of one core",
                        flush=True,
                    )
                score, evaluations = (fmean(v) for v in zip(*found, strict=True))
                base = evaluations if kind == "none" else base
                change = 100 * (evaluations / base - 1)
                print(
                    f"{name:6} {kind:14} weight {weight:<5g} mean     {part} {score:.4f}, "
                    f"{evaluations:.1f} evaluations ({change:+.0f} %)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
