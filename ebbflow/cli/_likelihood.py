"""`ebbflow evaluate --likelihood`: bits a dimension of pictures under a model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ebbflow.cli._shared import print_table, progress
from ebbflow.denoiser import Denoiser

COARSE = 0.9
"""The sigma/alpha above which the coarse bound looks: fine noise and flat ground count for less."""
COUNT = 64
BATCH = 8


def measure(
    denoiser: Denoiser,
    pixels: Tensor,
    *,
    probes: int,
    rtol: float,
    seed: int,
    batch: int,
    device: torch.device,
) -> dict[str, Any]:
    """Bits a dimension of uint8 pictures (N, C, H, W) by the probability flow and by the bound.

    Each figure has the standard error of the mean over pictures, which holds that of the probes,
    since every picture has its own; `probe_error` is their share. The coarse bound sees pictures
    at sigma/alpha = `COARSE` and more only. It is no sharp bound, but tells what kind of picture it
    is from how much of it is smooth, which dominates the others.
    """
    from ebbflow.diagnostics.report import mean_with_error
    from ebbflow.likelihood import bits_per_dimension, dequantise, elbo, log_likelihood

    size = pixels[0].numel()
    flow, errors, bounds, coarse = [], [], [], []
    starts = range(0, len(pixels), batch)
    with progress("likelihood", len(starts)) as advance, torch.no_grad():
        for start in starts:
            x0 = dequantise(pixels[start : start + batch], seed, start).float().to(device)
            value, error = log_likelihood(
                denoiser,
                x0,
                divergence="hutchinson",
                samples=probes,
                rtol=rtol,
                seed=seed,
                first_index=start,
            )
            bits, error = bits_per_dimension(value, error, size)
            bound = elbo(denoiser, x0, samples=32, seed=seed, first_index=start)
            flow.append(bits.cpu())
            errors.append(error.cpu())
            bounds.append(bits_per_dimension(*bound, size)[0].cpu())
            bound = elbo(denoiser, x0, samples=16, seed=seed, first_index=start, floor=COARSE)
            coarse.append(bits_per_dimension(*bound, size)[0].cpu())
            advance()
    probe = torch.cat(errors).square().mean().sqrt().item() / math.sqrt(len(pixels))
    return {
        "count": len(pixels),
        "dimensions": size,
        "bits_per_dimension": mean_with_error(torch.cat(flow)),
        "bound_bits_per_dimension": mean_with_error(torch.cat(bounds)),
        "coarse_bits_per_dimension": mean_with_error(torch.cat(coarse)),
        "probe_error": probe,
        "each": torch.cat(flow).tolist(),
    }


def show(report: dict[str, Any], title: str) -> None:
    """Print the report of `measure` as a table."""
    names = (
        ("bits_per_dimension", "bits/dim, probability flow"),
        ("bound_bits_per_dimension", "bits/dim, at most (ELBO)"),
        ("coarse_bits_per_dimension", f"the same, coarse (sigma/alpha >= {COARSE})"),
    )
    rows = [
        [label, f"{report[name]['mean']:.3f}", f"{report[name]['standard_error']:.3f}"]
        for name, label in names
    ]
    print_table(("figure", f"{report['count']:,} pictures", "standard error"), rows, title)
