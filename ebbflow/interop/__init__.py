"""Other libraries' models in, our plans out; each library is imported when it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ebbflow.interop import diffusers as diffusers
    from ebbflow.interop import networks as networks

_ROOMS = ("diffusers", "networks")


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'ebbflow.interop' has no attribute {name!r}; it has {_ROOMS}")
    return import_module(f"ebbflow.interop.{name}")


def __dir__() -> list[str]:
    return sorted(_ROOMS)
