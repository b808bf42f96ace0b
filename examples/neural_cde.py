"""A neural controlled equation that reads handwriting stroke by stroke.

Each stroke is a list of points at irregular times; the path through them drives the state,
`dz = f(z) dX` with X = (time, x, y), and its last state names the digit. Compared with a logistic
regression on the points at equal times. Neural Controlled Differential Equations for Irregular
Time Series.

    python -m examples.neural_cde --output strokes.png

The repository's strokes are the ten digits in one line each, bent, turned, moved and drawn at
uneven speed, of which a few points at random times are left.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ebbflow.differentiation import HermitePath, cdeint
from ebbflow.progress import bar
from examples._shared import arguments_and_data, columns, plots, save

HOLDS = "a .csv with the columns stroke, label, time, x, y, one point a row"
POINTS, COUNT = 20, 2500
# Where the pen passes, from the lower left (0, 0) to the upper right (9, 9).
DIGITS = (
    "59 18 14 50 84 88 59",
    "37 59 55 50",
    "17 39 88 64 10 90",
    "18 59 87 45 82 50 11",
    "69 13 93 77 60",
    "89 29 15 65 83 50 11",
    "79 35 12 50 82 54 23",
    "19 89 65 40",
    "55 17 59 87 55 12 50 82 55",
    "87 59 17 55 87 73 60",
)


def strokes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(POINTS, count, 3) of time, x and y, and labels."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    labels = torch.randint(10, (count,), generator=generator)
    points = torch.empty(POINTS, count, 3)
    for digit, shape in enumerate(DIGITS):
        rows = (labels == digit).nonzero()[:, 0]
        n = len(rows)
        if n == 0:
            continue
        corners = torch.tensor([[int(c) / 9 for c in word] for word in shape.split()]) - 0.5
        bent = corners[:, None] + 0.07 * normal(len(corners), n, 2)
        angle, stretch = 0.35 * normal(n), torch.exp(0.2 * normal(n, 2))
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1)
        bent = torch.einsum("nij,knj->kni", turn.view(n, 2, 2), bent * stretch)
        bent = bent + 0.15 * normal(n, 2)
        line = HermitePath(torch.linspace(0, 1, len(corners)).tolist(), bent)
        fine = torch.stack([line(t) for t in torch.linspace(0, 1, 100).tolist()])
        # The pen's place along the line at time t is t^p.
        times = torch.rand(POINTS, n, generator=generator).sort(0).values
        place = (99 * times ** torch.exp(0.4 * normal(n))).round().long()
        points[:, rows, 0] = times
        points[:, rows, 1:] = fine[place, torch.arange(n)] + 0.01 * normal(POINTS, n, 2)
    return points, labels


def read(path: Path) -> tuple[Tensor, Tensor]:
    """POINTS of each stroke, even in their order; times to [0, 1], places standardised."""
    found: dict[str, list[list[float]]] = {}
    names: dict[str, str] = {}
    for stroke, label, *numbers in columns(path, "stroke", "label", "time", "x", "y"):
        found.setdefault(stroke, []).append([float(v) for v in numbers])
        names[stroke] = label
    kinds = sorted(set(names.values()))
    if len(found) < 10 or len(kinds) < 2:
        raise SystemExit(
            f"{path} has {len(found)} strokes of {len(kinds)} labels; at least 10 of 2 are needed"
        )
    paths = []
    for rows in found.values():
        one = torch.tensor(sorted(rows))
        one[:, 0] = (one[:, 0] - one[0, 0]) / (one[-1, 0] - one[0, 0]).clamp(min=1e-12)
        paths.append(one[torch.linspace(0, len(one) - 1, POINTS).round().long()])
    points = torch.stack(paths, 1)
    places = points[..., 1:]
    points[..., 1:] = (places - places.mean((0, 1))) / places.std()
    return points, torch.tensor([kinds.index(names[stroke]) for stroke in found])


class NeuralCDE(nn.Module):
    """`z(0) = linear(X_0)`, `dz = f(z) dX`, `scores = linear(z(1))`."""

    def __init__(self, classes: int, width: int = 24, hidden: int = 48) -> None:
        super().__init__()
        self.width = width
        self.start = nn.Linear(3, width)
        self.net = nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, 3 * width), nn.Tanh()
        )
        self.out = nn.Linear(width, classes)

    def field(self, t: Tensor, z: Tensor) -> Tensor:
        """The matrix (B, width, 3) that multiplies dX."""
        return self.net(z).unflatten(-1, (self.width, 3))

    def forward(self, points: Tensor) -> Tensor:
        """Scores (B, classes) of points (T, B, 3); the path's own parameter counts the points."""
        path = HermitePath([float(k) for k in range(len(points))], points)
        ends = [0.0, len(points) - 1.0]
        z = cdeint(self.field, path, self.start(points[0]), ends, method="midpoint", step_size=1.0)
        return self.out(z[-1])


