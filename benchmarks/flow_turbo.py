"""FlowTurbo's refiner against plain solvers at equal network cost.

    python -m benchmarks.flow_turbo [--network 3000] [--refiner 1500]

A network of 6 blocks of 256 features learns the linear flow of a ring of eight modes, the default
refiner (one block of 64) learns its velocities' change, and every sampler is measured against the
network's own converged flow from the same noise. A pass of the refiner counts as its share of the
network's multiplications. Minutes on one core, most of them for the network.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

import ebbflow as ef
from ebbflow.solvers.straight import straight
from ebbflow.tuning import FlowTurbo, cost_share, train_refiner

SCHEDULE = ef.schedules.Linear()
RIVALS = ("euler", "heun", "flow-turbo", "dpm-solver++2m", "auto")


def ring() -> ef.oracles.GaussianMixture:
    angles = torch.arange(8) * 2 * math.pi / 8
    means = torch.stack([angles.cos(), angles.sin()], 1) * 2
    return ef.oracles.GaussianMixture(means, torch.full((8,), 0.04), torch.ones(8) / 8)


def model(data: Tensor, steps: int) -> ef.Denoiser:
    """A network trained by flow matching."""
    torch.manual_seed(0)
    net = ef.networks.MLP(2, 256, 6)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        x0 = data[torch.randint(len(data), (256,), generator=generator)]
        eps = torch.randn(256, 2, generator=generator)
        t = torch.rand(256, generator=generator)
        x = (1 - t)[:, None] * x0 + t[:, None] * eps
        loss = (net(x, t) - (eps - x0)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return ef.Denoiser(net.eval(), SCHEDULE, "velocity", shape=(2,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", type=int, default=3000)
    parser.add_argument("--refiner", type=int, default=1500)
    options = parser.parse_args()
    data = ring().sample(4096, seed=1).float()
    denoiser = model(data, options.network)
    refiner = train_refiner(denoiser, data, steps=options.refiner)
    share = cost_share(refiner, denoiser, (1, 2))
    print(f"refiner: {share:.2%} of a pass, leaves {refiner.remaining:.1%} of the change")
    x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        exact = ef.solvers.get("flow-turbo", heun=10**6).plan(SCHEDULE, 150).run(denoiser, x)

        def show(cost: float, name: str, end: Tensor) -> None:
            off = (end - exact).norm(dim=1)
            rms, median = (off.square().mean() / 2).sqrt().item(), off.median().item()
            print(f"{cost:6.2f}  {name:16}{rms:8.4f}{median:10.4f}", flush=True)

        print("passes  sampler          RMS error  median")
        for budget in range(2, 9):
            for name in RIVALS:
                plan = ef.solvers.get(name).largest(SCHEDULE, budget)
                if name == "dpm-solver++2m":  # whose own grid starts too near to pure noise
                    plan = ef.solvers.get(name).plan(SCHEDULE, times=straight(SCHEDULE, budget))
                if plan.nfe == budget:
                    show(budget, name, plan.run(denoiser, x))
            for refined in (2, 3, 4, 6):
                walk = FlowTurbo(refiner, 1, budget - 2, refined).plan(SCHEDULE)
                cost = budget + share * walk.solver.refiner_calls(SCHEDULE, walk.times)
                show(cost, walk.solver.word(len(walk.times) - 1), walk.run(denoiser, x))


if __name__ == "__main__":
    main()
