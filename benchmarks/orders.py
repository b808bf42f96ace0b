"""Observed orders of the deterministic solvers: `python -m benchmarks.orders [NAME ...]`.

The slope of the error over three halvings (48 to 384 steps) on a Gaussian and on a mixture, four
schedules, float64, against an adaptive eighth-order solution of the probability-flow ODE.
"""

from __future__ import annotations

import sys

from tests.laws.cases import DETERMINISTIC, LAWS, SCHEDULES, SOLVERS, maker
from tests.laws.test_order import errors, slope


def main(names: list[str]) -> None:
    columns = "".join(f"{name:>8}" for name in (*SCHEDULES, "least"))
    print(f"{'solver':<20}{'stated':>7}{'paper':>7}{columns}")
    for name in names or DETERMINISTIC:
        solver = SOLVERS[name]
        found = {schedule: errors(maker(solver), schedule) for schedule in SCHEDULES}
        for law in LAWS:
            observed = [slope(found[schedule][law]) for schedule in SCHEDULES]
            row = "".join(f"{value:>8.2f}" for value in (*observed, min(observed)))
            print(f"{name:<20}{solver.order:>7}{solver.nominal_order:>7}{row}  {law}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
