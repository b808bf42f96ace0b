"""How a packing of soft spheres answers to the diameter of half of them.

Positions minimise the energy of overlapping soft spheres in a periodic box; their derivative in
the diameter solves one system with the energy's Hessian, singular along the translations, by
BiCGSTAB. The figure shows it beside the tangent of unrolled steps from a start next to the minimum.
Efficient and Modular Implicit Differentiation, section 4.4.

    python -m examples.molecular_dynamics --output spheres.png
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import grad, jvp

from ebbflow.differentiation import linear, minimize, solvers
from examples._shared import arguments, plots, save

COUNT, BOX = 16, 3.6


def energy(x: Tensor, diameter: Tensor) -> Tensor:
    """Σ_{i<j} (1 - r/σ)²/2 over r < σ: x (COUNT, 2), the first half of diameter 1."""
    half = COUNT // 2
    sizes = torch.cat([torch.ones(half, dtype=x.dtype), diameter.expand(COUNT - half)])
    i, j = torch.triu_indices(COUNT, COUNT, 1)
    gap = x[i] - x[j]
    gap = gap - BOX * (gap / BOX).round()
    r = (gap.square().sum(-1) + 1e-12).sqrt()
    return 0.5 * torch.relu(1 - 2 * r / (sizes[i] + sizes[j])).square().sum()


def centred(v: Tensor) -> Tensor:
    """Without the translation, which the energy does not see."""
    return v - v.mean(0)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    steps, path = arguments("molecular_dynamics", __doc__, 600, argv)
    generator = torch.Generator().manual_seed(3)
    x0 = BOX * torch.rand(COUNT, 2, generator=generator, dtype=torch.float64)
    diameter, one = (torch.tensor(v, dtype=torch.float64) for v in (1.2, 1.0))
    # A soft mode turns what is left of the gradient into a much larger error of the position.
    made = minimize(
        energy,
        solver=solvers.LBFGS(tolerance=1e-14, max_iterations=5000),
        linear_solver=linear.BiCGSTAB(tolerance=1e-10, max_iterations=2000),
    )
    x, dx = jvp(lambda d: made(x0, d), (diameter,), (one,))
    tangent, h = centred(dx), 1e-4
    difference = centred(made(x, diameter + h) - made(x, diameter - h)) / (2 * h)
    error = ((tangent - difference).norm() / difference.norm()).item()
    print(f"energy {energy(x, diameter).item():.4f}, tangent against differences {error:.1e}")

    # Beside the minimum: from x0 the steps would end in another one, with another tangent.
    y, dy, errors = x + 0.03 * (x0 / BOX - 0.5), torch.zeros_like(x0), []
    v, dv = torch.zeros_like(x0), torch.zeros_like(x0)

    def move(y: Tensor, v: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        v = 0.9 * v - 0.3 * grad(energy)(y, d)
        return y + v, v

    for _ in range(steps):
        (y, v), (dy, dv) = jvp(move, (y, v, diameter), (dy, dv, one))
        errors.append(((centred(dy) - tangent).norm() / tangent.norm()).item())
    print(f"unrolled, {steps} steps: error {errors[-1]:.1e}, greatest on the way {max(errors):.1e}")

    figure, (left, right) = plots().subplots(1, 2, figsize=(10, 4.5))
    wrapped = x % BOX
    for k, place in enumerate(wrapped):
        size = 1.0 if k < COUNT // 2 else diameter.item()
        disc = plots().Circle(place.tolist(), size / 2, alpha=0.3, color=f"C{int(size > 1)}")
        left.add_patch(disc)
    left.quiver(*wrapped.T.tolist(), *tangent.T.tolist(), angles="xy")
    left.set(xlim=(0, BOX), ylim=(0, BOX), aspect="equal", title="d position / d diameter")
    right.semilogy(errors, label="unrolled, with momentum")
    right.axhline(error, color="C1", label="implicit against finite differences")
    right.set(xlabel="steps", ylabel="relative error of the tangent")
    right.legend()
    save(figure, path)
    return {"implicit": error, "unrolled": errors[-1]}


if __name__ == "__main__":
    main()
