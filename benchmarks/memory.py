"""Peak memory of gradients through sampling, by mode and number of steps.

    python -m benchmarks.memory [--steps 10 100 1000] [--batch 64] [--model fashion-mnist]

In multiples of one state (B, *shape), all that tensors held at once during sampling and its
backward pass. With `--model`, a reward (the mean pixel) is differentiated through 50 steps at most.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import ebbflow as ef

MODES = ("direct", "checkpoint", "reversible", "adjoint")


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most memory that tensors held at once while `run` ran."""
    # What was garbage before must not be freed, and so be counted, while it runs.
    gc.collect()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            run()
    finally:
        gc.enable()
    assert record.profiler is not None and record.profiler.kineto_results is not None
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = top = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        top = max(top, live)
    return top


def peak(denoiser: ef.Denoiser, shape: tuple[int, ...], gradient: str, steps: int) -> float:
    """In states, for the gradients of a reward to x_init and to the parameters."""
    torch.manual_seed(0)
    x = torch.randn(shape).requires_grad_()

    def run() -> None:
        samples = ef.sample(
            denoiser, shape, solver="ddim", steps=steps, x_init=x, gradient=gradient
        )
        samples.mean().backward()
        x.grad = None
        denoiser.zero_grad()

    return peak_bytes(run) / (x.numel() * x.element_size())


def main() -> None:
    """One line a mode."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--model", default=None)
    options = parser.parse_args()
    if options.model is None:
        torch.manual_seed(0)
        net = torch.nn.Sequential(*[torch.nn.Linear(64, 64), torch.nn.Tanh()] * 3)
        denoiser = ef.Denoiser(lambda x, t, n=net: n(x), ef.schedules.VP())
        shape, steps = (options.batch, 64), options.steps
    else:
        denoiser = ef.load(options.model)
        assert denoiser.shape is not None
        shape, steps = (options.batch, *denoiser.shape), [s for s in options.steps if s <= 50]
    print(f"peak memory in states of {shape}, {' / '.join(map(str, steps))} steps")
    for mode in options.modes:
        figures = [f"{peak(denoiser, shape, mode, n):10.1f}" for n in steps]
        print(f"{mode:12}", *figures, flush=True)


if __name__ == "__main__":
    main()
