"""Where a fit begins: rows by regression along the model's own paths, levels by a random search."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from ebbflow import solvers
from ebbflow.denoiser import Denoiser
from ebbflow.tuning.budget import Budget
from ebbflow.tuning.fit import score
from ebbflow.tuning.passage import Frame
from ebbflow.tuning.references import SOLVER, References
from ebbflow.tuning.residual_form import NONE, Parameters, ResidualForm

STEPS = 48  # of the paths
SAMPLES = 64
TRIALS = 40
SPREAD = 0.25  # of levels, e-folds, at first
RIDGE = 1e-9
TOPS, BOTTOMS = (10.0, 35.0), (0.1, 0.2)  # of levels to begin at, in deviations


class Paths:
    """Converged paths of some samples: w at any level, linear in log s between nodes."""

    def __init__(self, frame: Frame, denoiser: Denoiser) -> None:
        form, part = frame.form, frame.part
        plan = solvers.get(SOLVER).plan(form.schedule, STEPS)
        states, levels = [frame.start], [-form.schedule.log_snr(form.start).item() / 2]
        for step in plan.execute(denoiser, part.start, **part.condition):
            node = plan.stages[step.stage].node
            if step.state is None or node is None or not form.end < node < form.start:
                continue
            x = step.state
            if frame.mean is not None:
                x = x - form.schedule.alpha(node).item() * frame.mean
            states.append(frame.inside(x, node))
            levels.append(-form.schedule.log_snr(node).item() / 2)
        end = part.samples if frame.mean is None else part.samples - frame.mean
        self.end = frame.inside(end, form.end)
        self.states, self.levels = states, levels

    def at(self, level: float) -> Tensor:
        """w (B, *axes) at a level."""
        nodes = self.levels
        k = next((k for k, (_, low) in enumerate(pairwise(nodes)) if low <= level), len(nodes) - 2)
        high, low = nodes[k : k + 2]
        share = 1.0 if math.isinf(high) else min(1.0, max(0.0, (high - level) / (high - low)))
        return torch.lerp(self.states[k], self.states[k + 1], share)


def regress(frame: Frame, paths: Paths, levels: Tensor) -> tuple[Parameters, Tensor]:
    """Rows one after the other, each the least squares of the path's next state over what the calls
    before it found in the states that the rows before it made; and the last state (B, *shape)."""
    form = frame.form
    n, kinds = form.nfe, form.kinds
    gaps = (-torch.diff(levels)).clamp(min=NONE).log()
    found = Parameters(
        levels[0].clone(), gaps, torch.zeros(n + 1).double(), torch.zeros(2, n + 1, n).double()
    )
    times = form.times(found).tolist()
    gains, rows = form.gains(found), form.coefficients(found)
    features = form.features(form.levels(found))[:kinds]
    residuals: list[Tensor] = []
    for k in range(n + 1):
        target = paths.at(float(levels[k])) if k < n else paths.end
        w = frame.state(k, gains, rows, residuals)
        # What differs counts as much as it does in the state.
        by = frame.scale(times[k] if k < n else form.end)[1].to(w)
        columns = [
            features[kind, j].to(w) * residuals[j] for kind in range(kinds) for j in range(k)
        ]
        columns = [frame.start, *columns]
        table = torch.stack([(by * c).flatten() for c in columns], 1).double()
        lack = (by * (target - w)).flatten().double()
        size = table.square().sum(0).sqrt().clamp(min=1e-300)
        table = table / size
        normal = table.T @ table + RIDGE * torch.eye(len(size), dtype=torch.float64)
        solved = torch.linalg.solve(normal, table.T @ lack) / size
        found.gain[k] = solved[0]
        found.matrix[:kinds, k, :k] = solved[1:].reshape(kinds, k)
        w = w + sum(float(c) * column for c, column in zip(solved, columns, strict=True))
        if k < n:
            residuals.append(frame.residual(w, times[k]))
    return found, frame.sample(w)


@torch.no_grad()
def regression(
    form: ResidualForm,
    denoiser: Denoiser,
    train: References,
    budget: Budget,
    until: float,
    evaluations: float,
    seed: int,
) -> Parameters:
    """The best of levels near those of the form, each with its rows by `regress`, until that share
    of the budget, which is about so many evaluations, is used."""
    n = form.nfe
    count = max(8, min(SAMPLES, int(evaluations / (STEPS + TRIALS * n))))
    frame = Frame(form, denoiser, train.rows(slice(count)))
    paths = Paths(frame, denoiser)
    budget.spend(STEPS * len(frame.part))

    def tried(levels: Tensor) -> tuple[float, Parameters]:
        found, samples = regress(frame, paths, levels)
        budget.spend(n * len(frame.part))
        return score(frame.part.distance(samples)), found

    generator = torch.Generator().manual_seed(seed)
    spread = SPREAD
    begun = [(*tried(levels), levels) for levels in _beginnings(form)]
    best, found, levels = min(begun, key=lambda each: each[0])
    while budget.share < until:
        moves = spread * torch.randn(n, generator=generator, dtype=torch.float64)
        moves *= torch.rand(n, generator=generator) < 0.5
        there = (levels + moves).clamp(form.low, form.high).sort(descending=True).values
        size, parameters = tried(there)
        if size < best:
            best, found, levels, spread = size, parameters, there, 1.15 * spread
        else:
            spread *= 0.95
    return found


def _beginnings(form: ResidualForm) -> Iterator[Tensor]:
    """Levels to search from: those of the form, and some equally far apart."""
    yield form.levels(form.first)
    unit = 0.5 * form.axes.variance.mean().log()
    for high in TOPS:
        for low in BOTTOMS:
            even = torch.linspace(math.log(high), math.log(low), form.nfe, dtype=torch.float64)
            yield (unit + even).clamp(form.low, form.high)
