from __future__ import annotations

from dataclasses import replace

import pytest

from ebbflow.differentiation import tableaus
from ebbflow.differentiation.tableaus import Tableau
from ebbflow.differentiation.trees import density, nodes, trees

ALL = [value for value in vars(tableaus).values() if isinstance(value, Tableau)]


def test_rooted_trees_are_as_many_as_counted_by_cayley():
    assert [len(trees(n)) for n in range(1, 8)] == [1, 1, 2, 4, 9, 20, 48]
    assert {density(tree) for tree in trees(4)} == {4, 8, 12, 24}
    assert all(nodes(tree) == 5 for tree in trees(5))


@pytest.mark.parametrize("tableau", ALL, ids=lambda t: t.name)
def test_every_coefficient_is_checked(tableau: Tableau):
    """A coefficient that is off by 1e-3 is refused, wherever it is and however it is balanced."""

    def off(values: tuple[float, ...], i: int, by: float = 1e-3) -> tuple[float, ...]:
        return tuple(v + by if j == i else v for j, v in enumerate(values))

    mutants = []
    for i in range(tableau.stages):
        mutants.append({"b": off(tableau.b, i), "interpolant": ()})
        if i:
            mutants.append({"c": off(tableau.c, i)})
        if tableau.embedded and tableau.embedded_order:
            mutants.append({"embedded": off(tableau.embedded, i)})
        for j in range(len(tableau.a[i])):
            row = off(tableau.a[i], j)
            mutants.append({"a": (*tableau.a[:i], row, *tableau.a[i + 1 :])})
            # A wrong abscissa: the row and its sum move together.
            if tableau.order > 1 and (tableau.b[i] or tableau.first_same_as_last):
                moved = {"a": mutants[-1]["a"], "c": off(tableau.c, i)}
                if i < tableau.stages - 1 or tableau.b[i]:
                    mutants.append(moved)
    for i, row in enumerate(tableau.interpolant):
        changed = (*tableau.interpolant[:i], off(row, 1), *tableau.interpolant[i + 1 :])
        mutants.append({"interpolant": changed})
    for mutant in mutants:
        with pytest.raises(ValueError, match=tableau.name):
            replace(tableau, **mutant)


@pytest.mark.parametrize("tableau", ALL, ids=lambda t: t.name)
def test_the_stated_order_is_not_less_than_the_true_one(tableau: Tableau):
    with pytest.raises(ValueError, match=tableau.name):
        replace(tableau, order=tableau.order + 1)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="one entry a stage"):
        Tableau("short", 1, ((),), (1.0,), (0.0, 1.0))
    with pytest.raises(ValueError, match="at most 1"):
        Tableau("wide", 1, ((0.0, 0.0),), (1.0,), (0.0,))
