"""Triangular systems: exact where the theory says so, and quick where the map contracts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from ebbflow.equations.triangular import Causal, Method, Solution, solve

N, BATCH, WIDTH = 14, 3, 4
METHODS = {
    "jacobi": Method(),
    "blocks of 3": Method(block=3),
    "anderson": Method(memory=3),
}


def network(gain: float, seed: int = 0):
    """s_t = tanh(b_t + sum_{j<t} W_tj s_j), with random W of spectral norm about `gain / t`."""
    random = torch.Generator().manual_seed(seed)
    kind = {"generator": random, "dtype": torch.float64}
    weights = torch.randn(N, N, WIDTH, WIDTH, **kind) / math.sqrt(WIDTH)
    weights = weights / torch.arange(N).clamp(min=1)[:, None, None, None]
    bias = torch.randn(N, WIDTH, **kind)

    def h(times: Tensor, past: Tensor) -> Tensor:
        # A sum over all N places, so that any guess that leaks from t on would show.
        return torch.tanh(bias[times] + gain * torch.einsum("rjik,rjk->ri", weights[times], past))

    return h


def loop(h, start: Tensor, length: int = N) -> Tensor:
    """The system in order, (B, n, *shape)."""
    past = start.new_zeros(len(start), length, *start.shape[1:])
    for t in range(length):
        past[:, t] = h(torch.full((len(start),), t), past)
    return past


def spread(seed: int = 5) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, WIDTH, generator=random, dtype=torch.float64)


def run(h, guess: Tensor, **rest) -> Solution:
    system = Causal(h, N)
    return solve(system, system.start(guess), guess, **rest)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("window", (None, 1, 5))
def test_without_tolerance_the_answer_is_the_loop_s(method: Method, window: int | None) -> None:
    h, guess = network(3.0), spread()
    found = run(h, guess, method=method, window=window, tolerance=0.0)
    exact = loop(h, guess)
    assert (found.carry[0] - exact).abs().max() < 1e-13
    assert bool(found.converged.all()) and found.calls <= N
    assert found.residual.max() == 0


@pytest.mark.parametrize("rounds", range(1, N + 1))
def test_round_k_makes_k_unknowns_exact_and_no_more(rounds: int) -> None:
    h, guess = network(3.0), spread()
    found = run(h, guess, tolerance=0.0, max_rounds=rounds)
    wrong = (found.carry[0] - loop(h, guess)).abs().amax((0, 2))
    assert (wrong[:rounds] < 1e-13).all()
    # The unknowns from there on are those of Jacobi's iteration, written as a loop here.
    values = guess[:, None].expand(BATCH, N, WIDTH).clone()
    for _ in range(rounds):
        old = values.clone()
        for t in range(N):
            past = torch.where(torch.arange(N)[:, None] < t, old, 0.0)
            values[:, t] = h(torch.full((BATCH,), t), past)
    assert (found.carry[0] - values).abs().max() < 1e-13
    if rounds < N - 1:
        assert (wrong[rounds + 1 :] > 1e-12).any()
        assert not bool(found.converged.any()) and bool(torch.isinf(found.residual).all())


def test_a_contraction_converges_geometrically() -> None:
    gain = 0.1
    h, guess = network(gain), spread()
    exact = loop(h, guess)
    errors = [
        float((run(h, guess, tolerance=0.0, max_rounds=k).carry[0] - exact).abs().max())
        for k in range(1, 6)
    ]
    factors = [b / a for a, b in itertools.pairwise(errors)]
    # |s_t - s*_t| <= gain * mean_j |W_tj|_inf |s_j - s*_j|, whose norms stay below 3 here.
    assert max(factors) < 3 * gain
    quick = run(h, guess, tolerance=1e-9)
    assert quick.calls < N - 3 and (quick.carry[0] - exact).abs().max() < 1e-9


def test_rounds_grow_with_the_coupling() -> None:
    calls = [run(network(g), spread(), tolerance=1e-9).calls for g in (0.0, 0.03, 0.3, 3.0)]
    assert calls[0] == 2  # nothing depends on anything: one round, and one to see it
    assert calls == sorted(calls) and calls[1] < calls[-1] <= N


def test_blocks_spend_fewer_evaluations() -> None:
    h, guess = network(0.3), spread()
    plain = run(h, guess, tolerance=1e-9)
    blocks = run(h, guess, tolerance=1e-9, method=Method(block=3))
    assert int(blocks.evaluations.sum()) < int(plain.evaluations.sum())
    assert blocks.calls <= N


def test_anderson_needs_fewer_rounds_on_a_slow_linear_recursion() -> None:
    n, rate = 60, 0.02

    def h(times: Tensor, past: Tensor) -> Tensor:  # ds/dt = -s by Euler: slow for Picard
        return 1 - 2 * rate * past.sum(1)

    guess = torch.zeros(1, 1, dtype=torch.float64)
    system = Causal(h, n)
    found = {
        name: solve(system, system.start(guess), guess, tolerance=1e-9, method=METHODS[name])
        for name in ("jacobi", "anderson")
    }
    for solution in found.values():
        assert (solution.carry[0] - loop(h, guess, n)).abs().max() < 1e-8
    assert found["anderson"].calls < found["jacobi"].calls < n


def test_systems_do_not_know_their_neighbours() -> None:
    """One slow system costs the others nothing, and changes no bit of them."""
    h, guess = network(0.3), spread()

    def mixed(times: Tensor, past: Tensor) -> Tensor:
        return h(times, past)

    for method in METHODS.values():
        together = run(mixed, guess, tolerance=1e-6, method=method, window=6)
        for i in range(BATCH):
            alone = run(mixed, guess[i : i + 1], tolerance=1e-6, method=method, window=6)
            assert (together.carry[0][i] - alone.carry[0][0]).abs().max() < 1e-14
            assert int(together.rounds[i]) == int(alone.rounds[0])
            assert int(together.evaluations[i]) == int(alone.evaluations[0])
        assert together.calls == int(together.rounds.max())


def test_autoregressive_sampling_with_fixed_gumbel_noise_gives_the_same_tokens() -> None:
    n, vocabulary = 24, 11
    random = torch.Generator().manual_seed(0)
    table = torch.randn(vocabulary, vocabulary, generator=random, dtype=torch.float64)
    uniform = torch.rand(BATCH, n, vocabulary, generator=random, dtype=torch.float64)
    gumbel = -torch.log(-torch.log(uniform))

    def sampler(strength: float):
        """Logits from an exponential average of the past tokens' embeddings."""

        class Tokens(Causal):
            def answer(self, times: Tensor, queries: Tensor, rows: Tensor) -> Tensor:
                places = torch.arange(n)
                weight = 0.5 ** (times[:, None] - places).double()
                weight = torch.where(places < times[:, None], weight, 0.0)
                logits = strength * torch.einsum("rj,rjv->rv", weight, table[queries])
                return (logits + gumbel[rows, times]).argmax(-1)

        return Tokens(lambda times, past: past, n)

    for strength in (0.3, 3.0):
        system = sampler(strength)
        guess = torch.zeros(BATCH, dtype=torch.long)
        one = system.start(guess)
        exact = one[0].clone()
        for t in range(n):
            exact[:, t] = system.answer(torch.full((BATCH,), t), exact, torch.arange(BATCH))
        found = solve(system, one, guess, tolerance=0.0)
        assert torch.equal(found.carry[0], exact)
        assert found.calls <= n
        if strength < 1:
            assert found.calls < n


