"""A neural stochastic differential equation that generates series.

`z(0)` from normal numbers, `dz = f(t, z) dt + g(t, z) ∘ dW`, a linear read-out; trained by the
energy distance between batches of generated and real paths, differentiated by undoing reversible
Heun steps, in one state's memory. Compared by the distance of the marginal laws from series not
trained on, beside other real series of the same number (as near as it gets) and a normal law of the
whole path with the data's mean and covariance. On Neural Differential Equations, section 4.3;
Efficient and Accurate Gradients for Neural SDEs.

    python -m examples.neural_sde --output paths.png

The repository's series wander between two wells whose depths swap slowly.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ebbflow.differentiation import sdeint
from ebbflow.progress import bar
from examples._shared import arguments_and_data, columns, plots, save

HOLDS = "a .csv with the columns series, time, value, one observation a row"
TIMES, COUNT = 17, 6000


def wells(count: int, seed: int) -> Tensor:
    """(TIMES, count) of `dx = 8 (x - x³ + 0.7 cos 3t) dt + 1.2 dW`, from x(0) around -0.5."""

    def drift(t: Tensor, x: Tensor) -> Tensor:
        return 8 * (x - x**3 + 0.7 * torch.cos(3 * t))

    def diffusion(t: Tensor, x: Tensor) -> Tensor:
        return torch.full_like(x, 1.2)

    generator = torch.Generator().manual_seed(seed)
    start, times = -0.5 + 0.3 * torch.randn(count, generator=generator), torch.linspace(0, 1, TIMES)
    return sdeint(drift, diffusion, start, times, seed=seed, method="heun", steps=16)


def read(path: Path) -> Tensor:
    """Standardised values of each series at TIMES equal times of its span, linear in between."""
    found: dict[str, dict[float, float]] = {}
    for series, t, value in columns(path, "series", "time", "value"):
        found.setdefault(series, {})[float(t)] = float(value)
    if len(found) < 20:
        raise SystemExit(f"{path} has {len(found)} series; at least 20 are needed to learn a law")
    import numpy as np

    rows = []
    for one in found.values():
        t = sorted(one)
        rows.append(np.interp(np.linspace(t[0], t[-1], TIMES), t, [one[s] for s in t]))
    x = torch.tensor(np.stack(rows, 1), dtype=torch.float32)
    return (x - x.mean()) / x.std()


class NeuralSDE(nn.Module):
    """A generator of paths: `noise -> z(0)`, drift, diagonal diffusion and read-out."""

    def __init__(self, width: int = 8, hidden: int = 32) -> None:
        super().__init__()
        self.width = width
        self.start = nn.Sequential(nn.Linear(4, hidden), nn.SiLU(), nn.Linear(hidden, width))
        self.f = nn.Sequential(nn.Linear(width + 1, hidden), nn.SiLU(), nn.Linear(hidden, width))
        self.g = nn.Sequential(nn.Linear(width + 1, hidden), nn.SiLU(), nn.Linear(hidden, width))
        self.out = nn.Linear(width, 1)

    def drift(self, t: Tensor, z: Tensor) -> Tensor:
        """f, bounded, so that no path runs away."""
        return 8 * torch.tanh(self.f(self.with_time(t, z)))

    def diffusion(self, t: Tensor, z: Tensor) -> Tensor:
        """g, positive and bounded."""
        return 3 * torch.sigmoid(self.g(self.with_time(t, z)))

    def with_time(self, t: Tensor, z: Tensor) -> Tensor:
        """z and t side by side."""
        return torch.cat([z, t.expand(len(z), 1)], 1)

    def forward(self, count: int, seed: int) -> Tensor:
        """(TIMES, count) paths that the seed decides."""
        noise = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
        # Nodes at multiples of 1/32 cost few levels of the Brownian tree.
        times = torch.linspace(0, 1, TIMES)
        z = sdeint(
            self.drift,
            self.diffusion,
            self.start(noise),
            times,
            seed=seed,
            steps=2,
            gradient="reversible",
        )
        return self.out(z)[..., 0]


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """`2 E|X - Y| - E|X - X'| - E|Y - Y'|` of paths (T, n): 0 only for equal laws; unbiased."""

    def within(a: Tensor) -> Tensor:
        return torch.pdist(a.T).mean()

    across = (x.T[:, None] - y.T[None]).square().sum(-1).clamp(min=1e-12).sqrt().mean()
    return 2 * across - within(x) - within(y)


def marginal_distance(x: Tensor, y: Tensor) -> float:
    """Wasserstein's first distance of the values at each time, the mean over the times."""
    levels = (torch.arange(500) + 0.5) / 500
    return (x.quantile(levels, 1) - y.quantile(levels, 1)).abs().mean().item()


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    steps, path, data = arguments_and_data("neural_sde", __doc__, 500, HOLDS, argv)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    x = wells(COUNT, 1) if data is None else read(data)
    x = x[:, torch.randperm(x.shape[1], generator=generator)]
    held = x.shape[1] // 3
    test, other, train = x[:, :held], x[:, held : 2 * held], x[:, 2 * held :]
    model = NeuralSDE()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps + 1)
    begun, trace = time.perf_counter(), []
    with bar("neural SDE", steps) as advance:
        for k in range(steps):
            rows = torch.randint(train.shape[1], (128,), generator=generator)
            optimizer.zero_grad()
            loss = energy_distance(model(128, 1000 + k), train[:, rows])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            trace.append(loss.item())
            if k % 50 == 49:
                print(f"step {k + 1}  loss {loss.item():.4f}  {time.perf_counter() - begun:.0f} s")
            advance()
    with torch.no_grad():
        made = model(held, 7)
    factor = torch.linalg.cholesky(torch.cov(train) + 1e-6 * torch.eye(TIMES))
    normal = train.mean(1, keepdim=True) + factor @ torch.randn(TIMES, held, generator=generator)
    results = {"first loss": trace[0], "last loss": trace[-1]}
    for name, paths in (("neural SDE", made), ("normal law", normal), ("other real", other)):
        results[name] = marginal_distance(paths, test)
        results[f"{name} paths"] = energy_distance(paths[:, :1000], test[:, :1000]).item()
        print(
            f"{name}: distance of the marginals {results[name]:.4f}, "
            f"energy distance of the paths {results[f'{name} paths']:.4f}"
        )
    draw(made, test, path)
    return results


def draw(made: Tensor, real: Tensor, path: Path) -> None:
    """Paths of both kinds, and their laws at three times."""
    figure, axes = plots().subplots(1, 5, figsize=(16, 3.2))
    t = torch.linspace(0, 1, TIMES)
    low, high = real.min().item(), real.max().item()
    for axis, paths, name in ((axes[0], real, "real"), (axes[1], made, "generated")):
        axis.plot(t, paths[:, :30], color="C0" if name == "real" else "C1", alpha=0.4)
        axis.set(title=name, xlabel="time", ylim=(low, high))
    bins = torch.linspace(low, high, 40).tolist()
    for axis, k in zip(axes[2:], (TIMES // 4, TIMES // 2, TIMES - 1), strict=True):
        for paths, name in ((real, "real"), (made, "generated")):
            axis.hist(paths[k], bins, density=True, alpha=0.5, label=name)
        axis.set(title=f"time {t[k]:.2f}")
    axes[2].legend()
    save(figure, path)


if __name__ == "__main__":
    main()
