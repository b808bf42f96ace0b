"""Rooted trees: one order condition of a Runge–Kutta method each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from itertools import combinations_with_replacement

Tree = tuple  # A rooted tree is the tuple of its subtrees; the single node is ().
Rows = tuple[tuple[float, ...], ...]


@cache
def trees(order: int) -> tuple[Tree, ...]:
    """Every rooted tree with `order` nodes: 1, 1, 2, 4, 9, … of them."""
    return tuple(tuple(forest) for forest in _forests(order - 1, order - 1))


def _forests(nodes: int, largest: int) -> Iterator[list[Tree]]:
    if nodes == 0:
        yield []
        return
    for size in range(min(nodes, largest), 0, -1):
        for count in range(nodes // size, 0, -1):
            for same in combinations_with_replacement(trees(size), count):
                for rest in _forests(nodes - size * count, size - 1):
                    yield [*same, *rest]


def nodes(tree: Tree) -> int:
    """The number of nodes of a tree, the order of its condition."""
    return 1 + sum(nodes(child) for child in tree)


def density(tree: Tree) -> int:
    """γ(tree): the number of nodes times the densities of the subtrees."""
    return nodes(tree) * math.prod(density(child) for child in tree)


def weights(tree: Tree, a: Rows) -> list[float]:
    """φ(tree): for each stage, the product over the subtrees of `A φ(subtree)`."""
    out = [1.0] * len(a)
    for child in tree:
        inner = weights(child, a)
        for i, row in enumerate(a):
            out[i] *= sum(x * y for x, y in zip(row, inner, strict=False))
    return out


def up_to(order: int) -> Iterator[Tree]:
    """Every rooted tree with at most `order` nodes."""
    for size in range(1, order + 1):
        yield from trees(size)