@pytest.mark.parametrize(
    "bad",
    ({"window": 0}, {"tolerance": -1.0}, {"tolerance": math.nan}, {"max_rounds": 0}),
    ids=str,
)
def test_arguments_out_of_range_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match="at least"):
        run(network(1.0), spread(), **bad)


@pytest.mark.parametrize("bad", ({"block": 0}, {"memory": -1}, {"block": 2, "memory": 1}), ids=str)
def test_methods_out_of_range_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match="block"):
        Method(**bad)


def test_what_is_not_finite_is_named() -> None:
    h = network(1.0)

    def broken(times: Tensor, past: Tensor) -> Tensor:
        return torch.where(times[:, None] == 5, math.nan, h(times, past))

    with pytest.raises(FloatingPointError, match="unknown 5 "):
        run(broken, spread())


def test_mutants_of_the_acceptance_are_seen() -> None:
    """To accept one unknown more than is known to be exact is wrong."""
    from ebbflow.equations import triangular

    class Eager(triangular._State):
        def _accept(self, count: Tensor) -> None:
            n = self.system.length
            super()._accept(torch.minimum(count + 1, (n - self.front).clamp(max=self.width)))

    h, guess = network(3.0), spread()
    original = triangular._State
    try:
        triangular._State = Eager  # type: ignore[misc]
        # `of` builds the class by its name in the module.
        wrong = run(h, guess, tolerance=0.0)
    finally:
        triangular._State = original  # type: ignore[misc]
    assert (wrong.carry[0] - loop(h, guess)).abs().max() > 1e-6
