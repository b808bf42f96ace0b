"""Square roots against Sylvester solves, inverse convolutions against dense ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from ebbflow.differentiation import (
    NotSolved,
    causal_convolution,
    inverse_convolution,
    inverse_sqrtm,
    sqrtm,
)
from ebbflow.differentiation.convolution_inverse import log_determinant, sequential_steps

F64 = torch.float64
# (method, log10 of the condition number, degree, error): the table in sqrtm's docstring.
EXACT = ("newton-schulz", "denman-beavers", "eigen")
CASES = [
    *(
        (method, power, None, bound)
        for method in EXACT
        for power, bound in ((0, 1e-14), (1, 1e-13), (3, 1e-12), (5, 1e-10), (6, 1e-9))
    ),
    ("pade", 0, None, 1e-6),
    ("pade", 1, None, 5e-3),
    ("pade", 2, 60, 1e-8),
    ("pade", 3, 190, 1e-8),
    ("taylor", 0, None, 5e-4),
    ("taylor", 1, None, 5e-2),
]


def spectrum(power: int) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix of condition 10^power, its root, and a direction."""
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(8, 8, dtype=F64))[0]
    values = torch.logspace(-power, 0, 8, dtype=F64)
    g = torch.randn(8, 8, dtype=F64)
    a = (q * values) @ q.T
    return (a + a.T) / 2, (q * values.sqrt()) @ q.T, g + g.T


@pytest.mark.parametrize(("method", "power", "degree", "bound"), CASES)
def test_the_root_and_its_gradient_against_sylvester(
    method: str, power: int, degree: int | None, bound: float
) -> None:
    scipy = pytest.importorskip("scipy.linalg")
    a, root, g = spectrum(power)
    a.requires_grad_()
    found = sqrtm(a, method, degree=degree)
    (gradient,) = torch.autograd.grad(found, a, g)
    truth = torch.tensor(scipy.solve_sylvester(root.numpy(), root.numpy(), g.numpy()))
    assert (found - root).norm() < bound * root.norm()
    assert (gradient - truth).norm() < bound * truth.norm()


@pytest.mark.parametrize("method", ["pade", "taylor"])
def test_a_fixed_budget_refuses_what_is_out_of_its_range(method: str) -> None:
    with pytest.raises(NotSolved, match="ill-conditioned"):
        sqrtm(spectrum(4)[0], method)
    with pytest.raises(NotSolved):
        sqrtm(-torch.eye(3, dtype=F64), method)


@pytest.mark.parametrize("method", EXACT)
def test_what_has_no_root_raises_or_is_reported(method: str) -> None:
    bad = torch.diag(torch.tensor([1.0, -0.5], dtype=F64))
    with pytest.raises(NotSolved):
        sqrtm(bad, method)
    statuses = []
    sqrtm(bad, method, report=statuses.append)
    assert not statuses[0].ok


def test_roots_are_differentiable_to_second_order_and_in_batches() -> None:
    torch.manual_seed(1)
    a = torch.randn(2, 3, 3, dtype=F64)
    a = a @ a.mT + 0.5 * torch.eye(3, dtype=F64)
    for f in (sqrtm, inverse_sqrtm):
        assert gradcheck(f, (a.clone().requires_grad_(),), check_forward_ad=True)
        assert gradgradcheck(f, (a[0].clone().requires_grad_(),))

        def loss(a: Tensor, f: object = f) -> Tensor:
            return f(a).sin().sum()  # pyright: ignore

        assert torch.allclose(vmap(hessian(loss))(a)[0], jacrev(grad(loss))(a[0]), atol=1e-10)
        twice = jacfwd(jacfwd(loss))(a[0])
        assert torch.allclose(twice, jacrev(grad(loss))(a[0]), atol=1e-10)
    product = inverse_sqrtm(a) @ a @ inverse_sqrtm(a)
    assert torch.allclose(product, torch.eye(3, dtype=F64).expand_as(product))


def test_repeated_eigenvalues_have_a_gradient() -> None:
    eye = torch.eye(4, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(sqrtm(eye).sum(), eye)
    assert torch.allclose(gradient, torch.full((4, 4), 0.5, dtype=F64))


def kernel() -> Tensor:
    torch.manual_seed(2)
    weight = torch.randn(2, 2, 3, 2, dtype=F64) * 0.2
    weight[:, :, -1, -1] = torch.tensor([[1.0, 0.0], [0.4, 1.0]])
    return weight


def test_the_inverse_convolution_is_a_dense_triangular_solve() -> None:
    weight, x = kernel(), torch.randn(2, 2, 5, 4, dtype=F64)
    dense = jacrev(lambda y: causal_convolution(y[None], weight).flatten())(torch.zeros_like(x[0]))
    dense = dense.reshape(40, 40)
    solved = torch.linalg.solve(dense, x.flatten(1).T).T.view_as(x)
    assert torch.allclose(inverse_convolution(x, weight), solved, atol=1e-12)
    found = log_determinant(weight, 5, 4)
    assert found.item() == pytest.approx(-torch.linalg.slogdet(dense)[1].item(), abs=1e-10)


def test_the_inverse_convolution_s_derivatives() -> None:
    weight, x = kernel().requires_grad_(), torch.randn(1, 2, 3, 3, dtype=F64, requires_grad=True)
    assert gradcheck(inverse_convolution, (x, weight), check_forward_ad=True)
    assert gradgradcheck(inverse_convolution, (x, weight))
    w, z = weight.detach(), x.detach()
    many = torch.randn(3, 1, 2, 3, 3, dtype=F64)
    alone = torch.stack([inverse_convolution(m, w) for m in many])
    assert torch.allclose(vmap(lambda x: inverse_convolution(x, w))(many), alone)
    both = jacfwd(inverse_convolution, 1)(z, w), jacrev(inverse_convolution, 1)(z, w)
    assert torch.allclose(*both, atol=1e-12)


def test_sequential_steps_grow_like_the_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, forward and backward: one contraction with W_0 a step."""
    calls = 0
    einsum = torch.einsum

    def counted(*arguments: object) -> Tensor:
        nonlocal calls
        calls += 1
        return einsum(*arguments)

    monkeypatch.setattr(torch, "einsum", counted)
    for n in (4, 8, 16):
        x = torch.randn(1, 2, n, n, dtype=F64, requires_grad=True)
        calls = 0
        y = inverse_convolution(x, kernel())
        assert calls == 2 * sequential_steps(n, n) == 2 * (2 * n - 1)
        y.sum().backward()
        assert calls == 4 * (2 * n - 1)


def test_a_singular_or_exploding_convolution_raises() -> None:
    weight = kernel()
    weight[:, :, -1, -1] = 0
    with pytest.raises(NotSolved, match="singular"):
        inverse_convolution(torch.randn(1, 2, 3, 3, dtype=F64), weight)
    with pytest.raises(NotSolved, match="recursion grows"):
        inverse_convolution(
            torch.randn(1, 2, 40, 40, dtype=F64), 9 * torch.randn(2, 2, 3, 3).double()
        )
