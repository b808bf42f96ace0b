from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ebbflow.networks import MLP, FourierFeatures, UNet, count_parameters, known

SMALL: dict[str, Any] = {
    "channels": 1,
    "size": 8,
    "width": 8,
    "multipliers": (1, 2),
    "blocks": 1,
    "attention": (4,),
}


def randomised(net: nn.Module) -> nn.Module:
    """Weights without the zeros of the start, so that every input matters."""
    torch.manual_seed(1)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net


def unet(**more: Any) -> nn.Module:
    return randomised(UNet(**{**SMALL, **more}))


@pytest.mark.parametrize(
    ("arguments", "millions"),
    [
        ({"channels": 1, "patch": 2, "width": 16, "multipliers": (1, 2, 3), "classes": 10}, 0.5),
        ({"channels": 1, "patch": 2, "width": 32, "multipliers": (1, 2, 4), "classes": 10}, 3.05),
        ({"width": 128, "multipliers": (1, 2, 2, 2), "blocks": 4, "attention": (16, 8)}, 60.0),
    ],
    ids=["0.5M", "3M", "60M"],
)
def test_configurations_span_half_a_million_to_sixty_million_weights(
    arguments: dict[str, Any], millions: float
) -> None:
    with torch.device("meta"):
        net = UNet(**arguments)
    assert count_parameters(net) == pytest.approx(millions * 1e6, rel=0.12)


def test_the_count_of_a_perceptron_is_the_sum_of_its_matrices() -> None:
    d, w, blocks, classes, features = 3, 16, 2, 4, 64
    conditioning = (features + 1) * w + (w + 1) * w + (classes + 1) * w
    block = 2 * (w + 1) * w + 2 * 2 * w + (w + 1) * 2 * w
    expected = conditioning + (d + 1) * w + blocks * block + 2 * w + (w + 1) * d
    assert count_parameters(MLP(d, w, blocks, classes)) == expected


