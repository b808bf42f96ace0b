"""Log-likelihoods against closed forms.

Mutants that these tests kill: the divergence without the extension below the floor or evaluated at
half its angle; the prior without the statistics, or with alpha in place of alpha²; probes drawn at
each evaluation anew (solves do not arrive); a standard error without the √samples; probes shared by
the samples; a label's statistics given to all; gradients of a detached divergence.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ebbflow as ef
from ebbflow.likelihood import traces

SCHEDULES = [
    ef.schedules.VP(),
    ef.schedules.VE(),
    ef.schedules.Cosine(),
    ef.schedules.Linear(),
    ef.schedules.Betas(torch.linspace(1e-4, 0.02, 1000)),
]


def names(schedule: object) -> str:
    return type(schedule).__name__


def law(components: int, d: int = 3, seed: int = 0) -> ef.oracles.GaussianMixture:
    generator = torch.Generator().manual_seed(seed)
    root = 0.4 * torch.randn(components, d, d, generator=generator, dtype=torch.float64)
    means = 1.5 * torch.randn(components, d, generator=generator, dtype=torch.float64)
    covariances = root @ root.mT + 0.03 * torch.eye(d, dtype=torch.float64)
    weights = torch.rand(components, generator=generator, dtype=torch.float64) + 0.2
    return ef.oracles.GaussianMixture(means, covariances, weights)


@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_exact_divergence_is_the_closed_form(schedule: Any, components: int) -> None:
    for seed in range(2):
        data = law(components, seed=seed)
        x0 = data.sample(8, seed + 10)
        denoiser = data.denoiser(schedule, statistics=True)
        value, error = ef.log_likelihood(denoiser, x0, divergence="exact")
        assert value.shape == error.shape == (8,)
        assert bool((error == 0).all())
        torch.testing.assert_close(value, data.log_prob(x0), atol=1e-4, rtol=0)


def test_far_points_and_unequal_paths() -> None:
    data = law(2)
    x0 = torch.cat([data.sample(4, 1), 6 * torch.ones(1, 3, dtype=torch.float64)])
    denoiser = data.denoiser(ef.schedules.Cosine(), statistics=True)
    together, _ = ef.log_likelihood(denoiser, x0, divergence="exact")
    torch.testing.assert_close(together, data.log_prob(x0), atol=0, rtol=1e-4)
    alone = [ef.log_likelihood(denoiser, x[None], divergence="exact")[0] for x in x0]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("prediction", ["x0", "noise", "v", "velocity", "score"])
@pytest.mark.parametrize("schedule", [ef.schedules.Linear(), ef.schedules.VP()], ids=names)
def test_every_prediction_is_finite_at_the_ends(schedule: Any, prediction: str) -> None:
    data = law(2)
    exact = data.denoiser(schedule)

    def net(x: Tensor, t: Tensor) -> Tensor:
        return getattr(exact, prediction)(x, t) if prediction != "x0" else exact(x, t)

    denoiser = ef.Denoiser(
        net, schedule, prediction, statistics=ef.Statistics.exact(data.mean, data.covariance)
    )
    x0 = data.sample(4, 2)
    value, _ = ef.log_likelihood(denoiser, x0, divergence="exact")
    torch.testing.assert_close(value, data.log_prob(x0), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("schedule", "size"), [(SCHEDULES[0], 0.02), (SCHEDULES[1], 0.05)])
def test_the_bias_without_statistics_is_that_of_the_prior(schedule: Any, size: float) -> None:
    mean = torch.tensor([[1.0, -0.5]], dtype=torch.float64)
    covariance = torch.tensor([0.8], dtype=torch.float64)
    data = ef.oracles.GaussianMixture(mean, covariance, torch.ones(1))
    x0 = data.sample(16, 0)
    known, _ = ef.log_likelihood(data.denoiser(schedule, statistics=True), x0, divergence="exact")
    bare, _ = ef.log_likelihood(data.denoiser(schedule), x0, divergence="exact")
    # The flow of one Gaussian moves each deviation to the same deviation.
    z = (x0 - mean) / covariance.sqrt()
    alpha, sigma = schedule.alpha(1.0), schedule.sigma(1.0)
    deviation = torch.sqrt(alpha**2 * covariance + sigma**2)
    x1 = alpha * mean + deviation * z
    # Of x_1 under N(0, sigma²) in place of its own law.
    expected = (0.5 * z**2 - 0.5 * (x1 / sigma) ** 2 + torch.log(deviation / sigma)).sum(1)
    torch.testing.assert_close(bare - known, expected, atol=1e-5, rtol=0)
    assert 0.1 * size < (bare - known).abs().max() < 2 * size


def test_an_earlier_end_with_its_own_gaussian_is_exact() -> None:
    data = law(1)
    denoiser = data.denoiser(ef.schedules.VP(), statistics=True)
    x0 = data.sample(4, 1)
    value, _ = ef.log_likelihood(denoiser, x0, divergence="exact", end=0.4)
    torch.testing.assert_close(value, data.log_prob(x0), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("divergence", "samples"), [("hutchinson", 16), ("hutch++", 12)])
@pytest.mark.parametrize("schedule", [ef.schedules.Linear(), ef.schedules.VE()], ids=names)
def test_standard_errors_are_honest(schedule: Any, divergence: Any, samples: int) -> None:
    d = 3 if divergence == "hutchinson" else 16
    data = law(2 if d == 3 else 1, d=d, seed=1)
    x0 = data.sample(96, 5)
    denoiser = data.denoiser(schedule, statistics=True)
    value, error = ef.log_likelihood(
        denoiser, x0, divergence=divergence, samples=samples, rtol=1e-4
    )
    z = ((value - data.log_prob(x0)) / error).abs()
    # Student's t: medians 0.69, and 5 standard deviations of a median of 96.
    assert 0.45 < z.median() < 0.95
    assert z.max() < 5
    assert (z < 4).double().mean() > 0.98
    again, _ = ef.log_likelihood(
        denoiser, x0[:2], divergence=divergence, samples=samples, rtol=1e-4
    )
    torch.testing.assert_close(again, value[:2], atol=1e-6, rtol=0)
    later, _ = ef.log_likelihood(
        denoiser, x0[2:4], divergence=divergence, samples=samples, rtol=1e-4, first_index=2
    )
    torch.testing.assert_close(later, value[2:4], atol=1e-6, rtol=0)


def test_the_sketch_lowers_the_error_where_few_directions_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64))[0]
    variance = torch.cat([torch.full((3,), 4.0), torch.full((21,), 0.01)]).double()
    covariance = (q * variance) @ q.T
    data = ef.oracles.GaussianMixture(torch.zeros(1, 24), covariance[None], torch.ones(1))
    denoiser = data.denoiser(ef.schedules.Cosine(), statistics=True)
    x0 = data.sample(4, 0)
    _, plain = ef.log_likelihood(denoiser, x0, divergence="hutchinson", samples=18, rtol=1e-4)
    _, sketch = ef.log_likelihood(denoiser, x0, divergence="hutch++", samples=6, rtol=1e-4)
    assert sketch.mean() < 0.3 * plain.mean()


def test_traces_of_a_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(400, 5, generator=generator, dtype=torch.float64).requires_grad_()
    pull = traces.Pull(x @ matrix.T, x, False)
    torch.testing.assert_close(traces.exact(pull)[:, 0], matrix.trace().expand(400))
    for count, way in ((4, traces.hutchinson), (4, traces.hutch_plus_plus)):
        values = way(pull, traces.spheres(0, 0, 400, count, x.shape[1:]))
        values = values.mean(1)
        assert abs(values.mean() - matrix.trace()) < 4 * values.std() / 20


def test_labels_choose_the_law_and_its_statistics() -> None:
    laws = [law(1, seed=s) for s in (3, 4)]
    schedule = ef.schedules.VE(sigma_max=5.0)  # the prior matters
    oracles = [one.denoiser(schedule) for one in laws]

    def net(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        both = torch.stack([oracle(x, t) for oracle in oracles])
        return both[label, torch.arange(len(x))]

    classes = {c: ef.Statistics.exact(one.mean, one.covariance) for c, one in enumerate(laws)}
    pooled = ef.Statistics(classes[0].mean, classes[0].variance, classes[0].basis, 0.0, classes)
    denoiser = ef.Denoiser(net, schedule, statistics=pooled)
    label = torch.tensor([1, 0, 1, 0, 1])
    samples = torch.stack([one.sample(5, 1) for one in laws])
    x0 = samples[label, torch.arange(5)]
    value, _ = ef.log_likelihood(denoiser, x0, divergence="exact", label=label)
    expected = torch.stack([one.log_prob(x0) for one in laws])[label, torch.arange(5)]
    torch.testing.assert_close(value, expected, atol=1e-4, rtol=0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 8).double(), nn.Linear(8, 2).double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        told = torch.cat([x, t[:, None].to(x.dtype)], 1)
        return 0.5 * x + 0.3 * self.last(torch.tanh(self.first(told)))


@pytest.mark.parametrize(
    ("divergence", "gradient"),
    [
        *(("exact", mode) for mode in ("direct", "checkpoint", "reversible", "adjoint")),
        *(("hutchinson", mode) for mode in ("direct", "adjoint")),
    ],
)
def test_gradients_are_finite_differences(divergence: Any, gradient: Any) -> None:
    net = Net()
    denoiser = ef.Denoiser(net, ef.schedules.Cosine(), "v")
    x0 = torch.tensor([[0.3, -0.8], [1.1, 0.4]], dtype=torch.float64, requires_grad=True)

    def total(x: Tensor) -> Tensor:
        value, _ = ef.log_likelihood(
            denoiser, x, divergence=divergence, samples=2, rtol=1e-9, gradient=gradient
        )
        return (value * torch.tensor([1.0, 2.0])).sum()

    parameter = net.first.weight
    found = torch.autograd.grad(total(x0), [x0, parameter])
    step = 1e-3
    with torch.no_grad():
        for index in ((0, 1), (1, 0)):
            move = torch.zeros_like(x0)
            move[index] = step
            slope = (total(x0 + move) - total(x0 - move)) / (2 * step)
            torch.testing.assert_close(found[0][index], slope, atol=1e-5, rtol=1e-5)
        for index in ((0, 0), (5, 2)):
            ends = []
            for sign in (1, -1):
                parameter[index] += sign * step
                ends.append(total(x0))
                parameter[index] -= sign * step
            slope = (ends[0] - ends[1]) / (2 * step)
            torch.testing.assert_close(found[1][index], slope, atol=1e-5, rtol=1e-5)


class Attending(nn.Module):
    """Every coordinate a token, in the layout for which fused kernels are chosen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(2, 24).double(), nn.Linear(8, 1).double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        told = torch.stack([x, t[:, None].to(x.dtype).expand(x.shape)], 2)
        q, k, v = (part[:, None].contiguous() for part in self.first(told).chunk(3, dim=2))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return 0.5 * x + self.last(mixed[:, 0])[..., 0]


