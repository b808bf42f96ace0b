"""The libraries that these tests compare with; without them, a test says so and is skipped."""

from __future__ import annotations

from typing import Any

import pytest

REMEDY = "builds real diffusers pipelines: pip install 'ebbflow[peers]'"


@pytest.fixture(scope="session")
def diffusers() -> Any:
    library = pytest.importorskip("diffusers", reason=REMEDY)
    library.utils.logging.set_verbosity_error()
    return library


@pytest.fixture(scope="session")
def transformers() -> Any:
    return pytest.importorskip("transformers", reason=REMEDY)
