"""`ebbflow evaluate --diagnose`: a learned field on pictures, in a table and a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ebbflow.cli._shared import print_table
from ebbflow.denoiser import Denoiser

if TYPE_CHECKING:
    from ebbflow.diagnostics import Report

COUNT = 16


def measure(denoiser: Denoiser, pixels: Tensor, seed: int, device: torch.device) -> Report:
    """The report on uint8 pictures (N, C, H, W), uniformly dequantised, without a class."""
    from ebbflow.diagnostics import diagnose
    from ebbflow.likelihood import dequantise

    data = dequantise(pixels, seed).float().to(device)
    return diagnose(denoiser, data, times=6, loops=8, trajectories=8, samples=16, seed=seed)


def show(report: Report, title: str) -> None:
    """Print a row a time, then the paths and the best end."""
    columns = ("time", "log-SNR", "|J - Jᵀ|/|J|", "circulation", "mean score", "bound, nats")
    rows = [
        [
            f"{t:.3f}",
            f"{log_snr:.2f}",
            f"{curl.value:.4f} ± {curl.error:.4f}",
            f"{around.value:.1e} ± {around.error:.0e}",
            f"{mean.value:.4f} ({mean.ratio:.2f})",
            f"{end.bound.value:.1f} ± {end.bound.error:.1f}",
        ]
        for t, log_snr, curl, around, mean, end in zip(
            report.times,
            report.log_snr,
            report.asymmetry,
            report.circulation,
            report.mean_score,
            report.ends,
            strict=False,
        )
    ]
    last = report.ends[-1]
    bound = f"{last.bound.value:.1f} ± {last.bound.error:.1f}"
    rows.append([f"{last.time:.3f}", "", "", "", "", bound])
    print_table(columns, rows, title)
    paths = report.summary()["paths"]
    figures = ", ".join(
        f"{name} {found['mean']:.3f} ± {found['standard_error']:.3f}"
        for name, found in paths.items()
    )
    print(f"paths: {figures}; the end of the greatest bound: {report.best_end:.3f}")
    print("mean score: its size, and its square over that of chance (1: calibrated)")
