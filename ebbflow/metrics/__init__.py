"""Distances between two sets of vectors, and a feature network that turns images into vectors.

Nothing here knows of diffusion. Every metric takes vectors (n, d) and (m, d) and computes in
float64; `extract` makes them from images by any network.
"""

from __future__ import annotations

from ebbflow.metrics.energy import energy_distance
from ebbflow.metrics.features import batches, extract
from ebbflow.metrics.frechet import Moments, frechet_distance, gaussian_frechet_distance
from ebbflow.metrics.kernel import kernel_distance
from ebbflow.metrics.neighbours import density_coverage, precision_recall
from ebbflow.metrics.sliced import sliced_wasserstein
from ebbflow.metrics.two_sample import classifier_two_sample_test

__all__ = [
    "Moments",
    "batches",
    "classifier_two_sample_test",
    "density_coverage",
    "energy_distance",
    "extract",
    "frechet_distance",
    "gaussian_frechet_distance",
    "kernel_distance",
    "precision_recall",
    "sliced_wasserstein",
]
