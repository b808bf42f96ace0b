"""Fewer evaluations at the same accuracy: neural ODEs regularised by their solver's estimates.

    python -m benchmarks.regularized [--tasks digits series] [--iterations 300] [--seeds 3]

A classifier `linear -> ODE over [0, 1] -> linear` is trained without regularisation, with the
global one (`regularized_odeint`: every step's error and the largest stiffness) and with the local
one (`local_heuristics`: one step from a random time), on scikit-learn's 8x8 digits and on noisy
series of three shapes at random phase and rate. Printed: test accuracy, and evaluations of one test
batch.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from torch import Tensor, nn

from ebbflow.differentiation import local_heuristics, odeint, regularized_odeint

# The last weight of each kind: one starting step has a far smaller estimate than those accepted.
WEIGHTS = {"none": 0.0, "global": 3.0, "local": 150.0}
TOLERANCE: Any = {"rtol": 1e-5, "atol": 1e-5}


class OdeClassifier(nn.Module):
    """`inputs -> 24 numbers -> their ODE, with time -> classes`."""

    def __init__(self, inputs: int, classes: int, width: int = 24, hidden: int = 48) -> None:
        super().__init__()
        self.into = nn.Linear(inputs, width)
        self.net = nn.Sequential(nn.Linear(width + 1, hidden), nn.Tanh(), nn.Linear(hidden, width))
        self.out = nn.Linear(width, classes)
        # A lively field from the start, as long training makes it.
        with torch.no_grad():
            self.net[0].weight.mul_(2.0)
            self.net[2].weight.mul_(4.0)

    def field(self, t: Tensor, y: Tensor) -> Tensor:
        """dy/dt."""
        return self.net(torch.cat([y, t.expand(len(y), 1)], 1))

    def loss(self, x: Tensor, labels: Tensor, kind: str, weight: float) -> Tensor:
        """Cross entropy and the regularisation of this kind."""
        start = self.into(x)
        if kind == "global":
            found = regularized_odeint(self.field, start, [0.0, 1.0], **TOLERANCE)
            end, penalty = found.ys[-1], found.error + 0.1 * found.stiffness
        else:
            # The random time is an output beside the end.
            at = float(torch.rand(())) * 0.98 + 0.01
            ys = odeint(self.field, start, [0.0, at, 1.0], method="tsit5", **TOLERANCE)
            end, penalty = ys[-1], torch.zeros(())
            if kind == "local":
                error, stiffness = local_heuristics(self.field, at, ys[1], 1.0, **TOLERANCE)
                penalty = error + 0.1 * stiffness
        return nn.functional.cross_entropy(self.out(end), labels) + weight * penalty


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits, in [-1, 1]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(data.data).float() / 8 - 1, torch.from_numpy(data.target)


def series(n: int = 1800) -> tuple[Tensor, Tensor]:
    """Sines, triangles and sums of two sines on 48 irregular times, with noise."""
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    times, _ = uniform(n, 48).sort(1)
    angle = 2 * math.pi * (times * (1.5 + uniform(n, 1)) + uniform(n, 1))
    shapes = torch.stack(
        [
            torch.sin(angle),
            torch.asin(torch.sin(angle)) * 2 / math.pi,
            (torch.sin(angle) + torch.sin(2 * angle)) / 1.5,
        ]
    )
    labels = torch.randint(3, (n,), generator=generator)
    values = shapes[labels, torch.arange(n)]
    values = values + 0.1 * torch.randn(n, 48, generator=generator)
    # The values at regular times, by the nearest of those seen.
    nearest = (torch.linspace(0, 1, 32)[None, :, None] - times[:, None]).abs().argmin(2)
    return values.gather(1, nearest), labels


def trained(
    x: Tensor, labels: Tensor, kind: str, weight: float, seed: int, iterations: int
) -> tuple[float, int]:
    """Test accuracy and evaluations of the test batch, after training on three quarters."""
    torch.manual_seed(seed)
    order = torch.randperm(len(x))
    test, train = order[: len(x) // 4], order[len(x) // 4 :]
    model = OdeClassifier(x.shape[1], int(labels.max()) + 1)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(iterations):
        rows = train[torch.randint(len(train), (128,))]
        # From ten times the last weight, as in the paper.
        now = weight * 10 ** (1 - step / iterations)
        optimizer.zero_grad()
        model.loss(x[rows], labels[rows], kind, now).backward()
        optimizer.step()
    with torch.no_grad():
        run = odeint(
            model.field, model.into(x[test]), [0.0, 1.0], method="tsit5", full=True, **TOLERANCE
        )
        accuracy = (model.out(run.ys[-1]).argmax(1) == labels[test]).float().mean()
    return float(accuracy), int(run.evaluations)


def main() -> None:
    """One line a task, seed and kind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=["digits", "series"])
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of all weights")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in range(options.seeds):
        for task in options.tasks:
            x, labels = {"digits": digits, "series": series}[task]()
            for kind, weight in WEIGHTS.items():
                accuracy, evaluations = trained(
                    x, labels, kind, options.scale * weight, seed, options.iterations
                )
                print(
                    f"{task:7} seed {seed} {kind:7} accuracy {accuracy:.3f}, "
                    f"{evaluations} evaluations",
                    flush=True,
                )


if __name__ == "__main__":
    main()
