"""The loops that `benchmarks.overhead` times: bare ones, `Plan.run`, and those of the peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import ebbflow as ef
from tests.parity import peers

METHODS = {"first order": "ddim", "2M": "dpm-solver++2m", "3M": "dpm-solver++3m"}
FLOW = "diffusers FlowMatchEuler"
SCHEDULE = ef.schedules.VP()

Loop = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """A loop to time; `base` names the bare loop that does its multiply-adds."""

    name: str
    method: str
    base: str
    loop: Loop
    reset: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Weights:
    """One step of a bare loop: `D = p x + q F`, `x' = a x + b D + c D_1 + d D_2`."""

    p: float
    q: float
    a: float
    b: float
    c: float
    d: float


def weights(plan: ef.Plan, denoiser: ef.Denoiser) -> list[Weights]:
    """The plan's own coefficients, for the bare loops."""
    steps = []
    for stage in plan.stages:
        p, q, _ = (value.item() for value in denoiser.coefficients(stage.time))
        row = stage.update[0]
        steps.append(Weights(p, q, *(row.get(name, 0.0) for name in ("x0", "D", "x1", "x2"))))
    assert asdict(steps[-1]) == asdict(steps[-1]) | {"a": 0.0, "b": 1.0, "c": 0.0, "d": 0.0}
    return steps


def bare(method: str, prediction: str, start: Tensor, steps: list[Weights]) -> Loop:
    """The loop that one would write by hand for this method."""
    table = [(w.p, w.q, w.a, w.b, w.c, w.d) for w in steps[:-1]]
    p_last, q_last = steps[-1].p, steps[-1].q
    noise = prediction == "noise"

    def last(x: Tensor) -> Tensor:
        return torch.add(x * 0.5 * q_last, x, alpha=p_last) if noise else x * 0.5

    def first_order() -> Tensor:
        x = start
        for p, q, a, b, _, _ in table:
            d = x * 0.5
            if noise:
                d = torch.add(d * q, x, alpha=p)
            x = torch.add(x * a, d, alpha=b)
        return last(x)

    def second_order() -> Tensor:
        x, old = start, start
        for p, q, a, b, c, _ in table:
            d = x * 0.5
            if noise:
                d = torch.add(d * q, x, alpha=p)
            x = torch.add(x * a, d, alpha=b)
            if c:
                x = torch.add(x, old, alpha=c)
            old = d
        return last(x)

    def third_order() -> Tensor:
        x, old, older = start, start, start
        for p, q, a, b, c, e in table:
            d = x * 0.5
            if noise:
                d = torch.add(d * q, x, alpha=p)
            x = torch.add(x * a, d, alpha=b)
            if c:
                x = torch.add(x, old, alpha=c)
            if e:
                x = torch.add(x, older, alpha=e)
            old, older = d, old
        return last(x)

    return {"first order": first_order, "2M": second_order, "3M": third_order}[method]


def flow(start: Tensor, steps: int) -> Loop:
    """The bare loop of `x' = x + h v`, all that FlowMatchEuler computes."""

    def loop() -> Tensor:
        x = start
        for _ in range(steps):
            x = torch.add(x, x * 0.5, alpha=-1 / steps)
        return x

    return loop


def own(prediction: str, start: Tensor, steps: int) -> Iterator[Case]:
    """The bare loops and `Plan.run`, which must agree."""
    denoiser = ef.Denoiser(lambda x, t: x * 0.5, SCHEDULE, prediction)
    for method, name in METHODS.items():
        plan = ef.solvers.get(name).plan(SCHEDULE, steps)
        loop = bare(method, prediction, start, weights(plan, denoiser))

        def run(plan: ef.Plan = plan) -> Tensor:
            return plan.run(denoiser, start)

        torch.testing.assert_close(loop(), run(), rtol=1e-3, atol=1e-5)
        yield Case(f"bare {method}", method, f"bare {method}", loop)
        yield Case(f"ebbflow {name}", method, f"bare {method}", run)
    yield Case("bare flow", "first order", "bare flow", flow(start, steps))


