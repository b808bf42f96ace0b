"""One-step methods: `start` makes the state a method carries, `step` advances it, `undo` goes back.

The carried state is a tuple of tensors whose first is y. Steps are plain numbers (one, or one for
each sample), so that a solve is replayed from its list of steps alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
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


@dataclass(frozen=True)
class DiagonallyImplicit(RungeKutta):
    """Stages `k = f(t_i, x + hγ k)` by Newton's method, for stiff equations of moderate size.

    The Jacobian (one backward pass a row, counted as N evaluations for N unknowns a sample) is
    taken at the start of a step and again only where the iteration is slow. Under autograd the
    solution gets the implicit function theorem's derivative, whatever the iteration did:
    `M dk = J dx + ∂f/∂θ dθ`, M = I - hγJ. A stage that does not converge makes the step's error
    NaN, so that the step is rejected.
    """

    tolerance: float = 1e-10
    iterations: int = 12

    def start(self, f: Field, t: Time, y: Tensor) -> State:
        return (y, f(t, y))

    def factors(self, f: Field, t: Time, y: Tensor, w: float | Tensor) -> Solve | None:
        # All implicit stages have the same diagonal.
        gamma = next(row[i] for i, row in enumerate(self.tableau.a) if len(row) > i and row[i])
        return _newton_matrix(f, t, y.detach(), gamma * w)

    def stage(
        self, f: Field, t: Time, x: Tensor, w: float | Tensor | None, newton: Solve | None
    ) -> tuple[Tensor, Tensor]:
        if w is None:
            return f(t, x), x
        tolerance = max(self.tolerance, 50 * torch.finfo(f.real).eps)
        with torch.no_grad():
            k = f(t, x.detach())
            solve = newton or _newton_matrix(f, t, x.detach() + w * k, w)
            last = torch.full((), torch.inf, device=x.device)
            for _ in range(self.iterations):
                state = x.detach() + w * k
                change = solve(f(t, state) - k)
                k = k + change
                rows = t.shape[0] if isinstance(t, Tensor) else 1
                size = (w * change).abs().reshape(rows, -1).amax(1)
                size = size / (1 + state.abs().reshape(rows, -1).amax(1))
                late = size > tolerance
                if not late.any():
                    break
                if (late & (size > 0.1 * last)).any():
                    solve = _newton_matrix(f, t, x.detach() + w * k, w)
                last = size
            else:
                k = torch.where(late.reshape(-1, *(1,) * (k.ndim - 1)), torch.nan, k)
        if torch.is_grad_enabled():
            solve = _newton_matrix(f, t, x.detach() + w * k, w)
            k = k + solve(f(t, x + w * k) - k)
        return k, x + w * k


def _newton_matrix(f: Field, t: Time, x: Tensor, w: float | Tensor) -> Solve:
    """`v -> (I - wJ)⁻¹ v` with J = ∂f/∂x of each sample, or of the whole state without a batch."""
    samples = x.shape[0] if isinstance(t, Tensor) else 1
    size = x.numel() // samples
    f.calls += size
    # A row a backward pass: for small states much faster than torch.func.jacfwd's batched duals.
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = f.value(t, x).reshape(samples, size)
        rows = [
            torch.autograd.grad(value[:, i].sum(), x, retain_graph=True, allow_unused=True)[0]
            for i in range(size if value.requires_grad else 0)
        ]
    with torch.no_grad():
        zero = torch.zeros_like(x)
        rows = [zero if row is None else row for row in rows] or [zero] * size
        jacobian = torch.stack([row.reshape(samples, size) for row in rows], 1)
        identity = torch.eye(size, dtype=x.dtype, device=x.device)
        scale = w.reshape(-1, 1, 1) if isinstance(w, Tensor) else w
        factors, pivots = torch.linalg.lu_factor(identity - scale * jacobian)

    def solve(v: Tensor) -> Tensor:
        return torch.linalg.lu_solve(factors, pivots, v.reshape(samples, size, 1)).reshape(x.shape)

    return solve


@dataclass(frozen=True)
class ReversibleHeun(Method):
    """Reversible Heun: `ẑ' = 2y - ẑ + hf`, `f' = f(t', ẑ')`, `y' = y + h/2 (f + f')`.

    One evaluation a step, order 2, undone exactly; stable only on the imaginary axis, so neither
    for stiff nor for long dissipative problems. Efficient and Accurate Gradients for Neural SDEs,
    Algorithms 1 and 2 (Kidger et al. 2021).
    """

    def start(self, f: Field, t: Time, y: Tensor) -> State:
        return (y, y, f(t, y))

    def step(self, f: Field, t: Time, h: Time, state: State) -> Step:
        y, z, k = state
        w = f.weight(h, y)
        z1 = scaled(2 * y - z, w, k)
        k1 = f(t + h, z1)
        y1 = scaled(y, 0.5 * w, k + k1)
        return Step((y1, z1, k1), (0.5 * w) * (k1 - k))

    def undo(self, f: Field, t: Time, h: Time, state: State) -> State:
        y1, z1, k1 = state
        w = f.weight(h, y1)
        z = scaled(2 * y1 - z1, -w, k1)
        k = f(t, z)
        return (scaled(y1, -0.5 * w, k + k1), z, k)


@dataclass(frozen=True)
class AsynchronousLeapfrog(Method):
    """Asynchronous leapfrog: `m = y + h/2 v`, `v' = v + 2η (f(t + h/2, m) - v)`, `y' = m + h/2 v'`.

    One evaluation a step, order 2, undone exactly for η ≠ 1/2; η below 1 damps. MALI: A memory
    efficient and reverse accurate integrator for Neural ODEs, Algorithms 2 and 3 (Zhuang et al.
    2021). With η = 1 the order is 2; less damping is order 1.
    """

    damping: float = 1.0

    def start(self, f: Field, t: Time, y: Tensor) -> State:
        return (y, f(t, y))

    def step(self, f: Field, t: Time, h: Time, state: State) -> Step:
        y, v = state
        w = f.weight(h, y)
        m = scaled(y, 0.5 * w, v)
        change = f(t + 0.5 * h, m) - v
        v1 = v + 2 * self.damping * change
        return Step((scaled(m, 0.5 * w, v1), v1), w * change)

    def undo(self, f: Field, t: Time, h: Time, state: State) -> State:
        y1, v1 = state
        w = f.weight(h, y1)
        m = scaled(y1, -0.5 * w, v1)
        v = (v1 - 2 * self.damping * f(t + 0.5 * h, m)) / (1 - 2 * self.damping)
        return (scaled(m, -0.5 * w, v), v)


@dataclass(frozen=True)
class Coupled(Method):
    """A reversible coupling around any explicit method Ψ, of the same order.

    `y' = λy + (1 - λ)z + Ψ_h(t, z)`, `z' = z - Ψ_{-h}(t', y')`, where Ψ is the method's increment.
    Twice the evaluations; undone exactly, with rounding that grows as λ^-n. Where f contracts at a
    rate r, y and z part like e^(rt): the solver closes such gaps (`march.CLOSE`), which is not in
    the paper. Efficient, Accurate and Stable Gradients for Neural ODEs (McCallum, Foster 2024).
    """

    base: RungeKutta = field(default_factory=lambda: RungeKutta.of(tableaus.euler))
    coupling: float = 0.999

    @classmethod
    def around(cls, base: Method, coupling: float = 0.999) -> Coupled:
        """The coupling of an explicit Runge–Kutta method."""
        if not isinstance(base, RungeKutta) or base.tableau.implicit:
            raise TypeError(f"only explicit Runge–Kutta methods can be coupled, got {base.name!r}")
        if not 0.5 <= coupling <= 1:
            raise ValueError(f"coupling must be in [0.5, 1], got {coupling}")
        name = f"reversible-{base.name}"
        return cls(name, base.order, base.error_order, False, True, base, coupling)

    @property
    def carries_slope(self) -> bool:
        return False

    def start(self, f: Field, t: Time, y: Tensor) -> State:
        return (y, y)

    def step(self, f: Field, t: Time, h: Time, state: State) -> Step:
        y, z = state
        change, error = self.base.increment(f, t, h, z, True)
        y1 = self.coupling * y + (1 - self.coupling) * z + change
        return Step((y1, z - self.base.increment(f, t + h, -h, y1, False)[0]), error)

    def undo(self, f: Field, t: Time, h: Time, state: State) -> State:
        y1, z1 = state
        z = z1 + self.base.increment(f, t + h, -h, y1, False)[0]
        change = self.base.increment(f, t, h, z, False)[0]
        return ((y1 - (1 - self.coupling) * z - change) / self.coupling, z)

    def gap(self, state: State) -> Tensor | None:
        return state[0] - state[1]

    def closed(self, state: State) -> State:
        return (state[0], state[0])


def _second_order(cls: type[Method], name: str) -> Method:
    return cls(name, 2, 1, reversible=True)


euler = RungeKutta.of(tableaus.euler)
midpoint = RungeKutta.of(tableaus.midpoint)
heun = RungeKutta.of(tableaus.heun)
rk4 = RungeKutta.of(tableaus.rk4)
bosh3 = RungeKutta.of(tableaus.bosh3)
dopri5 = RungeKutta.of(tableaus.dopri5)
tsit5 = RungeKutta.of(tableaus.tsit5)
kvaerno3 = DiagonallyImplicit.of(tableaus.kvaerno3)
esdirk4 = DiagonallyImplicit.of(tableaus.esdirk4)
reversible_heun = _second_order(ReversibleHeun, "reversible-heun")
alf = _second_order(AsynchronousLeapfrog, "alf")

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        *(euler, midpoint, heun, rk4, bosh3, dopri5, tsit5),
        *(kvaerno3, esdirk4, reversible_heun, alf),
    )
}
