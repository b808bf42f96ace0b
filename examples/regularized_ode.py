"""A classifier whose layers are an equation, trained to be cheap to solve.

`linear -> ODE over [0, 1] -> linear` on 8x8 digits, trained plainly; with the errors of all steps
that its solver took as a penalty (global); and with the error of one step at a random time (local,
with which any way to differentiate goes, here by checkpoints). Printed are test accuracy and the
evaluations that solving for the test part takes, beside a logistic regression's accuracy.
Opening the Blackbox: Accelerating Neural Differential Equations by Regularizing Internal Solver
Heuristics; Locally Regularized Neural Differential Equations: Some Black Boxes Were Meant to Remain
Closed!

    python -m examples.regularized_ode --output digits_ode.png
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ebbflow.differentiation import locally_regularized_odeint, odeint, regularized_odeint
from ebbflow.progress import bar
from examples._shared import arguments_and_data, plots, save

HOLDS = "a .npz with the arrays images (N, ...) and labels (N,)"
TOLERANCE: Any = {"rtol": 1e-5, "atol": 1e-5}
KINDS = ("plain", "global", "local")
# The last weight; a run begins at ten times it, as in the papers.
WEIGHT = 1.0


def read(path: Path) -> tuple[Tensor, Tensor]:
    """Flat pictures in [-1, 1] and labels from 0."""
    import numpy as np

    with np.load(path, allow_pickle=False) as file:
        if not {"images", "labels"} <= set(file.files):
            raise SystemExit(f"{path} must be {HOLDS}; it has {', '.join(file.files) or 'nothing'}")
        images, labels = file["images"], file["labels"]
    if len(images) != len(labels) or labels.ndim != 1:
        raise SystemExit(f"{path}: {len(images)} images, labels of shape {labels.shape}")
    x = torch.from_numpy(images.reshape(len(images), -1).astype("float64"))
    _, numbers = np.unique(labels, return_inverse=True)
    return (x - x.min()) / (x.max() - x.min()).clamp(min=1e-12) * 2 - 1, torch.from_numpy(numbers)


class OdeClassifier(nn.Module):
    """`inputs -> width numbers -> their equation -> scores`."""

    def __init__(self, inputs: int, classes: int, width: int = 24, hidden: int = 48) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(inputs, width), nn.Linear(width, classes)
        self.first, self.last = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.rate = nn.Parameter(0.3 * torch.randn(hidden))
        # A lively field from the start is more accurate, and dearer.
        with torch.no_grad():
            self.last.weight.mul_(4.0)

    def field(self, t: Tensor, y: Tensor) -> Tensor:
        """dy/dt."""
        return self.last(torch.tanh(self.first(y) + t * self.rate))

    def loss(self, x: Tensor, labels: Tensor, kind: str, weight: float) -> Tensor:
        """Cross entropy and the penalty of this kind."""
        start, span = self.into(x), [0.0, 1.0]
        if kind == "plain":
            ys = odeint(self.field, start, span, method="tsit5", **TOLERANCE)
            return cross_entropy(self.out(ys[-1]), labels)
        if kind == "global":
            found = regularized_odeint(self.field, start, span, **TOLERANCE)
        else:
            at = 0.01 + 0.98 * torch.rand(()).item()
            found = locally_regularized_odeint(
                self.field, start, span, at=at, gradient="checkpoint", **TOLERANCE
            )
        return cross_entropy(self.out(found.ys[-1]), labels) + weight * found.error

    @torch.no_grad()
    def measured(self, x: Tensor, labels: Tensor) -> tuple[float, int]:
        """Accuracy, and evaluations of one solve for all of x."""
        run = odeint(self.field, self.into(x), [0.0, 1.0], method="tsit5", full=True, **TOLERANCE)
        right = self.out(run.ys[-1]).argmax(1) == labels
        return right.double().mean().item(), int(run.evaluations)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    steps, path, data = arguments_and_data("regularized_ode", __doc__, 300, HOLDS, argv)
    if data is None:
        raw = load_digits()
        x, labels = torch.from_numpy(raw.data) / 8 - 1, torch.from_numpy(raw.target)
    else:
        x, labels = read(data)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(x) // 4], order[len(x) // 4 :]
    models, costs, results, begun = {}, {}, {}, time.perf_counter()
    with bar("regularised ODE", steps * len(KINDS)) as advance:
        for kind in KINDS:
            torch.manual_seed(0)
            model = OdeClassifier(x.shape[1], int(labels.max()) + 1).double()
            optimizer = torch.optim.Adam(model.parameters(), 0.01)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps + 1)
            costs[kind] = []
            for k in range(steps):
                rows = train[torch.randint(len(train), (64,))]
                optimizer.zero_grad()
                weight = WEIGHT * 10 ** (1 - k / steps)
                model.loss(x[rows], labels[rows], kind, weight).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 10.0)
                optimizer.step()
                schedule.step()
                if k % 10 == 0:
                    costs[kind].append((k, model.measured(x[test], labels[test])[1]))
                advance()
            accuracy, evaluations = model.measured(x[test], labels[test])
            results[f"{kind} accuracy"], results[f"{kind} evaluations"] = accuracy, evaluations
            models[kind] = model
            print(
                f"{kind:6} test accuracy {accuracy:.3f}, {evaluations} evaluations, "
                f"{time.perf_counter() - begun:.0f} s"
            )
    flat = LogisticRegression(max_iter=2000).fit(x[train].numpy(), labels[train].numpy())
    results["logistic accuracy"] = float(flat.score(x[test].numpy(), labels[test].numpy()))
    print(f"logistic regression: test accuracy {results['logistic accuracy']:.3f}")
    draw(models, costs, x[test][:60], labels[test][:60], path)
    return results


def draw(
    models: dict[str, OdeClassifier],
    costs: dict[str, list[tuple[int, int]]],
    x: Tensor,
    labels: Tensor,
    path: Path,
) -> None:
    """Evaluations in training, and paths of the state in its two largest directions."""
    figure, axes = plots().subplots(1, 1 + len(models), figsize=(4 * (1 + len(models)), 3.6))
    for kind, points in costs.items():
        axes[0].plot([k for k, _ in points], [n for _, n in points], label=kind)
    axes[0].set(xlabel="training step", title="evaluations for the test part")
    axes[0].legend()
    for axis, (kind, model) in zip(axes[1:], models.items(), strict=True):
        with torch.no_grad():
            times = torch.linspace(0, 1, 40).tolist()
            ys = odeint(model.field, model.into(x), times, method="tsit5", **TOLERANCE)
        _, _, directions = torch.pca_lowrank(ys.flatten(0, 1), 2)
        flat = (ys - ys.mean((0, 1))) @ directions
        for k in range(len(x)):
            axis.plot(*flat[:, k].T, color=f"C{int(labels[k]) % 10}", linewidth=0.7)
        axis.scatter(*flat[-1].T, c=[f"C{int(n) % 10}" for n in labels], s=12)
        axis.set(title=f"paths, {kind}", xticks=[], yticks=[])
    save(figure, path)


if __name__ == "__main__":
    main()
