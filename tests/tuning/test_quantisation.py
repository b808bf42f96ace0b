"""Quantisation: rounding with known bounds, integers that are stored, states from denoising."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import ebbflow as ef
from ebbflow.guidance import ClassifierFree
from ebbflow.networks.unet import _Attention
from ebbflow.tuning import CalibrationSet, Quantised, denoising_states, quantise
from ebbflow.tuning.quantised_layers import (
    PARTS,
    Observer,
    QuantisedAttention,
    QuantisedLayer,
    Quantiser,
    affine,
    integer_weights,
    rounded,
    search_range,
)
from tests.laws.cases import oracle

COSINE = ef.schedules.Cosine()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


Rounding = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def check_rounding(function: Rounding, low: float, high: float, bits: int) -> None:
    """Within half a step in the range, idempotent, monotone, and zero stays zero."""
    ends = torch.tensor([low, high], dtype=torch.float64)
    scale, zero = affine(*ends, bits)
    x = torch.linspace(min(low, 0.0), max(high, 0.0), 1001, dtype=torch.float64)
    y = function(x, scale, zero, bits)
    assert bool(((x - y).abs() <= scale / 2 * (1 + 1e-9)).all())
    torch.testing.assert_close(function(y, scale, zero, bits), y, rtol=1e-12, atol=1e-12)
    assert bool((y.diff() >= 0).all())
    assert len(y.unique()) <= 2**bits
    assert function(torch.zeros(1), scale, zero, bits).item() == 0
    outside = function(torch.tensor([-1e6, 1e6], dtype=torch.float64), scale, zero, bits)
    assert bool((outside >= y.min() - 1e-9).all() and (outside <= y.max() + 1e-9).all())


@given(low=st.floats(-100, 100), width=st.floats(1e-3, 100), bits=st.integers(2, 16))
def test_rounding_keeps_its_bounds(low: float, width: float, bits: int) -> None:
    check_rounding(rounded, low, low + width, bits)


MUTANTS: dict[str, Rounding] = {
    "one level too many": lambda x, s, z, b: (torch.round(x / s + z).clamp(0, 2**b) - z) * s,
    "a floor": lambda x, s, z, b: (torch.floor(x / s + z).clamp(0, 2**b - 1) - z) * s,
    "no zero point": lambda x, s, z, b: torch.round(x / s).clamp(0, 2**b - 1) * s,
    "a zero that is no code": lambda x, s, z, b: rounded(x, s, z + 0.3, b),
    "a step too long": lambda x, s, z, b: rounded(x, 1.001 * s, z, b),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_rounding_is_seen(mutant: str) -> None:
    with pytest.raises(AssertionError):
        for bits in (3, 8):
            check_rounding(MUTANTS[mutant], -1.3, 2.9, bits)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_is_torch_s_own(bits: int) -> None:
    """To the ties, which fall differently where D is inverted first."""
    x = draw(20000)
    for low, high in ((-1.0, 2.0), (0.0, 3.0), (-2.5, 0.0)):
        scale, zero = affine(torch.tensor(low), torch.tensor(high), bits)
        theirs = torch.fake_quantize_per_tensor_affine(
            x, scale.item(), int(zero.item()), 0, 2**bits - 1
        )
        ours = rounded(x, scale, zero, bits)
        assert ((ours - theirs).abs() > 1e-5).double().mean() < 1e-3
        assert (ours - theirs).abs().max() < 1.01 * scale
    weight = draw(6, 40)
    stored, scales = integer_weights(weight, bits, None)
    top = 2 ** (bits - 1) - 1
    zeros = torch.zeros(6, dtype=torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(weight, scales, zeros, 0, -top, top)
    torch.testing.assert_close(stored * scales[:, None], theirs)


@pytest.mark.parametrize("power", [1.0, 2.0, 2.4])
def test_the_search_is_never_worse_than_the_range(power: float) -> None:
    """And better on tails: 0.6 of the error at 4 bits."""
    for seed, bits in ((1, 4), (2, 8), (3, 3)):
        x = draw(4000, seed=seed).double() ** 3
        low, high = x.min(), x.max()

        def error(share: Tensor, x: Tensor = x, bits: int = bits) -> float:
            found = rounded(x, *affine(share * x.min(), share * x.max(), bits), bits)
            return (x - found).abs().pow(power).mean().item()

        best = search_range(x, low, high, bits, power)
        assert error(best) <= error(torch.ones(()))
        assert (
            error(best)
            <= min(error(torch.tensor(k / 100, dtype=x.dtype)) for k in range(1, 101)) + 1e-12
        )
        if bits == 4 and power < 2:
            assert error(best) < 0.6 * error(torch.ones(()))
    assert search_range(x, low, high, 8, None).item() == 1


@pytest.mark.parametrize("bits", [2, 4, 8, 12])
def test_weights_are_integers_with_a_scale_for_each_output(bits: int) -> None:
    weight = draw(6, 5, 3, 3)
    stored, scale = integer_weights(weight, bits, None)
    assert stored.dtype == (torch.int8 if bits <= 8 else torch.int16)
    assert stored.abs().max() == 2 ** (bits - 1) - 1
    back = stored * scale[:, None, None, None]
    assert bool(((weight - back).abs() <= scale[:, None, None, None] / 2 * (1 + 1e-5)).all())
    louder = weight * torch.tensor([1, 1, 1000, 1, 1, 1])[:, None, None, None]
    assert torch.equal(integer_weights(louder, bits, None)[0], stored)
    searched, finer = integer_weights(weight, bits, 2.0)
    loss = (weight - searched * finer[:, None, None, None]).square().flatten(1).mean(1)
    assert bool((loss <= (weight - back).square().flatten(1).mean(1) * (1 + 1e-6)).all())


LAYERS: dict[str, tuple[nn.Module, Tensor]] = {
    "linear": (nn.Linear(5, 7), draw(9, 5)),
    "linear without bias, three axes": (nn.Linear(5, 7, bias=False), draw(2, 9, 5)),
    "convolution": (nn.Conv2d(4, 6, 3, padding=1), draw(2, 4, 8, 8)),
    "strided, in groups": (nn.Conv2d(4, 6, 3, stride=2, groups=2), draw(2, 4, 9, 9)),
    "one dimension": (nn.Conv1d(4, 6, 3, dilation=2, padding=1), draw(2, 4, 9)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_its_integer_arithmetic(name: str) -> None:
    """`D_x D_w (sum (q_x - z) q_w) + bias`, with the sums in float64, where integers are exact."""
    layer, x = LAYERS[name]
    observer = Observer()
    observer(x)
    quantiser = observer.quantiser(8, 2.0)
    quantised = QuantisedLayer(layer, quantiser, 8, 2.0, False)
    q = torch.round(x.double() / quantiser.scale) + quantiser.zero
    q = q.clamp(0, 255) - quantiser.zero
    whole: nn.Module = deepcopy(layer).double()
    with torch.no_grad():
        whole.weight.copy_(quantised.integers)  # pyright: ignore
        if whole.bias is not None:
            whole.bias.zero_()  # pyright: ignore
        sums = whole(q)
        shape = (-1,) if isinstance(layer, nn.Linear) else (-1, *(1,) * (x.ndim - 2))
        expected = sums * quantised.scale.double().reshape(shape) * quantiser.scale.double()
        if layer.bias is not None:
            expected = expected + layer.bias.double().reshape(shape)  # pyright: ignore
        torch.testing.assert_close(quantised(x).double(), expected, rtol=1e-5, atol=1e-5)
        # The layer itself is near, and the integers, where they are used, give the same.
        assert (quantised(x) - layer(x)).abs().max() < 0.05 * layer(x).abs().max()
        if isinstance(layer, nn.Linear):
            exact = QuantisedLayer(layer, quantiser, 8, 2.0, True)
            assert exact.integer
            torch.testing.assert_close(exact(x), quantised(x), rtol=1e-5, atol=1e-5)


def test_attention_rounds_the_inputs_of_both_products() -> None:
    attention = _Attention(8, 4)
    nn.init.normal_(attention.out.weight)
    x = draw(2, 8, 4, 4)
    watching = QuantisedAttention(attention, {part: Observer() for part in PARTS})
    torch.testing.assert_close(watching(x), attention(x))
    for bits, least, most in ((16, 0.0, 1e-3), (8, 1e-5, 0.05), (3, 0.05, 1.0)):
        rounding = {part: getattr(watching, part).quantiser(bits, None) for part in PARTS}
        found = QuantisedAttention(attention, rounding)(x)
        error = (found - attention(x)).abs().max() / attention(x).abs().max()
        assert least <= error < most
    # Each of the four is used: two levels in its place change the result.
    for part in PARTS:
        parts = {p: getattr(watching, p).quantiser(2 if p == part else 16, None) for p in PARTS}
        found = QuantisedAttention(attention, parts)(x)
        assert (found - attention(x)).abs().max() > 1e-3


@cache
def trained() -> ef.Denoiser:
    """A small perceptron that predicts v of the mixture."""
    torch.manual_seed(0)
    net = ef.networks.MLP(2, width=32, blocks=1)
    model = ef.Denoiser(net, COSINE, "v", shape=(2,), time="angle")
    data = oracle("mixture").sample(4000, seed=1).float()
    generator = torch.Generator().manual_seed(0)
    steps = 300
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    for _ in range(steps):
        x0 = data[torch.randint(len(data), (256,), generator=generator)]
        t = torch.rand(256, generator=generator, dtype=torch.float64)
        eps = torch.randn(256, 2, generator=generator)
        alpha, sigma = COSINE.alpha(t)[:, None].float(), COSINE.sigma(t)[:, None].float()
        error = model.v(alpha * x0 + sigma * eps, t) - (alpha * eps - sigma * x0)
        optimizer.zero_grad()
        error.square().mean().backward()
        optimizer.step()
        schedule.step()
    net.eval()
    return model


def plan(steps: int = 20) -> ef.Plan:
    return ef.solvers.get("ddim").plan(COSINE, steps)


def distance(model: ef.Denoiser, count: int = 400) -> float:
    """Mean distance of samples to those of the float model from the same noise."""
    found, expected = (ef.sample(m, (count, 2), plan=plan(), seed=3) for m in (model, trained()))
    return (found - expected).norm(dim=1).mean().item()


def test_eight_bits_keep_the_samples_and_more_bits_keep_more() -> None:
    states = denoising_states(trained(), plan())
    errors = [distance(quantise(trained(), states, bits)) for bits in (4, 6, 8, 12)]
    assert errors[2] < 0.02
    assert all(fine < 0.6 * coarse for coarse, fine in pairwise(errors))


def test_calibration_over_all_times_beats_one_time() -> None:
    """Whatever the one time is; in the middle the range that is seen is far too narrow."""
    over_all = distance(quantise(trained(), denoising_states(trained(), plan())))
    single = {
        place: distance(quantise(trained(), denoising_states(trained(), plan(), 256, place, 0.0)))
        for place in (0.0, 0.25, 0.5, 0.75, 1.0)
    }
    assert over_all < 0.8 * min(single.values())
    assert over_all < 0.1 * max(single.values())


def test_what_layers_see_changes_with_time() -> None:
    """Which is why one time is not enough: the range of some layer's input by more than half."""
    scales = []
    for place in (0.0, 0.5, 1.0):
        states = denoising_states(trained(), plan(), 256, place, 0.0)
        found = quantise(trained(), states, power=None)
        layers = [found.net.get_submodule(name).input for name in found.layers]  # pyright: ignore
        scales.append(torch.stack([layer.scale for layer in layers]))  # pyright: ignore
    table = torch.stack(scales)
    assert bool((table.amax(0) > 1.5 * table.amin(0)).any())