@pytest.mark.parametrize("net", [MLP(4, 8), UNet(**SMALL), UNet(**SMALL, patch=2, classes=3)])
def test_a_fresh_network_returns_zero_and_only_its_last_layer_has_a_gradient_path(
    net: nn.Module,
) -> None:
    x = torch.randn(2, 4) if isinstance(net, MLP) else torch.randn(2, 1, 8, 8)
    assert torch.equal(net(x, torch.rand(2)), torch.zeros_like(x))
    net(x, torch.rand(2)).sum().backward()
    moved = [p for p in net.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert moved, "nothing would ever learn"


@pytest.mark.parametrize("make", [lambda: MLP(4, 8, classes=3), lambda: UNet(**SMALL, classes=3)])
def test_none_is_the_null_class_and_labels_matter(make: Any) -> None:
    net = randomised(make())
    x = torch.randn(2, 4) if isinstance(net, MLP) else torch.randn(2, 1, 8, 8)
    time = torch.rand(2)
    assert torch.equal(net(x, time), net(x, time, label=torch.tensor([3, 3])))
    outputs = [net(x, time, label=torch.full((2,), label)) for label in range(4)]
    for first in range(4):
        for second in range(first):
            assert not torch.allclose(outputs[first], outputs[second])


def test_weights_of_labels_are_labels_and_can_be_learned() -> None:
    net = unet(classes=3)
    x, time = torch.randn(2, 1, 8, 8), torch.rand(2)
    weights = torch.eye(4)[[2, 3]].requires_grad_()
    found = net(x, time, label=weights)
    torch.testing.assert_close(found, net(x, time, label=torch.tensor([2, 3])))
    (gradient,) = torch.autograd.grad(found.square().sum(), weights)
    assert (gradient != 0).all()
    mixed = net(x, time, label=torch.tensor([[0.5, 0.5, 0.0, 0.0]] * 2))
    assert not torch.allclose(mixed, net(x, time, label=torch.tensor([0, 0])))
    with pytest.raises(ValueError, match=r"\(2, 3\).*floating weights \(2, 4\)"):
        net(x, time, label=torch.zeros(2, 3))


def test_labels_of_another_shape_and_labels_without_classes_are_refused() -> None:
    x, time = torch.randn(2, 1, 8, 8), torch.rand(2)
    with pytest.raises(ValueError, match=r"\(1,\).*\(2,\)"):
        unet(classes=3)(x, time, label=torch.tensor([0]))
    with pytest.raises(ValueError, match="no classes"):
        unet()(x, time, label=torch.tensor([0, 1]))


@pytest.mark.parametrize("patch", [1, 2])
def test_samples_of_a_batch_do_not_meet(patch: int) -> None:
    net = unet(patch=patch, attention=(4,))
    x, time = torch.randn(3, 1, 8, 8), torch.rand(3)
    together = net(x, time)
    for row in range(3):
        alone = net(x[row : row + 1], time[row : row + 1])
        assert torch.allclose(together[row : row + 1], alone, atol=1e-5)


def test_attention_carries_every_pixel_to_every_other() -> None:
    def reach(attention: tuple[int, ...]) -> int:
        net = randomised(
            UNet(1, 32, width=8, multipliers=(1,), blocks=1, attention=attention, embedding=8)
        )
        # The middle attends whatever the levels do; without it only convolutions are left.
        net.middle[0].attention = nn.Identity()  # pyright: ignore
        for norm in (m for m in net.modules() if isinstance(m, nn.GroupNorm)):
            norm.forward = lambda x: x  # group norm, too, sees the whole image
        x = torch.randn(1, 1, 32, 32, requires_grad=True)
        net(x, torch.zeros(1))[0, 0, 0, 0].backward()
        assert x.grad is not None
        return int((x.grad != 0).sum())

    # One 3x3 convolution at the ends, and two in each of four blocks.
    assert reach(()) == (1 + 10) ** 2
    assert reach((32,)) == 32 * 32


def test_patches_return_to_their_place() -> None:
    net = UNet(**{**SMALL, "patch": 2})

    class Shift(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    net.conv_out = Shift()  # pyright: ignore
    net.norm = nn.Identity()  # pyright: ignore
    net.conv_in = nn.Identity()  # pyright: ignore
    net.down, net.middle, net.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
    x = torch.randn(2, 1, 8, 8)
    assert torch.allclose(net(x, torch.zeros(2)), nn.functional.silu(x))


def test_the_time_is_resolved_at_small_and_large_angles() -> None:
    features = FourierFeatures(64, (0.5, 64.0)).double()

    def apart(a: float, b: float) -> float:
        va, vb = features(torch.tensor([a, b], dtype=torch.float64))
        return float((va - vb).norm() / va.norm())

    assert apart(0.005, 0.01) > 0.03
    assert apart(math.pi / 2 - 0.01, math.pi / 2) > 0.06
    assert apart(0.0, math.pi / 2) > 1.0
    # The kernel of features falls smoothly from 1, so that near times are alike.
    distances = [apart(0.5, 0.5 + d) for d in (1e-4, 1e-3, 1e-2, 3e-2)]
    assert distances == sorted(distances)


def test_features_have_unit_mean_square() -> None:
    values = FourierFeatures(32, (1.0, 10.0))(torch.rand(7))
    assert torch.allclose(values.square().mean(1), torch.ones(7), atol=1e-5)


@pytest.mark.parametrize("name", sorted(known()))
def test_a_network_can_be_built_again_from_its_json_config(name: str) -> None:
    kind = known()[name]
    small: dict[str, Any] = {**SMALL, "classes": 2} if name == "UNet" else {"features": 3}
    net: Any = kind(**small)
    again: Any = kind(**json.loads(json.dumps(net.config)))
    again.load_state_dict(net.state_dict())
    assert again.config == net.config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 10, "multipliers": (1, 2, 2)}, "multiple of 4"),
        ({"attention": (5,)}, r"attention at \[5\]"),
        ({"frequencies": (2.0, 1.0)}, "lowest <= highest"),
    ],
)
def test_impossible_shapes_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNet(**{**SMALL, **arguments})


def test_inputs_of_another_shape_are_refused() -> None:
    net = UNet(**SMALL)
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\)"):
        net(torch.randn(2, 3, 8, 8), torch.rand(2))
    with pytest.raises(ValueError, match="7x8"):
        net(torch.randn(2, 1, 8, 7), torch.rand(2))
    with pytest.raises(ValueError, match=r"\(B, 4\)"):
        MLP(4)(torch.randn(2, 5), torch.rand(2))


def test_half_precision_and_other_sizes_pass_through() -> None:
    net = unet(patch=2, classes=2)
    assert net(torch.randn(1, 1, 16, 12), torch.rand(1)).shape == (1, 1, 16, 12)
    half = net.to(torch.bfloat16)
    out = half(torch.randn(1, 1, 8, 8, dtype=torch.bfloat16), torch.rand(1))
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()
