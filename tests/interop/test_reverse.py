"""Likelihood and inversion of networks of diffusers: group norms, attention, class embeddings.

Mutants that these tests kill: a divergence of the noise prediction in place of the flow's; a probe
that is drawn anew at each evaluation; a network whose gradients are cut; labels that are not sliced
with the samples that still run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ebbflow as ef
from tests.interop import tiny
from tests.interop.test_load import ddim

SETTINGS: dict[str, Any] = {"divergence": "hutchinson", "samples": 2, "floor": 0.3}


def classes(diffusers: Any, dtype: torch.dtype) -> tuple[Any, ef.Denoiser]:
    """Group norms and attention at the middle, which is fused where it can be."""
    options = {"sample_size": 4, "in_channels": 1, "out_channels": 1, "num_class_embeds": 5}
    down, up = ("DownBlock2D",), ("UpBlock2D",)
    blocks = {"block_out_channels": (8,), "down_block_types": down, "up_block_types": up}
    network = tiny.unet(diffusers, **options, **blocks).to(dtype)
    pipeline = diffusers.DDPMPipeline(network, ddim(diffusers))
    return network, ef.interop.diffusers.load(pipeline)


def test_gradients_are_finite_differences(diffusers: Any) -> None:
    network, denoiser = classes(diffusers, torch.float64)
    x0, label = tiny.normal(1, 1, 4, 4).double(), denoiser.condition([3])
    leaf, weight = x0.clone().requires_grad_(), network.conv_in.weight

    def value(x: Tensor) -> Tensor:
        found, error = ef.log_likelihood(denoiser, x, rtol=1e-5, **SETTINGS, **label)
        assert bool(found.isfinite().all()) and bool((error > 0).all())
        return found.sum()

    gradients = torch.autograd.grad(value(leaf), [leaf, weight])
    for held, gradient in zip((x0, weight), gradients, strict=True):
        ends = []
        for sign in (1, -2, 1):  # there, to the other side, and back
            with torch.no_grad():
                held += sign * 1e-2 * gradient / gradient.norm()
                ends.append(value(x0))
        slope = (ends[0] - ends[1]) / 2e-2
        # Derivatives hold the steps that the solver chose; differences see them change.
        torch.testing.assert_close(slope, gradient.norm(), rtol=1e-2, atol=0)


def test_single_precision_is_double_precision_to_the_tolerance(diffusers: Any) -> None:
    """Round-off, 1e-6 of the network, can turn a step from accepted to rejected."""
    found = []
    for dtype in (torch.float64, torch.float32):
        _, denoiser = classes(diffusers, dtype)
        leaf = tiny.normal(2, 1, 4, 4).to(dtype).requires_grad_()
        label = denoiser.condition([3, 1])
        value, _ = ef.log_likelihood(denoiser, leaf, rtol=1e-3, **SETTINGS, **label)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        with torch.no_grad():
            bound, _ = ef.likelihood.elbo(denoiser, leaf, samples=8, floor=0.3, **label)
        found.append((value.detach(), gradient.double(), bound))
    (value, gradient, bound), (value32, gradient32, bound32) = found
    torch.testing.assert_close(value32, value, rtol=3e-3, atol=0)
    torch.testing.assert_close(bound32, bound, rtol=1e-4, atol=0)
    assert (gradient32 - gradient).norm() < 5e-2 * gradient.norm()


def test_probes_agree_with_the_exact_divergence(diffusers: Any) -> None:
    _, denoiser = classes(diffusers, torch.float64)
    x0 = tiny.normal(2, 1, 4, 4).double()
    label = denoiser.condition([3, 1])
    rest = {"rtol": 1e-4, "floor": 0.3}
    with torch.no_grad():
        exact, none = ef.log_likelihood(denoiser, x0, divergence="exact", **rest, **label)
        found, error = ef.log_likelihood(
            denoiser, x0, divergence="hutchinson", samples=12, **rest, **label
        )
    assert bool((none == 0).all())
    assert ((found - exact) / error).abs().max() < 4
    alone, _ = ef.log_likelihood(
        denoiser, x0[1:], divergence="exact", **rest, **denoiser.condition([1])
    )
    torch.testing.assert_close(alone, exact[1:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["bdia", "edict", "leapfrog"])
def test_inversion_is_exact(diffusers: Any, method: str) -> None:
    _, denoiser = classes(diffusers, torch.float32)
    label = denoiser.condition([3, 1])
    guided = ef.guidance.ClassifierFree(denoiser, 1.5, denoiser.condition([0, 0]))
    x0 = tiny.normal(2, 1, 4, 4).double()
    for model in (denoiser, guided):
        found = ef.invert(model, x0, method=method, steps=20, **label)
        assert found.round_trip_error < 1e-10
        assert max(latent.abs().max().item() for latent in found.latents) < 12