def test_states_are_those_of_the_run() -> None:
    """Sample i, as the network sees it at its own call."""
    model, count = trained(), 300
    states = denoising_states(model, plan(), count, seed=4)
    nodes = {1.0: ef.noise.normal(4, range(count), 0, (2,))}
    nodes |= {
        point.time: point.state for point in ef.trajectory(model, (count, 2), plan=plan(), seed=4)
    }
    for i in range(count):
        assert torch.equal(states.x[i], nodes[states.t[i].item()][i])


def check_times(make: Callable[[], CalibrationSet]) -> None:
    """A Gaussian of mean 0.4 and deviation 0.4, cut to the run: the shares at both its ends are
    those of its tails, and the median lies 0.4 of the way from the data."""
    times = torch.tensor([stage.time for stage in plan().stages], dtype=torch.float64)
    t = make().t
    place = 1 - torch.tensor([(times == value).nonzero().item() for value in t]) / (len(times) - 1)
    half = 0.5 / (len(times) - 1)
    gaussian = torch.distributions.Normal(0.4, 0.4)
    for found, expected in (
        ((place == 0).double().mean(), gaussian.cdf(torch.tensor(half))),
        ((place == 1).double().mean(), 1 - gaussian.cdf(torch.tensor(1 - half))),
        ((place < 0.4).double().mean(), gaussian.cdf(torch.tensor(0.4 - half))),
    ):
        assert abs(found - expected) < 4 * (expected * (1 - expected) / len(t)) ** 0.5


