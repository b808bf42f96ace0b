"""One thread a worker, the same numbers in every run."""

from __future__ import annotations

import os

# Before torch is imported anywhere: several workers share the cores, and a reduction split over
# a varying number of threads rounds differently.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What a command prints must not depend on where the tests run.
os.environ.update(NO_COLOR="1", COLUMNS="120")
os.environ.pop("FORCE_COLOR", None)

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)

# The same examples everywhere: a red run here is a red run there.
settings.register_profile("ebbflow", derandomize=True, deadline=None, database=None)
settings.load_profile("ebbflow")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """As many workers as there are cores, at most four, and none for single tests."""
    if any("::" in argument for argument in config.args):
        return 0
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(4, cores)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
