"""Gradient descent through the sampler, and the state of it that can be saved."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ebbflow.centred import centre, restore
from ebbflow.denoiser import Denoiser, Frozen, Wrapper
from ebbflow.finite import NonFinite
from ebbflow.plan import Plan
from ebbflow.tuning.budget import Budget
from ebbflow.tuning.references import References
from ebbflow.tuning.residual_form import Parameters, ResidualForm
from ebbflow.tuning.saved import Saved

RATES = {"top": 0.02, "shares": 0.02, "length": 0.02, "decay": 0.01, "matrix": 0.006}
END = 0.95
ADAM = 0.9, 0.98
WARM = 20  # steps
CLIP = 2.0  # norm of a gradient
KNEE = 10.0
"""Errors beyond this many times the mean one count linearly: a sample that lands elsewhere has an
error that no small move mends, and its square would drown all others."""
LATE = 0.25
"""Share of the fit in which times move alone: they need few samples, the matrix many."""
GRADIENT = 3
"""Evaluations that a call with its gradient counts as: forward, once more, backward."""


class Moved(Wrapper):
    """A denoiser that is called at given times, tensors that may carry gradients, in their order.

    Each call is computed again when gradients are taken: memory holds the insides of one.
    """

    def __init__(self, inner: Denoiser, times: Tensor) -> None:
        super().__init__(inner)
        self.times = times

    def prepare(self, times: tuple[float, ...], x: Tensor, target: str = "x0") -> list[Frozen]:
        inner: Any = self.net

        def call(t: Tensor, x: Tensor, **condition: Any) -> Tensor:
            return inner.at(t, x, target)(x, **condition)

        network = next(inner.parameters(), None) is not None
        again = partial(checkpoint, call, use_reentrant=False) if network else call
        return [partial(again, t) for t in self.times]


def measure(denoiser: Denoiser, plan: Plan, of: References) -> Tensor:
    """The errors of a plan, infinite where it blows up."""
    try:
        return of.errors(denoiser, plan)
    except NonFinite:
        return torch.full((len(of),), math.inf)


def score(errors: Tensor) -> float:
    """What decides between plans: 0.6 log of the mean error + 0.4 log of the root mean square."""
    return float(0.6 * errors.mean().log() + 0.2 * errors.square().mean().log())


def loss(errors: Tensor, typical: float) -> Tensor:
    """A quarter of the mean square, linear beyond the knee, and half the mean; typical is 1."""
    e = errors / typical
    square = torch.where(e < KNEE, e**2, 2 * KNEE * e - KNEE**2)
    return 0.25 * square.mean() + 0.5 * e.mean()


class Fit:
    """Adam on the parameters of a form; `best` are those with the best score on `held_out`.

    Adam is written out, because torch.optim takes seconds to import, which the budget has not.
    """

    def __init__(
        self,
        form: ResidualForm,
        denoiser: Denoiser,
        train: References,
        held_out: References,
        batch: int,
        seed: int,
        saved: Saved | None = None,
    ) -> None:
        self.form, self.denoiser, self.train, self.held_out = form, denoiser, train, held_out
        self.batch, self.seed = min(batch, len(train)), seed
        # Looking at what is held out may cost a tenth of learning.
        self.every = max(15, math.ceil(10 * len(held_out) / (GRADIENT * self.batch)))
        self.parameters = form.first.copy()
        self.best = form.first.copy()
        self.step = 0
        self.begin: float | None = None
        self.best_score = self.typical = math.inf
        leaves = self.parameters.tensors()
        self.first = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        self.second = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        if saved is None:
            self.best_score = score(measure(denoiser, form.plan(form.first), held_out))
        else:
            self._restore(saved)
        for leaf in self.parameters.tensors().values():
            leaf.requires_grad_()

    def run(self, budget: Budget) -> Iterator[None]:
        """Learn until all but the last twentieth of the budget is spent, which pays for measuring
        what was learnt; yields after each step."""
        # From here on the share of what is left counts: the converged samples have cost theirs.
        if self.begin is None:
            self.begin = min(budget.share, 0.9 * END)
        while budget.share < END:
            self._learn((budget.share - self.begin) / (END - self.begin))
            budget.spend(GRADIENT * self.batch * self.form.nfe)
            if self.step % self.every == 0:
                self._look()
                budget.spend(len(self.held_out) * self.form.nfe)
            yield
        self._look()

    def _learn(self, share: float) -> None:
        part = self.train.rows(self._rows())
        plan = self.form.plan(self.parameters)
        moved = Moved(self.form.about(self.denoiser), self.form.times(self.parameters))
        self.step += 1
        try:
            errors = part.distance(self._run(plan, moved, part))
        except NonFinite:  # what blew up teaches nothing; the next samples may
            return
        mean = float(errors.detach().mean())
        self.typical = mean if self.step == 1 else 0.95 * self.typical + 0.05 * mean
        leaves = self.parameters.tensors()
        gradients = torch.autograd.grad(loss(errors, self.typical), list(leaves.values()))
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        if not bool(torch.isfinite(norm)):
            return
        pace = min(1.0, self.step / WARM) * (0.51 + 0.49 * math.cos(math.pi * min(share, 1.0)))
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            gradient = gradient * min(1.0, float(CLIP / norm))
            mean = self.first[name].lerp_(gradient, 1 - ADAM[0])
            square = self.second[name].lerp_(gradient**2, 1 - ADAM[1])
            if name == "matrix" and share < LATE:
                continue
            direction = mean / (1 - ADAM[0] ** self.step)
            scale = (square / (1 - ADAM[1] ** self.step)).sqrt() + 1e-8
            leaf.data -= pace * RATES[name] * direction / scale
        leaves["top"].data.clamp_(max=self.form.high)

    def _run(self, plan: Plan, moved: Moved, part: References) -> Tensor:
        """What the plan makes, its shift by the mean outside of the times that move."""
        if not plan.centred:
            return plan.run(moved, part.start, **part.condition)
        _, start, mean = centre(self.denoiser, (part.start,), plan.start, part.condition)
        end = replace(plan, centred=False).run(moved, start[0], **part.condition)
        return restore(end, mean, plan.schedule, plan.times[-1])

    def _rows(self) -> Tensor:
        """Of this step: the training samples in an order of their own in each round."""
        size = len(self.train)
        places = range(self.step * self.batch, (self.step + 1) * self.batch)
        return torch.stack(
            [_order(size, self.seed, place // size)[place % size] for place in places]
        )

    def _look(self) -> None:
        plan = self.form.plan(self.parameters.copy())
        found = score(measure(self.denoiser, plan, self.held_out))
        if found < self.best_score:
            self.best, self.best_score = self.parameters.copy(), found

    def numbers(self) -> dict[str, float]:
        names = ("step", "batch", "typical", "best_score", "begin")
        return {name: getattr(self, name) for name in names}

    def tensors(self) -> dict[str, Tensor]:
        """The state beside `numbers`."""
        out = {f"parameters.{name}": v for name, v in self.parameters.tensors().items()}
        out |= {f"best.{name}": v for name, v in self.best.tensors().items()}
        out |= {f"first.{name}": v for name, v in self.first.items()}
        out |= {f"second.{name}": v for name, v in self.second.items()}
        return out

    def _restore(self, saved: Saved) -> None:
        def part(kind: str) -> dict[str, Tensor]:
            return {name: saved.tensors[f"{kind}.{name}"] for name in self.first}

        self.parameters, self.best = Parameters(**part("parameters")), Parameters(**part("best"))
        self.first, self.second = part("first"), part("second")
        self.step = int(saved.numbers["step"])
        self.typical, self.best_score = saved.numbers["typical"], saved.numbers["best_score"]
        self.begin = saved.numbers["begin"]


@lru_cache(maxsize=4)
def _order(size: int, seed: int, round: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + round)
    return torch.randperm(size, generator=generator)