def at_equal_times(points: Tensor) -> Tensor:
    """x and y at POINTS equal times, (B, 2 POINTS), linear between the points."""
    t = points[..., 0].T.contiguous()
    wanted = torch.linspace(0, 1, POINTS).expand(len(t), -1).contiguous()
    right = torch.searchsorted(t, wanted).clamp(1, POINTS - 1)
    before, after = t.gather(1, right - 1), t.gather(1, right)
    share = ((wanted - before) / (after - before).clamp(min=1e-9)).clamp(0, 1)[..., None]
    batch = torch.arange(len(t))[:, None]
    x = points[..., 1:].transpose(0, 1)
    return (x[batch, right - 1] * (1 - share) + x[batch, right] * share).flatten(1)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    from sklearn.linear_model import LogisticRegression

    steps, path, data = arguments_and_data("neural_cde", __doc__, 600, HOLDS, argv)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    points, labels = strokes(COUNT, generator) if data is None else read(data)
    order = torch.randperm(len(labels), generator=generator)
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    model = NeuralCDE(int(labels.max()) + 1)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps + 1)
    begun, trace = time.perf_counter(), []
    with bar("neural CDE", steps) as advance:
        for k in range(steps):
            rows = train[torch.randint(len(train), (64,), generator=generator)]
            optimizer.zero_grad()
            loss = cross_entropy(model(points[:, rows]), labels[rows])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            trace.append(loss.item())
            if k % 50 == 49:
                print(f"step {k + 1}  loss {loss.item():.3f}  {time.perf_counter() - begun:.0f} s")
            advance()
    with torch.no_grad():
        guesses = model(points[:, test]).argmax(1)
    accuracy = (guesses == labels[test]).float().mean().item()
    flat = at_equal_times(points)
    plain = LogisticRegression(max_iter=500).fit(flat[train].numpy(), labels[train].numpy())
    baseline = float(plain.score(flat[test].numpy(), labels[test].numpy()))
    print(f"test accuracy: neural CDE {accuracy:.3f}, logistic regression {baseline:.3f}")
    draw(points[:, test], labels[test], guesses, path)
    found = {"accuracy": accuracy, "logistic": baseline}
    return found | {"first loss": trace[0], "last loss": sum(trace[-5:]) / len(trace[-5:])}


def draw(points: Tensor, labels: Tensor, guesses: Tensor, path: Path) -> None:
    """Strokes that were named rightly (above) and wrongly (below, as far as there are any)."""
    figure, axes = plots().subplots(2, 7, figsize=(13, 4))
    right, wrong = (labels == guesses).nonzero()[:, 0], (labels != guesses).nonzero()[:, 0]
    for row, chosen, colour in ((axes[0], right, "C0"), (axes[1], wrong, "C3")):
        for axis in row:
            axis.set_axis_off()
        for axis, k in zip(row, chosen.tolist(), strict=False):
            axis.plot(*points[:, k, 1:].T, ".-", color=colour)
            axis.plot(*points[0, k, 1:], "k>")
            axis.set(title=f"{labels[k]} read as {guesses[k]}", aspect="equal")
    save(figure, path)


if __name__ == "__main__":
    main()
