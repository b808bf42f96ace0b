"""One-step methods: `start` makes the state a method carries, `step` advances it, `undo` goes back.

The carried state is a tuple of tensors whose first is y. Steps are plain numbers (one, or one for
each sample), so that a solve is replayed from its list of steps alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ebbflow.differentiation import tableaus
from ebbflow.differentiation.fields import Field, Time, combination, later, scaled
from ebbflow.differentiation.tableaus import Tableau

State = tuple[Tensor, ...]
Solve = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Step:
    """What one step gives: the new state, an error estimate of y and the solution in between.

    `dense(θ)` is y at t + θh; `nodes` are the times and states at the stages, and `slopes` f there.
    """

    state: State
    error: Tensor | None = None
    dense: Callable[[float | Tensor], Tensor] | None = None
    nodes: tuple[tuple[Time, Tensor], ...] = ()
    slopes: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Method:
    """`order` of the solution, `error_order` of the solution that the error estimate belongs to
    (0: no estimate, so steps are fixed); `has_dense` whether steps need not end at output times.
    """

    name: str
    order: int
    error_order: int = 0
    has_dense: bool = False
    reversible: bool = False

    @property
    def carries_slope(self) -> bool:
        """Whether a longer state than y starts with f as its last."""
        return True

    def start(self, f: Field, t: Time, y: Tensor) -> State:
        """The carried state at the first time."""
        raise NotImplementedError

    def step(self, f: Field, t: Time, h: Time, state: State) -> Step:
        """One step from t to t + h."""
        raise NotImplementedError

    def undo(self, f: Field, t: Time, h: Time, state: State) -> State:
        """The state at t, given the state at t + h."""
        raise TypeError(f"{self.name} cannot be undone; use a reversible method")

    def gap(self, state: State) -> Tensor | None:
        """How far two copies of the solution in a state are apart; None where there is one."""
        return None

    def closed(self, state: State) -> State:
        """The state without that gap, with the same y."""
        return state


@dataclass(frozen=True)
class RungeKutta(Method):
    """`k_i = f(t + c_i h, y + h Σ a_ij k_j)`, `y' = y + h Σ b_i k_i` from an explicit tableau.

    Where the last stage is f at the new state, it is carried to the next step.
    """

    tableau: Tableau = tableaus.euler

    @classmethod
    def of(cls, tableau: Tableau) -> RungeKutta:
        """The method of a tableau."""
        dense = bool(tableau.interpolant)
        return cls(tableau.name, tableau.order, tableau.embedded_order, dense, False, tableau)

    def start(self, f: Field, t: Time, y: Tensor) -> State:
        return (y, f(t, y)) if self.tableau.first_same_as_last else (y,)

    def step(self, f: Field, t: Time, h: Time, state: State) -> Step:
        tableau = self.tableau
        y = x = state[0]
        w = f.weight(h, y)
        ks = [state[1] if len(state) > 1 else f(t, y)]
        nodes: list[tuple[Time, Tensor]] = [(t, y)]
        newton = self.factors(f, t, y, w)
        for i in range(1, tableau.stages):
            same_time = i > 1 and tableau.c[i] == tableau.c[i - 1]
            time = nodes[-1][0] if same_time else later(t, tableau.c[i], h)
            x = scaled(y, w, combination(tableau.a[i][:i], ks))
            implicit = len(tableau.a[i]) > i
            k, x = self.stage(f, time, x, tableau.a[i][i] * w if implicit else None, newton)
            ks.append(k)
            nodes.append((time, x))
        # Where the last stage is the next step's first, its state already is the new state.
        same = tableau.first_same_as_last
        y1 = x if same else scaled(y, w, combination(tableau.b, ks))
        error = combination(tableau.error, ks) * w if tableau.embedded else None

        def dense(theta: float | Tensor) -> Tensor:
            if isinstance(theta, Tensor):
                theta = f.weight(theta, y)
            weights = tableau.dense_weights(theta)
            total = weights[0] * ks[0]
            for b, k in zip(weights[1:], ks[1:], strict=True):
                total = total + b * k
            return scaled(y, w, total)

        end = (y1, ks[-1]) if same else (y1,)
        return Step(end, error, dense if self.has_dense else None, tuple(nodes), tuple(ks))

    def factors(self, f: Field, t: Time, y: Tensor, w: float | Tensor) -> Solve | None:
        """What the stages of a step share: nothing for explicit ones."""
        return None

    def increment(
        self, f: Field, t: Time, h: Time, y: Tensor, estimate: bool
    ) -> tuple[Tensor, Tensor | None]:
        """`h Σ b_i k_i` and, on request, the error estimate; only stages of use are evaluated."""
        tableau, w = self.tableau, f.weight(h, y)
        estimate = estimate and bool(tableau.embedded)
        used = tableau.stages if estimate or tableau.b[-1] else tableau.stages - 1
        ks: list[Tensor] = []
        for row, c in zip(tableau.a[:used], tableau.c[:used], strict=True):
            ks.append(f(t + c * h, scaled(y, w, combination(row, ks)) if ks else y))
        error = w * combination(tableau.error, ks) if estimate else None
        return w * combination(tableau.b, ks), error

    def stage(
        self, f: Field, t: Time, x: Tensor, w: float | Tensor | None, newton: Solve | None
    ) -> tuple[Tensor, Tensor]:
        """The slope k and the state at a stage whose explicit part is x: here the state is x."""
        return f(t, x), x
