"""Distil handwritten digits to one image a class.

Ten images are learned so that a logistic regression trained on them alone does well on the
digits; the inner training is `minimize`, so that its length does not show in the memory.
Efficient and Modular Implicit Differentiation, section 4.2.

    python -m examples.data_distillation --output digits.png
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ebbflow.differentiation import linear, minimize
from examples._shared import arguments, plots, save


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    from sklearn.datasets import load_digits

    steps, path = arguments("data_distillation", __doc__, 40, argv)
    generator = torch.Generator().manual_seed(0)
    raw = load_digits()
    data, target = torch.tensor(raw.data) / 16, torch.tensor(raw.target)
    order = torch.randperm(len(data), generator=generator)
    train, test = order[:1200], order[1200:]
    labels = torch.arange(10)

    def inner(w: Tensor, images: Tensor) -> Tensor:
        return cross_entropy(images @ w, labels) + 5e-3 * w.square().sum()

    # The Hessian of 640 weights by products alone.
    made = minimize(inner, solver="lbfgs", linear_solver=linear.CG(tolerance=1e-6), tol=1e-7)
    noise = torch.randn(10, 64, generator=generator, dtype=data.dtype)
    images = (0.5 + 0.1 * noise).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=0.05)
    w, start, trace = torch.zeros(64, 10, dtype=data.dtype), time.perf_counter(), []
    for k in range(steps):
        optimizer.zero_grad()
        solved = made(w, images)
        loss = cross_entropy(data[train] @ solved, target[train])
        loss.backward()
        optimizer.step()
        w = solved.detach()
        accuracy = ((data[test] @ w).argmax(1) == target[test]).double().mean().item()
        trace.append((loss.item(), accuracy))
        if k % 5 == 4:
            seconds = time.perf_counter() - start
            figures = f"loss {loss.item():.3f}  test accuracy {accuracy:.3f}"
            print(f"step {k + 1}  {figures}  {seconds:.0f} s")
    figure, axes = plots().subplots(2, 6, figsize=(11, 4))
    flat = axes.flatten()
    for axis, image, label in zip(flat, images.detach(), labels, strict=False):
        axis.imshow(image.view(8, 8), cmap="gray")
        axis.set(title=str(label.item()), xticks=[], yticks=[])
    flat[10].plot([t[0] for t in trace])
    flat[10].set(title="outer loss")
    flat[11].plot([t[1] for t in trace])
    flat[11].set(title="test accuracy")
    save(figure, path)
    (first, _), (last, accuracy) = trace[0], trace[-1]
    return {"first loss": first, "last loss": last, "accuracy": accuracy}


if __name__ == "__main__":
    main()
