"""Accuracy and memory of layers without a depth on scikit-learn's 8x8 digits.

    python -m benchmarks.implicit_layers [--iterations 200] [--seeds 3]

The same cell `tanh(W z + U x + b)` as 20 explicit layers, as a deep equilibrium (`equilibrium`)
and, with its own answer taken away, as the field of a homotopy ODE (`HomotopyODE`, by the adjoint).
Printed: test accuracy, evaluations of the last training batch, and the peak memory of one training
step in multiples of a batch of hidden states.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from benchmarks.memory import peak_bytes
from ebbflow.differentiation import HomotopyODE, equilibrium

WIDTH, BATCH = 48, 128


class Cell(nn.Module):
    """`tanh(W z + U x + b)`, a contraction at first."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(inputs, WIDTH)
        nn.init.orthogonal_(self.inner.weight, 0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + self.outer(x))


class Pull(Cell):
    """Towards the cell's answer."""

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return 3 * (super().forward(z, x) - z)


class Explicit(nn.Module):
    """Twenty layers of one cell."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.cell, self.evaluations = Cell(inputs), 20

    def forward(self, x: Tensor) -> Tensor:
        z = x.new_zeros(len(x), WIDTH)
        for _ in range(self.evaluations):
            z = self.cell(z, x)
        return z


class Equilibrated(nn.Module):
    """The cell's fixed point."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.cell, self.evaluations = Cell(inputs), 0

    def forward(self, x: Tensor) -> Tensor:
        z0 = x.new_zeros(len(x), WIDTH)
        found = equilibrium(lambda z: self.cell(z, x), z0, tolerance=1e-3)
        self.evaluations = found.evaluations
        return found.z


def layer(kind: str, inputs: int) -> nn.Module:
    """One of the three."""
    if kind == "homotopy":
        return HomotopyODE(Pull(inputs), (WIDTH,))
    return Explicit(inputs) if kind == "explicit" else Equilibrated(inputs)


def trained(kind: str, seed: int, iterations: int) -> tuple[float, int, float]:
    """Test accuracy, evaluations and peak memory of a training step."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, labels = torch.from_numpy(data.data).float() / 8 - 1, torch.from_numpy(data.target)
    torch.manual_seed(seed)
    order = torch.randperm(len(x))
    test, train = order[: len(x) // 4], order[len(x) // 4 :]
    hidden, head = layer(kind, x.shape[1]), nn.Linear(WIDTH, 10)
    optimizer = torch.optim.Adam([*hidden.parameters(), *head.parameters()], 3e-3)

    def step() -> None:
        rows = train[torch.randint(len(train), (BATCH,))]
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(hidden(x[rows])), labels[rows]).backward()
        optimizer.step()

    for _ in range(iterations):
        step()
    evaluations = int(getattr(hidden, "evaluations", 0))
    memory = peak_bytes(step) / (BATCH * WIDTH * 4)
    hidden.eval()
    with torch.no_grad():
        accuracy = (head(hidden(x[test])).argmax(1) == labels[test]).float().mean()
    return float(accuracy), evaluations, memory


def main() -> None:
    """One line a seed and kind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in range(options.seeds):
        for kind in ("explicit", "equilibrium", "homotopy"):
            accuracy, evaluations, memory = trained(kind, seed, options.iterations)
            print(
                f"seed {seed} {kind:12} accuracy {accuracy:.3f}, {evaluations} evaluations, "
                f"peak memory {memory:.0f} states",
                flush=True,
            )


if __name__ == "__main__":
    main()
