"""Samplers of other libraries behind one contract: a start, a model and a budget in, an end out.

Each adapter drives a library's own sampler over its own options. Only deterministic samplers on
fixed grids are driven: the others have no endpoint that an error could be taken of.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ebbflow.benchmark.measure import Case, Model, Row
from ebbflow.benchmark.peers import azula, diffusers, k_diffusion


class End(NamedTuple):
    """Where a sampler stopped: its state, and alpha and sigma there."""

    x: Tensor
    alpha: float
    sigma: float


Run = Callable[[Case, Model, int], End]
"""`run(case, model, budget)`: start from `case.start(alpha, sigma)`, ask `model(x, alpha, sigma)`
at most `budget` times. Raises what the library raises when it cannot."""


@dataclass(frozen=True)
class Peer:
    """One sampler of a library with one choice of its options."""

    library: str
    method: str
    configuration: str
    run: Run


LIBRARIES: Mapping[str, Callable[[Case], Iterator[tuple[str, str, Run]]]] = {
    "diffusers": diffusers.samplers,
    "k-diffusion": k_diffusion.samplers,
    "azula": azula.samplers,
}


def gather(
    case: Case,
    libraries: Mapping[str, Callable[[Case], Iterator[tuple[str, str, Run]]]] = LIBRARIES,
) -> tuple[list[Peer], dict[str, str]]:
    """Every configuration that fits the case, and the missing libraries with the reason."""
    found, missing = [], {}
    for library, samplers in libraries.items():
        try:
            found += [Peer(library, *sampler) for sampler in samplers(case)]
        except ImportError as error:
            missing[library] = str(error)
    return found, missing


STOP = 0.011
"""The largest sigma/alpha at which a sampler may stop: what is left above it is no sample."""


def run_peers(
    case: Case, peers: Sequence[Peer], budgets: Sequence[int]
) -> tuple[list[Row], dict[str, int]]:
    """Rows of every peer at every budget, and how many runs of each library are not among them.

    Left out: runs that raised, that left the finite numbers, that spent more than their budget, or
    that stopped above `STOP`. The best run of each method at each budget has its distances too.
    """
    rows: list[Row] = []
    unscored: dict[str, int] = {}
    for budget in budgets:
        best: dict[str, tuple[Row, Tensor]] = {}
        for peer in peers:
            scored = _score(case, peer, budget)
            if scored is None:
                unscored[peer.library] = unscored.get(peer.library, 0) + 1
                continue
            row = scored[0]
            other = best.get(row.name)
            if other is None or _rms(row) < _rms(other[0]):
                if other is not None:
                    rows.append(other[0])
                best[row.name] = scored
            else:
                rows.append(row)
        rows += [case.with_distances(row, samples) for row, samples in best.values()]
    return rows, unscored


def _rms(row: Row) -> float:
    assert row.rms is not None
    return row.rms


def _score(case: Case, peer: Peer, budget: int) -> tuple[Row, Tensor] | None:
    model = case.model()
    began = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            end = End(*peer.run(case, model, budget))
    except Exception:  # whatever another library raises for options that do not fit
        return None
    seconds = time.perf_counter() - began
    if model.calls > budget or end.sigma > STOP * end.alpha or not bool(end.x.isfinite().all()):
        return None
    row = case.row(
        peer.library,
        peer.method,
        peer.configuration,
        budget,
        float(model.calls),
        seconds,
        end,
        distances=False,
    )
    return row, end.x / end.alpha
