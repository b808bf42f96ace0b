from __future__ import annotations

import math
import random
from itertools import pairwise

import numpy
import pytest
import torch

from ebbflow.differentiation import Brownian
from ebbflow.differentiation.brownian import hats, normals, philox


def test_philox_is_philox():
    """numpy has Philox-4x64 only; these are the published answers of Philox-4x32-10."""

    def run(counter: list[int], key: list[int]) -> list[int]:
        words = philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
        return [int(w) for w in words]

    full = 0xFFFFFFFF
    assert run([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert run([full] * 4, [full] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    counter, key = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
    assert run(counter, key) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_the_path_is_the_same_in_any_order_and_under_any_subdivision():
    times = [i / 7 for i in range(30)] + [0.5, 1.0, 2.0, 3.999, 1e-9, 1000.1]
    path = Brownian(3, (2, 3))
    values = {t: path(t) for t in times}
    shuffled = times * 2
    random.Random(0).shuffle(shuffled)
    other = Brownian(3, (2, 3))
    assert all(torch.equal(other(t), values[t]) for t in shuffled)
    whole = path(0.1, 3.7)
    for n in (2, 5, 64):
        cuts = [0.1 + (3.7 - 0.1) * i / n for i in range(n)] + [3.7]
        parts = sum(Brownian(3, (2, 3))(a, b) for a, b in pairwise(cuts))
        torch.testing.assert_close(torch.as_tensor(parts), whole, rtol=0, atol=1e-13)
    assert torch.equal(path(0.0), torch.zeros(2, 3, dtype=torch.float64))
    assert torch.equal(path(0.7, 0.2), -path(0.2, 0.7))


def test_the_covariance_is_the_lesser_time_exactly():
    """The law is Gaussian, so it is the sum over nodes of products of hats, without sampling."""
    times = [0.3, 1 / 3, 0.3000001, 0.9, 1.0, 1.7, 5.5, 100.25, math.pi]
    for s in times:
        first = dict(zip(*hats(s), strict=True))
        for t in times:
            second = dict(zip(*hats(t), strict=True))
            covariance = sum(w * second.get(node, 0.0) for node, w in first.items())
            assert covariance == pytest.approx(min(s, t), rel=1e-12)
            assert not set(first) & set(hats(-t)[0])


def test_draws_are_standard_normal_and_independent_across_nodes_seeds_and_places():
    z = normals(torch.tensor([1, 2**40]), [(5, 0), (5 + (1 << 33), 0), (5, 1)], 20001)
    z = z.reshape(6, -1).numpy()
    n = z.shape[1]
    assert numpy.abs(z.mean(1)).max() < 4.5 / math.sqrt(n)
    assert numpy.abs(numpy.corrcoef(z) - numpy.eye(6)).max() < 4.5 / math.sqrt(n)
    assert numpy.abs((z**2).mean(1) - 1).max() < 4.5 * math.sqrt(2 / n)
    assert numpy.abs((z**4).mean(1) - 3).max() < 4.5 * math.sqrt(96 / n)
    assert abs(numpy.corrcoef(z[0, ::2][:10000], z[0, 1::2][:10000])[0, 1]) < 0.045


def test_a_samples_path_depends_on_its_own_seed_only():
    batch = Brownian([4, 9, 2], (3, 2))
    for i, seed in enumerate((4, 9, 2)):
        assert torch.equal(batch(0.37)[i], Brownian([seed], (1, 2))(0.37)[0])
        assert torch.equal(batch(0.37)[i], Brownian(seed, (2,))(0.37))
    assert not torch.equal(batch(0.37)[0], batch(0.37)[1])


def test_nothing_is_kept_but_two_values():
    path = Brownian(0, (4,))
    for i in range(100):
        path(i * 0.013)
    assert len(path._last) == 2


def test_arguments_out_of_range():
    with pytest.raises(ValueError, match="seed"):
        Brownian(-1, (2,))
    with pytest.raises(ValueError, match="first axis"):
        Brownian([1, 2], (3,))
    for t in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            Brownian(0)(t)
