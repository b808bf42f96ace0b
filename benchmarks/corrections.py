"""Corrections of a model that exists: calibration, stitching, quantisation.

python -m benchmarks.corrections calibrate    biased oracles and a small trained network
python -m benchmarks.corrections stitch       error by share of cheap calls, on oracles
python -m benchmarks.corrections history      keeping a multistep history across the switch
python -m benchmarks.corrections quantise     8 bits by calibration set, on a small trained network
python -m benchmarks.corrections model        stitching and 8 bits on the bundled model (minutes)
python -m benchmarks.corrections products     time of integer against float products
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

import ebbflow as ef
from ebbflow.metrics.energy import energy_distance
from ebbflow.tuning import (
    CalibrationSet,
    MomentMatched,
    Stitched,
    calibrate,
    choose_switch,
    denoising_states,
    quantise,
)

COSINE = ef.schedules.Cosine()
PLACES = (0.0, 0.25, 0.5, 0.75, 1.0)


def law() -> ef.oracles.GaussianMixture:
    means = torch.tensor([[1.0, -0.5], [-1.2, 0.8]])
    covariances = torch.tensor([[[0.3, 0.2], [0.2, 0.4]], [[0.5, -0.3], [-0.3, 0.4]]])
    return ef.oracles.GaussianMixture(means, covariances, torch.tensor([0.6, 0.4]))


def trained(steps: int, width: int = 32) -> ef.Denoiser:
    """A perceptron that predicts v of the mixture."""
    torch.manual_seed(0)
    net = ef.networks.MLP(2, width=width, blocks=1)
    model = ef.Denoiser(net, COSINE, "v", shape=(2,), time="angle")
    data = law().sample(20000, seed=1).float()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    for _ in range(steps):
        x0 = data[torch.randint(len(data), (256,), generator=generator)]
        t = torch.rand(256, generator=generator, dtype=torch.float64)
        eps = torch.randn(256, 2, generator=generator)
        alpha, sigma = COSINE.alpha(t)[:, None].float(), COSINE.sigma(t)[:, None].float()
        error = model.v(alpha * x0 + sigma * eps, t) - (alpha * eps - sigma * x0)
        optimizer.zero_grad()
        error.square().mean().backward()
        optimizer.step()
        decay.step()
    net.eval()
    return model


def off(found: Tensor, expected: Tensor) -> float:
    """Mean over samples of the root mean square difference, over the samples' deviation."""
    deviation = (expected - expected.mean(0)).square().mean().sqrt()
    return ((found - expected).flatten(1).square().mean(1).sqrt().mean() / deviation).item()


def calibration(count: int) -> None:
    exact, plan = law().denoiser(COSINE), ef.solvers.get("dpm-solver++2m").plan(COSINE, 20)
    nodes = [t for t in ef.grids.angle(COSINE, 21) if t < 0.97]
    start = ef.noise.normal(7, range(count), 0, (2,), torch.float64)
    for size in (0.05, 0.1, 0.3):
        bias = size * torch.tensor([0.9, -0.45], dtype=torch.float64)

        def net(x: Tensor, t: Tensor, bias: Tensor = bias) -> Tensor:
            return exact.noise(x, t) - bias

        model = ef.Denoiser(net, COSINE, "noise", shape=(2,))
        mended = calibrate(model, law().sample(4000, seed=9), nodes[:-1])
        asked = {"solver": "dpm-solver++2m", "times": nodes, "x_init": start}
        pure, before, after = (
            ef.sample(d, (count, 2), **asked) for d in (exact, model, mended)
        )  # fmt: skip
        print(f"noise off by {size:4}: error {off(before, pure):.4f} -> {off(after, pure):.4f}")
    fresh = law().sample(count, seed=11)
    for steps in (50, 200, 1000):
        model = trained(steps)
        for n, confidence in ((500, 0.0), (500, 2.0), (10000, 0.0), (10000, 2.0)):
            data = law().sample(n, seed=9).float()
            mended = calibrate(model, data, 32, confidence=confidence)
            shown = []
            for d in (model, mended):
                samples = ef.sample(d, (count, 2), plan=plan, seed=3).double()
                mean = (samples.mean(0) - law().mean).norm().item()
                shown.append(f"mean off {mean:.4f}, energy {energy_distance(samples, fresh):.5f}")
            head = f"trained {steps:4} steps, {n:5} data, confidence {confidence}:"
            print(head, " -> ".join(shown), flush=True)


def stitching(count: int) -> None:
    known = ef.Statistics.exact(law().mean, law().covariance)
    for schedule in (ef.schedules.VP(), COSINE, ef.schedules.VE()):
        large = law().denoiser(schedule)
        small = MomentMatched(large, known)
        for name in ("ddim", "dpm-solver++2m"):
            plan = ef.solvers.get(name).plan(schedule, 20)
            times = [*(stage.time for stage in plan.stages), 0.0]
            pure = ef.sample(large, (count, 2), plan=plan)
            errors = []
            for calls in (2, 4, 6, 8, 12, 16, 19):
                model = Stitched(small, large, (times[calls - 1] + times[calls]) / 2)
                error = off(ef.sample(model, (count, 2), plan=plan), pure)
                errors.append(f"{calls / 20:.0%} {error:.4f}")
            choice = choose_switch(small, large, plan, 0.02, costs=(0.1, 1.0))
            print(f"{type(schedule).__name__:7} {name:15}", *errors, f"chosen {choice.share:.0%}")