def test_times_are_normal_and_cut_to_the_run() -> None:
    check_times(lambda: denoising_states(trained(), plan(), 2000))


@pytest.mark.parametrize("mean, deviation", [(0.6, 0.4), (0.4, 0.3), (0.4, 0.0)])
def test_other_times_are_seen(mean: float, deviation: float) -> None:
    with pytest.raises(AssertionError):
        check_times(lambda: denoising_states(trained(), plan(), 2000, mean, deviation))


def test_the_first_and_last_layers_on_the_way_of_the_state_are_left_alone() -> None:
    states = denoising_states(trained(), plan(), 32)
    model = quantise(trained(), states)
    names = ["conditioning.time_in", "conditioning.time_out"]
    names += [f"blocks.0.{name}" for name in ("linear_in", "modulation", "linear_out")]
    assert sorted(model.layers) == sorted(names)
    everything = quantise(trained(), states, skip=())
    assert sorted(everything.layers) == sorted([*names, "linear_in", "linear_out"])
    assert ef.sample(everything, (4, 2), steps=4).shape == (4, 2)
    net = ef.networks.UNet(1, 8, 8, (1, 2), 1, (4,))
    images = ef.Denoiser(net, COSINE, "v", shape=(1, 8, 8), time="angle")
    run = ef.solvers.get("ddim").plan(COSINE, 4)
    found = quantise(images, denoising_states(images, run, 4), integer=True)
    assert not {"conv_in", "conv_out"} & set(found.layers)
    assert found.attention == [n for n, m in net.named_modules() if isinstance(m, _Attention)]
    assert quantise(images, denoising_states(images, run, 4), attention=False).attention == []


