"""AutoDiffusion: times against brute force, blocks against a network that is known to skip them."""

from __future__ import annotations

import dataclasses
import itertools
import random
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

import ebbflow as ef
from ebbflow.benchmark.problems import oracle
from ebbflow.networks.unet import UNet
from ebbflow.tuning import References, references
from ebbflow.tuning.evolution import Evolution, Variation, evolve, search_times, times_variation
from ebbflow.tuning.skipping import Skipping, search_blocks, shares, skippable, without


@pytest.fixture(scope="module")
def problem() -> tuple[ef.Denoiser, References]:
    denoiser = oracle("mixture-2d", "vp").denoiser
    torch.set_default_dtype(torch.float64)
    found = references(denoiser, count=64)
    torch.set_default_dtype(torch.float32)
    return denoiser, found


@pytest.mark.parametrize("steps, points", [(2, 100), (3, 24)])
def test_it_finds_what_brute_force_finds(problem, steps: int, points: int) -> None:
    """Over a discrete grid of times, the least error within 5 %."""
    denoiser, noise = problem
    solver, grid = ef.solvers.get("ddim"), [k / points for k in range(1, points)]
    fit, _ = noise.split(48)

    def error(inner: tuple[float, ...]) -> float:
        plan = solver.plan(denoiser.schedule, times=(1.0, *inner, 0.0))
        return fit.errors(denoiser, plan).mean().item()

    every = [error(inner[::-1]) for inner in itertools.combinations(grid, steps - 1)]
    found = search_times(
        denoiser, steps, references=noise, solver="ddim", grid=grid, budget_seconds=600
    )
    least = found.origin["history"][-1]
    assert min(every) < 0.9 * sorted(every)[len(every) // 4]  # it is no flat landscape
    own = solver.plan(denoiser.schedule, steps)  # its nodes may lie between those of the grid
    assert least <= 1.05 * min(every)
    assert least >= 0.999 * min(every) or error(own.times[1:-1]) < min(every)


def test_the_best_never_rises_and_the_seed_decides(problem) -> None:
    denoiser, noise = problem

    def search(seed: int) -> ef.Plan:
        return search_times(
            denoiser, 4, references=noise, solver="dpm-solver++2m", seed=seed, evaluations=600
        )

    first, again, other = search(0), search(0), search(1)
    history = first.origin["history"]
    assert history == sorted(history, reverse=True)
    assert history[-1] < 0.8 * history[0] or history[-1] < 0.5 * first.origin["error_before"]
    assert first.stages == again.stages
    assert history == again.origin["history"] != other.origin["history"]
    assert first.nfe == 4
    assert first.origin["evaluations"] <= 900
    assert first.origin["solver"] == "dpm-solver++2m"


def test_found_times_serve_noise_that_was_not_searched(problem) -> None:
    denoiser, noise = problem
    torch.set_default_dtype(torch.float64)
    fresh = references(denoiser, count=128, seed=9)
    torch.set_default_dtype(torch.float32)
    for name, ratio in (("dpm-solver++2m", 0.6), ("auto", 0.95)):
        own = ef.solvers.get(name).largest(denoiser.schedule, 5, denoiser.statistics)
        found = search_times(denoiser, 5, references=noise, solver=name, evaluations=800)
        errors = [fresh.errors(denoiser, plan).mean().item() for plan in (found, own)]
        assert errors[0] < ratio * errors[1]


def test_it_is_never_worse_than_the_solver_s_own_nodes(problem) -> None:
    denoiser, noise = problem
    _, held_out = noise.split(48)
    own = ef.solvers.get("auto").largest(denoiser.schedule, 4, denoiser.statistics)
    # A grid without a good time among them.
    found = search_times(
        denoiser, 4, references=noise, grid=[0.97, 0.98, 0.99], evaluations=200, seed=2
    )
    before, after = (held_out.errors(denoiser, plan).mean().item() for plan in (own, found))
    assert after <= before
    assert found.origin["error_before"] == pytest.approx(before, rel=1e-9)
    assert found.origin["error_after"] == pytest.approx(after, rel=1e-9)


def test_elitism_is_what_keeps_the_best() -> None:
    """Maximising ones, with a variation that only ever loses some."""
    chance = random.Random(0)
    lose = Variation(
        lambda: tuple(chance.randint(0, 1) for _ in range(12)),
        lambda a: tuple(bit * chance.randint(0, 1) for bit in a),
        lambda a, b: tuple(x * y for x, y in zip(a, b, strict=True)),
    )
    numbers = Evolution(population=10, epochs=8, mutants=5, crosses=5)
    seen: list[tuple[int, ...]] = []

    def measure(gene: tuple[int, ...]) -> float:
        seen.append(gene)
        return -float(sum(gene))

    history = evolve(measure, [(1,) * 12], lose, chance, numbers)
    assert history == [-12.0] * 8
    assert len(seen) == len(set(seen))  # nothing is measured twice


@pytest.mark.parametrize("near", [0.0, 0.5, 1.0])
def test_variations_keep_to_the_grid_and_the_order(near: float) -> None:
    allowed, chance = [k / 40 for k in range(1, 40)], random.Random(0)
    vary = times_variation(allowed, 5, chance, Evolution(rate=0.3, near=near))
    one, two = (0.9, 0.7, 0.5, 0.3, 0.1), (0.8, 0.6, 0.4, 0.2, 0.05)
    mutants = [vary.mutate(one) for _ in range(400)]
    children = [vary.cross(one, two) for _ in range(400)]
    for times in (*mutants, *children, vary.draw()):
        assert len(times) == 5
        assert set(times) <= set(allowed)
        assert list(times) == sorted(set(times), reverse=True)
    # Each part changes at the rate; where none does, one is made to.
    changed = sum(5 - len(set(one) & set(times)) for times in mutants) / (400 * 5)
    assert abs(changed - (0.3 + 0.7**5 / 5)) < 0.05
    # Every part of a child is that of one parent or of the other, as often.
    assert all(c in pair for t in children for c, pair in zip(t, zip(one, two), strict=True))  # noqa: B905
    share = sum(c in one for times in children for c in times) / (400 * 5)
    assert abs(share - 0.5) < 0.05


def test_conditions_reach_the_samples_that_they_belong_to(float64) -> None:
    """The plan that is found is as good as it says, with the references' own conditions."""
    spread = torch.tensor([1.0, 0.04])

    def net(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """E[x_0 | x_t] of N(label, diag(spread)) on the straight path."""
        mean, s = label[:, None].to(x), t[:, None]
        gain = (1 - s) * spread / ((1 - s) ** 2 * spread + s**2)
        return mean + gain * (x - (1 - s) * mean)

    denoiser = ef.Denoiser(net, ef.schedules.Linear(), shape=(2,))
    labels = torch.tensor([0.0, 3.0, -2.0])
    noise = references(denoiser, count=32, condition={"label": labels}, tolerance=1e-5)
    plan = search_times(denoiser, 4, references=noise, solver="dpm-solver++2m", evaluations=300)
    _, held_out = noise.split(24)
    error = held_out.errors(denoiser, plan).mean().item()
    assert plan.origin["error_after"] == pytest.approx(error, rel=1e-9)
    assert error < 0.9 * plan.origin["error_before"]
    wrong = dataclasses.replace(held_out, condition={"label": labels[torch.arange(8) % 3].flip(0)})
    assert wrong.errors(denoiser, plan).mean() > 5 * error


def test_refusals(problem) -> None:
    denoiser, noise = problem
    with pytest.raises(ValueError, match="genie writes no plan"):
        search_times(denoiser, 4, references=noise, solver="genie")
    with pytest.raises(ValueError, match="a grid of 2 times for 3 inner nodes"):
        search_times(denoiser, 4, references=noise, solver="ddim", grid=[0.3, 0.6])
    with pytest.raises(ValueError, match="does not suffice for 2"):
        search_times(denoiser, 4, references=noise, evaluations=7)
    with pytest.raises(ValueError, match=r"rate 0 must lie in \(0, 1\]"):
        Evolution(rate=0)


# Blocks.


def small_unet() -> ef.Denoiser:
    torch.manual_seed(0)
    net = UNet(channels=1, size=8, width=8, multipliers=(1, 2), blocks=2, attention=(4,), head=8)
    with torch.no_grad():
        for parameter in net.parameters():  # zero-initialised blocks would be skipped for nothing
            parameter.add_(0.15 * torch.randn(parameter.shape))
    return ef.Denoiser(net, ef.schedules.Cosine(), prediction="v", shape=(1, 8, 8)).eval()


@pytest.fixture(scope="module")
def unet() -> ef.Denoiser:
    return small_unet()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_skipping_a_block_is_zeroing_what_it_adds(unet, x) -> None:
    """A residual block whose last layers are zero is the identity."""
    names = skippable(unet, x)
    assert {"net.down.0.0", "net.down.0.1", "net.middle.0", "net.middle.1"} <= set(names)
    weights = {name: value.clone() for name, value in unet.state_dict().items()}
    for name in ("net.down.0.1", "net.middle.0"):
        zeroed = deepcopy(unet)
        stage = zeroed.get_submodule(name)
        last = [stage.residual.conv_out]  # pyright: ignore
        last += [stage.attention.out] if name == "net.middle.0" else []  # pyright: ignore
        with torch.no_grad():
            for layer in last:
                layer.weight.zero_()
                layer.bias.zero_()
            skipped = Skipping(unet, names, (0.5,), [{names.index(name)}])
            assert torch.allclose(skipped(x, 0.3), zeroed(x, 0.3), atol=1e-6)
            assert not torch.allclose(skipped(x, 0.3), unet(x, 0.3), atol=1e-3)
    after = unet.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in weights.items())


@torch.no_grad()
def test_the_nearest_time_decides_also_within_a_batch(unet, x) -> None:
    names = skippable(unet, x)
    skips = [{0}, set(), {0, 2}]
    wrapped = Skipping(unet, names, (0.9, 0.5, 0.1), skips)
    for t, skip in ((1.0, skips[0]), (0.71, skips[0]), (0.69, skips[1]), (0.0001, skips[2])):
        alone = without(unet, [names[i] for i in skip])
        assert torch.equal(wrapped(x, t), alone(x, t))
    times = torch.tensor([0.95, 0.15, 0.5], dtype=torch.float64)
    together = wrapped(x, times)
    for i, t in enumerate(times.tolist()):
        assert torch.allclose(together[i], wrapped(x[i : i + 1], t)[0], atol=1e-5)
    assert Skipping(unet, names, (0.5,), [set()]).statistics is unet.statistics


@torch.no_grad()
def test_blocks_are_skipped_inside_guidance_too(x) -> None:
    """The guided network without a block is the guidance of the network without it."""
    net = UNet(channels=1, size=8, width=8, multipliers=(1, 2), attention=(4,), classes=3, head=8)
    for parameter in net.parameters():
        parameter.add_(0.15 * torch.randn(parameter.shape, generator=torch.manual_seed(0)))
    model = ef.Denoiser(net, ef.schedules.Cosine(), prediction="v", shape=(1, 8, 8)).eval()
    label = torch.tensor([0, 1, 2])
    guided = ef.guidance.ClassifierFree(model, 2.0, {"label": 3})
    names = skippable(guided, x, label=label)
    assert names == tuple(f"net.{name}" for name in skippable(model, x, label=label))
    skipped = Skipping(guided, names, (0.5,), [{1, 2}])
    part = without(model, [names[i].removeprefix("net.") for i in (1, 2)])
    by_hand = ef.guidance.ClassifierFree(part, 2.0, {"label": 3})  # pyright: ignore
    assert torch.equal(skipped(x, 0.4, label=label), by_hand(x, 0.4, label=label))
    assert not torch.allclose(skipped(x, 0.4, label=label), guided(x, 0.4, label=label), atol=1e-3)
    assert skipped.passes(0.4) == 2


def test_modules_share_their_weights_and_names_are_checked(unet, x) -> None:
    names = skippable(unet, x)
    part = without(unet, [names[0]])
    mine = {id(p) for p in unet.parameters()}
    assert {id(p) for p in part.parameters()} < mine
    with pytest.raises(ValueError, match="has no module 'upward' to skip"):
        without(unet, ["net.upward.0"])
    with pytest.raises(ValueError, match=r"blocks \[99\] of"):
        Skipping(unet, names, (0.5,), [{99}])


def test_shares_are_those_of_the_convolutions_and_products(unet, x) -> None:
    """Against a count by hand of one residual block without attention: two 3x3 convolutions."""
    names = skippable(unet, x)
    found = dict(zip(names, shares(unet, names, x), strict=True))
    assert found["net.down.0.0"] == pytest.approx(found["net.down.0.1"])
    two = 2 * (8 * 8 * 9 * 64) + 32 * 16  # channels in, out, taps, pixels; the modulation
    total = two / found["net.down.0.0"]
    # The whole network, layer by layer, at the sizes that hooks see.
    counted = 0
    hooks = []

    def count(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal counted
        weight = module.weight  # pyright: ignore
        counted += weight.numel() * out[0].numel() // out.shape[1]  # pyright: ignore

    for module in unet.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            hooks.append(module.register_forward_hook(count))
    with torch.no_grad():
        unet(x, 0.5)
    for hook in hooks:
        hook.remove()
    assert counted <= total * (1 + 1e-6) < 1.1 * counted  # attention's products come on top


class Branches(nn.Module):
    """x0 from four residual branches; takes `skip=`, or has them as modules."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)) for _ in range(4)
        )

    def forward(self, x: Tensor, t: Tensor, skip: frozenset[int] = frozenset()) -> Tensor:
        h = x
        for i, part in enumerate(self.parts):
            h = h if i in skip else h + (i + 1) / 4 * part(h * (1 + t[:, None]))
        return h.tanh()


@pytest.fixture(scope="module")
def branches() -> tuple[ef.Denoiser, ef.Plan, References]:
    denoiser = ef.Denoiser(Branches(), ef.schedules.Linear(), shape=(2,)).eval()
    plan = ef.solvers.get("ddim").plan(denoiser.schedule, 2)
    return denoiser, plan, references(denoiser, count=64, tolerance=1e-3)


def test_the_blocks_found_are_those_of_brute_force(branches) -> None:
    denoiser, plan, noise = branches
    fit, _ = noise.split(48)
    costs = (0.1, 0.15, 0.2, 0.25)
    sets = [frozenset(s) for n in range(5) for s in itertools.combinations(range(4), n)]
    every = {}
    times = [stage.time for stage in plan.stages]
    for skips in itertools.product(sets, sets):
        if sum(costs[b] for skip in skips for b in skip) >= 2 * (1 - 0.7) - 1e-9:
            wrapped = Skipping(denoiser, 4, times, skips)
            every[skips] = fit.errors(wrapped, plan).mean().item()
    found = search_blocks(
        denoiser, plan, 4, references=noise, share=0.7, costs=costs, budget_seconds=600
    )
    assert found.record["history"][-1] == pytest.approx(min(every.values()), rel=0.05)
    assert min(every.values()) < 0.9 * sorted(every.values())[len(every) // 4]
    assert found.record["share"] <= 0.7 + 1e-9
    history = found.record["history"]
    assert history == sorted(history, reverse=True)
    # Different blocks at different times are better than the same at all.
    same = min(error for (a, b), error in every.items() if a == b)
    assert found.record["history"][-1] < same


def test_skip_as_an_argument_and_as_modules_is_the_same(branches) -> None:
    denoiser, plan, noise = branches
    names = skippable(denoiser, noise.start)
    assert names == tuple(f"net.parts.{i}" for i in range(4))
    asked = Skipping(denoiser, 4, (1.0, 0.4), [{1}, {0, 3}])
    with torch.no_grad():
        end = plan.run(asked, noise.start)

        class Silent(nn.Module):
            """h + c * part(h) with the branch silent, by hand."""

            def __init__(self, skips: dict[float, set[int]]) -> None:
                super().__init__()
                self.net, self.skips = denoiser.net, skips

            def forward(self, x: Tensor, t: Tensor) -> Tensor:
                silent = self.skips[min(self.skips, key=lambda s: abs(s - t[0].item()))]
                h = x
                for i, part in enumerate(self.net.parts):  # pyright: ignore
                    weight = 0.0 if i in silent else (i + 1) / 4
                    h = h + weight * part(h * (1 + t[:, None]))
                return h.tanh()

        byhand = ef.Denoiser(Silent({1.0: {1}, 0.4: {0, 3}}), denoiser.schedule)
        assert torch.allclose(end, plan.run(byhand, noise.start), atol=1e-6)


def test_blocks_of_the_unet_are_searched_and_named_ones_cost_less(unet, x) -> None:
    names = skippable(unet, x)
    plan = ef.solvers.get("ddim").plan(unet.schedule, 3)
    noise = references(unet, count=12, tolerance=1e-2, most=32)
    found = search_blocks(
        unet, plan, names, references=noise, share=0.85, evaluations=90, budget_seconds=600
    )
    assert found.record["error_after"] <= found.record["error_before"]
    assert found.record["share"] <= 0.85
    counted = sum(shares(unet, names, x)[b] for skip in found.skips for b in skip)
    assert 1 - counted / 3 == pytest.approx(found.record["share"])
    with pytest.raises(ValueError, match=r"share 0.05: without any of the"):
        search_blocks(unet, plan, names, references=noise, share=0.05)
