"""The classifier two-sample test at chance, with power, and its binomial tail."""

from __future__ import annotations

import pytest
import scipy.stats
import torch

from ebbflow.metrics import classifier_two_sample_test
from ebbflow.metrics.two_sample import _tail


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (7, 10), (10, 10), (530, 1000), (900, 1000)])
def test_the_p_value_is_the_binomial_tail(hits: int, trials: int) -> None:
    expected = scipy.stats.binomtest(hits, trials, alternative="greater").pvalue
    assert _tail(hits, trials) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("hidden", [0, 16])
def test_equal_laws_stay_at_chance(hidden: int) -> None:
    tests = [
        classifier_two_sample_test(*torch.randn(2, 60, 3), hidden=hidden, steps=40, seed=seed)
        for seed in range(40)
    ]
    mean = sum(test.accuracy for test in tests) / len(tests)
    assert abs(mean - 0.5) < 3.5 * 0.5 / (60 * len(tests)) ** 0.5
    assert sum(test.p_value < 0.05 for test in tests) <= 7  # binomial: P(more) < 0.2 %


def test_separated_sets_are_told_apart() -> None:
    test = classifier_two_sample_test(torch.randn(300, 3), torch.randn(200, 3) + 4)
    assert test.accuracy > 0.97
    assert test.p_value < 1e-20
    assert test.held_out == 200


def test_the_accuracy_reaches_the_best_possible_for_shifted_gaussians() -> None:
    """The best classifier of N(0, 1) and N(m, 1) is right with probability Phi(m / 2)."""
    best = scipy.stats.norm.cdf(0.5)
    test = classifier_two_sample_test(torch.randn(4000, 1), torch.randn(4000, 1) + 1, hidden=0)
    assert abs(test.accuracy - best) < 3.5 * (best * (1 - best) / 4000) ** 0.5


def test_a_hidden_layer_sees_what_logistic_regression_cannot() -> None:
    x, y = torch.randn(400, 2), 3 * torch.randn(400, 2)
    assert classifier_two_sample_test(x, y, hidden=0).accuracy < 0.7
    assert classifier_two_sample_test(x, y).accuracy > 0.75


def test_the_seed_decides_everything_and_constant_features_do_no_harm() -> None:
    x, y = torch.randn(2, 50, 3)
    x[:, 1] = y[:, 1] = 7.0
    x[:, 0] += 5
    torch.manual_seed(1)
    first = classifier_two_sample_test(x, y, seed=3)
    torch.manual_seed(2)
    assert classifier_two_sample_test(x, y, seed=3) == first
    assert first.accuracy > 0.9
