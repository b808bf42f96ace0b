"""Law 3 for discrete tables: the levels at the indices are those of the chain."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ebbflow.schedules import Betas

DDPM = np.linspace(1e-4, 0.02, 1000)


def zero_terminal(betas: np.ndarray) -> np.ndarray:
    """Betas rescaled to no signal at the last index, as diffusers' rescale_zero_terminal_snr.

    Common Diffusion Noise Schedules and Sample Steps Are Flawed, algorithm 1.
    """
    root = np.sqrt(np.cumprod(1 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    bar = root**2
    return 1 - np.concatenate([bar[:1], bar[1:] / bar[:-1]])


def squared_cosine(steps: int) -> np.ndarray:
    """squaredcos_cap_v2: Improved Denoising Diffusion Probabilistic Models, equation 17."""
    bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - bar[1:] / bar[:-1], 0.999)


TABLES = {
    "linear": DDPM,
    "scaled linear": np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2,
    "squared cosine": squared_cosine(100),
    "zero terminal": zero_terminal(DDPM),
    "short": np.array([0.3, 0.6, 0.9]),
}


@given(betas=st.lists(st.floats(1e-5, 0.999), min_size=1, max_size=30), share=st.floats(0, 1))
def test_any_table_of_betas_is_a_schedule(betas: list[float], share: float) -> None:
    schedule = Betas(betas)
    bar = np.cumprod(1 - np.array(betas))
    t = torch.arange(1, len(betas) + 1, dtype=torch.float64) / len(betas)
    if bar[-1] > 1e-200:
        np.testing.assert_allclose(schedule.alpha(t) ** 2, bar, rtol=1e-9)
        assert schedule.time(schedule.log_snr(share)).item() == pytest.approx(share, abs=1e-7)
    total = schedule.alpha(share) ** 2 + schedule.sigma(share) ** 2
    assert total.item() == pytest.approx(1, abs=1e-14)


def test_a_single_beta_of_one_is_no_process() -> None:
    with pytest.raises(ValueError, match=r"betas\[0\] = 1"):
        Betas([1.0])


@pytest.mark.parametrize("name", TABLES)
def test_betas_hit_their_own_indices(name: str) -> None:
    """alpha_bar at t = (i + 1)/T is the cumulative product that every DDPM code uses."""
    table = TABLES[name]
    schedule, steps = Betas(table.tolist()), len(table)
    t = torch.tensor([(i + 1) / steps for i in range(steps)], dtype=torch.float64)
    bar = np.cumprod(1 - table)
    np.testing.assert_allclose(schedule.alpha(t).numpy() ** 2, bar, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(schedule.sigma(t).numpy() ** 2, 1 - bar, rtol=1e-9)
    # One step of the chain: variance beta is added to what sqrt(1 - beta) keeps.
    alpha, sigma = schedule.alpha(t).numpy(), schedule.sigma(t).numpy()
    kept = (1 - table[1:]) * sigma[:-1] ** 2 + table[1:]
    np.testing.assert_allclose(sigma[1:] ** 2, kept, rtol=1e-9)
    np.testing.assert_allclose(alpha[1:], np.sqrt(1 - table[1:]) * alpha[:-1], atol=1e-9)
