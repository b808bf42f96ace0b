"""Accuracy and memory of layers without a depth on scikit-learn's 8x8 digits.

    python -m benchmarks.implicit_layers [--iterations 300] [--seeds 3] [--depth 20]

One block, `tanh(W relu(V z + U x))` with x put in at every evaluation, as an explicit network of 20
such layers, as a deep equilibrium (`equilibrium`), and as the field of a homotopy ODE with its own
answer taken away (`HomotopyODE`, undone step by step). Printed: test accuracy, evaluations of the
block in the last training batch, and the peak memory of one training step in multiples of a batch
of hidden states.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from benchmarks.memory import peak_bytes
from ebbflow.differentiation import HomotopyODE, equilibrium

WIDTH, BATCH = 48, 128


class Block(nn.Module):
    """`tanh(W relu(V z + U x))`, a contraction as long as W and V are."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(inputs, WIDTH)
        self.mixed = nn.Linear(WIDTH, WIDTH)
        self.contract()

    @torch.no_grad()
    def contract(self) -> None:
        """Scale W and V back to a greatest singular value of 0.95."""
        for part in (self.inner, self.mixed):
            part.weight.mul_((0.95 / torch.linalg.matrix_norm(part.weight, 2)).clamp(max=1))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.mixed(torch.relu(self.inner(z) + self.outer(x))))


class Pull(Block):
    """Towards the block's answer."""

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return 2 * (super().forward(z, x) - z)


class Explicit(nn.Module):
    """As many layers of one block."""

    def __init__(self, inputs: int, depth: int) -> None:
        super().__init__()
        self.block, self.evaluations = Block(inputs), depth

    def forward(self, x: Tensor) -> Tensor:
        z = x.new_zeros(len(x), WIDTH)
        for _ in range(self.evaluations):
            z = self.block(z, x)
        return z


class Equilibrated(nn.Module):
    """The block's fixed point."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.block, self.evaluations = Block(inputs), 0

    def forward(self, x: Tensor) -> Tensor:
        z0 = x.new_zeros(len(x), WIDTH)
        found = equilibrium(lambda z: self.block(z, x), z0, tolerance=1e-3)
        self.evaluations = found.evaluations
        return found.z


def layer(kind: str, inputs: int, depth: int) -> nn.Module:
    """One of the three."""
    if kind == "homotopy":
        return HomotopyODE(Pull(inputs), (WIDTH,), gradient="reversible", method="alf")
    return Explicit(inputs, depth) if kind == "explicit" else Equilibrated(inputs)


def trained(kind: str, seed: int, iterations: int, depth: int) -> tuple[float, int, float]:
    """Test accuracy, evaluations and peak memory of a training step."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, labels = torch.from_numpy(data.data).float() / 8 - 1, torch.from_numpy(data.target)
    torch.manual_seed(seed)
    order = torch.randperm(len(x))
    test, train = order[: len(x) // 4], order[len(x) // 4 :]
    hidden, head = layer(kind, x.shape[1], depth), nn.Linear(WIDTH, 10)
    blocks = [part for part in hidden.modules() if isinstance(part, Block)]
    optimizer = torch.optim.Adam([*hidden.parameters(), *head.parameters()], 3e-3)

    def step() -> None:
        rows = train[torch.randint(len(train), (BATCH,))]
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(hidden(x[rows])), labels[rows]).backward()
        optimizer.step()
        for block in blocks:
            block.contract()

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
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--depth", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in range(options.seeds):
        for kind in ("explicit", "equilibrium", "homotopy"):
            accuracy, evaluations, memory = trained(
                *(kind, seed, options.iterations, options.depth)
            )
            print(
                f"seed {seed} {kind:12} accuracy {accuracy:.3f}, {evaluations} evaluations, "
                f"peak memory {memory:.0f} states",
                flush=True,
            )


if __name__ == "__main__":
    main()
