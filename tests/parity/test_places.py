"""The executor's arithmetic gives an element the same bits wherever it lies in memory.

torch computes the body of a tensor with vector instructions and its tail without. Where the two
round differently (a fused multiply-add on one side only), a sample would depend on its neighbours.
Of the operations of the executor none does. `torch.add` with a number other than one as its second
operand and an `alpha` can, so the constant of a row is the number one times `alpha`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import ebbflow as ef
from ebbflow.denoiser import factor
from ebbflow.rows import Stage
from tests.laws.cases import PLAIN

Operation = Callable[[Tensor, Tensor, float], Tensor]


def scaled(x: Tensor, value: float) -> Tensor:
    by = factor(value, x.dtype)
    assert isinstance(by, Tensor)
    return x * by


OPERATIONS: dict[str, Operation] = {
    "scale": lambda x, y, a: scaled(x, a),
    "add": lambda x, y, a: torch.add(x, y, alpha=a),
    "add in place": lambda x, y, a: scaled(x, -1.3 * a).add_(y, alpha=a),
    "add a constant": lambda x, y, a: torch.add(x, 1.0, alpha=a),
}
SIZES = (*range(1, 70), 127, 128, 129, 255, 257, 1000, 4097, 32767, 32769, 70001)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_any_part_alone_has_the_bits_of_the_whole(operation: Operation, dtype: torch.dtype) -> None:
    for size in SIZES:
        x, y = torch.randn(2, size, dtype=dtype)
        a = 0.1 + torch.rand(()).item()
        with threads(2):
            whole = operation(x, y, a)
        for first in {0, 1, 2, 3, 5, 7, 8, 13, size // 2}:
            for count in {1, 3, 8, 17, size - first}:
                part = slice(first, first + count)
                assert torch.equal(operation(x[part], y[part], a), whole[part]), (size, part)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_the_layout_in_memory_does_not_matter(operation: Operation, dtype: torch.dtype) -> None:
    for shape in [(3, 5, 7, 2), (2, 3, 17, 5), (1, 4, 9, 9)]:
        x, y = torch.randn(2, *shape, dtype=dtype)
        expected = operation(x, y, 0.37)
        last = y.contiguous(memory_format=torch.channels_last)
        turned = y.transpose(2, 3).contiguous().transpose(2, 3)
        for other in (last, turned):
            assert torch.equal(operation(x, other, 0.37), expected)
            assert torch.equal(
                operation(x.contiguous(memory_format=torch.channels_last), other, 0.37), expected
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_fast_factor_has_the_bits_of_the_number(dtype: torch.dtype) -> None:
    x = torch.randn(4099, dtype=dtype)
    for value in (0.1, -3.7, 1e-30, 1 + 2**-30, 2**0.5):
        assert torch.equal(scaled(x, value), x * value)


@pytest.mark.parametrize("name", PLAIN)
def test_a_row_alone_has_the_bits_of_the_row_in_a_batch(name: str) -> None:
    """Shapes of odd sizes, so that rows start and end anywhere in a vector."""
    schedule = ef.schedules.VP()
    plan = ef.solvers.get(name).plan(schedule, 5)
    denoiser = ef.Denoiser(lambda x, t: x * 0.3, schedule, "noise")
    for shape in [(1,), (3,), (7,), (1, 5, 3), (3, 11, 7)]:
        x = torch.randn(9, *shape)
        whole = plan.run(denoiser, x, seed=1, first_index=100)
        for first, count in [(0, 1), (1, 1), (4, 3), (8, 1), (2, 7)]:
            part = plan.run(denoiser, x[first : first + count], seed=1, first_index=100 + first)
            assert torch.equal(part, whole[first : first + count])


def test_a_row_with_a_constant_alone_has_the_bits_of_the_row_in_a_batch() -> None:
    schedule = ef.schedules.Linear()
    row = {"x0": 0.7, "D": 0.2, "1": 0.123}
    plan = ef.Plan(schedule, 1.0, (Stage(1.0, {"x0": 1.0, "1": 0.3}, (row,), 0.5),))
    denoiser = ef.Denoiser(lambda x, t: x * 0.3, schedule)
    x = torch.randn(9, 7)
    whole = plan.run(denoiser, x)
    for i in range(9):
        assert torch.equal(plan.run(denoiser, x[i : i + 1])[0], whole[i])
