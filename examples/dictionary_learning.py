"""Task-driven dictionary learning: a dictionary whose sparse codes predict well.

Codes are the fixed point of a proximal gradient step on a lasso (elastic net); dictionary and
classifier follow the derivative of the classification loss through it. Compared with the codes
of a dictionary of data alone.
Efficient and Modular Implicit Differentiation, section 4.3.

    python -m examples.dictionary_learning --output dictionary.png
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as logistic_loss

from ebbflow.differentiation import conditions, fixed_point, linear, proximal
from examples._shared import output, save

ATOMS = 10


def objective(codes: Tensor, dictionary: Tensor, data: Tensor) -> Tensor:
    return 0.5 * (codes @ dictionary - data).square().sum()


def sparse_codes(dictionary: Tensor, data: Tensor) -> Tensor:
    step = 0.9 / torch.linalg.matrix_norm(dictionary.detach(), ord=2).square().item()

    def prox(z: Tensor) -> Tensor:
        return proximal.elastic_net(z, 0.3 * step, 0.1 * step)

    condition = conditions.proximal_gradient(objective, prox, step)
    start = torch.zeros(len(data), ATOMS)
    return fixed_point(
        condition, start, (dictionary, data), tol=1e-7, linear_solver=linear.GMRES(tolerance=1e-6)
    )


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from sklearn.datasets import load_breast_cancer
    from sklearn.preprocessing import scale

    path = output("dictionary_learning", __doc__ or "")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    raw = load_breast_cancer()
    data, target = torch.tensor(scale(raw.data)), torch.tensor(raw.target).double()
    order = torch.randperm(len(data))
    train, test = order[:100], order[100:300]
    atoms = data[order[300 : 300 + ATOMS]]
    atoms = atoms / atoms.norm(dim=1, keepdim=True)

    def run(learn_dictionary: bool) -> list[tuple[float, float]]:
        dictionary = atoms.clone().requires_grad_(learn_dictionary)
        weights = torch.zeros(ATOMS + 1, requires_grad=True)
        learned = [weights, dictionary] if learn_dictionary else [weights]
        optimizer = torch.optim.Adam(learned, lr=0.05)
        trace: list[tuple[float, float]] = []
        fixed = None if learn_dictionary else sparse_codes(dictionary, data[train])
        for _ in range(40):
            optimizer.zero_grad()
            codes = sparse_codes(dictionary, data[train]) if fixed is None else fixed
            loss = logistic_loss(codes @ weights[:-1] + weights[-1], target[train])
            loss = loss + 1e-3 * weights.square().sum()
            loss.backward()
            optimizer.step()
            trace.append((loss.item(), 0.0))
        codes = sparse_codes(dictionary.detach(), data[test])
        right = ((codes @ weights[:-1] + weights[-1] > 0).double() == target[test]).double().mean()
        print(f"dictionary learned: {learn_dictionary}  loss {trace[-1][0]:.3f}  test {right:.3f}")
        return trace

    figure, axis = plt.subplots(figsize=(6, 4))
    for learn in (False, True):
        name = "task-driven dictionary" if learn else "fixed dictionary"
        axis.plot([t[0] for t in run(learn)], label=name)
    axis.set(xlabel="step", ylabel="training loss", title="codes by proximal gradient, implicit")
    axis.legend()
    save(figure, path)


if __name__ == "__main__":
    main()
