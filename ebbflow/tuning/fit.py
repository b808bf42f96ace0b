"""Gauss-Newton on the parameters of a form, and the state of it that can be saved."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from ebbflow.denoiser import Denoiser
from ebbflow.finite import NonFinite
from ebbflow.plan import Plan
from ebbflow.tuning.budget import Budget
from ebbflow.tuning.passage import Frame, Passage
from ebbflow.tuning.references import References
from ebbflow.tuning.residual_form import Parameters, ResidualForm
from ebbflow.tuning.saved import Saved

END = 0.95
STEPS, BATCH = 6, 512
"""At least so many steps, and at most so many samples for each."""
KNEE = 10.0
"""A sample whose error is this many times the median lands elsewhere, which no small move mends:
beyond it errors count by their size, and not by their square."""
DAMPING = 1e-2, (0.1, 1.0, 10.0)
"""At first, in diagonals of the normal matrix, and the changes of it that are tried."""
SETTLED = 1e9  # a damping at which no step gains anything
MOVES = {"top": 0.01, "gaps": 0.01}
"""Of parameters, for differences; the others move a state by `NUDGE` of its own deviation."""
NUDGE = 0.003
NUMBERS = 2**24  # that the columns of one part of the samples may hold


def measure(denoiser: Denoiser, plan: Plan, of: References) -> Tensor:
    """The errors of a plan, infinite where it blows up."""
    try:
        return of.errors(denoiser, plan)
    except NonFinite:
        return torch.full((len(of),), math.inf)


def score(errors: Tensor) -> float:
    """What decides between plans: 0.6 log of the mean error + 0.4 log of the root mean square."""
    return float(0.6 * errors.mean().log() + 0.2 * errors.square().mean().log())


def weights(errors: Tensor) -> Tensor:
    """Of the squares of errors (N,), so that least squares go down where `score` does."""
    mean, square = errors.mean(), errors.square().mean()
    each = 0.3 / (mean * (errors + 0.1 * mean)) + 0.2 / square
    return each * (KNEE * errors.median() / errors.clamp(min=1e-300)).clamp(max=1.0)


class Directions:
    """The parameters of a form as a vector.

    places: name and index of each; first: the call from which on it matters, n for the last row.
    """

    def __init__(self, form: ResidualForm) -> None:
        n = form.nfe
        below = [(k, j) for k in range(n + 1) for j in range(k)]
        found: list[tuple[str, tuple[int, ...], int]] = [("top", (), 0)]
        found += [("gaps", (k,), k + 1) for k in range(n - 1)]
        found += [("gain", (k,), k) for k in range(n + 1)]
        found += [("matrix", (kind, *at), at[0]) for kind in range(form.kinds) for at in below]
        self.places = [(name, at) for name, at, _ in found]
        self.first = [first for *_, first in found]
        self.evaluations = sum(n - first for first in self.first)

    def __len__(self) -> int:
        return len(self.places)

    def sizes(self, form: ResidualForm, parameters: Parameters, run: Passage) -> Tensor:
        """(P,): of moves whose differences are derivatives, in view of what a run found."""
        out = torch.full((len(self),), NUDGE, dtype=torch.float64)
        features = form.features(form.levels(parameters))
        for p, (name, at) in enumerate(self.places):
            if name in MOVES:
                out[p] = MOVES[name]
            elif name == "matrix":
                kind, _, j = at
                wide = features[kind, j].to(run.residuals[j]) * run.residuals[j]
                out[p] /= max(1e-6, float(wide.square().mean().sqrt()))
        return out

    def moved(self, parameters: Parameters, by: Tensor) -> Parameters:
        """The parameters, moved by a vector (P,)."""
        out = parameters.copy()
        for (name, at), value in zip(self.places, by.tolist(), strict=True):
            getattr(out, name)[at] += value
        return out


class Fit:
    """Gauss-Newton steps, damped as Levenberg and Marquardt do, on a few samples each; `best` are
    the parameters with the best score on `held_out`.

    One step solves least squares of the samples' errors, weighted for the score, in all times and
    coefficients at once. Columns of the Jacobian are differences of runs, which begin at the first
    call that a parameter changes.
    """

    def __init__(
        self,
        form: ResidualForm,
        denoiser: Denoiser,
        train: References,
        held_out: References,
        evaluations: float,
        seed: int,
        first: Parameters,
        saved: Saved | None = None,
    ) -> None:
        self.form, self.denoiser, self.train, self.held_out = form, denoiser, train, held_out
        self.directions, self.seed = Directions(form), seed
        self.each = self.directions.evaluations + (2 + len(DAMPING[1])) * form.nfe
        most = min(BATCH, math.ceil(len(train) / 2))
        self.batch = min(most, max(8, int(evaluations / STEPS / self.each)))
        self.parameters = first.copy()
        self.best = form.first
        self.step, self.damping, self.unseen, self.took = 0, DAMPING[0], 0.0, 0.0
        self.best_score = math.inf
        if saved is None:
            self.best_score = self._score(form.first, held_out)
            if first is not form.first:
                self._look()
        else:
            self._restore(saved)

    def run(self, budget: Budget) -> Iterator[None]:
        """Learn until a step would exceed the budget, of which the last twentieth pays for
        measuring what was learnt, or nothing is left to learn; yields after each step."""
        look = len(self.held_out) * self.form.nfe
        while budget.share + self.took < END and self.damping < SETTLED:
            began = budget.share
            spent = self._learn()
            self.unseen += spent
            # Looking at what is held out may cost a fifth of learning.
            if self.unseen >= 5 * look:
                self._look()
                spent, self.unseen = spent + look, 0.0
            budget.spend(spent)
            self.took = 0.5 * (budget.share - began)  # a step of which half fits is made
            yield
        self._look()

    def _learn(self) -> float:
        """One step, whose length is decided by other samples; the evaluations that it took."""
        part, others = (self.train.rows(self._rows(self.step + k)) for k in (0, 1))
        self.step += 1
        matrix, right = self._equations(part)
        diagonal = torch.diagonal(matrix).clamp(min=1e-9 * float(torch.diagonal(matrix).max()))
        found = [(self._score(self.parameters, others), 1.0, self.parameters)]
        for change in DAMPING[1]:
            damped = matrix + torch.diag(change * self.damping * diagonal)
            there = self.directions.moved(self.parameters, torch.linalg.solve(damped, right))
            there.top.clamp_(max=self.form.high)
            found.append((self._score(there, others), change, there))
        _, change, best = min(found, key=lambda each: each[0])
        stays = best is self.parameters
        self.damping = max(1e-6, self.damping * (10 * max(DAMPING[1]) if stays else change))
        self.parameters = best
        return len(part) * self.each

    @torch.no_grad()
    def _equations(self, part: References) -> tuple[Tensor, Tensor]:
        """The normal matrix (P, P) and right-hand side (P,) of the weighted least squares."""
        size = len(self.directions) * part.end[0].numel()
        chunks = torch.arange(len(part)).split(max(1, min(64, NUMBERS // size)))
        frames = [Frame(self.form, self.denoiser, part.rows(index)) for index in chunks]
        bases = [frame.run(self.parameters) for frame in frames]
        errors = part.distance(torch.cat([base.sample for base in bases]))
        matrix = torch.zeros(len(self.directions), len(self.directions), dtype=torch.float64)
        right = matrix[0].clone()
        each = weights(errors).split([len(index) for index in chunks])
        for frame, base, weight in zip(frames, bases, each, strict=True):
            columns, lack = self._columns(frame, base)
            root = weight.to(columns).sqrt()[:, None]
            columns, lack = (columns * root[..., None]).flatten(0, 1), (lack * root).flatten()
            matrix += (columns.T @ columns).to(matrix)
            right += (columns.T @ lack).to(matrix)
        return matrix, right

    def _score(self, parameters: Parameters, of: References) -> float:
        return score(measure(self.denoiser, self.form.plan(parameters), of))

    def _columns(self, frame: Frame, base: Passage) -> tuple[Tensor, Tensor]:
        """The Jacobian (B, features, P) of the samples' features, and what they lack (B, features),
        in deviations."""
        part = frame.part
        here = part.features(base.sample).flatten(1)
        scale = math.sqrt(here.shape[1]) * part.deviation
        columns = here.new_empty(*here.shape, len(self.directions))
        sizes = self.directions.sizes(self.form, self.parameters, base)
        for p, (move, first) in enumerate(zip(sizes.diag(), self.directions.first, strict=True)):
            there = frame.run(self.directions.moved(self.parameters, move), base, first).sample
            columns[..., p] = (part.features(there).flatten(1) - here) / (float(sizes[p]) * scale)
        return columns, (part.end.flatten(1) - here) / scale

    def _rows(self, step: int) -> Tensor:
        """Of a step: the training samples in an order of their own in each round."""
        size = len(self.train)
        places = range(step * self.batch, (step + 1) * self.batch)
        return torch.stack(
            [_order(size, self.seed, place // size)[place % size] for place in places]
        )

    def _look(self) -> None:
        found = self._score(self.parameters, self.held_out)
        if found < self.best_score:
            self.best, self.best_score = self.parameters.copy(), found

    def numbers(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("step", "batch", *_KEPT)}

    def tensors(self) -> dict[str, Tensor]:
        """The state beside `numbers`."""
        out = {f"parameters.{name}": v for name, v in self.parameters.tensors().items()}
        return out | {f"best.{name}": v for name, v in self.best.tensors().items()}

    def _restore(self, saved: Saved) -> None:
        def part(kind: str) -> Parameters:
            names = self.parameters.tensors()
            return Parameters(**{name: saved.tensors[f"{kind}.{name}"] for name in names})

        self.parameters, self.best = part("parameters"), part("best")
        self.step, self.batch = int(saved.numbers["step"]), int(saved.numbers["batch"])
        for name in _KEPT:
            setattr(self, name, saved.numbers[name])


_KEPT = ("damping", "unseen", "took", "best_score")


@lru_cache(maxsize=4)
def _order(size: int, seed: int, round: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + round)
    return torch.randperm(size, generator=generator)