def history(count: int) -> None:
    known = ef.Statistics.exact(law().mean, law().covariance)
    print("error against the large model's own run: history kept | started anew at the switch")
    for schedule in (ef.schedules.VP(), COSINE, ef.schedules.VE()):
        large = law().denoiser(schedule)
        small = MomentMatched(large, known)
        for name in ("dpm-solver++2m", "dpm-solver++3m", "ipndm3"):
            plan = ef.solvers.get(name).plan(schedule, 12)
            start = ef.noise.normal(0, range(count), 0, (2,), torch.float64)
            start = start * schedule.sigma(1.0)
            pure, shown = plan.run(large, start), []
            for k in (3, 4, 5, 6):
                model = Stitched(small, large, (plan.stages[k - 1].time + plan.stages[k].time) / 2)
                first, second = (
                    ef.solvers.get(name).plan(schedule, times=nodes)
                    for nodes in (plan.times[: k + 1], plan.times[k:])
                )
                anew = second.run(large, first.run(model, start))
                shown.append(f"{off(plan.run(model, start), pure):.4f}|{off(anew, pure):.4f}")
            print(f"{type(schedule).__name__:7} {name:15}", *shown)


def quantisation(count: int) -> None:
    model, plan = trained(1000), ef.solvers.get("ddim").plan(COSINE, 20)
    pure = ef.sample(model, (count, 2), plan=plan, seed=3)
    for bits in (8, 6, 4):
        for power in (None, 2.0, 2.4):
            errors = []
            for mean, deviation in [(0.4, 0.4), *((place, 0.0) for place in PLACES)]:
                states = denoising_states(model, plan, 512, mean, deviation)
                found = quantise(model, states, bits, power=power)
                error = off(ef.sample(found, (count, 2), plan=plan, seed=3), pure)
                errors.append(f"{'all' if deviation else mean} {error:.4f}")
            print(f"{bits} bits, power {power}:", *errors)


def model(count: int) -> None:
    bundled = ef.load("fashion-mnist")
    plan = ef.solvers.get("dpm-solver++2m").plan(bundled.schedule, 10)
    assert bundled.shape is not None
    label = torch.arange(count) % 10
    asked = {"plan": plan, "seed": 9, "label": label}
    pure = ef.sample(bundled, (count, *bundled.shape), **asked)
    gaussian, times = MomentMatched(bundled), [stage.time for stage in plan.stages]
    for calls in (1, 2, 3, 4, 5):
        stitched = Stitched(gaussian, bundled, (times[calls - 1] + times[calls]) / 2)
        error = off(ef.sample(stitched, (count, *bundled.shape), **asked), pure)
        print(f"a Gaussian for the first {calls} of 10 calls: error {error:.4f}", flush=True)
    seen = torch.arange(64) % 10
    rows: list[tuple[str, CalibrationSet, float | None, bool]] = []
    for mean, deviation in [(0.4, 0.4), *((place, 0.0) for place in PLACES)]:
        name = "all times" if deviation else f"t at {mean}"
        states = denoising_states(bundled, plan, 64, mean, deviation, seed=5, label=seen)
        rows.append((name, states, None, True))
    rows += [("least squares", rows[0][1], 2.0, True), ("no attention", rows[0][1], None, False)]
    for name, states, power, attention in rows:
        found = quantise(bundled, states, power=power, attention=attention)
        error = off(ef.sample(found, (count, *bundled.shape), **asked), pure)
        print(f"8 bits, {name}: error {error:.4f}, memory {found.memory_ratio:.3f}", flush=True)


def products() -> None:
    for m, k, n in ((64, 128, 128), (256, 512, 512), (1024, 512, 512)):
        x, w = (torch.randint(-128, 128, shape).to(torch.int8) for shape in ((m, k), (n, k)))
        seconds = []
        for left, right, multiply in (
            (x.float(), w.float().T, torch.mm),
            (x, w.T, torch._int_mm),  # pyright: ignore
        ):
            multiply(left, right)
            began = time.perf_counter()
            for _ in range(10):
                multiply(left, right)
            seconds.append(time.perf_counter() - began)
        print(f"({m}, {k}) x ({k}, {n}): integers take {seconds[1] / seconds[0]:.1f} of float32's")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = {
        "calibrate": calibration,
        "stitch": stitching,
        "history": history,
        "quantise": quantisation,
        "model": model,
    }
    parser.add_argument("part", choices=[*parts, "products"])
    parser.add_argument("--count", type=int, default=0, help="samples drawn")
    options = parser.parse_args()
    if options.part == "products":
        products()
        return
    parts[options.part](options.count or (24 if options.part == "model" else 1000))


if __name__ == "__main__":
    main()
