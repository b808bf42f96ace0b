"""Solutions against closed forms: value, all derivatives, second ones, batches, and failures."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import ebbflow.differentiation as differentiation
from ebbflow.differentiation import NotSolved, fixed_point, linear, minimize, root

torch.manual_seed(0)
A = torch.randn(8, 4, dtype=torch.float64)
Y = torch.randn(8, dtype=torch.float64)
X0 = torch.zeros(4, dtype=torch.float64)
T = torch.tensor(0.7, dtype=torch.float64)
NAMES = ("auto", "cg", "normal-cg", "gmres", "bicgstab", "direct")


def ridge(x: Tensor, t: Tensor, a: Tensor) -> Tensor:
    return 0.5 * (a @ x - Y).square().sum() + 0.5 * t * x.square().sum()


def solved(t: Tensor, a: Tensor = A) -> Tensor:
    # Not linalg.solve: its forward derivative under vmap is wrong in torch 2.13.
    return torch.linalg.inv(a.mT @ a + t * torch.eye(4, dtype=t.dtype)) @ (a.mT @ Y)


@pytest.mark.parametrize("name", NAMES)
def test_ridge_has_the_closed_form_s_derivatives_with_every_linear_solver(name: str) -> None:
    def f(t: Tensor) -> Tensor:
        return minimize(ridge, X0, t, A, linear_solver=name)

    for transform in (jacrev, jacfwd, hessian, lambda h: jacrev(jacfwd(h))):
        assert (transform(f)(T) - transform(solved)(T)).abs().max() < 1e-8


def test_transforms_compose_in_any_order() -> None:
    def f(t: Tensor) -> Tensor:
        return minimize(ridge, X0, t, A)

    ts = torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64)
    for transform in (jacrev, jacfwd, hessian):
        truth = torch.stack([transform(solved)(t) for t in ts])
        assert (vmap(transform(f))(ts) - truth).abs().max() < 1e-8
        across = transform(vmap(f))(ts)
        for _ in range(across.dim() - truth.dim()):
            across = across.diagonal(dim1=0, dim2=-1).movedim(-1, 0)
        if transform is not hessian:
            assert (across - truth).abs().max() < 1e-8
    values, vectors = torch.linalg.eigh(A.mT @ A)
    third = vectors @ (-6 * (values + T) ** -4 * (vectors.mT @ A.mT @ Y))
    for transform in (lambda h: jacfwd(hessian(h)), lambda h: jacrev(jacrev(jacrev(h)))):
        assert (transform(f)(T) - third).abs().max() < 1e-8


@pytest.mark.parametrize("order", [2, 3])
def test_every_nesting_of_forward_and_reverse_agrees(order: int) -> None:
    """torch itself gives zero for jacfwd(jacfwd(f)) where f is an autograd.Function."""

    def f(t: Tensor) -> Tensor:
        start = torch.ones((), dtype=torch.float64)
        return root(lambda x, t: t * x - 1, start, t)

    truth = (-1) ** order * math.factorial(order) * T.item() ** (-order - 1)
    for transforms in itertools.product((jacrev, jacfwd), repeat=order):
        derivative = f
        for transform in transforms:
            derivative = transform(derivative)
        assert derivative(T).item() == pytest.approx(truth, rel=1e-8)


def test_matrices_may_be_batched_inside_other_batches() -> None:
    many = torch.randn(2, 8, 4, dtype=torch.float64)
    ts = torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64)

    def loss(a: Tensor, t: Tensor) -> Tensor:
        return minimize(ridge, X0, t, a).sin().sum()

    def truth(a: Tensor, t: Tensor) -> Tensor:
        return solved(t, a).sin().sum()

    both = [
        vmap(vmap(grad(f), (0, None)), (None, 0))(many, ts)  # pyright: ignore
        for f in (loss, truth)
    ]
    assert (both[0] - both[1]).abs().max() < 1e-8
    assert (hessian(loss)(A, T) - hessian(truth)(A, T)).abs().max() < 1e-8


def test_plain_autograd_twice_and_forward_mode() -> None:
    a, t = A[:, :2].clone().requires_grad_(), T.clone().requires_grad_()

    def f(a: Tensor, t: Tensor) -> Tensor:
        return minimize(ridge, X0[:2], t, a)

    assert torch.autograd.gradcheck(f, (a, t), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (a, t))


def test_tangents_and_cotangents_agree() -> None:
    def f(a: Tensor) -> Tensor:
        return minimize(ridge, X0, T, a)

    v, w = torch.randn_like(A), torch.randn_like(X0)
    forward = (jvp(f, (A,), (v,))[1] * w).sum()
    assert torch.allclose(forward, (vjp(f, A)[1](w)[0] * v).sum(), rtol=1e-9)


WEIGHT = torch.randn(6, 6, dtype=torch.float64) / 6**0.5 * 0.7


def layer(z: Tensor, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    return torch.tanh(parameters["weight"] @ z + x + parameters["bias"])


@pytest.mark.parametrize("solver", ["anderson", "picard", "broyden", "newton-krylov"])
def test_a_fixed_point_network_against_finite_differences(solver: str) -> None:
    parameters = {"weight": WEIGHT, "bias": torch.randn(6, dtype=torch.float64)}
    x, z = torch.randn(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return fixed_point(layer, z, x, parameters, solver=solver).square().sum()

    h = 1e-5
    gradients: Any = grad(loss)(parameters)
    for name, value in parameters.items():
        direction = torch.randn_like(value)
        shifted = [loss({**parameters, name: value + s * direction}) for s in (h, -h)]
        difference = (shifted[0] - shifted[1]) / (2 * h)
        assert (gradients[name] * direction).sum().item() == pytest.approx(
            difference.item(), rel=1e-6, abs=1e-9
        )


def test_anderson_settles_on_maps_with_kinks() -> None:
    """A support vector machine's dual: its past misleads it wherever a multiplier meets zero."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(50, 13, generator=generator, dtype=torch.float64)
    target = torch.eye(3, dtype=torch.float64)[torch.arange(50) % 3]
    step = 1 / torch.linalg.matrix_norm(data, ord=2).item() ** 2

    def descend(dual: Tensor, ridge: Tensor) -> Tensor:
        slope = data @ (data.mT @ (dual - target)) + ridge * target
        return differentiation.projections.simplex(dual - step * slope)

    start = torch.full((50, 3), 1 / 3, dtype=torch.float64)
    solver = differentiation.solvers.Anderson(tolerance=1e-8)
    ridges = torch.logspace(0, 2, 6, dtype=torch.float64)
    statuses: list[Any] = []
    vmap(lambda r: fixed_point(descend, start, r, solver=solver, report=statuses.append))(ridges)
    assert statuses[0].ok, str(statuses[0])


