"""Observed orders of the deterministic solvers: `python -m benchmarks.orders [NAME ...]`.

The slope of the error over three halvings (48 to 384 steps) on a Gaussian and on a mixture, four
schedules, float64, against an adaptive eighth-order solution of the probability-flow ODE.
"""

from __future__ import annotations

import sys

from tests.laws.cases import DETERMINISTIC, SCHEDULES, SOLVERS, maker
from tests.laws.test_order import CASES, errors, slope


def main(names: list[str]) -> None:
    print(f"{'solver':<18}{'stated':>7}  " + "".join(f"{name:>8}" for name in SCHEDULES))
    for name in names or DETERMINISTIC:
        make = maker(SOLVERS[name])
        observed = {case: slope(errors(make, case)) for case in CASES}
        for law in ("gaussian", "mixture"):
            row = "".join(f"{observed[law, schedule]:>8.2f}" for schedule in SCHEDULES)
            print(f"{name:<18}{SOLVERS[name].order:>7}  {row}  {law}")


if __name__ == "__main__":
    main(sys.argv[1:])
