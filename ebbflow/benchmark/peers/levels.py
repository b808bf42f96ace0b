"""The noise levels between which other libraries' grids are laid."""

from __future__ import annotations

import math

from ebbflow.benchmark.measure import Case

TOP = 80.0
"""Where samplers that cannot start without signal start instead."""


def top(case: Case) -> float:
    """The largest sigma/alpha of a peer's grid: the process' own, `TOP` where that is infinite."""
    return TOP if math.isinf(case.top) else case.top


def lows(case: Case) -> tuple[float, float]:
    """The least positive sigma/alpha of a peer's grid, and of a grid that then steps to zero.

    That of DDPM's chain and of Stable Diffusion's; elsewhere EDM's, and ten times that.
    """
    return (0.01, 0.0292) if case.problem.setting == "vp" else (0.002, 0.02)


def ends(case: Case) -> tuple[tuple[str, float, bool], ...]:
    """How grids end: a title, the least sigma/alpha, and whether a step to zero follows."""
    low, higher = lows(case)
    return ("", low, False), (", then 0", low, True), (", early to 0", higher, True)