def test_a_batch_of_fixed_points_is_one_at_a_time() -> None:
    parameters = {"weight": WEIGHT, "bias": torch.zeros(6, dtype=torch.float64)}
    xs = torch.randn(5, 6, dtype=torch.float64) * torch.tensor([[0.01], [0.1], [1.0], [3.0], [9.0]])
    z = torch.zeros(6, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return fixed_point(layer, z, x, parameters)

    alone = torch.stack([jacrev(f)(x) for x in xs])
    assert torch.allclose(vmap(jacrev(f))(xs), alone, atol=1e-10)


def test_bisection_and_its_derivative() -> None:
    def f(t: Tensor) -> Tensor:
        solver = differentiation.solvers.Bisection(lower=0.0, upper=3.0)
        return root(lambda x, t: x**3 - t, t, t, solver=solver)

    t = torch.tensor([1.0, 8.0], dtype=torch.float64)
    assert torch.allclose(f(t), t ** (1 / 3), atol=1e-12)
    assert torch.allclose(jacrev(f)(t).diagonal(), t ** (-2 / 3) / 3, atol=1e-12)
    with pytest.raises(ValueError, match="no sign change"):
        f(-t)


def test_decorator_and_function_forms_agree() -> None:
    def condition(x: Tensor, t: Tensor) -> Tensor:
        return grad(ridge)(x, t, A)

    def solve(x0: Tensor, t: Tensor) -> Tensor:
        return solved(t.detach())

    @root(condition, solver=None, linear_solver="cg")
    def decorated(x0: Tensor, t: Tensor) -> Tensor:
        return solve(x0, t)

    forms = (decorated, root(condition, solver=solve), root(condition), minimize(ridge))
    for form in forms:
        arguments = (T, A) if form is forms[-1] else (T,)
        answer = jacrev(lambda t, f=form, a=arguments: f(X0, t, *a[1:]))(T)
        assert torch.allclose(answer, jacrev(solved)(T), atol=1e-8)
    ts = torch.tensor([0.3, 1.0], dtype=torch.float64)
    found = vmap(jacrev(lambda t: decorated(X0, t)))(ts)
    assert torch.allclose(found, vmap(jacrev(solved))(ts), atol=1e-8)


def test_nested_problems_are_differentiated_through_both() -> None:
    def inner(s: Tensor) -> Tensor:
        start = torch.ones((), dtype=torch.float64)
        return root(lambda x, s: x**3 - s, start, s)

    def outer(t: Tensor) -> Tensor:
        start = torch.ones((), dtype=torch.float64)
        return root(lambda y, t: y + inner(y) - t, start, t)

    t = torch.tensor(2.0, dtype=torch.float64)
    assert grad(outer)(t).item() == pytest.approx(1 / (1 + 1 / 3), abs=1e-9)


def test_memory_does_not_grow_with_the_iterations() -> None:
    def saved(damping: float) -> int:
        count = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal count
            count += x.numel()
            return x

        solver = differentiation.solvers.Picard(damping=damping)
        x = torch.randn(6, dtype=torch.float64, requires_grad=True)
        parameters = {"weight": WEIGHT, "bias": torch.zeros(6, dtype=torch.float64)}
        start = torch.zeros(6, dtype=torch.float64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            fixed_point(layer, start, x, parameters, solver=solver)
        return count

    assert saved(1.0) == saved(0.2) < 500


def test_captured_tensors_are_differentiated_like_arguments() -> None:
    def f(t: Tensor) -> Tensor:
        half = A[:] / 2
        return minimize(lambda x: ridge(x, t, 2 * half), X0)

    for transform in (jacrev, jacfwd, hessian, lambda h: vmap(jacfwd(h))):
        t = T if transform in (jacrev, jacfwd, hessian) else T.expand(2)
        assert (transform(f)(t) - transform(solved)(t)).abs().max() < 1e-8
    t = T.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(t).sum(), t)
    assert gradient.item() == pytest.approx(jacrev(solved)(T).sum().item(), abs=1e-8)


def test_a_module_s_parameters_are_seen() -> None:
    module = torch.nn.Linear(6, 6, dtype=torch.float64)
    with torch.no_grad():
        module.weight.mul_(0.5)
    x, z = torch.randn(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    fixed_point(lambda z, x: torch.tanh(module(z) + x), z, x).sum().backward()
    names = {"weight": module.weight.detach(), "bias": module.bias.detach()}
    given = grad(lambda p: fixed_point(layer, z, x, p).sum())(names)
    assert module.weight.grad is not None and module.bias.grad is not None
    assert torch.allclose(module.weight.grad, given["weight"], atol=1e-9)
    assert torch.allclose(module.bias.grad, given["bias"], atol=1e-9)


def test_a_tensor_that_cannot_be_followed_is_refused_rather_than_ignored() -> None:
    def f(t: Tensor) -> Tensor:
        hidden = iter(lambda: t, None)
        return minimize(lambda x: ridge(x, next(hidden), A), X0).sum()

    for use in (lambda: grad(f)(T), lambda: vmap(f)(T.expand(2)), lambda: jacfwd(f)(T)):
        with pytest.raises(ValueError, match="not among its arguments"):
            use()
    with pytest.raises(ValueError, match="not among its arguments"):
        f(T.clone().requires_grad_())
    assert f(T).isfinite()


def early(x0: Tensor, t: Tensor) -> Tensor:
    return x0


ENTRY_POINTS = {
    "root": lambda **o: root(lambda x, t: x**3 - t, X0 + 9, T, **o),
    "fixed_point": lambda **o: fixed_point(lambda x, t: torch.cos(9 * t * x), X0, T, **o),
    "minimize": lambda **o: minimize(lambda x, t: ((x - t) ** 4).sum(), X0 + 9, T, **o),
    "given": lambda **o: root(lambda x, t: x - t, X0, T, solver=early, **o),
}


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_a_solve_that_stops_early_raises_or_is_reported(name: str) -> None:
    call = ENTRY_POINTS[name]
    solvers = differentiation.solvers
    short = {
        "root": solvers.NewtonKrylov(max_iterations=2),
        "fixed_point": solvers.Anderson(max_iterations=2),
        "minimize": solvers.LBFGS(max_iterations=2),
    }
    options = {"solver": short[name]} if name in short else {}
    with pytest.raises(NotSolved, match="not solved"):
        call(**options)
    statuses: list[Any] = []
    call(**options, report=statuses.append)
    assert [status.ok for status in statuses] == [False]


@pytest.mark.parametrize("name", NAMES)
def test_a_singular_system_raises_or_is_reported_backward_and_forward(name: str) -> None:
    # x₁ + x₂ is determined, twice, x₁ - x₂ is not.
    def condition(x: Tensor, t: Tensor) -> Tensor:
        return torch.stack([x.sum() - t.sum(), x.sum() - t.sum() + (t[1] - 2 * t[0])])

    def solve(x0: Tensor, t: Tensor) -> Tensor:
        return t.detach().clone()

    t = torch.tensor([1.0, 2.0], dtype=torch.float64)
    start = torch.zeros(2, dtype=torch.float64)
    statuses: list[Any] = []
    for report in (None, statuses.append):
        made = root(condition, solver=solve, linear_solver=name, report=report)

        def f(t: Tensor, made: Any = made) -> Tensor:
            return made(start, t)[0]

        # Along this tangent the second equation asks for what x₁ + x₂ cannot give.
        for derivative in (grad(f), lambda t, f=f: jvp(f, (t,), (torch.ones_like(t),))[1]):
            if report is None:
                with pytest.raises(NotSolved):
                    derivative(t)
            else:
                statuses.clear()
                derivative(t)
                assert not statuses[-1].ok


def test_linear_solvers_stop_each_problem_by_itself() -> None:
    torch.manual_seed(1)
    matrix = torch.randn(3, 5, 5, dtype=torch.float64)
    matrix = matrix @ matrix.mT + torch.eye(5) * torch.tensor([1e-2, 1.0, 100.0]).view(3, 1, 1)
    b = torch.randn(3, 5, dtype=torch.float64)
    b[1] = 0
    truth = torch.linalg.solve(matrix, b.unsqueeze(-1)).squeeze(-1)
    for name in NAMES:
        result = linear.get(name)(linear.Operator.of(matrix), b)
        assert result.status.ok, str(result.status)
        assert torch.allclose(result.x, truth, atol=1e-6, rtol=1e-6), name


def test_cg_says_that_a_matrix_is_indefinite() -> None:
    matrix = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    b = torch.tensor([1.0, 1.0], dtype=torch.float64)
    assert not linear.CG()(linear.Operator.of(matrix), b).status.ok
    assert linear.GMRES()(linear.Operator.of(matrix), b).status.ok


def test_gmres_stops_at_the_first_krylov_space_that_holds_the_answer() -> None:
    """It knows its residual without solving; each problem of a batch stops as if alone."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(4, 30, 30, generator=generator, dtype=torch.float64) / 30**0.5
    scale = torch.tensor([0.1, 0.2, 0.5, 0.8], dtype=torch.float64)
    matrices = torch.eye(30, dtype=torch.float64) + scale[:, None, None] * noise
    b = torch.randn(4, 30, generator=generator, dtype=torch.float64)
    b[0] = 0.0
    solver = linear.GMRES(tolerance=1e-4)

    def least(matrix: Tensor, b: Tensor) -> int:
        """The dimension of the first space in which the residual is half the tolerance."""
        powers = itertools.accumulate(range(29), lambda v, _: matrix @ v - v, initial=b)
        basis = torch.linalg.qr(torch.stack([v / v.norm() for v in powers], 1))[0]
        for k in range(1, 31):
            image = matrix @ basis[:, :k]
            left = b - image @ torch.linalg.lstsq(image, b.unsqueeze(-1)).solution.squeeze(-1)
            if left.norm() <= 0.5e-4 * b.norm():
                return k
        raise AssertionError("no space is large enough")

    together = solver(linear.Operator.of(matrices), b)
    assert together.status.ok and together.x[0].eq(0.0).all()
    counts = []
    for matrix, one, x in zip(matrices[1:], b[1:], together.x[1:], strict=True):
        alone = solver(linear.Operator.of(matrix), one)
        counts.append(alone.status.iterations)
        assert counts[-1] == least(matrix, one)
        assert (alone.x - torch.linalg.solve(matrix, one)).norm() < 1e-3 * alone.x.norm()
        assert (x - torch.linalg.solve(matrix, one)).norm() < 1e-3 * x.norm()
    assert counts == sorted(counts) and counts[0] < counts[-1] == together.status.iterations


def test_the_error_of_the_derivative_is_that_of_the_solution_and_unrolling_lags() -> None:
    """Ridge by gradient descent: the implicit Jacobian's error falls with the solver's.

    Unrolled, it carries a factor of the number of iterations more.
    """
    lipschitz = torch.linalg.matrix_norm(A.mT @ A, ord=2) + T
    t = T.clone().requires_grad_()
    truth, exact = jacrev(solved)(T), solved(T)
    solution, implicit, unrolled = [], [], []
    x = X0
    marks = (40, 80, 160)
    for k in range(1, marks[-1] + 1):
        x = x - grad(ridge)(x, t, A) / lipschitz
        if k in marks:
            answer = x.detach()
            made = root(grad(ridge), solver=lambda x0, t, a, x=answer: x, tol=1.0)
            solution.append((answer - exact).norm().item())
            implicit.append((jacrev(lambda t, m=made: m(X0, t, A))(T) - truth).norm().item())
            rows = [torch.autograd.grad(x[i], t, retain_graph=True)[0] for i in range(4)]
            unrolled.append((torch.stack(rows) - truth).norm().item())
    ratios = [i / s for i, s in zip(implicit, solution, strict=True)]
    assert max(ratios) < 2 * min(ratios)
    lag = [u / i for u, i in zip(unrolled, implicit, strict=True)]
    assert lag[0] > 2 and lag[0] < lag[1] < lag[2]


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="linear_solver 'lu'"):
        root(lambda x: x, X0, linear_solver="lu")
    with pytest.raises(ValueError, match="solver 'adam'"):
        minimize(lambda x: x.sum(), X0, solver="adam")
    with pytest.raises(TypeError, match="floating-point"):
        root(lambda x: x, torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="as many numbers"):
        root(lambda x: x[:1], X0)