def of_diffusers(prediction: str, start: Tensor, steps: int) -> Iterator[Case]:
    diffusers = peers.diffusers()
    kind = {"x0": "sample", "noise": "epsilon"}[prediction]
    common = {"prediction_type": kind, "num_train_timesteps": 1000}
    schedulers = [
        ("DDIM", "first order", diffusers.DDIMScheduler(clip_sample=False, **common)),
        ("FlowMatchEuler", "first order", diffusers.FlowMatchEulerDiscreteScheduler()),
        ("DPMSolverMultistep 2", "2M", diffusers.DPMSolverMultistepScheduler(**common)),
        (
            "DPMSolverMultistep 3",
            "3M",
            diffusers.DPMSolverMultistepScheduler(solver_order=3, **common),
        ),
    ]
    for name, method, scheduler in schedulers:

        def loop(scheduler=scheduler) -> Tensor:
            x = start
            for t in scheduler.timesteps:
                x = scheduler.step(x * 0.5, t, x, return_dict=False)[0]
            return x

        def reset(scheduler=scheduler) -> None:
            scheduler.set_timesteps(steps)

        title = f"diffusers {name}"
        base = "bare flow" if title == FLOW else f"bare {method}"
        yield Case(title, method, base, loop, reset)


def of_k_diffusion(prediction: str, start: Tensor, steps: int) -> Iterator[Case]:
    sampling = peers.k_diffusion()
    plan = ef.solvers.get("ddim").plan(SCHEDULE, steps)
    times = torch.tensor(plan.times, dtype=torch.float64)
    sigmas = (SCHEDULE.sigma(times) / SCHEDULE.alpha(times)).to(start.dtype)

    def x0(x: Tensor, sigma: Tensor) -> Tensor:
        return x * 0.5

    def noise(x: Tensor, sigma: Tensor) -> Tensor:
        return x - x * 0.5 * sigma.reshape(-1, 1, 1, 1)

    model = {"x0": x0, "noise": noise}[prediction]
    cases: list[tuple[str, str, Loop]] = [
        ("euler", "first order", lambda: sampling.sample_euler(model, start, sigmas, disable=True)),
        ("dpmpp_2m", "2M", lambda: sampling.sample_dpmpp_2m(model, start, sigmas, disable=True)),
        (
            "dpmpp_3m_sde, eta 0",
            "3M",
            lambda: sampling.sample_dpmpp_3m_sde(
                model, start, sigmas, disable=True, eta=0.0, noise_sampler=lambda a, b: None
            ),
        ),
    ]
    for name, method, loop in cases:
        yield Case(f"k-diffusion {name}", method, f"bare {method}", loop)


def of_azula(prediction: str, start: Tensor, steps: int) -> Iterator[Case]:
    azula = peers.azula()

    class Half(azula.denoise.Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = azula.noise.VPSchedule()

        def forward(self, x_t: Tensor, t: Tensor):
            mean = x_t * 0.5
            if prediction == "noise":
                alpha, sigma = self.schedule(t)
                mean = (x_t - sigma * mean) / alpha
            return azula.denoise.DiracPosterior(mean=mean)

    sample, common = azula.sample, {"steps": steps, "silent": True}
    for name, method, sampler in [
        ("DDIM", "first order", sample.DDIMSampler(Half(), **common)),
        ("xEAB 2", "2M", sample.xEABSampler(Half(), order=2, **common)),
        ("xEAB 3", "3M", sample.xEABSampler(Half(), order=3, **common)),
    ]:
        yield Case(f"azula {name}", method, f"bare {method}", lambda s=sampler: s(start))


PEERS = {"diffusers": of_diffusers, "k-diffusion": of_k_diffusion, "azula": of_azula}


def gather(prediction: str, start: Tensor, steps: int) -> tuple[list[Case], dict[str, str]]:
    """The loops, and the peers that are absent with the reason."""
    cases, absent = list(own(prediction, start, steps)), {}
    for peer, make in PEERS.items():
        try:
            cases += make(prediction, start, steps)
        except ImportError as error:
            absent[peer] = str(error)
    return cases, absent
