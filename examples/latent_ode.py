"""A latent ODE: series seen at irregular times, filled in and continued.

A recurrent network reads what was seen of a series, last first, and gives a normal law of the
state at its start; an equation for that state and a linear read-out give the series at any time,
each sample of the batch solved at its own times. Compared, on series not trained on, with straight
lines between what was seen, continued by the last value. Latent ODEs for Irregularly-Sampled Time
Series.

    python -m examples.latent_ode --output series.png

The repository's series are swings of one damped pendulum, seen some ten times in noise.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ebbflow.differentiation import odeint
from ebbflow.progress import bar
from examples._shared import arguments_and_data, columns, plots, save

HOLDS = "a .csv with the columns series, time, value, one observation a row"
FUTURE, COUNT = 0.7, 1000


@dataclass(frozen=True)
class Batch:
    """(T, B) times in [0, 1] that increase, values, and masks: what is there, what is shown.

    Where nothing is there, times go on beyond 1.
    """

    t: Tensor
    x: Tensor
    there: Tensor
    shown: Tensor

    def __getitem__(self, rows: Tensor | slice) -> Batch:
        return Batch(self.t[:, rows], self.x[:, rows], self.there[:, rows], self.shown[:, rows])

    def __len__(self) -> int:
        return self.t.shape[1]


def pendulum(count: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Angles of `θ'' = -θ' - 120 sin θ` from random starts, at 20 random times, with noise 0.1."""

    def swing(t: Tensor, y: Tensor) -> Tensor:
        angle, speed = y.unbind(-1)
        return torch.stack([speed, -speed - 120 * angle.sin()], -1)

    times, _ = torch.rand(20, count, generator=generator, dtype=torch.float64).sort(0)
    start = torch.randn(count, 2, generator=generator) * torch.tensor([1.0, 8.0])
    from_zero = torch.cat([torch.zeros(1, count, dtype=torch.float64), times])
    angle = odeint(swing, start, from_zero, batch_dims=1, rtol=1e-5, atol=1e-6)[1:, :, 0]
    angle = angle + 0.1 * torch.randn(20, count, generator=generator)
    return list(zip(times.T, angle.T, strict=True))


def read(path: Path) -> list[tuple[Tensor, Tensor]]:
    """Times, moved and scaled to [0, 1] together, and standardised values of each series."""
    found: dict[str, dict[float, float]] = {}
    for series, t, value in columns(path, "series", "time", "value"):
        found.setdefault(series, {})[float(t)] = float(value)
    if len(found) < 10:
        raise SystemExit(f"{path} has {len(found)} series; at least 10 are needed to learn from")
    every = [t for one in found.values() for t in one]
    values = torch.tensor([x for one in found.values() for x in one.values()])
    lo, span = min(every), max(max(every) - min(every), 1e-12)
    pairs = []
    for one in found.values():
        t = torch.tensor(sorted(one), dtype=torch.float64)
        x = torch.tensor([one[float(s)] for s in t], dtype=torch.float32)
        pairs.append(((t - lo) / span, (x - values.mean()) / values.std()))
    return pairs


def gathered(series: list[tuple[Tensor, Tensor]], generator: torch.Generator) -> Batch:
    """One batch; a third of the times and all after FUTURE are there but not shown."""
    longest = max(len(t) for t, _ in series)
    t = 1 + torch.arange(1, longest + 1, dtype=torch.float64)[:, None].repeat(1, len(series))
    x, there = torch.zeros(longest, len(series)), torch.zeros(longest, len(series), dtype=bool)
    for k, (times, values) in enumerate(series):
        t[: len(times), k], x[: len(times), k], there[: len(times), k] = times, values, True
    shown = there & (t < FUTURE) & (torch.rand(t.shape, generator=generator) < 2 / 3)
    return Batch(t, x, there, shown)


class LatentODE(nn.Module):
    """`(t, x) -> GRU -> law of z(0)`, `dz/dt = net(z)`, `x = linear(z)`."""

    def __init__(self, width: int = 6, hidden: int = 48) -> None:
        super().__init__()
        self.width = width
        self.reader = nn.GRUCell(3, 48)
        self.law = nn.Linear(48, 2 * width)
        self.net = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width))
        self.out = nn.Linear(width, 1)
        self.log_noise = nn.Parameter(torch.tensor(-1.0))

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the deviation of z(0), from what is shown."""
        state = torch.zeros(len(batch), 48)
        later = torch.full((len(batch),), FUTURE)
        for t, x, shown in zip(*(v.flip(0) for v in (batch.t, batch.x, batch.shown)), strict=True):
            t = t.to(x)
            read = self.reader(torch.stack([x, t, later - t], -1), state)
            state = torch.where(shown[:, None], read, state)
            later = torch.where(shown, t, later)
        mean, log_deviation = self.law(state).chunk(2, -1)
        return mean, log_deviation - 2

    def field(self, t: Tensor, z: Tensor) -> Tensor:
        """dz/dt, 8 times the network's: a few swings in the unit of time."""
        return 8 * self.net(z)

    def decode(self, z: Tensor, t: Tensor) -> Tensor:
        """The series (T, B) at each sample's own times, from z(0)."""
        start = torch.full_like(t[:1], -1e-3)
        states = odeint(
            self.field, z, torch.cat([start, t]), rtol=1e-3, atol=1e-3, method="tsit5", batch_dims=1
        )
        return self.out(states[1:])[..., 0]

    def loss(self, batch: Batch, anneal: float) -> Tensor:
        """Minus the evidence bound a sample, its divergence from the prior weighted by `anneal`."""
        mean, log_deviation = self.encode(batch)
        z = mean + log_deviation.exp() * torch.randn_like(mean)
        # Times that are not there are not solved for: they wait at the end of the span.
        x = self.decode(z, within(batch))
        misfit = ((x - batch.x) / self.log_noise.exp()).square() / 2 + self.log_noise
        divergence = (mean.square() + (2 * log_deviation).exp() - 1) / 2 - log_deviation
        return (torch.where(batch.there, misfit, 0.0).sum() + anneal * divergence.sum()) / len(mean)


