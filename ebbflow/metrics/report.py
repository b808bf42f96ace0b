"""Every figure of a generated set against a reference, and references as small files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor

from ebbflow.files import replacing
from ebbflow.metrics.energy import energy_distance
from ebbflow.metrics.frechet import Moments, frechet_distance
from ebbflow.metrics.kernel import kernel_distance
from ebbflow.metrics.neighbours import density_coverage, precision_recall
from ebbflow.metrics.sliced import sliced_wasserstein
from ebbflow.metrics.two_sample import classifier_two_sample_test


@dataclass(frozen=True)
class Figures:
    """What `compare` measures of `count` samples; lower is better, but 1 is best from precision on.

    `two_sample_accuracy` is best at 1/2.
    """

    count: int
    frechet: float
    kernel: float
    kernel_standard_error: float
    sliced_wasserstein: float
    energy: float
    two_sample_accuracy: float
    two_sample_p_value: float
    precision: float
    recall: float
    density: float
    coverage: float


@dataclass(frozen=True, eq=False)
class Reference:
    """Features of real images: the moments of all of them, the vectors (n, d) of some.

    `held_out` holds the figures of other real images against this reference, by their count: what
    a perfect generator would get.
    """

    description: str
    moments: Moments
    features: Tensor
    held_out: Mapping[int, Figures] = field(default_factory=dict)

    @classmethod
    def of(cls, features: Tensor, description: str) -> Reference:
        """A reference that keeps all `features` (n, d)."""
        return cls(description, Moments.of(features), features)

    def yardstick(self, count: int) -> Figures | None:
        """The held-out figures at the count nearest in ratio to `count`, if there are any."""
        near = min(self.held_out, key=lambda n: max(n / count, count / n), default=None)
        return None if near is None else self.held_out[near]

    def save(self, path: Path) -> None:
        """Write a safetensors file: moments in single, features in half precision."""
        from safetensors.torch import save_file

        tensors = {
            "mean": self.moments.mean.float(),
            "scatter": self.moments.scatter.float(),
            "features": self.features.half(),
        }
        metadata = {
            "description": self.description,
            "count": str(self.moments.count),
            "held_out": json.dumps([asdict(figures) for figures in self.held_out.values()]),
        }
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata)

    @classmethod
    def load(cls, path: Path) -> Reference:
        """Read what `save` wrote; raises ValueError for a file that is damaged or another."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                mean, scatter, features = map(file.get_tensor, ("mean", "scatter", "features"))
        except SafetensorError as error:
            raise ValueError(f"{path} is no complete reference: {error}") from error
        moments = Moments(int(about["count"]), mean.double(), scatter.double())
        held_out = [Figures(**figures) for figures in json.loads(about["held_out"])]
        return cls(about["description"], moments, features.float(), {f.count: f for f in held_out})


def compare(
    features: Tensor, reference: Reference, *, allow_few: bool = False, seed: int = 0
) -> Figures:
    """Measure the `features` (n, d) of generated images against a reference.

    Raises ValueError for fewer images than features, unless `allow_few`; six are always needed.
    """
    real = reference.features
    least = min(len(features), len(real))
    if least < 6:
        raise ValueError(f"{least} images are too few for any figure: give at least 6")
    frechet = frechet_distance(features, reference.moments, allow_few=allow_few)
    kernel = kernel_distance(features, real, blocks=min(10, least // 2), seed=seed)
    test = classifier_two_sample_test(features, real, seed=seed)
    support = precision_recall(real, features)
    balls = density_coverage(real, features)
    return Figures(
        count=len(features),
        frechet=frechet,
        kernel=kernel.value,
        kernel_standard_error=kernel.standard_error,
        sliced_wasserstein=sliced_wasserstein(features, real, seed=seed),
        energy=energy_distance(features, real),
        two_sample_accuracy=test.accuracy,
        two_sample_p_value=test.p_value,
        precision=support.precision,
        recall=support.recall,
        density=balls.density,
        coverage=balls.coverage,
    )
