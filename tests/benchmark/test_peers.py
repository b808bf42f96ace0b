"""What other libraries' samplers are scored by, with samplers whose answers are known."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch

from ebbflow.benchmark import peers
from ebbflow.benchmark.measure import Case, Model
from ebbflow.benchmark.peers import End, Peer, gather, run_peers
from tests.benchmark.laws import MEAN, VARIANCES, exact, gaussian


def perfect(case: Case, model: Model, budget: int) -> End:
    """Asks as often as it may, and answers with the closed form."""
    for _ in range(budget):
        model(case.noise, 1.0, 1.0)
    return End(2 * exact(case, 0.005), 2.0, 0.01)


def greedy(case: Case, model: Model, budget: int) -> End:
    return perfect(case, model, budget + 1)


def early(case: Case, model: Model, budget: int) -> End:
    return End(exact(case, 0.1), 1.0, 0.1)


def broken(case: Case, model: Model, budget: int) -> End:
    return End(case.noise * math.nan, 1.0, 0.0)


def raising(case: Case, model: Model, budget: int) -> End:
    raise KeyError("no such option")


def off(case: Case, model: Model, budget: int) -> End:
    return End(exact(case, 0.0) + 0.1 / budget, 1.0, 0.0)


@pytest.mark.parametrize("setting", ["vp", "edm", "flow"])
def test_the_exact_answer_has_no_error(setting: str) -> None:
    case = Case(gaussian(setting), 16, seed=0)
    rows, unscored = run_peers(case, [Peer("fake", "perfect", "", perfect)], (3, 5))
    assert unscored == {}
    assert [(row.budget, row.evaluations) for row in rows] == [(3, 3.0), (5, 5.0)]
    for row in rows:
        assert row.rms == pytest.approx(0, abs=1e-5 * case.deviation)
        assert row.stops == pytest.approx(0.005)
        assert row.flipped == 0


def test_what_breaks_the_rules_is_counted_and_not_scored() -> None:
    case = Case(gaussian(), 16, seed=0)
    runs = {"greedy": greedy, "early": early, "broken": broken, "raising": raising}
    found = [Peer("bad", name, "", run) for name, run in runs.items()]
    rows, unscored = run_peers(case, [*found, Peer("good", "perfect", "", perfect)], (3, 5))
    assert {row.library for row in rows} == {"good"}
    assert unscored == {"bad": 8}


def test_every_configuration_is_a_row_and_the_best_has_its_distances() -> None:
    case = Case(gaussian(), 16, seed=0)
    worse = Peer("fake", "m", "worse", off)
    better = Peer("fake", "m", "better", perfect)
    for order in ([worse, better], [better, worse]):
        rows, _ = run_peers(case, order, (4,))
        known = {row.configuration: row.sliced is not None for row in rows}
        assert known == {"worse": False, "better": True}
        (row,) = (row for row in rows if row.configuration == "worse")
        assert row.rms == pytest.approx(0.025, rel=1e-3)


def test_a_start_without_signal_is_exact_at_the_peer_s_own_level() -> None:
    case = Case(gaussian("flow"), 8, seed=0)
    torch.testing.assert_close(case.start(1.0, 80.0), exact(case, 80.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(case.start(0.0, 1.0), case.noise)
    chain = Case(gaussian("vp"), 8, seed=0)
    torch.testing.assert_close(chain.start(0.006, 0.9), 0.9 * chain.noise)


def test_missing_libraries_are_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(case: Case) -> Iterator[Any]:
        raise ImportError("No module named 'absent'")

    def present(case: Case) -> Iterator[Any]:
        yield "perfect", "", perfect

    case = Case(gaussian(), 8, seed=0)
    found, missing = gather(case, {"absent": absent, "present": present})
    assert [(peer.library, peer.method) for peer in found] == [("present", "perfect")]
    assert missing == {"absent": "No module named 'absent'"}
    # The real adapters say so too.
    monkeypatch.delitem(sys.modules, "k_diffusion.sampling", raising=False)
    for name in ("diffusers", "azula.noise", "k_diffusion"):
        monkeypatch.setitem(sys.modules, name, None)
    found, missing = gather(case)
    assert found == []
    assert set(missing) == {"diffusers", "k-diffusion", "azula"}


def karras(steps: int) -> list[float]:
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    return [(high + k / steps * (low - high)) ** 7 for k in range(steps + 1)]


def rectified(steps: int) -> list[float]:
    spans = [1 - k / steps for k in range(steps + 1)]
    return [(s + (1 - s) * 0.002) / (s / 80 + 1 - s) for s in spans]


def flow(steps: int) -> list[float]:
    sigmas = [1 - k / (steps - 1) * 0.999 for k in range(steps)]
    return [s / (1 - s) if s < 1 else math.inf for s in sigmas] + [0.0]


def chain(steps: int) -> list[float]:
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    ratios = torch.exp(-gaussian("vp").denoiser.schedule.log_snr(t) / 2)
    return ratios.tolist()


EULERS = {
    "k-diffusion": ("k-diffusion", "euler", "karras 7", "edm", karras(10)),
    "azula, karras": ("azula", "Euler", "karras", "edm", karras(10)),
    "azula, rectified": ("azula", "Euler", "rectified", "flow", rectified(10)),
    # Its last step has no length.
    "diffusers, edm": (
        "diffusers",
        "EDMEuler",
        "sigma_schedule=karras rho=7.0 final_sigmas_type=sigma_min",
        "edm",
        karras(9),
    ),
    "diffusers, flow": ("diffusers", "FlowMatchEulerDiscrete", "shift=1.0", "flow", flow(10)),
    "diffusers, chain": (
        "diffusers",
        "DDIM",
        "clip_sample=False timestep_spacing=trailing set_alpha_to_one=True",
        "vp",
        chain(10),
    ),
}


@pytest.mark.parametrize("which", EULERS)
def test_a_first_order_peer_has_the_error_of_ddim_on_its_grid(which: str) -> None:
    library, method, title, setting, ratios = EULERS[which]
    case = Case(gaussian(setting), 16, seed=0)
    found, missing = gather(case)
    if library in missing:
        pytest.skip(f"needs {library}; the samplers above test the rules without it")
    called = (library, method, title)
    (peer,) = (p for p in found if (p.library, p.method, p.configuration) == called)
    ((row,), unscored) = run_peers(case, [peer], (10,))
    assert unscored == {}
    # The exact step for a constant prediction, in y = x/alpha: y' = D + (y - D) r'/r.
    unit = [(1.0, r) if math.isfinite(r) else (0.0, 1.0) for r in ratios]
    x = case.start(*unit[0])
    for (a, s), (b, r) in pairwise(unit):
        d = MEAN + a * VARIANCES / (a**2 * VARIANCES + s**2) * (x - a * MEAN)
        x = b * d + r / s * (x - a * d)
    errors = case.errors(x, *unit[-1])
    assert row.rms == pytest.approx(errors.square().mean().sqrt().item(), rel=1e-4)


def test_every_adapter_spends_what_it_says() -> None:
    for setting in ("vp", "edm", "flow"):
        case = Case(gaussian(setting), 8, seed=0)
        found, missing = gather(case)
        if missing:
            pytest.skip(f"needs {', '.join(missing)}; the fakes above test the rules")
        # One configuration of each method; the whole set runs in the benchmark.
        one = {(peer.library, peer.method): peer for peer in found}
        rows, unscored = run_peers(case, list(one.values()), (9,))
        spent = {row.name: row.evaluations for row in rows}
        assert all(8 <= evaluations <= 9 for evaluations in spent.values()), spent
        assert sum(unscored.values()) <= 0.2 * len(one)


def test_the_libraries_are_the_three_of_the_issue() -> None:
    assert set(peers.LIBRARIES) == {"diffusers", "k-diffusion", "azula"}
