"""Runge–Kutta tableaus as data that validate themselves.

A tableau is accepted only if its row sums are its abscissae and every order condition holds up to
the order it states, for the solution, for the embedded solution and for the interpolant: one
condition a rooted tree, `b · φ(tree) = 1/γ(tree)` (Solving Ordinary Differential Equations I,
section II.2), and `b(θ) · φ(tree) = θ^|tree| / γ(tree)` for the interpolant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ebbflow.differentiation.interpolants import hermite, product
from ebbflow.differentiation.trees import Rows, density, nodes, up_to, weights


@dataclass(frozen=True)
class Tableau:
    """Coefficients of `k_i = f(t + c_i h, y + h Σ a_ij k_j)`, `y' = y + h Σ b_i k_i`.

    `a` holds one row a stage, of length up to the stage itself: i for an explicit stage, i + 1 with
    the diagonal for an implicit one. `embedded` are the weights of the solution of order
    `embedded_order` that the error estimate compares with. `interpolant` holds, for each stage, the
    coefficients of θ, θ², … of `b_i(θ)`, accurate to `dense_order`: y(t + θh) = y + h Σ b_i(θ) k_i.
    `dissipative_size` is how far the stability region reaches on the negative real axis.
    Raises ValueError where a row sum or an order condition does not hold.
    """

    name: str
    order: int
    a: Rows
    b: tuple[float, ...]
    c: tuple[float, ...]
    embedded: tuple[float, ...] = ()
    embedded_order: int = 0
    interpolant: Rows = ()
    dense_order: int = 0
    dissipative_size: float = math.inf

    def __post_init__(self) -> None:
        stages = len(self.c)
        if not len(self.a) == len(self.b) == stages:
            raise ValueError(
                f"{self.name}: a, b and c must have one entry a stage, got {len(self.a)}, "
                f"{len(self.b)} and {stages}"
            )
        for i, (row, c) in enumerate(zip(self.a, self.c, strict=True)):
            if len(row) > i + 1:
                raise ValueError(
                    f"{self.name}: row {i} of a has {len(row)} entries, at most {i + 1}"
                )
            self._equal(f"the sum of row {i} of a", sum(row), c)
        for name, order, b in (
            ("b", self.order, self.b),
            ("embedded", self.embedded_order, self.embedded),
        ):
            for tree in up_to(order):
                phi = weights(tree, self.a)
                value = sum(x * y for x, y in zip(b, phi, strict=True))
                self._equal(f"{name} · φ{tree}", value, 1 / density(tree))
        for theta in (0.25, 0.6, 1.0) if self.interpolant else ():
            b = self.dense_weights(theta)
            for tree in up_to(self.dense_order):
                value = sum(x * y for x, y in zip(b, weights(tree, self.a), strict=True))
                self._equal(f"b({theta}) · φ{tree}", value, theta ** nodes(tree) / density(tree))
            if theta == 1:
                for x, y in zip(b, self.b, strict=True):
                    self._equal("b(1)", x, y)

    def _equal(self, what: str, value: float, expected: float) -> None:
        # Published decimals have 16 digits and entries up to 13.
        if abs(value - expected) > 5e-13:
            raise ValueError(f"{self.name}: {what} is {value!r}, must be {expected!r}")

    @property
    def stages(self) -> int:
        return len(self.c)

    @property
    def implicit(self) -> bool:
        """Whether some stage appears in its own equation."""
        return any(len(row) > i and row[i] != 0 for i, row in enumerate(self.a))

    @cached_property
    def first_same_as_last(self) -> bool:
        """Whether the last stage is f at the new state, and so the next step's first."""
        last = tuple(self.a[-1]) + (0.0,) * (self.stages - len(self.a[-1]))
        return self.stages > 1 and last == self.b and self.c[-1] == 1 and not any(self.a[0])

    @cached_property
    def error(self) -> tuple[float, ...]:
        """Weights of the error estimate, `b - embedded`; empty without an embedded solution."""
        return tuple(x - y for x, y in zip(self.b, self.embedded, strict=False))

    def dense_weights(self, theta: Any) -> list[Any]:
        """`b_i(θ)` by Horner's rule, of a number or a tensor."""
        out = []
        for row in self.interpolant:
            value: Any = 0.0
            for coefficient in reversed(row):
                value = (value + coefficient) * theta
            out.append(value)
        return out


euler = Tableau("euler", 1, ((),), (1.0,), (0.0,), dissipative_size=2.0)
midpoint = Tableau(
    "midpoint", 2, ((), (0.5,)), (0.0, 1.0), (0.0, 0.5), (1.0, 0.0), 1, dissipative_size=2.0
)
heun = Tableau("heun", 2, ((), (1.0,)), (0.5, 0.5), (0.0, 1.0), (1.0, 0.0), 1, dissipative_size=2.0)
rk4 = Tableau(
    "rk4",
    4,
    ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
    (1 / 6, 1 / 3, 1 / 3, 1 / 6),
    (0.0, 0.5, 0.5, 1.0),
    dissipative_size=2.785,
)
_b = (2 / 9, 1 / 3, 4 / 9, 0.0)
# A 3(2) Pair of Runge-Kutta Formulas (Bogacki, Shampine 1989).
bosh3 = Tableau(
    "bosh3",
    3,
    ((), (0.5,), (0.0, 0.75), _b[:3]),
    _b,
    (0.0, 0.5, 0.75, 1.0),
    (7 / 24, 1 / 4, 1 / 3, 1 / 8),
    2,
    hermite(_b),
    3,
    2.51,
)


