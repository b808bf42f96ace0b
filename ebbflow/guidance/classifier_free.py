"""Classifier-free guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ebbflow.denoiser import Denoiser, Frozen, Wrapper
from ebbflow.schedules import TimeLike


class ClassifierFree(Wrapper):
    """`D = D(x | null) + scale (D(x | condition) - D(x | null))`; scale 1 is the condition alone.

    The form is the same in every prediction, because its weights sum to 1. Two passes a call, one
    where the scale is 1 (or 0, the null condition alone). Classifier-Free Diffusion Guidance,
    equation 6, with scale = 1 + w.

    Args:
        inner: the conditional denoiser.
        scale: of the guidance, finite.
        null: what replaces those conditions when there is none, such as `{"label": 10}`; a number
            stands for a tensor filled with it.
    """

    def __init__(self, inner: Denoiser, scale: float, null: Mapping[str, Any]) -> None:
        super().__init__(inner)
        if not abs(scale) < float("inf"):
            raise ValueError(f"the guidance scale must be finite, got {scale}")
        self.scale = float(scale)
        self.null = dict(null)
        if self.scale == 1.0:
            self.statistics = inner.statistics

    def passes(self, t: float) -> int:
        return self.net.passes(t) * (1 if self.scale in (0.0, 1.0) else 2)  # pyright: ignore

    def mean(self, x: Tensor, **condition: Any) -> Tensor | None:
        inner: Any = self.net
        without = inner.mean(x, **{**condition, **self._absent(condition)})
        if without is None:
            return None
        return torch.lerp(without, inner.mean(x, **condition), self.scale)

    def at(self, t: TimeLike, x: Tensor, target: str = "x0") -> Frozen:
        frozen = self.net.at(t, x, target)  # pyright: ignore
        scale = self.scale

        def guided(x: Tensor, **condition: Any) -> Tensor:
            if scale == 1.0:
                return frozen(x, **condition)
            without = frozen(x, **{**condition, **self._absent(condition)})
            if scale == 0.0:
                return without
            return torch.lerp(without, frozen(x, **condition), scale)

        return guided

    def _absent(self, condition: Mapping[str, Any]) -> dict[str, Any]:
        return {name: _like(value, condition.get(name)) for name, value in self.null.items()}


def _like(value: Any, condition: Any) -> Any:
    if isinstance(condition, Tensor) and isinstance(value, int | float):
        return torch.full_like(condition, value)
    return value