def within(batch: Batch) -> Tensor:
    """The times, with those that are not there just after the span instead of far."""
    after = 1 + 1e-6 * torch.arange(1, len(batch.t) + 1, dtype=batch.t.dtype)[:, None]
    return torch.where(batch.there, batch.t, after)


def straight_lines(batch: Batch) -> Tensor:
    """Linear between what is shown, and the first or last value outside."""
    found = torch.zeros_like(batch.x)
    for k in range(len(batch)):
        t, x = batch.t[batch.shown[:, k], k], batch.x[batch.shown[:, k], k]
        if len(t) == 0:
            continue
        right = torch.searchsorted(t, batch.t[:, k].contiguous()).clamp(1, max(len(t) - 1, 1))
        left, right = right - 1, right.clamp(max=len(t) - 1)
        gap = (t[right] - t[left]).clamp(min=1e-12)
        share = ((batch.t[:, k] - t[left]) / gap).clamp(0, 1).to(x)
        found[:, k] = x[left] + share * (x[right] - x[left])
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    steps, path, data = arguments_and_data("latent_ode", __doc__, 700, HOLDS, argv)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    series = pendulum(COUNT, generator) if data is None else read(data)
    order = torch.randperm(len(series), generator=generator)
    everything = gathered([series[int(k)] for k in order], generator)
    held = max(len(series) // 5, 1)
    test, train = everything[:held], everything[held:]
    model = LatentODE()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps + 1)
    begun, trace = time.perf_counter(), []
    with bar("latent ODE", steps) as advance:
        for k in range(steps):
            rows = torch.randint(len(train), (min(64, len(train)),), generator=generator)
            optimizer.zero_grad()
            loss = model.loss(train[rows], min(1.0, 2 * k / steps))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            schedule.step()
            trace.append(loss.item())
            if k % 50 == 49:
                print(f"step {k + 1}  loss {loss.item():.2f}  {time.perf_counter() - begun:.0f} s")
            advance()
    with torch.no_grad():
        mean, _ = model.encode(test)
        guesses = {"latent ODE": model.decode(mean, within(test)), "lines": straight_lines(test)}
    results: dict[str, float] = {"first loss": trace[0], "last loss": trace[-1]}
    for span, chosen in (
        ("between", test.there & ~test.shown & (test.t < FUTURE)),
        ("beyond", test.there & (test.t >= FUTURE)),
    ):
        for name, guess in guesses.items():
            error = (guess - test.x)[chosen].square().mean().sqrt().item()
            results[f"{name} {span}"] = error
        print(
            f"held-out error {span} what was seen: latent ODE "
            f"{results[f'latent ODE {span}']:.3f}, straight lines {results[f'lines {span}']:.3f}"
        )
    draw(model, test, path)
    return results


def draw(model: LatentODE, test: Batch, path: Path) -> None:
    """Six series: what was seen, what was not, twenty draws from the law of the start."""
    figure, axes = plots().subplots(2, 3, figsize=(12, 6), sharex=True, sharey=True)
    fine = torch.linspace(0, 1, 120, dtype=torch.float64)
    for k, axis in enumerate(axes.flatten()[: len(test)]):
        one = test[torch.tensor([k])]
        with torch.no_grad():
            mean, log_deviation = model.encode(one)
            z = mean + log_deviation.exp() * torch.randn(20, model.width)
            curves = model.decode(z, fine[:, None].repeat(1, 20))
        axis.plot(fine, curves, color="C0", alpha=0.15)
        axis.axvspan(FUTURE, 1, color="0.93")
        t, x, shown, there = (v[:, 0] for v in (one.t, one.x, one.shown, one.there))
        axis.plot(t[shown], x[shown], "ko", label="seen")
        axis.plot(t[there & ~shown], x[there & ~shown], "C1x", label="not seen")
        axis.set_xlim(0, 1)
    axes[0, 0].legend()
    figure.supxlabel("time")
    save(figure, path)


if __name__ == "__main__":
    main()
