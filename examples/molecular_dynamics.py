"""How a packing of soft spheres answers to the diameter of half of them.

Positions minimise the energy of overlapping soft spheres in a periodic box; their derivative in
the diameter solves one system with the energy's Hessian, singular along the translations, by
BiCGSTAB. The figure shows it beside the tangent of the unrolled steps, which gets there later.
Efficient and Modular Implicit Differentiation, section 4.4.

    python -m examples.molecular_dynamics --output spheres.png
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import grad, jvp

from ebbflow.differentiation import linear, minimize, solvers
from examples._shared import output, save

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


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path = output("molecular_dynamics", __doc__ or "")
    torch.manual_seed(3)
    torch.set_default_dtype(torch.float64)
    x0, diameter, one = BOX * torch.rand(COUNT, 2), torch.tensor(1.2), torch.ones(())
    made = minimize(
        energy,
        solver=solvers.LBFGS(tolerance=1e-10, max_iterations=5000),
        linear_solver=linear.BiCGSTAB(tolerance=1e-8, max_iterations=2000),
    )
    x, dx = jvp(lambda d: made(x0, d), (diameter,), (one,))
    h = 1e-5
    ahead, behind = (made(x, diameter + s) for s in (h, -h))
    difference = (ahead - behind) / (2 * h)
    aligned = [v - v.mean(0) for v in (dx, difference)]
    error = ((aligned[0] - aligned[1]).norm() / aligned[1].norm()).item()
    print(f"energy {energy(x, diameter).item():.4f}, tangent against differences {error:.1e}")

    y, dy, sizes = x0, torch.zeros_like(x0), []
    v, dv = torch.zeros_like(x0), torch.zeros_like(x0)

    def move(y: Tensor, v: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        v = 0.9 * v - 0.3 * grad(energy)(y, d)
        return y + v, v

    for _ in range(600):
        (y, v), (dy, dv) = jvp(move, (y, v, diameter), (dy, dv, one))
        sizes.append((dy - dy.mean(0)).norm().item())
    print(f"length of the tangent: implicit {aligned[0].norm():.3f}, unrolled {sizes[-1]:.3f}")

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5))
    wrapped = x % BOX
    for k, place in enumerate(wrapped):
        size = 1.0 if k < COUNT // 2 else diameter.item()
        left.add_patch(plt.Circle(place.tolist(), size / 2, alpha=0.3, color=f"C{int(size > 1)}"))
    left.quiver(*wrapped.T.tolist(), *aligned[0].T.tolist(), angles="xy")
    left.set(xlim=(0, BOX), ylim=(0, BOX), aspect="equal", title="d position / d diameter")
    right.semilogy(sizes, label="unrolled, with momentum")
    right.axhline(aligned[1].norm().item(), color="C1", label="implicit = finite differences")
    right.set(xlabel="steps", ylabel="length of the tangent")
    right.legend()
    save(figure, path)


if __name__ == "__main__":
    main()
