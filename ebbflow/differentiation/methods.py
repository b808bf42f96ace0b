"""The methods by name: explicit and diagonally implicit pairs, and those that can be undone."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ebbflow.differentiation import tableaus
from ebbflow.differentiation.fields import Field, Time, scaled
from ebbflow.differentiation.runge_kutta import Method, RungeKutta, Solve, State, Step


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