def _dormand_prince() -> Tableau:
    """A Family of Embedded Runge-Kutta Formulae (Dormand, Prince 1980).

    The interpolant is the one of Solving Ordinary Differential Equations I, section II.6.
    """
    b = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0)
    d = (
        -12715105075 / 11282082432,
        0.0,
        87487479700 / 32700410799,
        -10690763975 / 1880347072,
        701980252875 / 199316789632,
        -1453857185 / 822651844,
        69997945 / 29380423,
    )
    # b(θ) = Hermite's cubic + θ²(1-θ)² d.
    cubic = [(*row, 0.0) for row in hermite(b)]
    bump = (0.0, 1.0, -2.0, 1.0)
    rows = [
        tuple(x + w * y for x, y in zip(row, bump, strict=True))
        for row, w in zip(cubic, d, strict=True)
    ]
    return Tableau(
        "dopri5",
        5,
        (
            (),
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
            b[:6],
        ),
        b,
        (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
        (1951 / 21600, 0.0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300, 1 / 60),
        4,
        tuple(rows),
        4,
        3.3066,
    )


def _tsitouras() -> Tableau:
    """Runge–Kutta pairs of order 5(4) satisfying only the first column simplifying assumption."""
    b = (
        0.09646076681806523,
        0.01,
        0.4798896504144996,
        1.379008574103742,
        -3.290069515436081,
        2.324710524099774,
        0.0,
    )
    error = (
        -0.00178001105222577714,
        -0.0008164344596567469,
        0.007880878010261995,
        -0.1447110071732629,
        0.5823571654525552,
        -0.45808210592918697,
        1 / 66,
    )
    # Each b_i(θ) as its leading coefficient and its factors, lowest degree first.
    rows = (
        product(
            (-1.0530884977290216,),
            (-1.3299890189751412, 1.0),
            (0.7139816917074209, -1.4364028541716351, 1.0),
        ),
        product((0.1017,), (0.0, 1.0), (1.2949852507374631, -2.1966568338249754, 1.0)),
        product(
            (2.490627285651252793,), (0.0, 1.0), (1.57803468208092486, -2.38535645472061657, 1.0)
        ),
        product(
            (-16.54810288924490272,),
            (0.0, 1.0),
            (-1.21712927295533244, 1.0),
            (-0.61620406037800089, 1.0),
        ),
        product(
            (47.37952196281928122,),
            (0.0, 1.0),
            (-1.203071208372362603, 1.0),
            (-0.658047292653547382, 1.0),
        ),
        product((-34.87065786149660974,), (0.0, 1.0), (-1.2, 1.0), (-2 / 3, 1.0)),
        product((2.5,), (0.0, 1.0), (-1.0, 1.0), (-0.6, 1.0)),
    )
    return Tableau(
        "tsit5",
        5,
        (
            (),
            (0.161,),
            (-0.008480655492356989, 0.335480655492357),
            (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
            (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
            (
                5.86145544294642,
                -12.92096931784711,
                8.159367898576159,
                -0.071584973281401,
                -0.028269050394068383,
            ),
            b[:6],
        ),
        b,
        (0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0),
        tuple(x - y for x, y in zip(b, error, strict=True)),
        4,
        rows,
        4,
        3.5068,
    )


def _kvaerno3() -> Tableau:
    """Singly Diagonally Implicit Runge–Kutta Methods with an Explicit First Stage (Kværnø 2004).

    3(2), L-stable, stiffly accurate, second stage order; everything follows from γ, a root of
    6γ³ - 18γ² + 9γ - 1, and the order conditions.
    """
    gamma = 0.43586652150845899942
    a32 = (0.5 - gamma) / (2 * gamma)
    # b2 c2 + b3 + γ = 1/2 and b2 c2² + b3 + γ = 1/3 with c2 = 2γ.
    b2 = (1 / 6) / (2 * gamma * (1 - 2 * gamma))
    b3 = 0.5 - gamma - b2 * 2 * gamma
    third = (1 - a32 - gamma, a32, gamma)
    b = (1 - b2 - b3 - gamma, b2, b3, gamma)
    return Tableau(
        "kvaerno3",
        3,
        ((), (gamma, gamma), third, b),
        b,
        (0.0, 2 * gamma, 1.0, 1.0),
        (*third, 0.0),
        2,
        hermite(b),
        3,
    )


def _esdirk4() -> Tableau:
    """ESDIRK4(3)6L[2]SA, the implicit half of ARK4(3)6L[2]SA.

    Additive Runge–Kutta Schemes for Convection–Diffusion–Reaction Equations (Kennedy, Carpenter
    2003); L-stable, stiffly accurate, second stage order.
    """
    b = (82889 / 524892, 0.0, 15625 / 83664, 69875 / 102672, -2260 / 8211, 1 / 4)
    return Tableau(
        "esdirk4",
        4,
        (
            (),
            (1 / 4, 1 / 4),
            (8611 / 62500, -1743 / 31250, 1 / 4),
            (5012029 / 34652500, -654441 / 2922500, 174375 / 388108, 1 / 4),
            (
                15267082809 / 155376265600,
                -71443401 / 120774400,
                730878875 / 902184768,
                2285395 / 8070912,
                1 / 4,
            ),
            b,
        ),
        b,
        (0.0, 1 / 2, 83 / 250, 31 / 50, 17 / 20, 1.0),
        (
            4586570599 / 29645900160,
            0.0,
            178811875 / 945068544,
            814220225 / 1159782912,
            -3700637 / 11593932,
            61727 / 225920,
        ),
        3,
        hermite(b),
        3,
    )


dopri5 = _dormand_prince()
tsit5 = _tsitouras()
kvaerno3 = _kvaerno3()
esdirk4 = _esdirk4()