def test_the_model_it_came_from_is_untouched() -> None:
    model = trained()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.statistics = ef.Statistics.from_data(draw(50, 2))
    try:
        found = quantise(model, denoising_states(model, plan(), 16))
        assert found.statistics is model.statistics
    finally:
        model.statistics = None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for layer in found.layers:
        assert isinstance(found.net.get_submodule(layer), QuantisedLayer)  # pyright: ignore
        assert isinstance(model.net.get_submodule(layer), nn.Linear)  # pyright: ignore


def test_memory_is_counted_in_bytes() -> None:
    model = quantise(trained(), denoising_states(trained(), plan(), 16))
    weights = sum(
        trained().net.get_submodule(name).weight.numel()  # pyright: ignore
        for name in model.layers
    )
    outputs = sum(
        len(trained().net.get_submodule(name).weight)  # pyright: ignore
        for name in model.layers
    )
    whole = sum(value.numel() for value in trained().net.state_dict().values())  # pyright: ignore
    scales = outputs + 2 * len(model.layers)
    expected = (weights + 4 * (whole - weights) + 4 * scales) / (4 * whole)
    assert model.memory_ratio == pytest.approx(expected, rel=1e-12)


def test_files(tmp_path: Path) -> None:
    model = quantise(trained(), denoising_states(trained(), plan(), 64))
    model.save(tmp_path)
    x = draw(8, 2)
    loaded = Quantised.load(tmp_path)
    assert torch.equal(loaded(x, 0.4), model(x, 0.4))
    assert (loaded.layers, loaded.bits, loaded.memory_ratio) == (
        model.layers, 8, model.memory_ratio
    )  # fmt: skip
    assert (tmp_path / "model.safetensors").stat().st_size < 0.6 * 4 * sum(
        value.numel()
        for value in trained().net.state_dict().values()  # pyright: ignore
    )
    integers = Quantised.load(tmp_path, integer=True)
    torch.testing.assert_close(integers(x, 0.4), model(x, 0.4), rtol=1e-4, atol=1e-4)
    blank = ef.networks.MLP(2, width=32, blocks=1)
    assert torch.equal(Quantised.load(tmp_path, blank)(x, 0.4), model(x, 0.4))
    for other in (ef.networks.MLP(2, width=16, blocks=1), ef.networks.MLP(2, width=32, blocks=2)):
        with pytest.raises(ValueError, match=r"shape|do not fit"):
            Quantised.load(tmp_path, other)
    with pytest.raises(ValueError, match="another network"):
        Quantised.load(tmp_path, nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="ebbflow-quantised"):
        ef.load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change in ({"bits": 40}, {"layers": "all"}, {"format": "other"}, {"more": 1}):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError):
            Quantised.load(tmp_path)


