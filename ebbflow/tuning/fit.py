"""Gradient descent through the sampler, and the state of it that can be saved."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ebbflow.denoiser import Denoiser, Frozen, Wrapper
from ebbflow.tuning.budget import Budget
from ebbflow.tuning.references import References
from ebbflow.tuning.residual_form import Parameters, ResidualForm
from ebbflow.tuning.saved import Saved

RATES = {"top": 0.02, "shares": 0.02, "length": 0.02, "decay": 0.01, "matrix": 0.006}
WARM = 20  # steps
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


def score(errors: Tensor) -> float:
    """What decides between plans: 0.6 log of the mean error + 0.4 log of the root mean square."""
    if not bool(torch.isfinite(errors).all()):
        return math.inf
    return 0.6 * math.log(errors.mean()) + 0.2 * math.log(errors.square().mean())


def loss(errors: Tensor, typical: float) -> Tensor:
    """A quarter of the mean square, linear beyond the knee, and half the mean; typical is 1."""
    e = errors / typical
    square = torch.where(e < KNEE, e**2, 2 * KNEE * e - KNEE**2)
    return 0.25 * square.mean() + 0.5 * e.mean()


class Fit:
    """Adam on the parameters of a form; `best` are those with the best score on `held_out`."""

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
        groups = [
            {"params": [leaf.requires_grad_()], "name": name} for name, leaf in leaves.items()
        ]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
        if saved is None:
            plan = form.plan(form.first)
            self.best_score = score(held_out.errors(denoiser, plan))
            self.typical = float(train.errors(denoiser, plan).mean())
        else:
            self._restore(saved)

    def run(self, budget: Budget) -> Iterator[None]:
        """Learn until the budget is spent; yields after each step."""
        # From here on the share of what is left counts: the converged samples have cost theirs.
        if self.begin is None:
            self.begin = min(budget.share, 0.9)
        while budget.share < 1:
            self._learn((budget.share - self.begin) / (1 - self.begin))
            budget.spend(GRADIENT * self.batch * self.form.nfe)
            if self.step % self.every == 0:
                self._look()
                budget.spend(len(self.held_out) * self.form.nfe)
            yield
        self._look()

    def _learn(self, share: float) -> None:
        part = self.train.rows(self._rows())
        plan = self.form.plan(self.parameters)
        moved = Moved(self.denoiser, self.form.times(self.parameters))
        errors = part.distance(plan.run(moved, part.start, **part.condition))
        mean = float(errors.detach().mean())
        self.typical = 0.95 * self.typical + 0.05 * mean
        self.optimizer.zero_grad()
        loss(errors, self.typical).backward()
        leaves = self.parameters.tensors()
        norm = torch.nn.utils.clip_grad_norm_(leaves.values(), 2.0)
        self.step += 1
        pace = min(1.0, self.step / WARM) * (0.51 + 0.49 * math.cos(math.pi * min(share, 1.0)))
        for group in self.optimizer.param_groups:
            waits = group["name"] == "matrix" and share < LATE
            group["lr"] = 0.0 if waits else RATES[group["name"]] * pace
        if bool(torch.isfinite(norm)):  # a sample that blew up teaches nothing
            self.optimizer.step()
        with torch.no_grad():
            self.parameters.top.clamp_(max=self.form.high)

    def _rows(self) -> Tensor:
        """Of this step: the training samples in an order of their own in each round."""
        size = len(self.train)
        places = range(self.step * self.batch, (self.step + 1) * self.batch)
        return torch.stack(
            [_order(size, self.seed, place // size)[place % size] for place in places]
        )

    def _look(self) -> None:
        found = score(self.held_out.errors(self.denoiser, self.form.plan(self.parameters.copy())))
        if found < self.best_score:
            self.best, self.best_score = self.parameters.copy(), found

    def numbers(self) -> dict[str, float]:
        names = ("step", "batch", "typical", "best_score", "begin")
        return {name: getattr(self, name) for name in names}

    def tensors(self) -> dict[str, Tensor]:
        """The state beside `numbers`."""
        out = {f"parameters.{name}": v for name, v in self.parameters.tensors().items()}
        out |= {f"best.{name}": v for name, v in self.best.tensors().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            out |= {f"adam.{i}.{name}": torch.as_tensor(v) for name, v in state.items()}
        return out

    def _restore(self, saved: Saved) -> None:
        for name, leaf in self.parameters.tensors().items():
            leaf.data.copy_(saved.tensors[f"parameters.{name}"])
        own = {name: saved.tensors[f"best.{name}"] for name in self.parameters.tensors()}
        self.best = Parameters(**own)
        described = self.optimizer.state_dict()
        for key, value in saved.tensors.items():
            kind, _, rest = key.partition(".")
            if kind == "adam":
                index, _, name = rest.partition(".")
                described["state"].setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(described)
        self.step = int(saved.numbers["step"])
        self.typical, self.best_score = saved.numbers["typical"], saved.numbers["best_score"]
        self.begin = saved.numbers["begin"]


@lru_cache(maxsize=4)
def _order(size: int, seed: int, round: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + round)
    return torch.randperm(size, generator=generator)
