"""Task-driven dictionary learning: a dictionary whose sparse codes predict well.

Codes are fixed points of a proximal gradient step, one problem a sample; dictionary and classifier
follow the derivative of the classification loss through them. Compared with the dictionary that
reconstructs best and a classifier on its codes, over several splits of a set of tumours.
Efficient and Modular Implicit Differentiation, section 4.3.

    python -m examples.dictionary_learning --output dictionary.png
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as logistic_loss

from ebbflow.differentiation import conditions, fixed_point, proximal
from examples._shared import arguments, plots, save

ATOMS, SPLITS = 3, 3


def reconstruction(code: Tensor, dictionary: Tensor, sample: Tensor) -> Tensor:
    return 0.5 * (code @ dictionary - sample).square().sum()


def sparse_codes(dictionary: Tensor, data: Tensor) -> Tensor:
    step = 0.9 / torch.linalg.matrix_norm(dictionary.detach(), ord=2).square().item()

    def prox(z: Tensor) -> Tensor:
        return proximal.elastic_net(z, 0.3 * step, 0.1 * step)

    condition = conditions.proximal_gradient(reconstruction, prox, step)

    def code(sample: Tensor) -> Tensor:
        start = torch.zeros(ATOMS, dtype=data.dtype)
        return fixed_point(condition, start, (dictionary, sample), tol=1e-9)

    return torch.vmap(code)(data)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    from sklearn.datasets import load_breast_cancer
    from sklearn.preprocessing import scale

    steps, path = arguments("dictionary_learning", __doc__, 40, argv)
    raw = load_breast_cancer()
    data, target = torch.tensor(scale(raw.data)), torch.tensor(raw.target).double()

    def run(split: int, task_driven: bool) -> tuple[list[float], float]:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(split))
        train, test = order[:80], order[80:380]
        atoms = data[order[-ATOMS:]]
        dictionary = (atoms / atoms.norm(dim=1, keepdim=True)).requires_grad_()
        weights = torch.zeros(ATOMS + 1, dtype=data.dtype, requires_grad=True)
        optimizer = torch.optim.Adam([weights, dictionary], lr=0.02)
        trace: list[float] = []
        # First the dictionary that reconstructs; its classifier, or both, by the task's loss.
        for k in range(2 * steps):
            optimizer.zero_grad()
            codes = sparse_codes(dictionary, data[train])
            if k < steps:
                # At their minimum, the codes' own derivative adds nothing.
                fit = reconstruction(codes.detach(), dictionary, data[train]) / len(train)
                (fit + 0.1 * dictionary.square().sum()).backward()
            else:
                codes = codes if task_driven else codes.detach()
                loss = logistic_loss(codes @ weights[:-1] + weights[-1], target[train])
                (loss + 1e-2 * weights.square().sum()).backward()
                trace.append(loss.item())
            optimizer.step()
        with torch.no_grad():
            scores = sparse_codes(dictionary, data[test]) @ weights[:-1] + weights[-1]
        return trace, ((scores > 0).double() == target[test]).double().mean().item()

    figure, axis = plots().subplots(figsize=(6, 4))
    results: dict[str, float] = {}
    for name, task_driven in (("reconstructing", False), ("task-driven", True)):
        runs = [run(split, task_driven) for split in range(SPLITS)]
        accuracy = sum(r[1] for r in runs) / SPLITS
        loss = [sum(values) / SPLITS for values in zip(*(r[0] for r in runs), strict=True)]
        each = ", ".join(f"{r[1]:.3f}" for r in runs)
        print(
            f"{name} dictionary of {ATOMS} atoms: loss {loss[-1]:.3f}, test {accuracy:.3f} ({each})"
        )
        axis.plot(loss, label=f"{name}, test accuracy {accuracy:.3f}")
        results[name], results[f"{name} loss"] = accuracy, loss[-1]
    axis.set(xlabel="step", ylabel="training loss", title="codes by proximal gradient, implicit")
    axis.legend()
    save(figure, path)
    return results


if __name__ == "__main__":
    main()