def test_what_cannot_be_quantised_is_refused() -> None:
    states = CalibrationSet(draw(4, 2), torch.full((4,), 0.5))
    with pytest.raises(ValueError, match="network itself"):
        quantise(ClassifierFree(trained(), 2.0, {}), states)
    with pytest.raises(ValueError, match="network itself"):
        quantise(oracle("mixture").denoiser(COSINE), states)
    for bits in (1, 17, 8.0, True):
        with pytest.raises(ValueError, match="2 to 16"):
            quantise(trained(), states, bits)  # pyright: ignore
    with pytest.raises(ValueError, match="no layers"):
        quantise(trained(), states, skip=["linear_inn"])
    with pytest.raises(ValueError, match="times"):
        CalibrationSet(draw(4, 2), torch.zeros(3))
    with pytest.raises(ValueError, match="deviation"):
        denoising_states(trained(), plan(), deviation=-1.0)
    with pytest.raises(ValueError, match="2 to 16"):
        Quantiser(0)


def bundled_errors(count: int, states: int, steps: int, places: tuple[float, ...]) -> list[float]:
    """Of the bundled model: relative error of samples, calibrated over all times and at one."""
    model = ef.load("fashion-mnist")
    run = ef.solvers.get("dpm-solver++2m").plan(model.schedule, steps)
    label = torch.arange(states) % 10
    asked = {"plan": run, "seed": 9, "label": torch.arange(count) % 10}
    pure = ef.sample(model, (count, 1, 32, 32), **asked)
    errors = []
    for mean, deviation in [(0.4, 0.4), *((place, 0.0) for place in places)]:
        seen = denoising_states(model, run, states, mean, deviation, seed=5, label=label)
        found = ef.sample(quantise(model, seen, power=None), (count, 1, 32, 32), **asked)
        errors.append(functional.mse_loss(found, pure).sqrt().item() / pure.std().item())
    return errors


def test_the_bundled_model_in_eight_bits() -> None:
    over_all, clean = bundled_errors(2, 10, 6, (0.0,))
    assert over_all < 0.12
    assert clean > 3 * over_all


@pytest.mark.slow
def test_the_bundled_model_in_eight_bits_at_every_single_time() -> None:
    over_all, *single = bundled_errors(24, 64, 10, (0.0, 0.25, 0.5, 0.75, 1.0))
    assert over_all < 0.08
    assert over_all < 1.1 * min(single)
    assert over_all < 0.5 * min(single[:3])
