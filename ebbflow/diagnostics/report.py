"""One report of how good a learned field is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebbflow import noise
from ebbflow.denoiser import Denoiser
from ebbflow.diagnostics.conservative import STREAM, Estimate, asymmetry, circulation
from ebbflow.diagnostics.paths import Paths, paths
from ebbflow.likelihood import elbo
from ebbflow.likelihood.angle import AngleFlow, per_sample
from ebbflow.statistics import Statistics


@dataclass(frozen=True)
class MeanScore:
    """The mean noise prediction over noisy data, which is zero for the true score.

    Args:
        value: its root mean square over coordinates, the part that scatter explains taken off.
        ratio: its square over the square that scatter alone would give: about 1 if calibrated.
        error: the root mean square of `D(x_t) - x_0` over samples and coordinates.
    """

    value: float
    ratio: float
    error: float


@dataclass(frozen=True)
class EndTime:
    """What it means to end the process, and to begin sampling, at `time`.

    Args:
        time: the end.
        bound: the mean evidence lower bound of the data with this end, in nats, with its error over
            data and draws. Where it falls towards 1, the score's errors at high noise cost more
            than a prior closer to the data would.
        gap: `KL(N(alpha m, alpha² C + sigma²) || N(0, sigma²))` in nats, m and C of the data: what
            a prior without statistics costs.
    """

    time: float
    bound: Estimate
    gap: float


@dataclass(frozen=True)
class Report:
    """What `diagnose` found, one figure a time, and paths of sampling; `save_figure` draws it."""

    times: tuple[float, ...]
    log_snr: tuple[float, ...]
    asymmetry: tuple[Estimate, ...]
    circulation: tuple[Estimate, ...]
    mean_score: tuple[MeanScore, ...]
    ends: tuple[EndTime, ...]
    paths: Paths

    @property
    def best_end(self) -> float:
        """The end time of the greatest bound."""
        return max(self.ends, key=lambda end: end.bound.value).time

    def summary(self) -> dict[str, Any]:
        """All of it in numbers for JSON; of the paths, means with standard errors."""
        named = {
            name: mean_with_error(getattr(self.paths, name)) for name in ("straightness", "length")
        }
        return {
            "times": list(self.times),
            "log_snr": list(self.log_snr),
            "asymmetry": [e._asdict() for e in self.asymmetry],
            "circulation": [e._asdict() for e in self.circulation],
            "mean_score": [asdict(m) for m in self.mean_score],
            "ends": [{"time": e.time, "bound": e.bound._asdict(), "gap": e.gap} for e in self.ends],
            "best_end": self.best_end,
            "paths": {**named, "turning": mean_with_error(self.paths.turning)},
        }

    def save_figure(self, path: str | Path) -> None:
        """Draw the report, four panels, as a picture; needs matplotlib."""
        from ebbflow.diagnostics.draw import save

        save(self, Path(path))


def diagnose(
    denoiser: Denoiser,
    data: Tensor,
    *,
    times: int = 8,
    probes: int = 4,
    loops: int = 16,
    samples: int = 32,
    trajectories: int = 16,
    seed: int = 0,
    floor: float = 1e-2,
    **condition: Any,
) -> Report:
    """How far a denoiser is from a score, from calibrated and from straight, on data (N, *shape).

    At `times` times, at the middles of equal pieces of the angle atan(sigma/alpha): the asymmetry
    of the score's Jacobian over all data, its circulation around triangles at the first `loops`
    samples, its mean over all data and both signs of their noise; at ends as many, the evidence
    lower bound; and the paths of as many `trajectories` from noise.

    floor: the least sigma/alpha, of the bounds and of paths; samples: calls a bound, even;
    condition: tensors whose first axis is the batch belong to the data and, in order, to the paths.
    Costs about `times (probes backward + 27 loops/N + 2 + 1.3 samples)` calls on N samples.
    Are We Really Learning the Score Function? Reinterpreting Diffusion Models Through Wasserstein
    Gradient Flow Matching; On Calibrating Diffusion Probabilistic Models; How Much is Enough? A
    Study on Diffusion Times in Score-based Generative Models.
    """
    if not isinstance(times, int) or times < 1:
        raise ValueError(f"times is how many, at least 1, got {times!r}")
    if len(data) < 2 or not data.is_floating_point() or not bool(torch.isfinite(data).all()):
        raise ValueError(f"data must be at least 2 finite samples, got {tuple(data.shape)}")
    denoiser.check_input(data)
    schedule, n = denoiser.schedule, len(data)
    flow = AngleFlow.of(denoiser, data, floor, 1.0)
    data = data.to(flow.dtype)
    middles = flow.first + (flow.last - flow.first) * (torch.arange(times) + 0.5).double() / times
    nodes = schedule.time(-2 * torch.log(torch.tan(middles)))
    few = data[:loops]
    some = per_sample(condition, n, torch.arange(min(loops, n)))
    asymmetries, circulations, means = [], [], []
    for t in nodes.tolist():
        asymmetries.append(
            asymmetry(denoiser, data, t, probes=probes, seed=seed, condition=condition)
        )
        circulations.append(circulation(denoiser, few, t, seed=seed, condition=some))
        means.append(mean_score(denoiser, data, t, seed=seed, condition=condition))

    statistics = Statistics.from_data(data.detach().cpu())
    ends = []
    with torch.no_grad():
        for t in [*nodes.tolist(), 1.0]:
            bound, _ = elbo(
                denoiser, data, samples=samples, seed=seed, floor=floor, end=t, **condition
            )
            error = bound.std().item() / math.sqrt(n)
            gap = prior_gap(statistics, schedule.alpha(t).item(), schedule.sigma(t).item())
            ends.append(EndTime(t, Estimate(bound.mean().item(), error), gap))

    count = min(trajectories, n)
    x1 = noise.normal(seed, range(count), 9, data.shape[1:], torch.float64, stream=STREAM)
    shown = per_sample(condition, n, torch.arange(count))
    return Report(
        tuple(nodes.tolist()),
        tuple(schedule.log_snr(nodes).tolist()),
        tuple(asymmetries),
        tuple(circulations),
        tuple(means),
        tuple(ends),
        paths(flow, x1.to(data.device), shown),
    )


@torch.no_grad()
def mean_score(
    denoiser: Denoiser,
    x0: Tensor,
    t: float,
    *,
    seed: int = 0,
    condition: Mapping[str, Any] | None = None,
) -> MeanScore:
    """The mean of `E[eps | x_t]` over data, with each noise as +eps and -eps.

    It is `-sigma` times the mean score, `∫ grad p_t = 0` for any law, so that a mean is an error.
    On Calibrating Diffusion Probabilistic Models, section 3.1.
    """
    alpha, sigma = denoiser.schedule.alpha(t).item(), denoiser.schedule.sigma(t).item()
    eps = noise.normal(seed, range(len(x0)), 8, x0.shape[1:], x0.dtype, stream=STREAM).to(x0.device)
    extra = dict(condition or {})
    signal = x0.double()
    both = [denoiser(alpha * x0 + sign * sigma * eps, t, **extra).double() for sign in (1, -1)]
    # The noise that a prediction of x_0 stands for, less the true one.
    wrong = (alpha / sigma * (signal - (both[0] + both[1]) / 2)).flatten(1)
    mean = wrong.mean(0).square().mean().item()
    scatter = (wrong.var(0) / len(x0)).mean().item()
    square = sum((part - signal).square().mean().item() for part in both) / 2
    ratio = mean / scatter if scatter > 0 else math.inf
    return MeanScore(math.sqrt(max(mean - scatter, 0.0)), ratio, math.sqrt(square))


def prior_gap(statistics: Statistics, alpha: float, sigma: float) -> float:
    """`KL(N(alpha m, alpha² C + sigma²) || N(0, sigma²))` in nats."""
    ratio = (alpha / sigma) ** 2
    signal = ratio * statistics.variance
    left = statistics.mean.numel() - statistics.variance.numel()
    rest = ratio * statistics.residual
    total = (signal - torch.log1p(signal)).sum().item() + left * (rest - math.log1p(rest))
    return 0.5 * (total + ratio * statistics.mean.square().sum().item())


def mean_with_error(values: Tensor) -> dict[str, float]:
    """The mean of values (n,) and its standard error, infinite for one value."""
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return {"mean": values.mean().item(), "standard_error": error}
