"""Feature extraction: batches change nothing, and wrong ranges and types are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.metrics import Moments, batches, extract


def network(images: torch.Tensor) -> torch.Tensor:
    assert images.dtype == torch.float32 and images.min() >= -1 and images.max() <= 1
    return images.double().flatten(1)


@given(batch=st.integers(1, 12))
def test_batches_change_nothing(batch: int) -> None:
    images = torch.randint(0, 256, (10, 1, 2, 2), dtype=torch.uint8)
    expected = (images.double() / 255 * 2 - 1).flatten(1)
    torch.testing.assert_close(extract(network, images, batch), expected, rtol=0, atol=1e-6)
    streamed = Moments.stream(batches(network, images, batch))
    torch.testing.assert_close(streamed.mean, expected.mean(0), rtol=0, atol=1e-6)


def test_levels_and_floats_agree_and_a_small_overshoot_is_clipped() -> None:
    levels = torch.tensor([0, 51, 204, 255], dtype=torch.uint8).view(1, 1, 2, 2)
    floats = torch.tensor([-1.05, -0.6, 0.6, 1.0]).view(1, 1, 2, 2)
    torch.testing.assert_close(extract(network, levels), extract(network, floats))


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    extract(network, torch.zeros(4, 1, 2, 2) - 0.5, batch=1, progress=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((2, 1, 2, 2), 255.0), r"\[255, 255\].*\[-1, 1\].*as uint8"),
        (torch.rand(2, 1, 2, 2), r"2 \* x - 1"),
        (torch.full((2, 1, 2, 2), torch.nan), "nan"),
        (torch.zeros(2, 1, 2, 2, dtype=torch.int64), "int64.*uint8"),
        (torch.zeros(2, 2), r"\(n, C, H, W\).*\(2, 2\)"),
        (torch.zeros(0, 1, 2, 2), r"\(0, 1, 2, 2\)"),
    ],
)
def test_wrong_images_are_refused(images: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extract(network, images)
