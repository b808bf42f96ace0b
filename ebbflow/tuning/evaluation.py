"""What searches share: the error of a plan, the budget it is charged to, and when to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ebbflow.denoiser import Denoiser
from ebbflow.finite import NonFinite
from ebbflow.plan import Plan
from ebbflow.progress import bar
from ebbflow.tuning.identity import identity
from ebbflow.tuning.references import References

Objective = Callable[[Tensor, References], float]
"""Of samples (N, *shape) that a plan made of the references' noise; less is better."""


def mean_error(samples: Tensor, references: References) -> float:
    """The mean distance of samples to where the model itself takes the same noise, in deviations.

    The mean, not its square: a few samples that change mode would rule a root mean square.
    """
    return references.distance(samples).mean().item()


def energy(samples: Tensor, references: References) -> float:
    """The energy distance between the laws of two sets in the references' features, where it does
    not matter which sample is which; an unbiased estimate, which may be negative."""
    from ebbflow.metrics import energy_distance

    found = references.features(samples).flatten(1) / references.deviation
    return energy_distance(found, references.end.flatten(1) / references.deviation)


def frechet(samples: Tensor, references: References) -> float:
    """The Fréchet distance between the two sets in the references' features; it takes more samples
    than features."""
    from ebbflow.metrics.frechet import Moments, frechet_distance

    found = references.features(samples).flatten(1)
    return frechet_distance(found, Moments.of(references.end.flatten(1)))


class Trial:
    """The error of plans on one model, counted against a budget.

    Args:
        denoiser, references, objective: what is measured; a plan whose prediction is not finite
            has an infinite error.
        evaluations: at most so many denoiser calls a sample, as if every plan ran on all of the
            references; None for no limit.
        seconds: of wall time since the trial was made.

    Attributes: `spent`, the evaluations so far; `errors`, those of the plans so far, by key.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        references: References,
        objective: Objective = mean_error,
        evaluations: float | None = None,
        seconds: float = math.inf,
    ) -> None:
        if evaluations is not None and not evaluations > 0:
            raise ValueError(f"evaluations must be positive, got {evaluations}")
        if not seconds > 0:
            raise ValueError(f"budget_seconds must be positive, got {seconds}")
        if len(references) < 2:
            raise ValueError(f"a search needs at least 2 references, got {len(references)}")
        # The rest is held out: what is kept at the end is chosen on it.
        fit = max(1, 3 * len(references) // 4)
        self.fit, self.held_out = references.split(fit)
        self.share = fit / len(references)
        self.denoiser = denoiser
        self.objective = objective
        self.evaluations = math.inf if evaluations is None else float(evaluations)
        self.seconds = float(seconds)
        self.began = time.monotonic()
        self.spent = 0.0
        self.errors: dict[Any, float] = {}
        self.advance: Callable[[], None] = lambda: None

    def left(self, calls: int, reserve: int = 0) -> bool:
        """Whether a plan of so many calls, and `reserve` plans at the end, still fit."""
        cost = calls * (self.share + reserve * (1 - self.share))
        within = self.spent + cost <= self.evaluations * (1 + 1e-12)
        return within and time.monotonic() - self.began < self.seconds

    def error(self, key: Any, plan: Plan, denoiser: Denoiser | None = None) -> float:
        """The objective of a plan on the references that are searched on, once a key."""
        if key not in self.errors:
            self.errors[key] = self._measure(plan, self.fit, denoiser)
            self.spent += plan.nfe * self.share
            self.advance()
        return self.errors[key]

    def check(self, plan: Plan, denoiser: Denoiser | None = None) -> float:
        """The objective of a plan on the references that are held out."""
        self.spent += plan.nfe * (1 - self.share)
        return self._measure(plan, self.held_out, denoiser)

    def best(self, count: int) -> list[Any]:
        """The keys of least error, the best first."""
        return sorted(self.errors, key=lambda key: self.errors[key])[:count]

    def require(self, calls: int, least: int = 1) -> None:
        """Raise ValueError unless the budget suffices for so many plans and their checks."""
        need = least * calls
        if self.evaluations < need:
            raise ValueError(
                f"a budget of {self.evaluations:g} evaluations does not suffice for {least} "
                f"plan(s) of {calls} calls: give at least {need}"
            )

    def _measure(self, plan: Plan, references: References, denoiser: Denoiser | None) -> float:
        try:
            samples = references.run(denoiser or self.denoiser, plan)
            value = self.objective(samples, references)
        except NonFinite:
            return math.inf
        return value if math.isfinite(value) else math.inf

    @contextmanager
    def progress(self, description: str, show: bool) -> Iterator[None]:
        """A bar over the budget, in hundredths of it."""
        shown = 0
        with bar(description, 100, show) as advance:

            def tick() -> None:
                nonlocal shown
                elapsed = time.monotonic() - self.began
                done = max(self.spent / self.evaluations, elapsed / self.seconds)
                while shown < min(100, int(100 * done)):
                    shown += 1
                    advance()

            self.advance = tick
            yield

    def record(self, search: str, seed: int, before: float, after: float) -> Mapping[str, Any]:
        """What the origin of the plan found says."""
        return {
            "search": search,
            "model": identity(self.denoiser),
            "seed": seed,
            "objective": getattr(self.objective, "__name__", "objective"),
            "references": len(self.fit) + len(self.held_out),
            "evaluations": round(self.spent, 2),
            "seconds": round(time.monotonic() - self.began, 2),
            "error_before": before,
            "error_after": after,
        }
