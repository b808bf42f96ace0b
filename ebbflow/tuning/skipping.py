"""Blocks of a network that are skipped at some times, and the search for them.

Which blocks a call skips depends on its time alone, so it is a denoiser wrapper; no plan knows.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ebbflow.denoiser import Denoiser, Frozen, Wrapper
from ebbflow.plan import Plan
from ebbflow.schedules import TimeLike, as_time
from ebbflow.tuning.cost import operations
from ebbflow.tuning.evaluation import Objective, Trial, mean_error
from ebbflow.tuning.evolution import STANDARD, Evolution, Variation, evolve
from ebbflow.tuning.references import References

Blocks = Sequence[str] | int
"""Names of modules inside a denoiser, such as "net.middle.1"; or how many blocks its network has,
if it takes `skip=`, the set of those to leave out, as a condition."""

Skips = tuple[frozenset[int], ...]
"""The blocks skipped at each of a number of times, by their place among the blocks."""

NOTHING: frozenset[int] = frozenset()


class _Passed(nn.Module):
    """What stands in for a skipped block."""

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Tensor:
        return x


def without(net: nn.Module, names: Collection[str]) -> nn.Module:
    """The same module with some inner ones replaced by the identity in their first argument.

    Parameters and buffers are shared and nothing of `net` changes. Raises ValueError for a name
    that is not a module inside it.
    """
    inner: dict[str, list[str]] = {}
    for name in names:
        head, _, rest = name.partition(".")
        inner.setdefault(head, []).append(rest)
    if not inner:
        return net
    twin = copy(net)
    twin._modules = dict(net._modules)
    for head, rests in inner.items():
        child = net._modules.get(head)
        if child is None:
            raise ValueError(
                f"{type(net).__name__} has no module {head!r} to skip; it has {list(net._modules)}"
            )
        deeper = [rest for rest in rests if rest]
        twin._modules[head] = _Passed() if "" in rests else without(child, deeper)
    return twin


@torch.no_grad()
def skippable(
    denoiser: Denoiser,
    x: Tensor,
    t: float = 0.5,
    kinds: tuple[type[nn.Module], ...] = (),
    **condition: Any,
) -> tuple[str, ...]:
    """Names of the modules inside a denoiser that may be skipped, in order, none inside another.

    Those are the outermost modules made of modules that one call (x a batch of states) runs, and
    whose output has the shape of their first input. kinds: look at modules of these classes
    only, be they made of others or not.
    """
    calls: dict[str, list[bool]] = {}

    def look(name: str, module: nn.Module, given: tuple[Any, ...], out: Any) -> None:
        same = bool(given) and isinstance(out, Tensor) and isinstance(given[0], Tensor)
        calls.setdefault(name, []).append(same and out.shape == given[0].shape)

    named = {
        name: module
        for name, module in denoiser.named_modules()
        if not isinstance(module, Denoiser | nn.ModuleList | nn.ModuleDict)
        and any(True for _ in module.parameters())
        and (isinstance(module, kinds) if kinds else any(True for _ in module.children()))
    }
    # A network is no block of itself.
    inside = {name: m for name, m in named.items() if not _is_network(denoiser, m)}
    hooks = [m.register_forward_hook(partial(look, name)) for name, m in inside.items()]
    try:
        denoiser(x, t, **condition)
    finally:
        for hook in hooks:
            hook.remove()
    found: list[str] = []
    for name in inside:  # parents come before their children
        seen = calls.get(name)
        if seen and all(seen) and not any(name.startswith(f"{f}.") for f in found):
            found.append(name)
    return tuple(found)


def _is_network(denoiser: Denoiser, module: nn.Module) -> bool:
    return any(isinstance(m, Denoiser) and m.net is module for m in denoiser.modules())


class Skipping(Wrapper):
    """A denoiser that leaves out blocks of its network, others at other times.

    A call uses the entry of `skips` whose time is nearest to its own; times of shape (B,) that call
    for different ones are answered group by group. It is another law than the inner one's, so the
    statistics are dropped unless nothing is skipped.

    Args:
        inner: the denoiser.
        blocks: what may be skipped, see `Blocks`.
        times: decreasing, such as those of a plan's calls.
        skips: for each of them the blocks left out.
        record: what `search_blocks` found, if it made this.
    """

    def __init__(
        self,
        inner: Denoiser,
        blocks: Blocks,
        times: Sequence[float],
        skips: Sequence[Collection[int]],
        record: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(inner)
        self.blocks = blocks if isinstance(blocks, int) else tuple(blocks)
        self.skips: Skips = tuple(frozenset(skip) for skip in skips)
        self.times = tuple(times)
        self.record = dict(record or {})
        count = number(blocks)
        if len(self.times) != len(self.skips) or not self.times:
            raise ValueError(
                f"{len(self.times)} times and {len(self.skips)} sets of blocks: give one set a time"
            )
        wrong = sorted({b for skip in self.skips for b in skip if not 0 <= b < count})
        if wrong:
            raise ValueError(f"blocks {wrong} of {count}: they are counted from 0")
        self._variants = {skip: variant(inner, blocks, skip) for skip in set(self.skips)}
        if not any(self.skips):
            self.statistics = inner.statistics

    def passes(self, t: float) -> int:
        return self.net.passes(t)  # pyright: ignore

    def skipped(self, t: float) -> frozenset[int]:
        """The blocks that a call at time t leaves out."""
        return self.skips[self._nearest(t)]

    def _nearest(self, t: float) -> int:
        return min(range(len(self.times)), key=lambda i: abs(self.times[i] - t))

    def at(self, t: TimeLike, x: Tensor, target: str = "x0") -> Frozen:
        times = as_time(t)
        if times.ndim == 0:
            return self._frozen(times.item(), self.skipped(times.item()), x, target)
        each = [self.skipped(value) for value in times.tolist()]
        groups = {
            skip: [i for i, s in enumerate(each) if s == skip] for skip in dict.fromkeys(each)
        }
        if len(groups) == 1:
            return self._frozen(times, each[0], x, target)
        frozen = {s: self._frozen(times[i], s, x[i], target) for s, i in groups.items()}

        def grouped(x: Tensor, **condition: Any) -> Tensor:
            out = torch.empty_like(x)
            for skip, rows in groups.items():
                own = {
                    name: value[rows]
                    if isinstance(value, Tensor) and value.ndim and len(value) == len(x)
                    else value
                    for name, value in condition.items()
                }
                out[rows] = frozen[skip](x[rows], **own)
            return out

        return grouped

    def _frozen(self, t: TimeLike, skip: frozenset[int], x: Tensor, target: str) -> Frozen:
        denoiser, extra = self._variants[skip]
        return partial(denoiser.at(t, x, target), **extra)


def number(blocks: Blocks) -> int:
    """How many blocks there are."""
    return blocks if isinstance(blocks, int) else len(blocks)


def variant(
    inner: Denoiser, blocks: Blocks, skip: Collection[int]
) -> tuple[Denoiser, dict[str, Any]]:
    """A denoiser without these blocks, and the condition with which it is called."""
    if isinstance(blocks, int):
        return inner, {"skip": frozenset(skip)}
    return cast(Denoiser, without(inner, [blocks[i] for i in sorted(skip)])), {}


@torch.no_grad()
def shares(
    denoiser: Denoiser, blocks: Blocks, x: Tensor, t: float = 0.5, **condition: Any
) -> tuple[float, ...]:
    """The share of one call's multiplications and additions that each block takes, as torch counts
    them (matrix products, convolutions and attention)."""

    def count(skip: Collection[int]) -> int:
        one, extra = variant(denoiser, blocks, skip)
        return operations(lambda: one(x, t, **condition, **extra))

    full = count(())
    if not full:
        raise ValueError("torch counts no operation of this network: give costs yourself")
    return tuple(1 - count((i,)) / full for i in range(number(blocks)))


def search_blocks(
    denoiser: Denoiser,
    plan: Plan,
    blocks: Blocks,
    *,
    references: References,
    share: float = 0.75,
    costs: Sequence[float] | None = None,
    seed: int = 0,
    evaluations: float | None = None,
    budget_seconds: float = 60.0,
    progress: bool = False,
    objective: Objective = mean_error,
    evolution: Evolution = STANDARD,
) -> Skipping:
    """The blocks to skip at each call of a plan, such that all calls cost at most `share` of the
    full ones: AutoDiffusion's second stage, given the times of its first.

    The first candidates skip the same blocks at every call. What is returned is the best on a
    quarter of the references that the search does not see, where it is never worse than the best of
    those.

    Args:
        plan: whose calls are looked at; the references are the full network's.
        blocks: what may be skipped: `skippable(denoiser, x)`, or a number, see `Blocks`.
        share: of the full cost, in (0, 1]. costs: of each block, as a share of one call;
            measured unless given.
        evaluations: denoiser calls a sample, at most, a call counting as one whatever it skips;
            the other arguments are those of `search_times`.

    The result's `record` has what a plan's origin would, and "share", what the calls cost, and
    "error_full", the error of the plan with the full network.
    Raises ValueError when skipping every block costs more than `share`.
    AutoDiffusion: Training-Free Optimization of Time Steps and Architectures for Automated
    Diffusion Model Acceleration, section 3 (architectures).
    """
    if not 0 < share <= 1:
        raise ValueError(f"share {share} must lie in (0, 1]: it is one of the full network's cost")
    trial = Trial(denoiser, references, objective, evaluations, budget_seconds)
    trial.require(plan.nfe, 4)
    chance, calls, count = random.Random(seed), plan.nfe, number(blocks)
    times = [stage.time for stage in plan.stages]
    if costs is None:
        one = references.rows(slice(1))
        costs = shares(denoiser, blocks, one.start, times[0], **one.condition)
    allowed = (1 - share) * calls  # what must be saved
    if calls * sum(costs) < allowed * (1 - 1e-9):
        raise ValueError(
            f"share {share}: without any of the {count} blocks a call still costs "
            f"{1 - sum(costs):.3f} of a full one; give a larger share or more blocks"
        )

    def saved(skips: Skips) -> float:
        return sum(costs[b] for skip in skips for b in skip)

    def fitted(bits: set[tuple[int, int]]) -> Skips:
        """More skipped at random until the cost fits, then what need not be skipped put back."""
        every = [(k, b) for k in range(calls) for b in range(count)]
        chance.shuffle(every)
        total = sum(costs[b] for _, b in bits)
        for bit in every:
            if total < allowed * (1 - 1e-9) and bit not in bits:
                bits.add(bit)
                total += costs[bit[1]]
        for bit in every:
            if bit in bits and total - costs[bit[1]] >= allowed * (1 - 1e-9):
                bits.remove(bit)
                total -= costs[bit[1]]
        return tuple(frozenset(b for k, b in bits if k == call) for call in range(calls))

    def bits(skips: Skips) -> set[tuple[int, int]]:
        return {(k, b) for k, skip in enumerate(skips) for b in skip}

    def draw() -> Skips:
        return fitted({(k, b) for k in range(calls) for b in range(count) if chance.random() < 0.3})

    def mutate(old: Skips) -> Skips:
        flips = {(k, b) for k in range(calls) for b in range(count)}
        flips = {bit for bit in sorted(flips) if chance.random() < evolution.rate}
        return fitted(bits(old) ^ flips)

    def cross(one: Skips, two: Skips) -> Skips:
        return fitted(bits(tuple(chance.choice(pair) for pair in zip(one, two, strict=True))))

    def wrapped(skips: Skips) -> Skipping:
        return Skipping(denoiser, blocks, times, skips)

    def measure(skips: Skips) -> float | None:
        if trial.errors and not trial.left(calls, 5):
            return None
        return trial.error(skips, plan, wrapped(skips))

    same = [tuple([frozenset(s)] * calls) for s in _uniform(costs, 1 - share, chance)]
    with trial.progress("searching blocks", progress):
        history = evolve(measure, same, Variation(draw, mutate, cross), chance, evolution)
        start = min((s for s in same if s in trial.errors), key=trial.errors.__getitem__)
        finalists = dict.fromkeys([start, *trial.best(3)])
        checked = {skips: trial.check(plan, wrapped(skips)) for skips in finalists}
        full = trial.check(plan)
    best = min(checked, key=checked.__getitem__)
    record = trial.record("AutoDiffusion blocks", seed, checked[start], checked[best])
    reached = {"share": 1 - saved(best) / calls, "error_full": full, "history": history}
    return Skipping(denoiser, blocks, times, best, {**record, **reached})


def _uniform(costs: Sequence[float], least: float, chance: random.Random) -> list[set[int]]:
    """Up to 25 sets of blocks that save `least` of a call, none of which could be put back."""
    found: dict[frozenset[int], None] = {}
    order = list(range(len(costs)))
    for _ in range(100):
        chance.shuffle(order)
        chosen: set[int] = set()
        for b in order:
            if sum(costs[i] for i in chosen) < least * (1 - 1e-9):
                chosen.add(b)
        for b in order:
            if b in chosen and sum(costs[i] for i in chosen - {b}) >= least * (1 - 1e-9):
                chosen.remove(b)
        found[frozenset(chosen)] = None
        if len(found) == 25:
            break
    return [set(chosen) for chosen in found]
