"""Law 6: guidance at its neutral setting is the identity, and one formula in every prediction."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import ebbflow as ef
from ebbflow.denoiser import PREDICTIONS
from ebbflow.guidance import ClassifierFree
from tests.laws.cases import PLAIN
from tests.laws.test_conversions import TARGETS, call

VP = ef.schedules.VP()
LABEL = torch.tensor([0, 2, 1, 2])
NULL = 3
X = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
T = torch.tensor([0.1, 0.4, 0.6, 0.95], dtype=torch.float64)


def network(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """Each class bends the input in its own way; class 3 is the absence of one."""
    return torch.sin(x * (1 + label[:, None])) + t[:, None] * label[:, None]


def conditional(kind: str = "v") -> ef.Denoiser:
    sigma_data = 0.5 if kind == "edm" else None
    return ef.Denoiser(network, VP, kind, shape=(5,), sigma_data=sigma_data)


Guide = Callable[[ef.Denoiser, float], ef.Denoiser]


def classifier_free(inner: ef.Denoiser, scale: float) -> ef.Denoiser:
    return ClassifierFree(inner, scale, {"label": NULL})


# Each guides by a scale, has a neutral scale of 1 and nothing of the condition at 0.
GUIDES: dict[str, Guide] = {"classifier-free": classifier_free}


def check_guidance(guide: Guide, kind: str) -> None:
    inner = conditional(kind)
    absent = torch.full_like(LABEL, NULL)
    for target in TARGETS:
        with_, without = (call(inner, target)(X, T, label=c) for c in (LABEL, absent))  # pyright: ignore
        assert torch.equal(call(guide(inner, 1.0), target)(X, T, label=LABEL), with_)  # pyright: ignore
        assert torch.equal(call(guide(inner, 0.0), target)(X, T, label=LABEL), without)  # pyright: ignore
        for scale in (-1.0, 0.3, 2.0, 7.5):
            found = call(guide(inner, scale), target)(X, T, label=LABEL)  # pyright: ignore
            expected = scale * with_ + (1 - scale) * without
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("guide", GUIDES)
def test_guidance_is_affine_in_every_prediction(guide: str, kind: str) -> None:
    check_guidance(GUIDES[guide], kind)


MUTANTS: dict[str, Guide] = {
    "the other convention": lambda inner, scale: classifier_free(inner, scale + 1),
    "slightly more": lambda inner, scale: classifier_free(inner, scale * 1.001),
    "none at all": lambda inner, scale: inner,
    "another null": lambda inner, scale: ClassifierFree(inner, scale, {"label": NULL - 1}),
    "reversed": lambda inner, scale: classifier_free(inner, 1 - scale),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_seen(mutant: str) -> None:
    with pytest.raises(AssertionError):
        check_guidance(MUTANTS[mutant], "v")


@pytest.mark.parametrize("name", PLAIN)
def test_samples_at_scale_one_are_those_without(name: str) -> None:
    inner = conditional("x0")
    guided = classifier_free(inner, 1.0)
    asked = {"solver": name, "steps": 4, "label": LABEL}
    assert torch.equal(ef.sample(guided, (4, 5), **asked), ef.sample(inner, (4, 5), **asked))


def test_guided_predictions_agree_with_each_other() -> None:
    """x = alpha x0 + sigma eps holds for what guidance predicts, too."""
    guided = classifier_free(conditional(), 3.0)
    alpha, sigma = VP.alpha(T)[:, None], VP.sigma(T)[:, None]
    x0, noise = guided(X, T, label=LABEL), guided.noise(X, T, label=LABEL)
    torch.testing.assert_close(alpha * x0 + sigma * noise, X)
    torch.testing.assert_close(guided.score(X, T, label=LABEL), -noise / sigma)
    rates = VP.alpha_prime(T)[:, None], VP.sigma_prime(T)[:, None]
    velocity = rates[0] * x0 + rates[1] * noise
    torch.testing.assert_close(guided.velocity(X, T, label=LABEL), velocity)


def test_statistics_hold_only_where_the_law_does() -> None:
    inner = conditional()
    inner.statistics = ef.Statistics.exact(torch.zeros(5), torch.eye(5))
    assert classifier_free(inner, 1.0).statistics is inner.statistics
    assert classifier_free(inner, 2.0).statistics is None


def test_passes_are_counted() -> None:
    inner = conditional()
    assert [classifier_free(inner, s).passes(0.5) for s in (0.0, 1.0, 2.0)] == [1, 1, 2]
    twice = classifier_free(classifier_free(inner, 2.0), 3.0)
    assert twice.passes(0.5) == 4
    result = ef.sample(
        classifier_free(inner, 2.0), (4, 5), solver="edm", steps=3, full=True, label=LABEL
    )
    assert (result.nfe, result.passes) == (5, 10)


def test_a_scale_that_is_no_number_is_refused() -> None:
    for scale in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be finite"):
            classifier_free(conditional(), scale)
