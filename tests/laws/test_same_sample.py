"""Law 9: a sample knows its seed and its index, not its neighbours.

Bit for bit: in any batch, any shard, any process.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ebbflow as ef
from ebbflow.networks import MLP, UNet
from tests.laws.cases import PLAIN, SOLVERS, some_statistics

ROOT = Path(__file__).parents[2]
VP = ef.schedules.VP()


def randomised(net: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(3)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return net


def vectors() -> ef.Denoiser:
    net = randomised(MLP(3, width=16, blocks=1, classes=4))
    return ef.Denoiser(net, VP, "edm", (3,), some_statistics(3), "angle", 0.5)


def pictures() -> ef.Denoiser:
    config: dict[str, Any] = {"multipliers": (1, 2), "blocks": 1, "attention": (4,)}
    net = randomised(UNet(channels=1, size=8, width=8, **config))
    return ef.Denoiser(net, VP, "v", shape=(1, 8, 8))


MODELS = {"vectors": (vectors, (3,), 500, 64, 337), "pictures": (pictures, (1, 8, 8), 40, 16, 21)}


def check_alone(model: str, **asked: Any) -> None:
    """Sample `index` alone is sample `index` of `count`, evaluated in chunks of `batch`."""
    make, shape, count, batch, index = MODELS[model]
    denoiser = make()
    every = ef.sample(denoiser, (count, *shape), batch=batch, seed=7, **asked)
    alone = ef.sample(denoiser, (1, *shape), batch=batch, seed=7, first_index=index, **asked)
    assert torch.equal(alone[0], every[index])
    for first, last in pairwise((0, 1, index, count)):
        shard = ef.sample(
            denoiser, (last - first, *shape), batch=batch, seed=7, first_index=first, **asked
        )
        assert torch.equal(shard, every[first:last])
    assert len({row.numpy().tobytes() for row in every}) == count, "samples repeat"


@pytest.mark.parametrize("name", SOLVERS)
def test_a_vector_alone_is_itself_in_any_batch(name: str) -> None:
    check_alone("vectors", solver=name, steps=3)


@pytest.mark.parametrize("name", ["dpm-solver++2m", "ddpm"])
def test_a_picture_alone_is_itself_in_any_batch(name: str) -> None:
    check_alone("pictures", solver=name, steps=2)


def test_conditions_and_starts_follow_the_index() -> None:
    """Tensors whose first axis is the batch are cut by sample, starts too; the rest is shared."""
    denoiser = vectors()
    label = torch.arange(130) % 4
    x = torch.randn(130, 3)
    for first_index in (0, 10):  # the second is not aligned with the chunks
        for batch in (64, 130, 7):
            asked: dict[str, Any] = {"solver": "ddpm", "steps": 3, "batch": batch, "seed": 1}
            asked |= {"times": [0.9, 0.5, 0.1]}
            del asked["steps"]
            every = ef.sample(
                denoiser, (130, 3), x_init=x, label=label, first_index=first_index, **asked
            )
            for i in (0, 1, 63, 64, 129):
                one = ef.sample(
                    denoiser,
                    (1, 3),
                    x_init=x[i : i + 1],
                    label=label[i : i + 1],
                    first_index=first_index + i,
                    **asked,
                )
                assert torch.equal(one[0], every[i]), (first_index, batch, i)


def elementwise(x: Tensor, t: Tensor) -> Tensor:
    """The same arithmetic for every element, wherever it lies in memory."""
    return x / (1 + x * x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PLAIN)
def test_the_executor_does_not_know_the_batch(name: str, dtype: torch.dtype) -> None:
    """Without chunks, odd sizes, any row: vectorised loops and their tails round alike."""
    denoiser = ef.Denoiser(elementwise, VP, "noise")
    plan = SOLVERS[name].plan(VP, times=[0.99, 0.7, 0.4, 0.2, 0.05])
    x = torch.randn(67, 5, 3, dtype=dtype)
    every = plan.run(denoiser, x, seed=9, first_index=100)
    for first, count in ((0, 1), (3, 7), (13, 31), (66, 1), (0, 67)):
        rows = plan.run(denoiser, x[first : first + count].clone(), seed=9, first_index=100 + first)
        assert torch.equal(rows, every[first : first + count])


Noise = Callable[..., Tensor]


def _one_stream(normal: Noise) -> Noise:
    def wrong(seed: int, indices: Sequence[int], step: int, shape: Any, *rest: Any) -> Tensor:
        generator = torch.Generator().manual_seed(seed + step)
        return torch.randn(len(indices), *shape, generator=generator)

    return wrong


def _by_row(normal: Noise) -> Noise:
    return lambda seed, indices, *rest: normal(seed, range(len(indices)), *rest)


def _off_by_one(normal: Noise) -> Noise:
    return lambda seed, indices, *rest: normal(seed, [indices[0], *indices[:-1]], *rest)


@pytest.mark.parametrize("wrong", [_one_stream, _by_row, _off_by_one])
@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_noise_that_knows_its_neighbours_is_seen(
    name: str, wrong: Callable[[Noise], Noise], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ebbflow.noise.normal", wrong(ef.noise.normal))
    with pytest.raises(AssertionError):
        check_alone("vectors", solver=name, steps=2)


def test_chunks_that_start_at_the_request_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that rounds by its place in the batch needs chunks aligned to the index."""

    def by_place(x: Tensor, t: Tensor) -> Tensor:
        return x + 1e-3 * torch.arange(len(x)).reshape(-1, 1)

    monkeypatch.setitem(
        MODELS, "by place", (lambda: ef.Denoiser(by_place, VP, "v"), (3,), 200, 64, 137)
    )
    check_alone("by place", solver="ddim", steps=2)
    aligned = ef.sampling.Job.chunks  # pyright: ignore

    def unaligned(self: Any, batch: int | None) -> Any:
        return [c._replace(first=self.first_index, keep=slice(None)) for c in aligned(self, batch)]

    monkeypatch.setattr("ebbflow.sampling.Job.chunks", unaligned)
    with pytest.raises(AssertionError):
        check_alone("by place", solver="ddim", steps=2)


def test_other_processes_draw_the_same() -> None:
    names = ("dpm-solver++2m", "ddpm")
    program = (
        "import sys, torch, ebbflow as ef\n"
        "from tests.laws.test_same_sample import vectors\n"
        "torch.set_num_threads(1)\n"
        f"for name in {names!r}:\n"
        "    asked = dict(solver=name, steps=3, seed=7, batch=64, first_index=40)\n"
        "    x = ef.sample(vectors(), (5, 3), **asked)\n"
        "    sys.stdout.buffer.write(x.numpy().tobytes())\n"
    )
    out = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True)
    every = (
        ef.sample(vectors(), (100, 3), solver=name, steps=3, seed=7, batch=64) for name in names
    )
    assert out.stdout == b"".join(x[40:45].contiguous().numpy().tobytes() for x in every)