def test_attention_has_the_second_derivatives_that_gradients_need() -> None:
    denoiser = ef.Denoiser(Attending(), ef.schedules.Cosine(), "v")
    x0 = torch.randn(1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def value(x: Tensor) -> Tensor:
        settings: Any = {"divergence": "hutchinson", "samples": 2, "rtol": 1e-7, "floor": 0.1}
        return ef.log_likelihood(denoiser, x, **settings)[0].sum()

    leaf = x0.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    move = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        slope = (value(x0 + move) - value(x0 - move)) / 2e-2
    torch.testing.assert_close(slope, gradient.norm(), rtol=1e-3, atol=0)


def test_nothing_is_recorded_without_need() -> None:
    data = law(1)
    value, _ = ef.log_likelihood(data.denoiser(ef.schedules.Linear()), data.sample(2, 0))
    assert not value.requires_grad


def test_single_precision_of_a_network() -> None:
    data = law(2)
    exact = data.denoiser(ef.schedules.Cosine())
    single = ef.Denoiser(
        lambda x, t: exact(x.float(), t).float(), ef.schedules.Cosine(), "x0", shape=(3,)
    )
    x0 = data.sample(6, 3)
    value, _ = ef.log_likelihood(single, x0.float(), divergence="exact", rtol=1e-5)
    torch.testing.assert_close(value, data.log_prob(x0), atol=2e-3, rtol=0)


def test_images_have_their_shape() -> None:
    mean = torch.zeros(1, 12, dtype=torch.float64)
    data = ef.oracles.GaussianMixture(mean, torch.tensor([0.25]), torch.ones(1))
    flat = data.denoiser(ef.schedules.Cosine())
    denoiser = ef.Denoiser(
        lambda x, t: flat(x.flatten(1), t).reshape(x.shape), ef.schedules.Cosine(), shape=(3, 2, 2)
    )
    x0 = data.sample(3, 0).reshape(3, 3, 2, 2)
    value, error = ef.log_likelihood(denoiser, x0, divergence="hutchinson", samples=2)
    torch.testing.assert_close(value, data.log_prob(x0.flatten(1)), atol=1e-4, rtol=0)
    # A multiple of the identity is exact with probes on a sphere.
    assert bool((error < 1e-4).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divergence": "fast"}, "fast"),
        ({"divergence": "hutchinson", "samples": 1}, "samples"),
        ({"divergence": "hutch++", "samples": 3}, "use exact"),
        ({"rtol": 0.0}, "rtol"),
        ({"floor": 0.0}, "floor"),
        ({"end": 0.0}, "end"),
    ],
)
def test_arguments_out_of_range(change: dict[str, Any], message: str) -> None:
    data = law(1)
    denoiser = data.denoiser(ef.schedules.Linear())
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        ef.log_likelihood(denoiser, data.sample(2, 0), **change)


def test_bad_data_and_solves_that_do_not_arrive() -> None:
    data = law(1)
    denoiser = data.denoiser(ef.schedules.Linear())
    x0 = data.sample(2, 0)
    with pytest.raises(ValueError, match="NaN"):
        ef.log_likelihood(denoiser, x0 * math.nan)
    with pytest.raises(ValueError, match="dequantise"):
        ef.log_likelihood(denoiser, (255 * x0).to(torch.uint8))
    with pytest.raises(RuntimeError, match="max_steps=3"):
        ef.log_likelihood(denoiser, x0, max_steps=3)
